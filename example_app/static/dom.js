// The few things that all parts of the page do with the document.

export const $ = (id) => document.getElementById(id);

/** A copy of what a template holds. */
export const copyOf = (template) => $(template).content.firstElementChild.cloneNode(true);

/** Has a screen reader say it. */
export const announce = (words) => { $("live").textContent = words; };

/** This key belongs to the input method, which ends a word with it. Safari says so by the code 229 only. */
export const composes = (event) => event.isComposing || event.keyCode === 229;
