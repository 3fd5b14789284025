// The overview's table: sorted, filtered and searched over all components; rows are made as they come into sight.
const table = $("overview-table");
const body = table.tBodies[0];
const form = $("filters");
const STEP = DATA.rows_per_part;
const rowOf = [...body.rows];
let order = COMPONENTS.map((_, rank) => rank);
let shown = STEP;
let turn = 0;

const LABELS = Object.fromEntries(DATA.numbers.map(([name, title]) => [name, title]));
const SHARES = new Set(DATA.numbers.filter(([, , isShare]) => isShare).map(([name]) => name));
const ranged = DATA.numbers.map(([name]) => name);
const ranges = new Map();

const fetchRow = async (rank) => {
  if (!rowOf[rank]) {
    const chunk = Math.floor(rank / STEP);
    const rows = await part(`rows-${chunk}`);
    rows.forEach((html, i) => { rowOf[chunk * STEP + i] ??= parse(html); });
  }
  return rowOf[rank];
};

const fill = (rows) => {
  body.replaceChildren(...rows);
  $("table-count").textContent = order.length === COMPONENTS.length ? `${number(order.length)} components` : `${number(order.length)} of ${number(COMPONENTS.length)} components`;
  $("more-rows").hidden = order.length <= shown;
  $("no-rows").hidden = order.length > 0;
};

const renderTable = () => {
  const mine = ++turn;
  const wanted = order.slice(0, shown);
  if (wanted.every((at) => rowOf[at])) return fill(wanted.map((at) => rowOf[at]));
  return Promise.all(wanted.map(fetchRow)).then((rows) => { if (mine === turn) fill(rows); }, (error) => $("table-count").replaceChildren(apology(error)));
};

const sortBy = (key, direction) => {
  const sign = direction === "ascending" ? 1 : -1;
  const compare = (a, b) => {
    const [x, y] = [COMPONENTS[a][key], COMPONENTS[b][key]];
    if (x === null || y === null) return (x === null) - (y === null);
    return sign * (typeof x === "string" ? x.localeCompare(y, undefined, { numeric: true }) : x - y);
  };
  order.sort((a, b) => compare(a, b) || a - b);
};

const currentSort = () => {
  const head = [...table.tHead.rows[0].cells].find((cell) => cell.ariaSort);
  return head ? [head.dataset.sort, head.ariaSort] : ["share", "descending"];
};

const matches = (component, words) => words.every((word) => {
  const digits = word.replace(/^#/, "");
  if (/^\d+$/.test(digits) && String(component.j) === digits) return true;
  return !word.startsWith("#") && component.heading.toLowerCase().includes(word);
});

const filterTable = () => {
  const words = $("search").value.toLowerCase().split(/\s+/).filter(Boolean);
  const strategy = $("filter-strategy").value, predicted = $("filter-class").value;
  order = COMPONENTS.filter((component) =>
    matches(component, words)
    && (strategy === "" || component.group === Number(strategy))
    && (predicted === "" || component.class === Number(predicted))
    && [...ranges].every(([key, [low, high]]) => {
      const value = component[key];
      const unit = SHARES.has(key) ? 100 : 1;
      return (low.value === "" && high.value === "")
        || (value !== null && (low.value === "" || unit * value >= Number(low.value) - 1e-9) && (high.value === "" || unit * value <= Number(high.value) + 1e-9));
    })).map((component) => component.rank);
  sortBy(...currentSort());
  shown = STEP;
  renderTable();
  showOnMap(new Set(order));
};

for (const head of table.tHead.rows[0].cells) {
  if (!head.dataset.sort) continue;
  const button = el("button", { type: "button" });
  button.append(...head.childNodes);
  head.append(button);
  button.addEventListener("click", () => {
    const key = head.dataset.sort;
    const first = key === "heading" || key === "j" ? "ascending" : "descending";
    const direction = head.ariaSort ? (head.ariaSort === "ascending" ? "descending" : "ascending") : first;
    for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
    head.ariaSort = direction;
    sortBy(key, direction);
    renderTable();
  });
}

const startTable = () => {
  DATA.groups.forEach((group, i) => $("filter-strategy").append(el("option", { value: i }, `${i + 1} · ${group.heading}`)));
  $("filter-strategy").parentElement.hidden = DATA.groups.length < 2;
  const classes = [...new Set(COMPONENTS.map((component) => component.class))].filter((c) => c >= 0).sort((a, b) => a - b);
  classes.forEach((c) => $("filter-class").append(el("option", { value: c }, className(c))));
  $("filter-class").parentElement.hidden = classes.length < 2;
  for (const key of ranged) {
    const unit = SHARES.has(key) ? "%" : "";
    const input = (what) => el("input", { type: "number", step: "any", "aria-label": `${LABELS[key]} ${what} ${unit}`.trim(), placeholder: what });
    const pair = [input("at least"), input("at most")];
    ranges.set(key, pair);
    $("ranges").querySelector("div").append(el("div", {}, el("span", {}, `${LABELS[key]} ${unit}`), ...pair));
  }
  form.hidden = false;
  form.addEventListener("input", filterTable);
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filterTable));
  $("no-rows").querySelector("button").addEventListener("click", () => form.reset());
  $("more-rows").querySelector("button").addEventListener("click", () => { shown += STEP; renderTable(); });
  renderTable();
};
