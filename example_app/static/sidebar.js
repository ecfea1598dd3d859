// The list of threads, and the drawer that it is in on a narrow screen.
import { $, copyOf } from "./dom.js";

/** `listThreads` and `deleteThread` are the helper's; `complain(words)` says what went wrong. */
export function createSidebar({ listThreads, deleteThread, complain, focusComposer }) {
  const threads = new Map();   // id -> thread, newest first
  let current = null;          // the id of the one that is open
  const narrow = matchMedia("(max-width: 820px)");

  // ---------------------------------------------------------------- the list

  async function load(before) {
    try {
      const { data, has_more } = await listThreads({ limit: 30, before });
      const older = before ? [...threads.values()] : [];
      threads.clear();
      for (const thread of [...older, ...data]) threads.set(thread.id, thread);
      $("threads-more").hidden = !has_more;
      show();
    } catch (error) {
      $("threads-note").textContent = `The list could not be loaded. ${error.message}`;
    }
  }

  function show() {
    $("threads").replaceChildren(...[...threads.values()].map(itemOf));
    $("threads-note").textContent = threads.size ? "" : "Conversations appear here.";
    const title = titleOf(threads.get(current));
    $("title").textContent = current ? title : "New chat";
    document.title = current ? `${title} · assistream` : "assistream";
    if (current) $("new").removeAttribute("aria-current");
    else $("new").setAttribute("aria-current", "page");
  }

  function itemOf(thread) {
    const item = copyOf("t-thread"), part = (selector) => item.querySelector(selector);
    const title = titleOf(thread), made = new Date(thread.created_at * 1000);
    part("a").href = `#${thread.id}`;
    if (thread.id === current) part("a").setAttribute("aria-current", "page");
    part(".name").textContent = part("a").title = title;
    part("time").dateTime = made.toISOString();
    part("time").textContent = made.toDateString() === new Date().toDateString()
      ? made.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit" })
      : made.toLocaleDateString([], { day: "numeric", month: "short" });
    part("button").setAttribute("aria-label", `Delete “${title}”`);
    part("button").onclick = () => askToDelete(thread);
    return item;
  }

  function askToDelete(thread) {
    const dialog = $("confirm");
    $("confirm-what").textContent = `“${titleOf(thread)}” and its answers will be gone for good.`;
    dialog.returnValue = "";
    dialog.onclose = () => { if (dialog.returnValue === "delete") remove(thread); };
    dialog.showModal();
  }

  async function remove({ id }) {
    try {
      await deleteThread(id);
    } catch (error) {
      if (error.code !== "thread_not_found") return complain(error.message);
    }
    threads.delete(id);
    if (id === current) location.hash = "";
    else show();
    $("new").focus();
  }

  $("threads-more").onclick = () => load([...threads.keys()].at(-1));
  document.addEventListener("visibilitychange", () => { if (!document.hidden) load(); });

  // ---------------------------------------------------------------- the drawer

  const isOpen = () => document.body.classList.contains("drawer");

  function open() {
    document.body.classList.add("drawer");
    $("drawer-open").setAttribute("aria-expanded", "true");
    $("main").inert = true;
    $("drawer-close").focus();
  }

  function close() {
    if (!isOpen()) return;
    document.body.classList.remove("drawer");
    $("drawer-open").setAttribute("aria-expanded", "false");
    $("main").inert = false;
    narrow.matches ? $("drawer-open").focus() : focusComposer();
  }

  $("drawer-open").onclick = open;
  $("drawer-close").onclick = $("scrim").onclick = close;
  narrow.addEventListener("change", close);
  $("skip").onclick = (event) => { event.preventDefault(); close(); focusComposer(); };
  $("new").onclick = () => { close(); if (!narrow.matches) focusComposer(); };

  return {
    load: () => load(),
    isOpen,
    close,
    /** Marks the thread that is open; null: the one to come. */
    select(id) {
      current = id;
      show();
    },
    /** The thread is gone. */
    forget: (id) => threads.delete(id),
  };
}

const titleOf = (thread) => thread?.metadata?.title || "Conversation";
