// The tree of strategies: nodes [parent, children, components, share, distance, heading, component or −1, group].
const opened = new Set();
let nodes = null;
let current = 0;

const nodeHref = (id) => (nodes[id][6] < 0 ? `#strategy-${id}` : `#component-${nodes[id][6]}`);

const visible = () => {
  const list = [];
  const waiting = [[0, 1]];
  while (waiting.length) {
    const [id, level] = waiting.pop();
    list.push([id, level]);
    if (opened.has(id)) for (const child of [...nodes[id][1]].reverse()) waiting.push([child, level + 1]);
  }
  return list;
};

const openFirst = () => {
  // Above the coloured strategies everything is open.
  nodes.forEach(([, children, , , , , , group], id) => { if (group < 0 && children.length) opened.add(id); });
  if (!opened.size) opened.add(0);
};

const treeItem = ([id, level]) => {
  const [, children, count, share, distance, heading, j, group] = nodes[id];
  const open = opened.has(id);
  const item = el("div", { role: "treeitem", "aria-level": level, "aria-expanded": children.length ? String(open) : null, tabindex: id === current ? 0 : -1, "data-node": id },
    el("span", { class: "twist", "aria-hidden": "true", onclick: () => { toggle(id); } }, children.length ? (open ? "▾" : "▸") : ""),
    dot(group),
    el("a", { href: nodeHref(id), tabindex: -1 }, j >= 0 ? el("span", { class: "index" }, String(j)) : "", heading),
    el("span", { class: "count" }, j >= 0 ? "" : `${number(count)} components, joined at ${distance.toFixed(2)}`),
    meter(share), el("span", { class: "value" }, percent(share)));
  item.style.setProperty("--level", Math.min(level - 1, 14));
  return item;
};

const renderTree = (focus) => {
  const items = visible();
  if (!items.some(([id]) => id === current)) current = 0;
  $("tree").querySelector("[role=tree]").replaceChildren(...items.map(treeItem));
  if (focus) focusNode(current);
};

const focusNode = (id) => {
  for (const item of $("tree").querySelectorAll("[role=treeitem]")) item.tabIndex = Number(item.dataset.node) === id ? 0 : -1;
  current = id;
  $("tree").querySelector(`[data-node="${id}"]`)?.focus();
};

const toggle = (id, open = !opened.has(id)) => {
  if (!nodes[id][1].length) return;
  if (open) opened.add(id); else opened.delete(id);
  current = id;
  renderTree(true);
};

const treeKeys = (event) => {
  const list = visible().map(([id]) => id);
  const where = list.indexOf(current);
  const [parent, children] = nodes[current];
  const go = {
    ArrowDown: () => focusNode(list[Math.min(where + 1, list.length - 1)]),
    ArrowUp: () => focusNode(list[Math.max(where - 1, 0)]),
    Home: () => focusNode(list[0]),
    End: () => focusNode(list[list.length - 1]),
    ArrowRight: () => (opened.has(current) ? focusNode(children[0]) : toggle(current, true)),
    ArrowLeft: () => (opened.has(current) ? toggle(current, false) : parent >= 0 && focusNode(parent)),
    Enter: () => { location.hash = nodeHref(current); },
    " ": () => toggle(current),
  }[event.key];
  if (!go || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  event.stopPropagation();
  go();
};

const showTree = async () => {
  if (nodes) return;
  try {
    nodes = await part("tree-0");
  } catch (error) {
    $("tree").replaceChildren(apology(error));
    return;
  }
  openFirst();
  $("tree").replaceChildren(el("div", { role: "tree", "aria-labelledby": "strategies-title", onkeydown: treeKeys }));
  renderTree(false);
};
