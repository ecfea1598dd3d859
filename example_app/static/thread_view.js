// One array in, one list on the page.
import { initialOf, nameOf, voiceOf } from "./assistants.js";
import { $, announce, copyOf } from "./dom.js";
import { show as showMarkdown } from "./markdown.js";

/** A model is at it, or about to be. */
export const isActive = ({ run }) => run && ["queued", "in_progress"].includes(run.status);
/** Neither is a model at it, nor does it wait for the user. */
export const isOver = (entry) => !isActive(entry) && entry.run?.status !== "requires_action";

/**
 * `text(entry)` and `parts(entry)` are the helper's; `fillCard(card, call, entry)` shows a tool call, `retry(entry)` asks
 * for another answer, `complain(words)` says what went wrong.
 */
export function createThreadView({ text, parts, fillCard, retry, complain, jumped }) {
  const list = $("entries"), scroller = $("scroller"), jump = $("jump");
  const rows = new Map();     // message id -> {node, entry}: what is on the page for it
  const inTurn = new Set();   // messages that this page asked to be answered one after another
  let pinned = true;          // the newest text is followed

  // ---------------------------------------------------------------- the list

  function show(entries) {
    const there = new Set(entries.map(({ message }) => message.id));
    for (const [id, row] of rows) if (!there.has(id)) { row.node.remove(); rows.delete(id); }
    const columns = layout(entries);
    const lastTurn = entries.findLastIndex((entry) => !entry.assistant_id);
    let place = list.firstElementChild;
    entries.forEach((entry, i) => {
      const { node } = fill(entry);
      node.dataset.columns = columns[i];
      // Only the newest try can be run again: a new run answers the end of the thread.
      const newest = i > lastTurn && !entries.some((later, j) => j > i && later.assistant_id === entry.assistant_id);
      node.classList.toggle("newest", newest);
      if (node === place) place = place.nextElementSibling;
      else list.insertBefore(node, place);
    });
    follow();
  }

  /** How many replies stand side by side in each entry's row: "2 first" opens a row of two; its question is "wide". */
  function layout(all) {
    const columns = Array(all.length).fill("1 first");
    for (let from = 0, to, stacked; from < all.length; from = to) {
      if (!all[from].assistant_id) stacked = inTurn.has(all[from].message.id);
      for (to = from + 1; to < all.length && !stacked && together(all[from], all[to]);) to++;
      const wide = to - from === 1 ? 1 : (to - from) % 3 ? 2 : 3;
      if (wide > 1 && from && !all[from - 1].assistant_id) columns[from - 1] = "wide";
      for (let i = from; i < to; i++) columns[i] = wide + ((i - from) % wide ? "" : " first");
    }
    return columns;
  }

  // ---------------------------------------------------------------- an entry

  function fill(entry) {
    let row = rows.get(entry.message.id);
    if (!row) rows.set(entry.message.id, row = { node: copyOf(entry.assistant_id ? "t-assistant" : "t-user") });
    if (row.entry !== entry) (entry.assistant_id ? fillReply : fillUser)(row.node, entry, row.entry);
    row.entry = entry;
    return row;
  }

  function fillUser(node, entry) {
    const words = text(entry);
    node.firstElementChild.firstElementChild.textContent = words;
    node.classList.toggle("long", words.length > 240 || words.split("\n").length > 4);
  }

  function fillReply(node, entry, before) {
    const id = entry.assistant_id, name = nameOf(id), words = text(entry), shown = merged(parts(entry));
    const state = stateOf(entry, words, shown), part = (selector) => node.querySelector(selector);
    node.dataset.state = state.key;
    node.dataset.voice = voiceOf(id);
    part("article").setAttribute("aria-label", name);
    part("h3").textContent = name;
    part(".avatar").textContent = initialOf(id);
    part(".status").textContent = state.label;
    part(".copy").hidden = !words || isActive(entry);
    part(".waits").textContent = state.waits ?? "";
    fillParts(part(".parts"), shown, entry);

    part(".failure").hidden = !["failed", "stopped", "cut"].includes(state.key);
    part(".failure p").textContent = state.why ?? "";
    if (before && isActive(before) && isOver(entry)) {
      announce(`${name}: ${[state.label, state.why || words].filter(Boolean).join(". ")}`);
    }
  }

  /** Each part has its element for as long as it is there, so that what is open, selected or typed in it stays. */
  function fillParts(parent, shown, entry) {
    const keys = new Set(shown.map(({ key }) => key));
    for (const node of [...parent.children]) if (!keys.has(node.dataset.key)) node.remove();
    const nodes = new Map([...parent.children].map((node) => [node.dataset.key, node]));
    let place = parent.firstElementChild;
    for (const one of shown) {
      const node = nodes.get(one.key) ?? copyOf(TEMPLATES[one.type] ?? "t-words");
      node.dataset.key = one.key;
      if (node === place) place = place.nextElementSibling;
      else parent.insertBefore(node, place);
      if (one.type === "tool_call") fillCard(node, one.call, entry);
      else if (one.type === "reasoning") node.lastElementChild.textContent = one.text;
      else showMarkdown(node, wordsOf(one), isActive(entry));
    }
  }

  // ---------------------------------------------------------------- following the newest text

  function follow() {
    if (pinned && rows.size) scroller.scrollTop = scroller.scrollHeight;
    jump.hidden = pinned || !rows.size;
  }
  function pin() {
    pinned = true;
    follow();
  }
  scroller.addEventListener("scroll", () => {
    pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
    jump.hidden = pinned || !rows.size;
  }, { passive: true });
  new ResizeObserver(follow).observe(scroller);
  jump.onclick = () => { pin(); jumped(); };

  // ---------------------------------------------------------------- buttons inside messages

  list.addEventListener("click", async ({ target }) => {
    const button = target.closest("[data-do]");
    if (!button) return;
    const { entry } = [...rows.values()].find(({ node }) => node.contains(button));
    if (button.dataset.do === "copy") copy(button, text(entry));
    if (button.dataset.do === "copy-code") copy(button, button.closest("figure").querySelector("code").textContent);
    if (button.dataset.do === "retry") {
      pinned = true;
      button.disabled = true;
      await retry(entry);
      button.disabled = false;
    }
  });

  async function copy(button, words) {
    try {
      await navigator.clipboard.writeText(words);
      announce("Copied.");
      button.classList.add("copied");
      setTimeout(() => button.classList.remove("copied"), 1500);
    } catch {
      complain("The browser did not allow copying.");
    }
  }

  return { show, follow, pin, answeredInTurn: (messageId) => inTurn.add(messageId) };
}

