// The chat page. Each part of it is a module that knows only its own piece of the document:
//
//   composer.js     the message box            assistants.js   who answers
//   thread_view.js  the messages               markdown.js     what a model wrote, as elements
//   tool_cards.js   what a model calls, and the questions that go with it
//   sidebar.js      the list of threads        connection.js   the line about the connection
//   storage.js      what the browser keeps     dom.js          the few things that all do with the document
//
// This one knows the helper, and which thread is open: it puts the parts together and does what they ask for.
import { createComposer, titleFor } from "./composer.js";
import { createConnectionLine } from "./connection.js";
import { $, composes } from "./dom.js";
import { createSidebar } from "./sidebar.js";
import { draft, keepChoice, keepDraft } from "./storage.js";
import { createThreadView, isActive, isOver } from "./thread_view.js";
import { createToolCards } from "./tool_cards.js";

// ---------------------------------------------------------------- what is open

let threadId = null;        // null: a new chat
let entries = [];
let set = null;             // what the helper calls with its entries
let leaving = null;         // AbortController of its loadThread
let sending = null;         // the message that is not in the thread yet: {thread, mode, isIt(entry)}
const stops = new Map();    // AbortController -> the thread its runs are in
let view = null;            // the messages on the page

// What assistants may do with the page. Whichever tab is first does it, so what needs the user's eyes is a card.
const tools = {
  set_theme({ scheme }) {
    paint(scheme);
    return `The page is ${scheme} now.`;
  },
};

// ---------------------------------------------------------------- the parts

// Before the helper is there: what is sent until then goes out when it is.
const composer = createComposer({
  threadId: () => threadId,
  send,
  stop,
  canStop: () => !entries.every(isOver) || !!sending?.thread,
  resized: () => view?.follow(),
});
const line = createConnectionLine();

// Where the blueprint is, is the app's affair: the page says it.
const {
  addMessageAndRuns, approve, cancelRun, createThread, deleteThread, deny, listAssistants, listThreads, loadThread, parts,
  run, submitToolOutputs, text,
} = await import(new URL($("app").dataset.assistream, location.href));

const { complain } = composer;
const cards = createToolCards({
  approve, deny, submitToolOutputs, threadId: () => threadId, focusComposer: composer.focus,
});
view = createThreadView({ text, parts, fillCard: cards.fill, retry, complain, jumped: composer.focus });
const sidebar = createSidebar({ listThreads, deleteThread, complain, focusComposer: composer.focus });

// ---------------------------------------------------------------- opening a thread

async function open(id) {
  leaving?.abort();
  leaving = new AbortController();
  const { signal } = leaving;
  threadId = id;
  set = (next) => {
    if (signal.aborted) return;
    if (entries.length && !next.length) gone({ code: "thread_not_found" });
    else show(next);
  };
  line.begin(id ? "connecting" : "live");
  if (sending && sending.thread !== id) sent();
  sidebar.close();
  show([]);
  view.pin();
  $("notice").hidden = true;
  $("empty").hidden = !!id;
  composer.open();
  sidebar.select(id);
  if (!id) return;
  try {
    await loadThread(id, set, { signal, tools, onstate: (state) => signal.aborted || line.update(state) });
    if (!signal.aborted) $("empty").hidden = entries.length > 0 || !!sending;
  } catch (error) {
    if (!signal.aborted) gone(error);
  } finally {
    if (!signal.aborted) line.update();
  }
}

function show(next) {
  const mine = sending?.thread === threadId && next.find(sending.isIt);
  if (mine) accepted(mine);
  entries = next;
  view.show(entries);
  composer.showStop();
  if (entries.length) $("empty").hidden = true;
}

function gone(error) {
  sidebar.forget(threadId);
  threadId = null;
  show([]);
  sidebar.select(null);
  $("notice").hidden = false;
  $("notice-text").textContent = error.code === "thread_not_found"
    ? "It was deleted, or it belongs to another browser." : error.message;
}

const openFromHash = () => open(location.hash.slice(1) || null);
addEventListener("hashchange", openFromHash);

// ---------------------------------------------------------------- sending

async function send(words, ids, mode) {
  const known = new Set(entries.map(({ message }) => message.id));
  const mine = sending = { thread: threadId, mode, isIt: (entry) => !entry.assistant_id && !known.has(entry.message.id) };
  composer.lock(words);
  line.sending(true);
  try {
    if (!threadId) await beginThread(mine, words);
    keepDraft(threadId, words);
    $("empty").hidden = true;
    view.pin();
    await follow(threadId, (signal) => addMessageAndRuns(threadId, words, ids, set, { mode, signal }));
    if (draft(mine.thread) === words) keepDraft(mine.thread, "");
  } catch (error) {
    complain(error.message);
  } finally {
    if (sending === mine) sent();
  }
}

async function beginThread(mine, words) {
  mine.thread = await createThread({ title: titleFor(words) });
  sending = mine;
  keepDraft(null, "");
  history.pushState(null, "", `#${mine.thread}`);
  sidebar.load();
  open(mine.thread);
  composer.lock(words);
}

/** The message is in the thread. */
function accepted({ message }) {
  if (sending.mode === "sequential") view.answeredInTurn(message.id);
  composer.clear();
  sent();
}

function sent() {
  sending = null;
  line.sending(false);
  composer.unlock();
}

// ---------------------------------------------------------------- runs

/** Runs until the end; what went wrong inside a run is shown in its entry, so only a refused request throws. */
async function follow(thread, call) {
  const stop = new AbortController();
  stops.set(stop, thread);
  try {
    await call(stop.signal);
  } catch (error) {
    if (error.name !== "AbortError" && !error.runs?.length) throw error;
  } finally {
    stops.delete(stop);
  }
}

async function retry(entry) {
  complain("");
  try {
    await follow(threadId, (signal) => run(threadId, entry.assistant_id, set, { signal }));
  } catch (error) {
    complain(error.message);
  }
}

function stop() {
  for (const [stop, thread] of stops) if (thread === threadId) stop.abort();
  // Runs that were started before a reload, or in another tab, have no signal here.
  for (const entry of entries.filter((entry) => !isOver(entry)))
    cancelRun(threadId, entry.run.id).catch((error) => complain(error.message));
  composer.focus();
}

// ---------------------------------------------------------------- scheme and keys

const systemScheme = () => matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
const scheme = () => document.documentElement.dataset.theme || systemScheme();

function paint(next) {
  document.documentElement.dataset.theme = next === systemScheme() ? "" : next;
  keepChoice("theme", document.documentElement.dataset.theme);
}
$("theme").onclick = () => paint(scheme() === "dark" ? "light" : "dark");
// What one tab chooses, all have.
addEventListener("storage", ({ key, newValue }) => {
  if (key === "theme") document.documentElement.dataset.theme = newValue ?? "";
});

addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || composes(event) || $("confirm").open) return;
  if (sidebar.isOpen()) sidebar.close();
  // By its button only, where a question waits: Escape is what closes the question's own boxes.
  else if (entries.some(isActive) || sending?.thread) stop();
});

// ---------------------------------------------------------------- start

line.update("connecting");
await Promise.all([
  sidebar.load(),
  listAssistants().then(composer.fill).catch((error) => complain(`The assistants could not be loaded. ${error.message}`)),
]);
line.update("live");
openFromHash();
composer.ready();
