// The message box, with what stands around it: who answers, Send and Stop, the suggestions, and what went wrong.
import { createPicker, nameOf, voiceOf } from "./assistants.js";
import { $, composes } from "./dom.js";
import { draft, keepDraft } from "./storage.js";

/**
 * `send(words, assistantIds, mode)` and `stop()` do what the user asks for, `threadId()` says which thread is open,
 * `canStop()` whether there is anything to stop, and `resized()` is told when the box may have another height.
 */
export function createComposer({ threadId, send, stop, canStop, resized }) {
  const form = $("composer"), input = $("text");
  let locked = false;
  // People type faster than pages load: what is sent before the page is ready goes out when it is.
  let ready = false, early = false;

  const picker = createPicker(() => complain(""));

  /** Fits the box to its text, and the buttons to what can be done. */
  function refresh() {
    input.style.height = "auto";
    input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
    showStop();
    $("send").disabled = !input.value.trim() || !picker.picked().length || locked;
    resized();
  }

  const showStop = () => { $("stop").hidden = !canStop(); };

  function complain(words) {
    $("problem").textContent = words;
    refresh();
  }

  function submit(typed) {
    const words = clean(typed).trim(), ids = picker.picked();
    if (!words || locked) return;
    if (ids.length) send(words, ids, picker.mode);
    else complain("Pick at least one assistant.");
  }

  input.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
    event.preventDefault();
    form.requestSubmit();
  });
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (ready) submit(input.value);
    else early = true;
  });
  input.addEventListener("input", () => {
    // Until the page is ready it is not known which thread it is for.
    if (ready) keepDraft(threadId(), input.value);
    refresh();
  });
  $("stop").onclick = stop;
  $("suggestions").addEventListener("click", ({ target }) => {
    const button = target.closest("button");
    if (!button) return;
    picker.pick(button.dataset.ask.split(","), button.dataset.mode);
    input.focus();
    submit(button.textContent);
  });

  return {
    complain,
    showStop,
    focus: () => input.focus(),

    /** The assistants are known: shows them, and whom each suggestion would ask. */
    fill(assistants) {
      picker.fill(assistants);
      for (const button of $("suggestions").querySelectorAll("button")) {
        const ids = button.dataset.ask.split(",").filter(picker.has);
        button.parentElement.hidden = !ids.length;
        button.title = ids.map(nameOf).join(", ");
        button.lastElementChild.append(...ids.map((id) => {
          const dot = document.createElement("i");
          dot.dataset.voice = voiceOf(id);
          return dot;
        }));
      }
    },

    /** Another thread is open: shows what was typed there. */
    open() {
      if (!ready && input.value) keepDraft(threadId(), input.value);
      else input.value = draft(threadId()) ?? "";
      complain("");
    },

    ready() {
      ready = true;
      if (early) form.requestSubmit();
    },

    // The text stays in the box until the thread shows it: whatever goes wrong, nothing typed is lost.
    lock(words) {
      locked = true;
      input.readOnly = true;
      input.value = words;
      complain("");
    },
    unlock() {
      locked = false;
      input.readOnly = false;
      refresh();
    },
    /** The thread shows it. */
    clear() {
      keepDraft(threadId(), "");
      input.value = "";
    },
  };
}

/** Without what no server can store: NUL, and halves of characters, which a paste can bring. */
function clean(words) {
  const whole = words.replaceAll("\0", "");
  return whole.toWellFormed?.() ?? whole.replace(/\p{Surrogate}/gu, "\uFFFD");
}

/** The first line, cut to 80 characters where a character ends for its reader: half an emoji is none. */
export function titleFor(words) {
  const line = words.split("\n")[0], Segmenter = Intl.Segmenter;
  const parts = Segmenter ? Array.from(new Segmenter().segment(line), ({ segment }) => segment) : [...line];
  let title = "";
  for (const part of parts) {
    if (title.length + part.length > 80) break;
    title += part;
  }
  return title.trimEnd();
}
