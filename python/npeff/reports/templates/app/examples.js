// A page per example, and a list of all. Records: [position, label, prediction, confidence, explained share, number of
// components, [[component, coefficient], …], attributions [[component, drawing], …], what is predicted [[word, share], …]].
const PER_PART = DATA.examples_per_part;
const PER_PAGE = 60;
let page = 0;
let listing = 0;

const record = async (i) => (await part(`examples-${Math.floor(i / PER_PART)}`))[i % PER_PART];

const content = async (i) => {
  if (!DATA.pictures) return null;
  try {
    return (await part(`pictures-${Math.floor(i / PER_PART)}`))[i % PER_PART] ?? null;
  } catch {
    return null;
  }
};

const isWrong = ([, label, predicted]) => label >= 0 && predicted >= 0 && label !== predicted;

const verdict = (row) => {
  const [, label, predicted] = row;
  if (isWrong(row)) return el("span", { class: "verdict wrong" }, `${className(label)} → ${className(predicted)}`);
  const known = label >= 0 ? label : predicted;
  return known >= 0 ? el("span", { class: "verdict" }, className(known)) : "";
};

const drawing = (shown, row, large) => {
  if (!shown) return null;
  const alt = `Example ${row[0]}`;
  if (shown.kind === "place") {
    const before = large || shown.before.length < 120 ? shown.before : `…${shown.before.slice(-120)}`;
    return el("p", { class: "words place", dir: "auto" }, before, el("mark", {}, shown.at), el("span", { class: "after" }, large ? shown.after : ""));
  }
  if (shown.kind === "text") return el("p", { class: "words" }, large ? shown.text : shown.text.slice(0, 140) + (shown.text.length > 140 ? " …" : ""));
  if (shown.kind === "image") return el("img", { class: shown.small ? "pixels" : "photo", src: shown.uri, alt });
  return el("img", { class: "strip", src: shown.uri, alt: `${alt}; values ${shown.values}` });
};

// Tokens in the colours of their levels; of a place, its token is marked.
const tokens = ({ tokens: list, index, cut = ["", ""] }) => el("p", { class: index === undefined ? "words tokens" : "words place tokens", dir: "auto" }, cut[0], list.map(([token, level], i) => {
  const one = el(i === index ? "mark" : "span", { class: level >= 0 ? "for" : "against", title: level.toFixed(2) }, token);
  one.style.setProperty("--v", Math.abs(level));
  return one;
}), cut[1]);

const showExample = async (i) => {
  const view = $("example");
  let row, shown;
  try {
    [row, shown] = await Promise.all([record(i), content(i)]);
    if (!row) throw new Error(`there is no example ${i}`);
  } catch (error) {
    view.replaceChildren(el("h2", { tabindex: -1 }, "Example"), apology(error));
    return;
  }
  const [position, label, predicted, confidence, explained, count, coefficients, attributions, likely] = row;
  const largest = coefficients.length ? coefficients[0][1] : 1;
  const fact = (name, value) => (value === null ? "" : el("div", {}, el("dt", {}, name), el("dd", {}, value)));
  view.replaceChildren(
    el("header", { class: "line" }, el("h2", { tabindex: -1 }, `Example ${number(position)}`),
      el("nav", { "aria-label": "Around this example" },
        i > 0 ? el("a", { "data-go": "previous", href: `#example-${i - 1}`, "aria-label": "Previous example" }, "←") : "",
        i + 1 < DATA.n_examples ? el("a", { "data-go": "next", href: `#example-${i + 1}`, "aria-label": "Next example" }, "→") : "",
        el("a", { href: "#examples" }, "all examples"))),
    el("div", { class: "example-page" },
      el("figure", { class: `large ${shown?.kind ?? "none"}` }, drawing(shown, row, true) ?? el("p", { class: "unused" }, DATA.pictures ? "Its input was left out of this report." : "The report was written without the data.")),
      el("div", {},
        el("dl", { class: "facts" },
          fact("label", label < 0 ? null : className(label)),
          fact("prediction", predicted < 0 ? null : el("span", { class: isWrong(row) ? "verdict wrong" : "" }, className(predicted))),
          fact("confidence", confidence === null ? null : percent(confidence)),
          fact("explained by the components", explained === null ? null : percent(explained))),
        likely?.length ? [el("h3", {}, "What the model predicts"), el("ul", { class: "rows likely" }, likely.map(([word, share]) =>
          el("li", {}, el("span", { class: "what", title: word }, word), meter(share), el("span", { class: "value" }, percent(share)))))] : "",
        el("h3", {}, "Its components"),
        coefficients.length ? el("ul", { class: "rows coefficients" }, coefficients.map(([j, value]) => {
          const component = byNumber.get(j);
          return el("li", {}, el("a", { class: "what", href: `#component-${j}`, title: component.heading }, el("span", { class: "index" }, String(j)), " ", dot(component.group), ` ${component.heading}`), meter(value, Math.max(1, largest)), el("span", { class: "value" }, coefficient(value)));
        })) : el("p", { class: "unused" }, "None has a coefficient above zero: its Fisher is zero, or unlike all components."),
        count > coefficients.length ? el("p", { class: "key" }, `and ${number(count - coefficients.length)} smaller ones`) : "",
        (attributions ?? []).map(([j, drawn]) => el("section", { class: "examples attributions" },
          el("h4", {}, "What speaks for ", el("a", { href: `#component-${j}` }, `component ${j}, ${byNumber.get(j).heading}`), el("span", { class: "note" }, " red for, blue against")),
          drawn.tokens ? tokens(drawn) : el("img", { class: drawn.small ? "pixels" : "photo", src: drawn.uri, alt: `What in the input speaks for component ${j}` }))))));
};

