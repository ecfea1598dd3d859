import { show as showMarkdown } from "./markdown.js";

const $ = (id) => document.getElementById(id);
const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);
const input = $("text"), list = $("entries"), scroller = $("scroller");

// People type faster than pages load: what is sent before the page is ready goes out when it is.
let ready = false, early = false;
// This key belongs to the input method, which ends a word with it. Safari says so by the code 229 only.
const composes = (event) => event.isComposing || event.keyCode === 229;
input.addEventListener("keydown", (event) => {
  if (event.key !== "Enter" || event.shiftKey || composes(event)) return;
  event.preventDefault();
  $("composer").requestSubmit();
});
$("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  if (ready) send(input.value.trim(), picked(), $("composer").elements.mode.value);
  else early = true;
});

const helper = new URL($("app").dataset.assistream, location.href);
const { addMessageAndRuns, createThread, loadThread, run, text } = await import(helper);

const assistants = new Map();   // id -> {id, name, description, voice}
const threads = new Map();      // id -> thread, newest first
const rows = new Map();         // message id -> what is on the page for it
const inTurn = new Set();       // messages that this page asked to be answered one after another
const stops = new Map();        // AbortController -> the thread its runs are in
let threadId = null, entries = [], view = null, set = null, slow = 0, sending = null, pinned = true;
let stream = "live";            // how the thread reaches this page, as the helper says

const isActive = (entry) => entry.run && ["queued", "in_progress"].includes(entry.run.status);
const nameOf = (id) => assistants.get(id)?.name ?? id;

// ---------------------------------------------------------------- what the five functions do not cover

async function api(path, options) {
  const answer = await fetch(new URL(path, helper), options);
  const body = await answer.json().catch(() => null);
  if (!answer.ok) throw Object.assign(new Error(body?.error?.message ?? `The server answered ${answer.status}.`), body?.error);
  return body;
}

const remember = (store, key, value) => {
  try {
    value ? store.setItem(key, value) : store.removeItem(key);
  } catch { /* a forbidden or full storage only costs the memory */ }
};
const recall = (store, key) => {
  try { return store.getItem(key); } catch { return null; }
};

// ---------------------------------------------------------------- one array in, one list on the page

function render(next) {
  const fresh = new Set(next.map((entry) => entry.message.id));
  const mine = sending?.thread === threadId && next.find(sending.isIt);
  if (mine) accepted(mine);
  entries = next;
  for (const [id, row] of rows) if (!fresh.has(id)) { row.node.remove(); rows.delete(id); }
  const columns = layout(next);
  let place = list.firstElementChild;
  next.forEach((entry, i) => {
    let row = rows.get(entry.message.id);
    if (!row) rows.set(entry.message.id, row = { node: copyOf(entry.assistant_id ? "t-assistant" : "t-user") });
    if (row.entry !== entry) (entry.assistant_id ? fillReply : fillUser)(row.node, entry, row.entry);
    row.entry = entry;
    row.node.dataset.columns = columns[i];
    // Only the newest try can be run again: a new run answers the end of the thread.
    const newest = i > columns.lastTurn && !next.some((later, j) => j > i && later.assistant_id === entry.assistant_id);
    row.node.classList.toggle("newest", newest);
    if (row.node === place) place = place.nextElementSibling;
    else list.insertBefore(row.node, place);
  });
  showStop();
  if (next.length) $("empty").hidden = true;
  follow();
}

/** How many replies stand side by side in each entry's row: "2 first" opens a row of two; its question is "wide". */
function layout(all) {
  const columns = Array(all.length).fill("1 first");
  columns.lastTurn = all.findLastIndex((entry) => !entry.assistant_id);
  for (let from = 0, to, stacked; from < all.length; from = to) {
    if (!all[from].assistant_id) stacked = inTurn.has(all[from].message.id);
    for (to = from + 1; to < all.length && !stacked && together(all[from], all[to]);) to++;
    const wide = to - from === 1 ? 1 : (to - from) % 3 ? 2 : 3;
    if (wide > 1 && from && !all[from - 1].assistant_id) columns[from - 1] = "wide";
    for (let i = from; i < to; i++) columns[i] = wide + ((i - from) % wide ? "" : " first");
  }
  return columns;
}