const TEMPLATES = { tool_call: "t-tool", reasoning: "t-reasoning" };
const wordsOf = ({ part }) => part.text?.value ?? part.refusal ?? "";

/** Without what says nothing, and thoughts that follow each other as one. */
function merged(parts) {
  const shown = [];
  for (const one of parts) {
    const last = shown.at(-1);
    if (one.type !== "reasoning") {
      if (one.call || wordsOf(one)) shown.push(one);
    } else if (one.text) {
      if (last?.type === "reasoning") shown[shown.length - 1] = { ...last, text: `${last.text}\n\n${one.text}` };
      else shown.push(one);
    }
  }
  return shown;
}

/** Replies of one POST that did not wait for each other. The thread does not say how they were asked for. */
function together(first, other) {
  const a = first.run, b = other.run;
  if (!a || !b || a.created_at !== b.created_at) return false;
  const ended = a.completed_at ?? a.failed_at ?? a.cancelled_at;
  const waited = b.started_at ? ended && b.started_at >= ended && b.started_at > a.started_at
    : a.started_at && b.status === "queued";
  return !waited;
}

const EARLY = {
  max_tokens: "The answer ends here: it reached the model’s length limit.",
  max_output_tokens: "The answer ends here: it reached the model’s length limit.",
  content_filter: "The answer ends here: the model’s content filter stopped it.",
};

/** What a reply's header and foot say: a key for the style, a label, what it waits for, and why it ended early. */
function stateOf({ message, run }, words, shown) {
  const reason = message.incomplete_details?.reason ?? run?.incomplete_details?.reason;
  if (run?.status === "queued") return { key: "queued", label: "Queued" };
  // It goes on, and says what it waits for: a model that is still loading, say.
  if (run?.status === "in_progress" && run.last_error?.message) return { key: "thinking", label: "Waiting", waits: run.last_error.message };
  if (run?.status === "requires_action") return { key: "waits", label: "Waits for an answer" };
  if (run?.status === "expired" || reason === "run_expired") return { key: "cut", label: "Expired", why: "Nobody answered in time." };
  if (run?.status === "in_progress" && shown.at(-1)?.call) return { key: "thinking", label: "Using tools" };
  if (run?.status === "in_progress") return message.content.length ? { key: "writing", label: "Writing" } : { key: "thinking", label: "Thinking" };
  if (run?.status === "failed" || reason === "run_failed") return { key: "failed", label: "Failed", why: run?.last_error?.message ?? "Something went wrong." };
  if (run?.status === "cancelled" || reason === "run_cancelled") return { key: "stopped", label: "Stopped", why: "" };
  if (message.status === "incomplete" || run?.status === "incomplete") {
    const early = words ? "The answer ends early." : "The answer ended before its first word.";
    return { key: "cut", label: "Cut short", why: EARLY[reason] ?? early };
  }
  return { key: "done", label: "" };
}