const positionToIndex = async (position) => {
  if (DATA.first_id !== null) return position - DATA.first_id;
  return (await part("ids-0")).indexOf(position);
};

const listItem = async (i, row) => {
  const shown = await content(i);
  const best = row[6].length ? byNumber.get(row[6][0][0]) : null;
  return el("li", { class: shown?.kind ?? "none" }, el("a", { href: `#example-${i}`, class: "row", "aria-label": `Example ${row[0]}` },
    drawing(shown, row, false) ?? "", el("span", { class: "about" }, el("span", { class: "position" }, number(row[0])), verdict(row), best ? el("span", { class: "coefficient" }, dot(best.group), ` ${best.heading}`) : "")));
};

// Pages walk through the parts one by one: wrong predictions are found as far as needed, never all at once.
const showList = async () => {
  const mine = ++listing;
  const wrong = $("only-wrong").checked;
  const found = [];
  const from = page * PER_PAGE;
  let seen = 0, more = false;
  try {
    const first = wrong ? 0 : Math.floor(from / PER_PART);
    if (!wrong) seen = first * PER_PART;
    search: for (let chunk = first; chunk * PER_PART < DATA.n_examples; chunk++) {
      const rows = await part(`examples-${chunk}`);
      if (mine !== listing) return;
      for (let k = 0; k < rows.length; k++) {
        if (wrong && !isWrong(rows[k])) continue;
        if (seen++ < from) continue;
        if (found.length === PER_PAGE) { more = true; break search; }
        found.push([chunk * PER_PART + k, rows[k]]);
      }
    }
  } catch (error) {
    $("example-list").replaceChildren(apology(error));
    return;
  }
  const items = await Promise.all(found.map(([i, row]) => listItem(i, row)));
  if (mine !== listing) return;
  $("example-list").replaceChildren(...(items.length ? items : [el("li", { class: "none unused" }, wrong ? "No prediction on record is wrong." : "There is no example.")]));
  const turnTo = (to, words) => el("button", { type: "button", onclick: () => { page = to; showList(); scrollTo(0, 0); } }, words);
  $("example-pages").replaceChildren(page ? turnTo(page - 1, "← before") : "", el("span", {}, found.length ? `page ${page + 1}` : ""), more ? turnTo(page + 1, "more →") : "");
};

const startExamples = () => {
  $("only-wrong").addEventListener("change", () => { page = 0; showList(); });
  $("only-wrong").parentElement.hidden = !DATA.has_labels;
  $("go-to").addEventListener("submit", async (event) => {
    event.preventDefault();
    const i = await positionToIndex(Number($("go-to-number").value)).catch(() => -1);
    const there = i >= 0 && i < DATA.n_examples;
    $("go-to-message").textContent = there ? "" : "That example was not decomposed.";
    if (there) location.hash = `#example-${i}`;
  });
};