// Replies of one POST that did not wait for each other. The thread does not say how they were asked for.
function together(first, other) {
  const a = first.run, b = other.run;
  if (!a || !b || a.created_at !== b.created_at) return false;
  const ended = a.completed_at ?? a.failed_at ?? a.cancelled_at;
  const waited = b.started_at ? ended && b.started_at >= ended && b.started_at > a.started_at
    : a.started_at && b.status === "queued";
  return !waited;
}

function fillUser(node, entry) {
  const words = text(entry);
  node.firstElementChild.firstElementChild.textContent = words;
  node.classList.toggle("long", words.length > 240 || words.split("\n").length > 4);
}

function fillReply(node, entry, before) {
  const name = nameOf(entry.assistant_id), words = text(entry);
  const state = stateOf(entry), part = (selector) => node.querySelector(selector);
  node.dataset.state = state.key;
  node.dataset.voice = assistants.get(entry.assistant_id)?.voice ?? 5;
  part("article").setAttribute("aria-label", name);
  part("h3").textContent = name;
  part(".avatar").textContent = name[0].toUpperCase();
  part(".status").textContent = state.label;
  part(".copy").hidden = !words || isActive(entry);
  part(".waits").textContent = state.waits ?? "";
  showMarkdown(part(".md"), words, isActive(entry));

  const thoughts = (entry.steps ?? []).map((step) => step.step_details?.reasoning?.text).filter(Boolean).join("\n\n");
  part(".reasoning").hidden = !thoughts;
  if (thoughts) part(".reasoning div").textContent = thoughts;

  part(".failure").hidden = !["failed", "stopped", "cut"].includes(state.key);
  part(".failure p").textContent = state.why ?? "";
  if (before && isActive(before) && !isActive(entry)) {
    $("live").textContent = `${name}: ${[state.label, state.why || words].filter(Boolean).join(". ")}`;
  }
}

const EARLY = {
  max_tokens: "The answer ends here: it reached the model’s length limit.",
  max_output_tokens: "The answer ends here: it reached the model’s length limit.",
  content_filter: "The answer ends here: the model’s content filter stopped it.",
};

function stateOf({ message, run: its }) {
  const why = message.incomplete_details?.reason ?? its?.incomplete_details?.reason;
  if (its?.status === "queued") return { key: "queued", label: "Queued" };
  // It goes on, and says what it waits for: a model that is still loading, say.
  if (its?.status === "in_progress" && its.last_error?.message) return { key: "thinking", label: "Waiting", waits: its.last_error.message };
  if (its?.status === "in_progress") return message.content.length ? { key: "writing", label: "Writing" } : { key: "thinking", label: "Thinking" };
  if (its?.status === "failed" || why === "run_failed") return { key: "failed", label: "Failed", why: its?.last_error?.message ?? "Something went wrong." };
  if (its?.status === "cancelled" || why === "run_cancelled") return { key: "stopped", label: "Stopped", why: "" };
  if (message.status === "incomplete" || its?.status === "incomplete") {
    const early = text({ message }) ? "The answer ends early." : "The answer ended before its first word.";
    return { key: "cut", label: "Cut short", why: EARLY[why] ?? early };
  }
  return { key: "done", label: "" };
}

// ---------------------------------------------------------------- following the newest text

function follow() {
  if (pinned && entries.length) scroller.scrollTop = scroller.scrollHeight;
  $("jump").hidden = pinned || !entries.length;
}
scroller.addEventListener("scroll", () => {
  pinned = scroller.scrollHeight - scroller.scrollTop - scroller.clientHeight < 48;
  $("jump").hidden = pinned || !entries.length;
}, { passive: true });
new ResizeObserver(follow).observe(scroller);
$("jump").onclick = () => { pinned = true; follow(); input.focus(); };

// ---------------------------------------------------------------- opening a thread

async function open(id) {
  view?.abort();
  view = new AbortController();
  const { signal } = view;
  threadId = id;
  set = (next) => {
    if (signal.aborted) return;
    if (entries.length && !next.length) gone({ code: "thread_not_found" });
    else render(next);
  };
  pinned = true;
  stream = id ? "connecting" : "live";
  if (sending && sending.thread !== id) unlock();
  closeDrawer();
  complain("");
  render([]);
  $("notice").hidden = true;
  $("empty").hidden = !!id;
  if (!ready && input.value) remember(sessionStorage, draftKey(), input.value);
  else input.value = recall(sessionStorage, draftKey()) ?? "";
  grow();
  showThreads();
  if (!id) return;
  try {
    await loadThread(id, set, { signal, onstate: (state) => signal.aborted || streamIs(state) });
    if (!signal.aborted) $("empty").hidden = entries.length > 0 || !!sending;
  } catch (error) {
    if (!signal.aborted) gone(error);
  } finally {
    if (!signal.aborted && !sending) connection();
  }
}

