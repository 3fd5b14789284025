// What the address says is what is shown: #component-17, #example-3, #strategies, …
const views = [...document.querySelectorAll("main > [data-view]")];
const articles = new Map([...$("components").querySelectorAll(":scope > article")].map((article) => [article.id, article]));
const scrolled = new Map();
const TITLE = document.title;
let here = location.hash;
let lastY = 0;
let visit = 0;
let searching = false; // the search field gets the focus when the overview comes

const show = (view, title) => {
  for (const section of views) section.hidden = section.dataset.view !== view;
  for (const link of document.querySelectorAll("nav.site a")) {
    const mine = { component: "overview", strategy: "strategies", example: "examples" }[view] ?? view;
    if (link.hash === `#${mine}`) link.setAttribute("aria-current", "page"); else link.removeAttribute("aria-current");
  }
  document.title = title ? `${title} – ${TITLE}` : TITLE;
};

const showComponent = async (j) => {
  const component = byNumber.get(j);
  const name = `component-${j}`;
  if (!articles.has(name)) {
    let article;
    try {
      article = parse(await part(name));
    } catch (error) {
      article = el("article", { id: name, class: "component" }, el("h3", { tabindex: -1 }, `${j} ${component.heading}`), apology(error));
    }
    for (const old of articles.keys()) if (articles.size > 20 && articles.get(old).dataset.loaded) { articles.get(old).remove(); articles.delete(old); }
    article.dataset.loaded = "";
    articles.set(name, article);
    $("components").append(article);
  }
  // The arrows follow the table as it is sorted and filtered now.
  const where = order.indexOf(component.rank);
  if (where >= 0) {
    const neighbours = { previous: order[where - 1], next: order[where + 1] };
    for (const link of articles.get(name).querySelectorAll("[data-go]")) {
      const other = COMPONENTS[neighbours[link.dataset.go]];
      link.hidden = !other;
      if (other) link.href = `#component-${other.j}`;
    }
  }
  return articles.get(name);
};

const route = async (first) => {
  const mine = ++visit;
  const [, kind, digits] = /^#([a-z]+)-?(\d+)?$/.exec(location.hash) ?? [null, "overview"];
  const id = digits === undefined ? null : Number(digits);
  let heading = null;
  if (kind === "component" && byNumber.has(id)) {
    const article = await showComponent(id);
    if (mine !== visit) return;
    for (const other of articles.values()) other.hidden = other !== article;
    $("components-title").hidden = true;
    show("component", `${id} ${byNumber.get(id).heading}`);
    heading = article.querySelector("h3");
  } else if (kind === "components") {
    for (const article of articles.values()) article.hidden = false;
    $("components-title").hidden = false;
    show("component", "Components");
    heading = $("components");
  } else if (kind === "example" && id !== null && id < DATA.n_examples) {
    await showExample(id);
    if (mine !== visit) return;
    show("example", `Example ${id}`);
    heading = $("example").querySelector("h2");
  } else if (kind === "examples") {
    show("examples", "Examples");
    showList();
    heading = $("examples-title");
  } else if (kind === "strategy" && id !== null) {
    const article = await part(`strategy-${id}`).then(parse, (error) => el("article", {}, el("h3", { tabindex: -1 }, "Strategy"), apology(error)));
    if (mine !== visit) return;
    $("strategy").replaceChildren(article);
    show("strategy", article.querySelector("h3").textContent.trim());
    heading = article.querySelector("h3");
  } else if (kind === "strategies") {
    show("strategies", "Strategies");
    showTree();
    heading = $("strategies-title");
  } else if (kind === "provenance") {
    show("provenance", "Provenance");
    document.querySelector("#provenance details").open = true;
    heading = $("provenance-title");
  } else {
    show("overview");
    heading = document.querySelector("h1");
  }
  document.documentElement.dataset.route = location.hash || "#overview";
  if (first && !location.hash) return;
  scrollTo({ top: scrolled.get(location.hash) ?? 0, behavior: "instant" });
  if (searching) $("search").focus();
  else heading?.focus({ preventScroll: true });
  searching = false;
};

const keys = (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.defaultPrevented) return;
  const typing = event.target.closest("input, select, textarea");
  if (event.key === "Escape") {
    if (typing) event.target.blur();
    else location.hash = "#overview";
  } else if (typing) {
    return;
  } else if (event.key === "/") {
    event.preventDefault();
    if ($("overview").hidden) {
      searching = true;
      location.hash = "#overview";
    } else $("search").focus();
  } else if (event.key === "ArrowLeft" || event.key === "ArrowRight") {
    if (event.target.closest(".scroll")) return;
    const which = event.key === "ArrowLeft" ? "previous" : "next";
    const link = [...document.querySelectorAll(`main > :not([hidden]) [data-go="${which}"]`)].filter((one) => one.offsetParent && !one.hidden);
    if (link.length === 1) link[0].click();
  }
};

history.scrollRestoration = "manual";
addEventListener("scroll", () => { lastY = scrollY; }, { passive: true });
addEventListener("keydown", keys);
addEventListener("hashchange", () => {
  scrolled.set(here, lastY);
  here = location.hash;
  route(false);
});
document.querySelector("h1").tabIndex = -1; // focused when the overview comes back
document.querySelector("nav.site").hidden = false;
startTable();
startMap();
startExamples();
route(true);
