"use strict";
// What a reader can do with a report: choose arms, compare two of them, sort, point at marks, change the theme, export.
// The page is whole without it. Text from the run enters the page as text only (textContent), never as markup; what is
// chosen is kept in the address behind "#", so that a link shows the same; nothing is stored and nothing is requested.

const data = JSON.parse(document.getElementById("data").textContent);
const state = { hide: new Set(), theme: "auto", a: 0, b: 0, readouts: 0 };
const byId = (id) => document.getElementById(id);
const all = (selector, root = document) => [...root.querySelectorAll(selector)];

function element(name, text = "", attributes = {}) {
  const made = document.createElement(name);
  made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

// --- what is chosen, in the address --------------------------------------------------------------------------------

function readAddress() {
  const found = new URLSearchParams(location.hash.slice(1));
  const arm = (text, otherwise) => (/^\d+$/.test(text ?? "") && Number(text) < data.arms.length ? Number(text) : otherwise);
  state.hide = new Set((found.get("hide") ?? "").split(",").map((text) => arm(text, -1)).filter((n) => n >= 0));
  state.theme = ["light", "dark"].includes(found.get("theme")) ? found.get("theme") : "auto";
  state.a = arm(found.get("a"), Math.min(2, data.arms.length - 1));
  state.b = arm(found.get("b"), 0);
}

function writeAddress() {
  const kept = [];
  if (state.hide.size) kept.push(`hide=${[...state.hide].sort((x, y) => x - y).join(",")}`);
  if (state.theme !== "auto") kept.push(`theme=${state.theme}`);
  kept.push(`a=${state.a}`, `b=${state.b}`);
  history.replaceState(null, "", `#${kept.join("&")}`);
}

function show() {
  document.documentElement.dataset.theme = state.theme;
  byId("theme").value = state.theme;
  for (const box of all("#arms input")) box.checked = !state.hide.has(Number(box.value));
  showArms();
  showPair();
}

function choose(change) {
  Object.assign(state, change);
  writeAddress();
  show();
}

// --- arms ----------------------------------------------------------------------------------------------------------

function showArms() {
  for (const each of all("[data-arms]")) {
    each.toggleAttribute("data-off", each.dataset.arms.split(" ").some((number) => state.hide.has(Number(number))));
  }
  all("svg[data-pitch]").forEach(closeRows);
  const hidden = [...state.hide].sort((x, y) => x - y).map((number) => data.arms[number].label);
  byId("arms-shown").textContent = `${data.arms.length - hidden.length} of ${data.arms.length}`;
  byId("hidden-arms").textContent = hidden.length ? `Hidden by the reader: ${hidden.join(", ")}.` : "";
}

// Rows of a drawing count downwards to its axis: those that are left move down to it, and the top is cut off.
function closeRows(svg) {
  svg.dataset.box ??= svg.getAttribute("viewBox");
  const pitch = Number(svg.dataset.pitch);
  const marks = all("[data-row]", svg);
  const off = new Set(marks.filter((mark) => mark.hasAttribute("data-off")).map((mark) => Number(mark.dataset.row)));
  for (const mark of marks) {
    const below = [...off].filter((row) => row > Number(mark.dataset.row)).length;
    mark.setAttribute("transform", `translate(0 ${below * pitch})`);
  }
  const [x, y, width, height] = svg.dataset.box.split(/\s+/).map(Number);
  svg.setAttribute("viewBox", `${x} ${y + off.size * pitch} ${width} ${height - off.size * pitch}`);
}

function makeArms() {
  const list = byId("arms");
  data.arms.forEach((arm, number) => {
    const label = element("label");
    const box = element("input", "", { type: "checkbox", value: number });
    box.addEventListener("change", () => {
      const hide = new Set(state.hide);
      if (box.checked) hide.delete(number);
      else hide.add(number);
      choose({ hide });
    });
    label.append(box, element("span", arm.called));
    list.append(label);
  });
}

// --- any two arms --------------------------------------------------------------------------------------------------

function makePair() {
  for (const side of ["a", "b"]) {
    const select = byId(`pair-${side}`);
    data.arms.forEach((arm, number) => select.append(element("option", arm.called, { value: number })));
    select.addEventListener("change", () => choose({ [side]: Number(select.value) }));
  }
  byId("pair-swap").addEventListener("click", () => choose({ a: state.b, b: state.a }));
}

function showPair() {
  byId("pair-a").value = state.a;
  byId("pair-b").value = state.b;
  const rows = Object.entries(data.pairs).map(([phase, square]) => {
    const found = square[state.a][state.b] ?? ["1 (the same arm)", "", "", "", ""];
    const row = element("tr");
    row.append(element("th", phase, { scope: "row" }));
    found.forEach((text, column) => {
      const css = column < 2 ? "number" : { faster: "good", slower: "bad" }[text];
      row.append(element("td", text, css ? { class: css } : {}));
    });
    return row;
  });
  byId("pair-rows").replaceChildren(...rows);
}

// --- tables: sort and export ---------------------------------------------------------------------------------------

const UNITS = { KiB: 2 ** 10, MiB: 2 ** 20, GiB: 2 ** 30, ms: 1e-3, "µs": 1e-6 };
const NUMBER = /^(?:< )?([+-]?[\d,]*\.?\d+)(?:e([+-]?\d+))?(?: ([A-Za-zµ]+))?/;
const SUPERSCRIPTS = "⁰¹²³⁴⁵⁶⁷⁸⁹";

// Figures as other programs read them: an ASCII minus, no separators of thousands, 1.3e-3 for 1.3 × 10⁻³, no signs.
function plain(text) {
  return text
    .replace(/[†‡]/g, "")
    .replace(/[ \u00a0]+/g, " ")
    .replace(/ × 10([⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+)/g, (_, power) =>
      `e${[...power].map((digit) => (digit === "⁻" ? "-" : SUPERSCRIPTS.indexOf(digit))).join("")}`)
    .replace(/\u2212/g, "-")
    .replace(/(\d),(?=\d{3})/g, "$1")
    .replace(/\s*\n\s*/g, "; ")
    .trim();
}

function valueOf(cell) {
  if (!cell) return NaN;
  if (cell.dataset.value) return Number(cell.dataset.value);
  const found = plain(cell.textContent).match(NUMBER);
  return found ? Number(`${found[1]}e${found[2] ?? 0}`) * (UNITS[found[3]] ?? 1) : NaN;
}

// A table's bodies are its groups, as the rows of one arm: a group is sorted by its first row and stays together.
function sortBy(table, column, direction) {
  const head = table.tHead.rows[0].cells;
  const numeric = head[column].classList.contains("number");
  const key = (body) => (numeric ? valueOf(body.rows[0].cells[column]) : body.rows[0].cells[column]?.textContent ?? "");
  const order = (x, y) => {
    if (direction === 0) return Number(x.dataset.place) - Number(y.dataset.place);
    const [one, other] = [key(x), key(y)];
    if (!numeric) return direction * one.localeCompare(other, "en", { numeric: true });
    if (Number.isNaN(one) || Number.isNaN(other)) return Number.isNaN(one) - Number.isNaN(other);
    return direction * (one - other);
  };
  table.append(...[...table.tBodies].sort(order));
  for (const each of head) each.removeAttribute("aria-sort");
  if (direction) head[column].setAttribute("aria-sort", direction > 0 ? "ascending" : "descending");
}

function makeSortable(table) {
  [...table.tBodies].forEach((body, place) => (body.dataset.place = place));
  all("thead th", table).forEach((head) => {
    const button = element("button", head.textContent, { type: "button", title: "Sort by this column" });
    button.addEventListener("click", () => {
      const next = { ascending: -1, descending: 0 }[head.getAttribute("aria-sort")] ?? 1;
      sortBy(table, head.cellIndex, next);
    });
    head.replaceChildren(button);
  });
}

// A spreadsheet would compute a cell that begins like a formula; names may.
const guarded = (text) => (/^[=+\-@\t\r]/.test(text) && !/^[+-]?[\d.]/.test(text) ? `'${text}` : text);
const quoted = (value) => `"${String(value ?? "").replaceAll('"', '""')}"`;
const csv = (rows) => rows.map((row) => row.map(quoted).join(",")).join("\r\n") + "\r\n";

// The rows that are shown, each with all its columns: what spans several rows stands in each of them.
function cellsOf(table) {
  const shown = (each) => !each.closest("[data-off]");
  const rows = [];
  let spans = [];
  for (const row of [...table.rows].filter(shown)) {
    const texts = [];
    const cells = [...row.cells].filter(shown);
    while (cells.length || spans[texts.length]?.left) {
      const held = spans[texts.length];
      if (held?.left) {
        held.left -= 1;
        texts.push(held.text);
      } else {
        const cell = cells.shift();
        const text = cell.classList.contains("number") && cell.tagName === "TD" ? plain(cell.textContent) : cell.textContent;
        spans[texts.length] = { left: cell.rowSpan - 1, text: guarded(text.trim()) };
        texts.push(guarded(text.trim()));
      }
    }
    rows.push(texts);
  }
  return rows;
}

const safeName = (text, ending) => {
  const kept = text.normalize("NFKD").replace(/[^A-Za-z0-9]+/g, "-").replace(/^-+|-+$/g, "").slice(0, 80);
  return `headgrid-${kept.toLowerCase() || "export"}.${ending}`;
};

function download(blob, name) {
  const link = element("a", "", { download: name });
  link.href = URL.createObjectURL(blob);
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
}

const saveCsv = (rows, title) =>
  download(new Blob(["\ufeff", csv(rows)], { type: "text/csv;charset=utf-8" }), safeName(`${data.name} ${title}`, "csv"));

function saveBlocks() {
  const shown = data.blocks.filter((row) => !state.hide.has(row[0]));
  saveCsv([data.columns, ...shown.map(([arm, ...row]) => [guarded(data.arms[arm].label), ...row])], "blocks");
}

// A button beside the heading of a table or drawing, or below what has none.
function addAction(shown, label, title, act) {
  const button = element("button", label, { type: "button", title, class: "act" });
  button.addEventListener("click", act);
  let before = shown.previousElementSibling;
  while (before && !/^H[34]$/.test(before.tagName)) before = before.previousElementSibling;
  (before ?? shown).after(button);
}

// --- figures: read-outs and export ---------------------------------------------------------------------------------

function tellBlock(number) {
  const row = Object.fromEntries(data.columns.map((column, index) => [column, data.blocks[number][index]]));
  const place = `${data.arms[row.arm].label}, launch ${row.launch}, ${row.warm_up ? "warm-up" : "block"} ${row.block}`;
  const times = Object.keys(data.pairs).filter((phase) => row[`${phase}_s`] !== null);
  const told = times.map((phase) => `${phase} ${row[`${phase}_s`].toPrecision(6)} s`).join(", ");
  return `${place}: ${told}${row.codes ? `; ${row.verdict}: ${row.codes}` : ""}`;
}

function distance(mark, x, y) {
  const box = mark.getBoundingClientRect();
  return Math.hypot(Math.max(box.left - x, 0, x - box.right), Math.max(box.top - y, 0, y - box.bottom));
}

// Points and boxes tell what they are below their drawing: to a pointer the nearest one, to the arrow keys one by one.
function makeReadout(figure) {
  const drawing = figure.querySelector(".drawing");
  for (const title of all("svg title", drawing)) {
    title.parentNode.dataset.told = title.textContent;
    title.remove(); // else the browser would show it a second time
  }
  const marks = all("[data-told], [data-point]", drawing).filter((mark) => !mark.querySelector("[data-point]"));
  if (!marks.length) return;
  const line = element("p", "", { class: "readout", role: "status", id: `readout-${(state.readouts += 1)}` });
  drawing.after(line);
  drawing.tabIndex = 0;
  drawing.setAttribute("aria-describedby", line.id);
  let current = null;
  const tell = (mark) => {
    current?.classList.remove("on");
    current = mark;
    current?.classList.add("on");
    line.textContent = mark ? (mark.dataset.told ?? tellBlock(Number(mark.dataset.point))) : "";
  };
  const shown = () => marks.filter((mark) => !mark.closest("[data-off]"));
  const point = (event) => {
    const near = shown().map((mark) => [distance(mark, event.clientX, event.clientY), mark]);
    const [away, mark] = near.reduce((x, y) => (y[0] < x[0] ? y : x), [24, null]);
    if (mark && away < 24) tell(mark);
  };
  drawing.addEventListener("pointermove", point);
  drawing.addEventListener("pointerdown", point);
  drawing.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (event.key === "Escape") tell(null);
    if (!step) return;
    event.preventDefault();
    const listed = shown();
    const at = listed.indexOf(current);
    tell(listed[at < 0 ? 0 : (at + step + listed.length) % listed.length]);
  });
}