function gone(error) {
  threads.delete(threadId);
  threadId = null;
  render([]);
  showThreads();
  $("notice").hidden = false;
  $("notice-text").textContent = error.code === "thread_not_found"
    ? "It was deleted, or it belongs to another browser." : error.message;
}

const openFromHash = () => open(location.hash.slice(1) || null);
addEventListener("hashchange", openFromHash);

/** What there is to say about the connection, unless it turns out to be nothing before `ms` are over. */
function soon(words, ms) {
  clearTimeout(slow);
  slow = setTimeout(() => connection(words), ms);
}

const STATES = {
  connecting: "Connecting…",
  unauthenticated: "You are signed out. Sign in again, in any tab, and this page goes on by itself.",
  polling: "Live text does not get through to you, so this page asks for news every few seconds.",
  paused: "Paused while other tabs are in use. It goes on when you look at it.",
};

/** A word about the stream, unless the one about sending has the line. */
function streamIs(state) {
  stream = state;
  if (!sending) connection();
}

/** Shows `words`, or what there is to say about the stream; a reconnect that is over in a second is nothing to say. */
function connection(words) {
  clearTimeout(slow);
  if (words === undefined && stream === "connecting") soon(STATES.connecting, 1500);
  words ??= stream === "connecting" ? "" : STATES[stream] ?? "";
  $("connection").textContent = navigator.onLine ? words : "You are offline. Answers go on, and show when you are back.";
}
addEventListener("online", () => connection());
addEventListener("offline", () => connection());

// ---------------------------------------------------------------- the composer

const draftKey = () => `draft:${threadId ?? "new"}`;
const picked = () => [...$("picker").querySelectorAll("input:checked")].sort((a, b) => a.dataset.order - b.dataset.order).map((box) => box.value);
const complain = (words) => { $("problem").textContent = words; follow(); };

function grow() {
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, innerHeight * 0.4)}px`;
  showStop();
  $("send").disabled = !input.value.trim() || !picked().length || !!sending;
  follow();
}

input.addEventListener("input", () => {
  remember(sessionStorage, draftKey(), input.value);
  grow();
});

/** Without what no server can store: NUL, and halves of characters, which a paste can bring. */
function clean(words) {
  const whole = words.replaceAll("\0", "");
  return whole.toWellFormed?.() ?? whole.replace(/\p{Surrogate}/gu, "\uFFFD");
}

/** The first line, cut to 80 characters where a character ends for its reader: half an emoji is none. */
function titleFor(words) {
  const line = words.split("\n")[0], Segmenter = Intl.Segmenter;
  const parts = Segmenter ? Array.from(new Segmenter().segment(line), ({ segment }) => segment) : [...line];
  let title = "";
  for (const part of parts) {
    if (title.length + part.length > 80) break;
    title += part;
  }
  return title.trimEnd();
}

// The text stays in the box until the thread shows it: whatever goes wrong, nothing typed is lost.
async function send(typed, ids, mode) {
  const words = clean(typed).trim();
  if (!words || sending) return;
  if (!ids.length) return complain("Pick at least one assistant.");
  const known = new Set(entries.map((entry) => entry.message.id));
  const mine = sending = { thread: threadId, mode, isIt: (entry) => !entry.assistant_id && !known.has(entry.message.id) };
  input.readOnly = true;
  input.value = words;
  complain("");
  grow();
  soon("Still sending…", 3000);
  try {
    if (!threadId) {
      const id = mine.thread = await createThread({ title: titleFor(words) });
      sending = mine;
      remember(sessionStorage, draftKey(), "");
      history.pushState(null, "", `#${id}`);
      loadThreads();
      open(id);
      input.value = words;
    }
    remember(sessionStorage, draftKey(), words);
    $("empty").hidden = true;
    pinned = true;
    const key = draftKey();
    await start((signal) => addMessageAndRuns(threadId, words, ids, set, { mode, signal }));
    if (recall(sessionStorage, key) === words) remember(sessionStorage, key, "");
  } catch (error) {
    complain(error.message);
  } finally {
    if (sending === mine) unlock();
  }
}

function accepted({ message }) {
  if (sending.mode === "sequential") inTurn.add(message.id);
  remember(sessionStorage, draftKey(), "");
  input.value = "";
  unlock();
}

