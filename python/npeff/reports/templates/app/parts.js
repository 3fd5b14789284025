// Parts of the report: in the page, or in scripts beside it, which load from disk where fetching may not.
const parts = new Map();
const arriving = new Map();
const KEPT = 80;
const absent = new Set(DATA.absent);

window.npeff = (name, value) => {
  const resolve = arriving.get(name);
  arriving.delete(name);
  if (resolve) resolve(value);
};

const fetchPart = (name) => new Promise((resolve, reject) => {
  const inline = document.querySelector(`script[data-part="${name}"]`);
  if (inline) return resolve(JSON.parse(inline.textContent));
  if (absent.has(name) || !DATA.parts) return reject(new Error("left out"));
  arriving.set(name, resolve);
  const script = el("script", { src: `${DATA.parts}/${name}.js` });
  script.onload = () => script.remove();
  script.onerror = () => reject(new Error(`${DATA.parts}/${name}.js is missing`));
  document.head.append(script);
});

const part = (name) => {
  if (!parts.has(name)) {
    parts.set(name, fetchPart(name));
    if (parts.size > KEPT) parts.delete(parts.keys().next().value);
  }
  return parts.get(name);
};

const apology = (error) => el("p", { class: "doubt" }, error.message === "left out"
  ? `This was left out: the report may take no more than ${DATA.limit}. Written as a folder, or with a larger limit, it holds everything.`
  : `${error.message}. Move or send the page together with its folder ${DATA.parts}.`);
