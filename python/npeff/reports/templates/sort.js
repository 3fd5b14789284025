// Sorts the overview by a column. The page is complete without it.
(() => {
  const table = document.getElementById("overview-table");
  const body = table.tBodies[0];
  const key = (row, column) => row.cells[column].dataset.value;
  for (const head of table.tHead.rows[0].cells) {
    if (!head.dataset.sort) continue;
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const text = head.dataset.sort === "text";
      const first = text || head.cellIndex === 0 ? "ascending" : "descending";
      const order = head.ariaSort ? (head.ariaSort === "ascending" ? "descending" : "ascending") : first;
      for (const other of table.tHead.rows[0].cells) other.ariaSort = null;
      head.ariaSort = order;
      const sign = order === "ascending" ? 1 : -1;
      const compare = text ? (a, b) => a.localeCompare(b, undefined, { numeric: true }) : (a, b) => a - b;
      const column = head.cellIndex;
      body.append(...[...body.rows].sort((a, b) => sign * compare(key(a, column), key(b, column))));
    });
  }
})();