function unlock() {
  sending = null;
  connection();
  input.readOnly = false;
  grow();
}

/** Runs until the end; what went wrong inside a run is shown in its entry, so only a refused request throws. */
async function start(call) {
  const stop = new AbortController();
  stops.set(stop, threadId);
  try {
    await call(stop.signal);
  } catch (error) {
    if (error.name !== "AbortError" && !error.runs?.length) throw error;
  } finally {
    stops.delete(stop);
  }
}

function showStop() {
  $("stop").hidden = !entries.some(isActive) && !sending?.thread;
}

function stopAll() {
  for (const [stop, thread] of stops) if (thread === threadId) stop.abort();
  // Runs that were started before a reload, or in another tab, have no signal here.
  for (const { run: its } of entries.filter(isActive)) {
    api(`threads/${threadId}/runs/${its.id}/cancel`, { method: "POST", headers: { "Content-Type": "application/json" }, body: "{}" })
      .catch((error) => complain(error.message));
  }
  input.focus();
}
$("stop").onclick = stopAll;

$("suggestions").addEventListener("click", ({ target }) => {
  const button = target.closest("button");
  if (!button) return;
  pick(button.dataset.ask.split(","));
  $("composer").elements.mode.value = button.dataset.mode ?? "parallel";
  input.focus();
  showPicked();
  send(button.textContent.trim(), picked(), $("composer").elements.mode.value);
});

// ---------------------------------------------------------------- who answers

function pick(ids) {
  for (const box of $("picker").querySelectorAll("input")) {
    box.checked = ids.includes(box.value);
    box.dataset.order = ids.indexOf(box.value);
  }
}

function showPicked() {
  const ids = picked(), inOrder = ids.length > 1 && $("composer").elements.mode.value === "sequential";
  for (const chip of $("picker").querySelectorAll("label")) {
    const box = chip.querySelector("input"), name = nameOf(box.value);
    chip.querySelector(".avatar").textContent = inOrder && box.checked ? ids.indexOf(box.value) + 1 : name[0].toUpperCase();
  }
  $("mode").hidden = ids.length < 2;
  remember(localStorage, "picked", ids.join());
  remember(localStorage, "mode", $("composer").elements.mode.value);
  grow();
}

async function loadAssistants() {
  const { data } = await api("assistants");
  data.forEach((assistant, voice) => {
    assistants.set(assistant.id, { ...assistant, voice: voice % 6 });
    const chip = copyOf("t-chip");
    chip.dataset.voice = voice % 6;
    chip.title = assistant.description ?? "";
    chip.querySelector("input").value = assistant.id;
    chip.querySelector(".name").textContent = nameOf(assistant.id);
    $("picker").append(chip);
  });
  for (const button of $("suggestions").querySelectorAll("button")) {
    const ids = button.dataset.ask.split(",").filter((id) => assistants.has(id));
    button.parentElement.hidden = !ids.length;
    button.title = ids.map(nameOf).join(", ");
    button.lastElementChild.append(...ids.map((id) => {
      const dot = document.createElement("i");
      dot.dataset.voice = assistants.get(id).voice;
      return dot;
    }));
  }
  const last = (recall(localStorage, "picked") ?? "").split(",").filter((id) => assistants.has(id));
  pick(last.length ? last : data.slice(0, 2).map(({ id }) => id));
  $("composer").elements.mode.value = recall(localStorage, "mode") ?? "parallel";
  showPicked();
}

let clicks = 10;
for (const group of [$("picker"), $("mode")]) {
  group.addEventListener("change", ({ target }) => {
    if (target.type === "checkbox") target.dataset.order = clicks++;
    complain("");
    showPicked();
  });
}

// ---------------------------------------------------------------- the list of threads

async function loadThreads(before) {
  try {
    const { data, has_more } = await api(`threads?limit=30${before ? `&before=${before}` : ""}`);
    const older = before ? [...threads.values()] : [];
    threads.clear();
    for (const thread of [...older, ...data]) threads.set(thread.id, thread);
    $("threads-more").hidden = !has_more;
    showThreads();
  } catch (error) {
    $("threads-note").textContent = `The list could not be loaded. ${error.message}`;
  }
}

