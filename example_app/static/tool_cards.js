// What a model calls, a card each: its arguments as they come in, where it stands, what came of it. A call that waits for
// the user has a question in its card. Every tab and device draws it; whoever answers first counts.
import { nameOf } from "./assistants.js";
import { $, announce, composes, copyOf } from "./dom.js";

/**
 * `approve`, `deny` and `submitToolOutputs` are the helper's, `threadId()` says which thread is open, and
 * `focusComposer()` is where the focus goes once nothing is asked any more.
 */
export function createToolCards({ approve, deny, submitToolOutputs, threadId, focusComposer }) {
  const known = new WeakMap();   // card -> {call, entry, form, answering}: what it shows
  const asked = [];              // what is to be announced

  function fill(card, call, entry) {
    const shown = known.get(card) ?? {}, part = (selector) => card.querySelector(selector);
    known.set(card, Object.assign(shown, { call, entry }));
    const name = nameOfTool(call), state = stateOf(call, entry.run), ended = state.key === "done";
    card.dataset.state = state.key;
    card.setAttribute("aria-label", `${name}: ${state.label}`);
    part("h4").textContent = name;
    part(".state").textContent = state.label;
    part(".took").textContent = took(call);
    put(part(".arguments"), pretty(call.function?.arguments ?? ""));
    const output = call.function?.output ?? "";
    // Of a call that came to nothing, the output is what the model was told of it.
    put(part(".why"), ended || !call.completed_at ? "" : output || call.error || "");
    part(".output").hidden = !ended || !output;
    put(part(".output pre"), ended ? pretty(output) : "");
    ask(card, shown, state.question);
  }

  // ---------------------------------------------------------------- the question

  function ask(card, shown, question) {
    if (question && !shown.form) {
      shown.form = QUESTIONS[question](card, shown);
      card.append(shown.form);
      tell(`${nameOf(shown.entry.assistant_id)} asks: ${shown.call.function.name}.`);
      beckon(card);
    } else if (!question && shown.form) {
      const hadFocus = shown.form.contains(document.activeElement);
      shown.form.remove();
      shown.form = null;
      if (hadFocus) card.focus({ preventScroll: true });
      if (!shown.answering && shown.call.status !== "interrupted") note(card, "It was answered elsewhere.");
    }
  }

  /** Says all that is asked at once: what is announced later would take the place of what was said before. */
  function tell(question) {
    if (asked.push(question) === 1) queueMicrotask(() => announce(asked.splice(0).join(" ")));
  }

  /** Sends an answer, and says what came of it. */
  async function answer(card, shown, said, send) {
    const { form } = shown, name = nameOfTool(shown.call), before = document.activeElement;
    wrong(form, "");
    shown.answering = true;
    toggle(form, false);
    try {
      await send(threadId(), shown.entry.run.id, shown.call.id);
      announce(`${said}: ${name}.`);
    } catch (error) {
      shown.answering = false;
      if (error.status === 409) {
        note(card, elsewhere(error));
      } else {
        toggle(form, true);
        wrong(form, error.message);
        if (form.contains(before)) before.focus();
        return;
      }
    }
    const { activeElement } = document;
    if (activeElement === document.body || card.contains(activeElement)) next(card);
  }

  function next(card) {
    const open = document.querySelectorAll('.tool[data-state="asks"]');
    const other = [...open].find((one) => one !== card);
    if (other) other.focus();
    else focusComposer();
  }

  function note(card, words) {
    card.querySelector(".note").textContent = words;
    announce(words);
  }

  const QUESTIONS = {
    /** Approve, approve with other arguments, or deny. */
    approval(card, shown) {
      const form = copyOf("t-approval"), edits = form.querySelector("textarea"), reason = form.querySelector("input");
      const [yes, edit, no, back] = form.querySelectorAll("button"), remember = form.querySelector(".remember input");
      let mode = "";

      function turn(to) {
        const from = mode;
        mode = to;
        form.querySelector(".edits").hidden = to !== "edits";
        form.querySelector(".reason").hidden = to !== "reason";
        remember.parentElement.hidden = to === "reason";
        edit.hidden = no.hidden = !!to;
        back.hidden = !to;
        yes.textContent = { "": "Approve", edits: "Approve with changes", reason: "Deny" }[to];
        wrong(form, "");
        if (to === "edits" && !edits.value) {
          edits.value = JSON.stringify(JSON.parse(shown.call.function.arguments), null, 2);
          edits.rows = Math.min(edits.value.split("\n").length + 1, 12);
        }
        (to === "edits" ? edits : to === "reason" ? reason : from === "edits" ? edit : no).focus();
        form.scrollIntoView({ block: "nearest" });
      }

      function submit() {
        const options = remember.checked ? { remember: true } : {};
        if (mode === "reason")
          return answer(card, shown, "Denied", (...ids) => deny(...ids, { reason: reason.value.trim() || undefined }));
        if (mode === "edits") {
          const { value, problem } = objectIn(edits.value);
          edits.setAttribute("aria-invalid", !!problem);
          if (problem) return wrong(form, problem);
          options.arguments = value;
        }
        answer(card, shown, mode ? "Approved with changes" : "Approved", (...ids) => approve(...ids, options));
      }

      for (const button of [edit, no, back]) button.onclick = () => turn(button.value);
      onsubmit(form, submit);
      form.addEventListener("keydown", (event) => {
        if (composes(event)) return;
        if (event.key === "Escape" && mode) {
          event.stopPropagation();
          turn("");
        }
        if (event.key !== "Enter" || event.shiftKey) return;
        // Enter on a box that is to be ticked would approve.
        if ([edits, remember].includes(event.target)) event.preventDefault();
        if (event.target === edits) form.requestSubmit();
      });
      return form;
    },

    /** A page tool: the day that is chosen here is its output. */
    pick_date(card, shown) {
      const form = copyOf("t-pick_date"), day = form.querySelector("input");
      const purpose = objectIn(shown.call.function.arguments).value?.purpose;
      form.querySelector("label span").textContent = `Choose a day${typeof purpose === "string" ? ` ${purpose}` : ""}`;
      const give = (said, output) =>
        answer(card, shown, said, (thread, run, call) =>
          submitToolOutputs(thread, run, [{ tool_call_id: call, output: { day: output } }]));
      onsubmit(form, () => give(`Sent ${day.value}`, day.value));
      form.querySelector("[value=none]").onclick = () => give("No day was chosen", null);
      return form;
    },
  };

  /** What a card says of its call: a key for the style, a label, and the question that it asks. */
  function stateOf(call, run) {
    const waiting = run?.required_action?.submit_tool_outputs.tool_calls ?? [];
    const needs = waiting.find(({ id }) => id === call.id)?.needs;
    const name = call.function?.name;
    if (needs === "approval") return { key: "asks", label: "Needs approval", question: "approval" };
    if (needs && Object.hasOwn(QUESTIONS, name)) return { key: "asks", label: "Waits for you", question: name };
    if (needs) return { key: "runs", label: "Waits for an open tab" };
    if (call.status === "in_progress") {
      if (run?.status === "requires_action") return { key: "held", label: "Waits for the other answers" };
      if (call.started_at) return { key: "runs", label: "Running" };
      return { key: "comes", label: objectIn(call.function?.arguments).problem ? "Coming in" : "Starting" };
    }
    if (call.status === "interrupted" && run?.status === "expired") return { key: "interrupted", label: "Expired" };
    if (call.status === "interrupted" && call.error === "not answered") return { key: "interrupted", label: "Not answered" };
    return STATES[call.status] ?? { key: "held", label: call.status };
  }

  return { fill };
}

