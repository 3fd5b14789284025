// Elements and words. Text from the data only ever becomes text nodes and attribute values, or comes as markup that was
// escaped when the report was written.
const DATA = JSON.parse(document.getElementById("report-data").textContent);
const $ = (id) => document.getElementById(id);

const el = (name, attributes = {}, ...children) => {
  const svg = name.startsWith("svg:");
  const element = svg ? document.createElementNS("http://www.w3.org/2000/svg", name.slice(4)) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== ""));
  return element;
};

const parse = (html) => {
  const template = document.createElement("template");
  template.innerHTML = html.trim();
  return template.content.firstElementChild;
};

const percent = (share) => {
  const value = 100 * share;
  if (value >= 99.5 && value < 99.9999) return value < 99.95 ? `${value.toFixed(1)} %` : "> 99.9 %";
  if (value >= 9.95 || value === 0) return `${value.toFixed(0)} %`;
  return value >= 0.1 ? `${value.toFixed(1)} %` : "< 0.1 %";
};
const number = (value) => String(value).replace(/\B(?=(\d{3})+$)/g, "\u2009");
const coefficient = (value) => (value >= 0.095 ? value.toFixed(2) : String(Number(value.toPrecision(2))));
const className = (c) => (c < 0 ? "no label" : (DATA.classes[c] ?? String(c)));
const dot = (group) => el("i", { class: group < 0 ? "dot" : `dot c${group % 12}` });
const meter = (share, top = 1) => {
  const bar = el("i");
  bar.style.width = `${Math.min(100, (100 * share) / top)}%`;
  return el("span", { class: "meter", "aria-hidden": "true" }, bar);
};

// One object per component, in the order of their shares.
const COMPONENTS = DATA.rows.map((row, rank) => ({ rank, ...Object.fromEntries(DATA.columns.map((key, i) => [key, row[i]])) }));
const byNumber = new Map(COMPONENTS.map((component) => [component.j, component]));
