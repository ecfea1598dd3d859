// What the browser remembers: choices for good, drafts for as long as the tab. A forbidden or full storage only costs
// the memory.

const read = (storage, key) => {
  try { return storage().getItem(key); } catch { return null; }
};
const write = (storage, key, value) => {
  try {
    value ? storage().setItem(key, value) : storage().removeItem(key);
  } catch { /* see above */ }
};
// Functions, as the mere mention of a forbidden storage throws.
const always = () => localStorage, thisTab = () => sessionStorage;

/** A choice of the user's: "picked", "mode" or "theme". */
export const choice = (name) => read(always, name);
export const keepChoice = (name, value) => write(always, name, value);

/** What is typed and not sent, for each thread and for the one to come. */
export const draft = (threadId) => read(thisTab, `draft:${threadId ?? "new"}`);
export const keepDraft = (threadId, words) => write(thisTab, `draft:${threadId ?? "new"}`, words);
