"use strict";

// Tables: a click on a title sorts by its column, numbers from the best down first, empty last.
function sortTable(table, column, ascending) {
  const body = table.tBodies[0];
  const rows = [...body.rows];
  const number = table.tHead.rows[0].cells[column].dataset.kind === "number";
  const keys = new Map(rows.map((row) => {
    const cell = row.cells[column];
    if (!number) return [row, cell.textContent];
    return [row, cell.dataset.sort ? Number(cell.dataset.sort) : null];
  }));
  const sign = ascending ? 1 : -1;
  rows.sort((a, b) => {
    const [left, right] = [keys.get(a), keys.get(b)];
    if (left === null || right === null) return (left === null) - (right === null);
    return sign * (number ? left - right : left.localeCompare(right, "en", { numeric: true }));
  });
  body.append(...rows);
}

for (const table of document.querySelectorAll("table.sorted")) {
  const titles = [...table.tHead.rows[0].cells];
  titles.forEach((title, column) => {
    title.querySelector("button")?.addEventListener("click", () => {
      const down = title.dataset.kind === "number" ? "descending" : "ascending";
      const other = down === "ascending" ? "descending" : "ascending";
      const order = title.getAttribute("aria-sort") === down ? other : down;
      titles.forEach((each) => each.removeAttribute("aria-sort"));
      title.setAttribute("aria-sort", order);
      sortTable(table, column, order === "ascending");
    });
  });
}

// Leaderboard: rows that fit all chosen values and hold all searched words.
const filters = document.getElementById("filters");
const cells = [...document.getElementById("cells").tBodies[0].rows];
// Not in what a row is compared with: who looks for a method means its own rows.
const words = new Map(cells.map((row) => {
  const names = [...row.cells].slice(0, 4).map((cell) => cell.textContent);
  return [row, names.join(" ").toLowerCase()];
}));

function filterCells() {
  const chosen = Object.fromEntries(new FormData(filters));
  const searched = chosen.search.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of cells) {
    const fits = ["model", "benchmark", "method", "budget"].every(
      (name) => !chosen[name] || row.dataset[name] === chosen[name],
    );
    row.hidden = !(fits && searched.every((word) => words.get(row).includes(word)));
    shown += !row.hidden;
  }
  document.getElementById("shown").textContent = `${shown} of ${cells.length} cells`;
}

filters.addEventListener("input", filterCells);
filters.addEventListener("submit", (event) => event.preventDefault());
// A form's fields have their first values only after its reset event.
filters.addEventListener("reset", () => setTimeout(filterCells));

// Samples: everything a model, a data set or a file says enters as text, never as HTML.
function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

const parsed = new Map();
function data(id) {
  if (!parsed.has(id)) parsed.set(id, JSON.parse(document.getElementById(id).textContent));
  return parsed.get(id);
}

function said(answer, score) {
  const field = element("dd");
  field.append(element("span", answer === "" ? "(nothing)" : answer, "answer"));
  if (score !== null) field.append(" ", element("span", `score ${score.toFixed(3)}`, "score"));
  return field;
}

function sampleItem(cell, [id, answer, score, fullScore]) {
  const [question, target, full, images] = data("samples-data").documents[cell.documents][id];
  const item = element("li");
  const shown = element("div", undefined, "images");
  images.forEach((index, place) => {
    const [source, width, height] = data("images-data")[index];
    const image = element("img");
    Object.assign(image, { loading: "lazy", decoding: "async", width, height });
    image.alt = `Image ${images.length > 1 ? `${place + 1} ` : ""}of sample ${id}`;
    image.src = source;
    shown.append(image);
  });
  if (images.length) item.append(shown);
  const facts = element("dl");
  facts.append(
    element("h3", `Sample ${id}`),
    element("dt", "question"), element("dd", question),
    element("dt", "target"), element("dd", target),
    element("dt", "full KV"), said(full, fullScore),
    element("dt", "this cell"), said(answer, score),
  );
  item.append(facts);
  return item;
}

function showSamples(cell) {
  const name = [cell.model, cell.benchmark, cell.method, `budget ${cell.budget}`].join(", ");
  const some = cell.samples.length < cell.differ ? `; the first ${cell.samples.length} are shown, ` +
    "those of the most different scores first" : "";
  document.getElementById("differing").textContent =
    `${name}: ${cell.differ} of ${cell.of} answers are not full KV's${some}.`;
  const items = cell.samples.map((sample) => sampleItem(cell, sample));
  document.getElementById("answers").replaceChildren(...items);
}

const choice = document.getElementById("choice");
const steps = ["model", "benchmark", "method", "budget"];

// Each list offers what there is under the choices before it, and keeps its own where it can.
function chooseCell(wanted) {
  let left = data("samples-data").cells;
  for (const step of steps) {
    const select = choice.elements[step];
    const values = [...new Set(left.map((cell) => cell[step]))];
    const value = values.includes(wanted[step]) ? wanted[step] : values[0];
    select.replaceChildren(...values.map((each) => new Option(each, each, false, each === value)));
    left = left.filter((cell) => cell[step] === value);
  }
  showSamples(left[0]);
}

function chooseLinked() {
  const linked = /^#samples-(\d+)$/.exec(location.hash);
  const cell = linked && data("samples-data").cells.find((each) => each.cell === Number(linked[1]));
  if (!cell) return false;
  chooseCell(cell);
  document.getElementById("samples").scrollIntoView();
  return true;
}

if (choice) {
  choice.addEventListener("input", () => chooseCell(Object.fromEntries(new FormData(choice))));
  choice.addEventListener("submit", (event) => event.preventDefault());
  addEventListener("hashchange", chooseLinked);
  // The address does not change where it says so already.
  document.addEventListener("click", (event) => {
    if (event.target.closest("a")?.hash === location.hash) chooseLinked();
  });
  if (!chooseLinked()) chooseCell({});
}
