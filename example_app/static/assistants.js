// Who answers: the assistants, and the boxes to pick them by.
import { $, copyOf } from "./dom.js";
import { choice, keepChoice } from "./storage.js";

const VOICES = 6;               // colours that style.css has; the last is everybody else's
const assistants = new Map();   // id -> {id, name, description, voice}

export const nameOf = (id) => assistants.get(id)?.name ?? id;
export const initialOf = (id) => nameOf(id)[0].toUpperCase();
export const voiceOf = (id) => assistants.get(id)?.voice ?? VOICES - 1;

/** The boxes, and whether those who are picked answer at once or in turn. Tells of every change. */
export function createPicker(onchange) {
  const boxes = $("picker"), modes = $("composer").elements;
  let clicks = 10;   // what is picked by hand comes after what was picked for the user

  const all = () => [...boxes.querySelectorAll("input")];
  const picked = () => all().filter((box) => box.checked).sort((a, b) => a.dataset.order - b.dataset.order).map((box) => box.value);

  function fill(data) {
    data.forEach((assistant, i) => {
      const chip = copyOf("t-chip"), voice = i % VOICES;
      assistants.set(assistant.id, { ...assistant, voice });
      chip.dataset.voice = voice;
      chip.title = assistant.description ?? "";
      chip.querySelector("input").value = assistant.id;
      chip.querySelector(".name").textContent = nameOf(assistant.id);
      boxes.append(chip);
    });
    const last = (choice("picked") ?? "").split(",").filter((id) => assistants.has(id));
    pick(last.length ? last : data.slice(0, 2).map(({ id }) => id), choice("mode"));
  }

  function pick(ids, mode) {
    for (const box of all()) {
      box.checked = ids.includes(box.value);
      box.dataset.order = ids.indexOf(box.value);
    }
    modes.mode.value = mode ?? "parallel";
    show();
  }

  /** In turn, each picked one's place stands where its letter was. */
  function show() {
    const ids = picked(), numbered = ids.length > 1 && modes.mode.value === "sequential";
    for (const box of all()) {
      const place = ids.indexOf(box.value) + 1;
      box.closest("label").querySelector(".avatar").textContent = numbered && place ? place : initialOf(box.value);
    }
    $("mode").hidden = ids.length < 2;
    keepChoice("picked", ids.join());
    keepChoice("mode", modes.mode.value);
    onchange();
  }

  for (const group of [boxes, $("mode")]) {
    group.addEventListener("change", ({ target }) => {
      if (target.type === "checkbox") target.dataset.order = clicks++;
      show();
    });
  }

  return { fill, pick, picked, has: (id) => assistants.has(id), get mode() { return modes.mode.value; } };
}