const STATES = {
  completed: { key: "done", label: "Done" },
  failed: { key: "failed", label: "Failed" },
  denied: { key: "denied", label: "Denied" },
  interrupted: { key: "interrupted", label: "Interrupted" },
};

const nameOfTool = (call) => call.function?.name ?? call.type;

/** The focus goes to the card, not to a button: a key that is meant for a message then answers nothing. */
function beckon(card) {
  const { activeElement } = document, composer = $("text");
  if (activeElement === document.body || (activeElement === composer && !composer.value)) card.focus({ preventScroll: true });
}

function onsubmit(form, submit) {
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    submit();
  });
}

function toggle(form, on) {
  for (const one of form.querySelectorAll("button, input, textarea")) one.disabled = !on;
}

function wrong(form, words) {
  form.querySelector(".wrong").textContent = words;
}

function elsewhere({ code, decision, message }) {
  if (code !== "already_answered") return message;
  if (decision?.needs !== "approval") return "It was answered elsewhere.";
  return `It was answered elsewhere: ${decision.approve ? "approved" : "denied"}.`;
}

/** A selection in it stays where nothing changed. */
function put(node, words) {
  if (node.textContent !== words) node.textContent = words;
}

function objectIn(source) {
  try {
    const value = JSON.parse(source);
    if (value && typeof value === "object" && !Array.isArray(value)) return { value };
    return { problem: "The arguments are a JSON object: { … }." };
  } catch (error) {
    return { problem: `This is no JSON. ${error.message}` };
  }
}

/** JSON with its lines, in one where that is short; anything else, such as half of it, as it is. */
function pretty(source) {
  try {
    const lines = JSON.stringify(JSON.parse(source), null, 2), line = lines.replace(/\n\s*/g, " ");
    return line.length > 60 ? lines : line;
  } catch {
    return source;
  }
}

function took({ started_at, completed_at }) {
  if (!started_at || !completed_at) return "";
  const seconds = completed_at - started_at;
  return seconds < 1 ? "< 1 s" : seconds < 120 ? `${seconds} s` : `${Math.round(seconds / 60)} min`;
}
