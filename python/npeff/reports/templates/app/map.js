// A point per component.
const WIDTH = 1000, HEIGHT = 560, MARGIN = 34;
const points = new Map();
const COLOURS = {
  strategy: ["Strategy", (c) => `c${c.group % 12}`],
  class: ["Predicted class", (c) => (c.class < 0 ? "" : `c${c.class % 12}`)],
};

const at = (component) => [MARGIN + component.x * (WIDTH - 2 * MARGIN), MARGIN + component.y * (HEIGHT - 2 * MARGIN)];

const spread = (key) => {
  const values = COMPONENTS.map((c) => c[key]).filter((value) => value !== null && value !== undefined);
  return [Math.min(...values), Math.max(...values)];
};

const colourMap = (key) => {
  const legend = $("map-legend");
  if (COLOURS[key]) {
    for (const [component, point] of points) {
      point.setAttribute("class", COLOURS[key][1](component));
      point.style.fill = "";
    }
    const items = key === "strategy" ? DATA.groups.map((group, i) => [i, group.heading]) : [...new Set(COMPONENTS.map((c) => c.class))].filter((c) => c >= 0).sort((a, b) => a - b).map((c) => [c, className(c)]);
    legend.replaceChildren(...items.slice(0, 12).map(([i, name]) => el("span", {}, dot(i), ` ${name}`)), items.length > 12 ? el("span", {}, "colours repeat") : "");
    return;
  }
  const [low, high] = spread(key);
  for (const [component, point] of points) {
    const value = component[key];
    point.setAttribute("class", "");
    point.style.fill = value === null ? "var(--rule)" : `color-mix(in oklab, var(--accent) ${Math.round(8 + (92 * (value - low)) / (high - low || 1))}%, var(--second))`;
  }
  const words = SHARES.has(key) ? percent : (value) => String(Number(value.toPrecision(3)));
  legend.replaceChildren(el("span", {}, words(low)), el("i", { class: "ramp" }), el("span", {}, words(high)));
};

const showOnMap = (ranks) => {
  for (const [component, point] of points) point.parentElement.classList.toggle("faded", !ranks.has(component.rank));
};

const step = (from, key) => {
  const [dx, dy] = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[key];
  const [x, y] = at(from);
  let best = null, least = Infinity;
  for (const [component, point] of points) {
    if (component === from || point.parentElement.classList.contains("faded")) continue;
    const [u, v] = [at(component)[0] - x, at(component)[1] - y];
    const along = u * dx + v * dy, across = Math.abs(u * dy) + Math.abs(v * dx);
    const cost = along + 2.5 * across;
    if (along > 0 && cost < least) [best, least] = [component, cost];
  }
  return best;
};

// The strategies' names above their points, moved up where two would lie on each other.
const labels = () => {
  const placed = [];
  return DATA.groups.map((group, i) => {
    const members = COMPONENTS.filter((component) => component.group === i);
    const weight = members.reduce((sum, c) => sum + c.share, 0) || 1;
    const name = group.heading.length > 26 ? `${group.heading.slice(0, 25).replace(/[\s,…“]+$/, "")}…` : group.heading;
    const half = 4 * name.length + 8;
    const centre = members.reduce((sum, c) => sum + (at(c)[0] * c.share) / weight, 0);
    const x = Math.min(WIDTH - half, Math.max(half, centre));
    let y = Math.max(18, Math.min(...members.map((c) => at(c)[1])) - 14);
    const taken = () => placed.some(([u, v, w]) => Math.abs(u - x) < w + half && Math.abs(v - y) < 18);
    while (y > 18 && taken()) y -= 6;
    while (taken()) y += 6;
    placed.push([x, y, half]);
    return el("svg:text", { x: x.toFixed(0), y: y.toFixed(0), "aria-hidden": "true" }, name);
  });
};

const startMap = () => {
  if (COMPONENTS.length < 2) return;
  const most = Math.max(...COMPONENTS.map((c) => c.share)) || 1;
  const largest = Math.max(6, Math.min(17, 120 / Math.sqrt(COMPONENTS.length)));
  const svg = el("svg:svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "group", "aria-label": "Map of the components; arrow keys move between them, Enter opens one" });
  for (const component of COMPONENTS) {
    const [x, y] = at(component);
    const point = el("svg:circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: Math.max(2, largest * Math.sqrt(component.share / most)).toFixed(1) },
      el("svg:title", {}, `${component.j} ${component.heading}: ${percent(component.share)}`));
    const link = el("svg:a", { href: `#component-${component.j}`, tabindex: component.rank ? -1 : 0, "aria-label": `Component ${component.j}, ${component.heading}`,
      onkeydown: (event) => {
        if (!event.key.startsWith("Arrow")) return;
        event.preventDefault();
        event.stopPropagation();
        const next = step(component, event.key);
        if (!next) return;
        link.setAttribute("tabindex", -1);
        const other = points.get(next).parentElement;
        other.setAttribute("tabindex", 0);
        other.focus();
      } }, point);
    points.set(component, point);
    svg.append(link);
  }
  if (DATA.groups.length > 1) svg.append(...labels());
  $("map").append(svg);
  const choices = [...(DATA.groups.length > 1 ? ["strategy"] : []), ...(COMPONENTS.some((c) => c.class >= 0) ? ["class"] : []), ...ranged];
  for (const key of choices) $("map-colour").append(el("option", { value: key }, COLOURS[key]?.[0] ?? LABELS[key]));
  $("map-colour").addEventListener("change", (event) => colourMap(event.target.value));
  $("map-section").hidden = false;
  colourMap(choices[0]);
};