// The drawing as a file of its own: what is hidden left out, the page's colours and font written into it.
function standalone(svg) {
  const copy = svg.cloneNode(true);
  all("[data-off]", copy).forEach((each) => each.remove());
  all(".on", copy).forEach((each) => each.classList.remove("on"));
  const [, , width, height] = svg.getAttribute("viewBox").split(/\s+/).map(Number);
  copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
  copy.setAttribute("width", width);
  copy.setAttribute("height", height);
  const style = document.createElementNS("http://www.w3.org/2000/svg", "style");
  style.textContent = `text { font-family: ${getComputedStyle(document.body).fontFamily} !important }`;
  copy.prepend(style);
  const text = new XMLSerializer().serializeToString(copy);
  return { width, height, text: text.replace(/var\(--([\w-]+)\)/g, (_, name) => colour(name)) };
}

function colour(name) {
  const probe = element("span", "", { style: `color: var(--${name})` });
  document.body.append(probe);
  const found = getComputedStyle(probe).color;
  probe.remove();
  return found;
}

async function savePng(figure, title) {
  const { width, height, text } = standalone(figure.querySelector("svg"));
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(text)}`;
  await image.decode();
  const [scale, above] = [width > 500 ? 2 : 4, 26];
  const canvas = element("canvas");
  [canvas.width, canvas.height] = [Math.ceil(width * scale), Math.ceil((height + above) * scale)];
  const draw = canvas.getContext("2d");
  draw.scale(scale, scale);
  draw.fillStyle = colour("paper");
  draw.fillRect(0, 0, width, height + above);
  draw.fillStyle = colour("ink");
  draw.font = `600 12px ${getComputedStyle(document.body).fontFamily}`;
  draw.fillText(title, 4, 17, width - 8);
  draw.drawImage(image, 0, above, width, height);
  canvas.toBlob((blob) => download(blob, safeName(`${data.name} ${title}`, "png")), "image/png");
}

// --- start ---------------------------------------------------------------------------------------------------------

for (const table of all("main .scroll > table")) {
  const title = table.parentNode.getAttribute("aria-label");
  addAction(table.parentNode, "CSV", `Save “${title}” as CSV`, () => saveCsv(cellsOf(table), title));
  if (table.dataset.sortable) makeSortable(table);
}
for (const figure of all("figure")) {
  if (!figure.querySelector("svg")) continue;
  const title = figure.querySelector("h3").textContent;
  addAction(figure.querySelector(".drawing"), "PNG", `Save “${title}” as PNG`, () => savePng(figure, title));
  makeReadout(figure);
}
makeArms();
makePair();
byId("theme").addEventListener("change", (event) => choose({ theme: event.target.value }));
byId("save-blocks").addEventListener("click", saveBlocks);
byId("save-blocks").hidden = data.blocks.length === 0;
for (const id of ["tools", "pair"]) byId(id).hidden = data.arms.length === 0;
readAddress();
show();
addEventListener("hashchange", () => {
  if (!location.hash.includes("=")) return; // an anchor of the page
  readAddress();
  show();
});