function showThreads() {
  const titleOf = (thread) => thread?.metadata?.title || "Conversation";
  const today = new Date().toDateString();
  $("threads").replaceChildren(...[...threads.values()].map((thread) => {
    const item = copyOf("t-thread"), link = item.querySelector("a"), made = new Date(thread.created_at * 1000);
    link.href = `#${thread.id}`;
    if (thread.id === threadId) link.setAttribute("aria-current", "page");
    item.querySelector(".name").textContent = link.title = titleOf(thread);
    item.querySelector("time").dateTime = made.toISOString();
    item.querySelector("time").textContent = made.toDateString() === today
      ? made.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
      : made.toLocaleDateString([], { day: "numeric", month: "short" });
    item.querySelector("button").setAttribute("aria-label", `Delete “${titleOf(thread)}”`);
    item.querySelector("button").onclick = () => askToDelete(thread, titleOf(thread));
    return item;
  }));
  $("threads-note").textContent = threads.size ? "" : "Conversations appear here.";
  $("title").textContent = threadId ? titleOf(threads.get(threadId)) : "New chat";
  document.title = threadId ? `${titleOf(threads.get(threadId))} · assistream` : "assistream";
  if (threadId) $("new").removeAttribute("aria-current");
  else $("new").setAttribute("aria-current", "page");
}

function askToDelete(thread, title) {
  const dialog = $("confirm");
  $("confirm-what").textContent = `“${title}” and its answers will be gone for good.`;
  dialog.returnValue = "";
  dialog.onclose = async () => {
    if (dialog.returnValue !== "delete") return;
    try {
      await api(`threads/${thread.id}`, { method: "DELETE" });
    } catch (error) {
      if (error.code !== "thread_not_found") return complain(error.message);
    }
    threads.delete(thread.id);
    if (thread.id === threadId) location.hash = "";
    else showThreads();
    $("new").focus();
  };
  dialog.showModal();
}

$("threads-more").onclick = () => loadThreads([...threads.keys()].at(-1));
document.addEventListener("visibilitychange", () => { if (!document.hidden) loadThreads(); });

// ---------------------------------------------------------------- buttons inside messages

list.addEventListener("click", async ({ target }) => {
  const button = target.closest("[data-do]");
  if (!button) return;
  const { entry } = [...rows.values()].find(({ node }) => node.contains(button));
  if (button.dataset.do === "copy") copied(button, text(entry));
  if (button.dataset.do === "copy-code") copied(button, button.closest("figure").querySelector("code").textContent);
  if (button.dataset.do === "retry") {
    pinned = true;
    button.disabled = true;
    complain("");
    await start((signal) => run(threadId, entry.assistant_id, set, { signal })).catch((error) => complain(error.message));
    button.disabled = false;
  }
});

async function copied(button, words) {
  try {
    await navigator.clipboard.writeText(words);
    $("live").textContent = "Copied.";
    button.classList.add("copied");
    setTimeout(() => button.classList.remove("copied"), 1500);
  } catch {
    complain("The browser did not allow copying.");
  }
}

// ---------------------------------------------------------------- drawer, scheme, keys

const narrow = matchMedia("(max-width: 820px)");
function openDrawer() {
  document.body.classList.add("drawer");
  $("drawer-open").setAttribute("aria-expanded", "true");
  $("main").inert = true;
  $("drawer-close").focus();
}
function closeDrawer() {
  if (!document.body.classList.contains("drawer")) return;
  document.body.classList.remove("drawer");
  $("drawer-open").setAttribute("aria-expanded", "false");
  $("main").inert = false;
  (narrow.matches ? $("drawer-open") : input).focus();
}
$("drawer-open").onclick = openDrawer;
$("drawer-close").onclick = $("scrim").onclick = closeDrawer;
narrow.addEventListener("change", closeDrawer);
$("skip").onclick = (event) => { event.preventDefault(); closeDrawer(); input.focus(); };
$("new").onclick = () => { closeDrawer(); if (!narrow.matches) input.focus(); };

$("theme").onclick = () => {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const next = (document.documentElement.dataset.theme || system) === "dark" ? "light" : "dark";
  document.documentElement.dataset.theme = next === system ? "" : next;
  remember(localStorage, "theme", document.documentElement.dataset.theme);
};

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || composes(event) || $("confirm").open) return;
  if (document.body.classList.contains("drawer")) closeDrawer();
  else if (!$("stop").hidden) stopAll();
});

// ---------------------------------------------------------------- start

await Promise.all([loadThreads(), loadAssistants().catch((error) => complain(`The assistants could not be loaded. ${error.message}`))]);
connection();
openFromHash();
ready = true;
if (early) $("composer").requestSubmit();
