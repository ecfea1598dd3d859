// A small, safe Markdown subset. Only DOM nodes are built, with textContent: no string ever becomes HTML.
const FENCE = /^\s*(`{3,}|~{3,})\s*([\w+#.-]*)/;
const ITEM = /^(\s*)(?:([-*+])|(\d{1,9})[.)])\s+/;
const HEADING = /^(#{1,6})\s+(.*)/;
const RULE = /^\s*([-*_])(\s*\1){2,}\s*$/;
const ROW = /^\s*\|.*\|\s*$/;
const INLINE = new RegExp([
  "`([^`\\n]{1,2000})`",
  "\\*\\*((?:[^*\\n]|\\*(?!\\*)){1,1000}?)\\*\\*",
  "(?<![\\w*])[*_](?![\\s*_])([^*_\\n]{1,1000}?)(?<!\\s)[*_](?![\\w*])",
  "\\[([^\\[\\]\\n]{1,500})\\]\\((https?://[^\\s()]{1,2000})\\)",
  "(https?://[^\\s<>()\\[\\]\"'`*]{1,2000}[^\\s<>()\\[\\]\"'`*.,;:!?])",
].join("|"), "g");

/** Shows `source` in `parent`; blocks that did not change keep their nodes, so a selection in them stays. */
export function show(parent, source, growing) {
  // The first character of a list or fence would flash as text before the rest of it comes.
  const blocks = split((growing ? source.replace(/\n\s*([-*+#>|]+|\d+[.)]?|[`~]{1,2})$/, "") : source).split("\n"));
  blocks.forEach((block, i) => {
    const old = parent.children[i];
    if (old?.source === block.source && old.kind === block.kind) return;
    const node = build(block, 0);
    // Only here: a list's own direction is that of its text, which is not looked for below another `dir`.
    Object.assign(node, { source: block.source, kind: block.kind, dir: "auto" });
    old ? old.replaceWith(node) : parent.append(node);
  });
  while (parent.children.length > blocks.length) parent.lastElementChild.remove();
}

function split(lines) {
  const blocks = [];
  for (let i = 0; i < lines.length;) {
    const from = i, line = lines[i], fence = FENCE.exec(line);
    const add = (kind) => blocks.push({ kind, lines: lines.slice(from, i), source: lines.slice(from, i).join("\n") });
    if (!line.trim()) i++;
    else if (fence) {
      do i++; while (i < lines.length && !lines[i].trim().startsWith(fence[1]));
      i++;
      add("code");
    } else if (HEADING.test(line)) { i++; add("heading"); }
    else if (RULE.test(line)) { i++; add("rule"); }
    else if (line.startsWith(">")) { while (lines[i]?.startsWith(">")) i++; add("quote"); }
    else if (ROW.test(line)) { while (ROW.test(lines[i] ?? "")) i++; add("table"); }
    else if (ITEM.test(line)) {
      const numbered = !!ITEM.exec(line)[3];
      // An item goes on over indented lines, and over a blank line when more of the list follows it.
      const goesOn = (next) => next !== undefined && (/^\s+\S/.test(next) || (ITEM.test(next) && !!ITEM.exec(next)[3] === numbered && !RULE.test(next)));
      for (i++; goesOn(lines[i]) || (lines[i]?.trim() === "" && goesOn(lines[i + 1]));) i++;
      add("list");
    } else {
      const starts = [FENCE, HEADING, RULE, ROW, ITEM, /^>|^\s*$/];
      for (i++; i < lines.length && !starts.some((start) => start.test(lines[i]));) i++;
      add("text");
    }
  }
  return blocks;
}

function build({ kind, lines }, depth) {
  if (kind === "code") return code(lines);
  if (kind === "rule") return element("hr");
  if (kind === "heading") return inline(element("h4"), lines[0].replace(HEADING, "$2"));
  if (kind === "table") return table(lines);
  if (depth > 5 || kind === "text") return inline(element("p"), lines.join("\n"));
  if (kind === "quote") return nest(element("blockquote"), lines.map((line) => line.replace(/^> ?/, "")), depth);
  const [, indent, , number] = ITEM.exec(lines[0]);
  const list = element(number ? "ol" : "ul"), items = [];
  if (number) list.start = Number(number);
  for (const line of lines) {
    const item = ITEM.exec(line);
    if (item && item[1].length <= indent.length + 1) items.push({ width: item[0].length, lines: [line.slice(item[0].length)] });
    else items.at(-1).lines.push(line.replace(new RegExp(`^\\s{0,${items.at(-1).width}}`), ""));
  }
  list.append(...items.map((item) => nest(element("li"), item.lines, depth)));
  return list;
}

function nest(parent, lines, depth) {
  const blocks = split(lines);
  // An item's one text stands for itself; of several, each is a paragraph.
  const bare = parent.tagName === "LI" && blocks.filter(({ kind }) => kind === "text").length === 1;
  for (const block of blocks) {
    if (block.kind === "text" && bare) inline(parent, block.lines.join("\n"));
    else parent.append(build(block, depth + 1));
  }
  return parent;
}

function table(lines) {
  const wrapped = element("div", { className: "wide" }), node = wrapped.appendChild(element("table"));
  lines.forEach((line, i) => {
    const row = i === 1 && /^[\s|:-]+$/.test(line) ? element("tr") : node.insertRow();
    for (const cell of line.trim().slice(1, -1).split(/(?<!\\)\|/))
      row.append(inline(element(i ? "td" : "th"), cell.trim().replaceAll("\\|", "|")));
  });
  return wrapped;
}

function code(lines) {
  const [, fence, language] = FENCE.exec(lines[0]);
  const closed = lines.length > 1 && lines.at(-1).trim().startsWith(fence);
  const figure = element("figure"), bar = element("figcaption"), pre = element("pre", { tabIndex: 0, dir: "ltr" });
  bar.append(language || "code", element("button", { type: "button", textContent: "Copy" }));
  bar.lastChild.dataset.do = "copy-code";
  pre.append(element("code", { textContent: lines.slice(1, closed ? -1 : undefined).join("\n") }));
  figure.append(bar, pre);
  return figure;
}

function inline(parent, source) {
  let at = 0;
  for (const found of source.matchAll(INLINE)) {
    const [whole, mono, strong, em, label, address, bare] = found;
    parent.append(source.slice(at, found.index));
    at = found.index + whole.length;
    if (mono) parent.append(element("code", { textContent: mono }));
    else if (strong) parent.append(inline(element("strong"), strong));
    else if (em) parent.append(inline(element("em"), em));
    else parent.append(element("a", { href: address ?? bare, textContent: label ?? bare, target: "_blank", rel: "noopener noreferrer" }));
  }
  parent.append(source.slice(at));
  return parent;
}

const element = (name, properties) => Object.assign(document.createElement(name), properties);
