// The view, search, filters and order, which the hash stores and which apply to charts and table alike.

const get = (id) => document.getElementById(id);
const upper = (text) => text[0].toUpperCase() + text.slice(1);
const pointed = ({ clientX: x, clientY: y }) => ({ left: x, right: x, top: y, bottom: y });
const card = {
  node: get("card"),
  layer: null,
  pinned: false,

  hover(layer, event) {
    if (this.pinned) return;
    if (!layer) return this.leave();
    this.show(layer, pointed(event));
  },
  leave() {
    if (!this.pinned) this.hide();
  },
  pin(layer, event) {
    if (!layer || (this.pinned && this.layer === layer)) return this.hide();
    this.pinned = true;
    this.layer = null;
    this.show(layer, pointed(event));
  },
  hide() {
    this.pinned = false;
    this.layer = null;
    this.node.hidden = true;
    this.node.classList.remove("pinned");
    for (const plot of plots) plot.activate(null);
  },
  /** Shows a layer's measurements next to a place; `spoken` also tells screen readers the gist. */
  show(layer, place, spoken = false) {
    if (this.layer !== layer) {
      this.layer = layer;
      this.node.replaceChildren(...describe(layer));
      const close = { type: "button", class: "close", "aria-label": "Close", onclick: () => this.hide() };
      if (this.pinned) this.node.append(element("button", close, "×"));
      for (const plot of plots) plot.activate(layer);
    }
    this.place(place);
    if (spoken) get("spoken").textContent = gist(layer);
  },
  explain(word, place) {
    this.pinned = false;
    this.layer = null;
    this.node.replaceChildren(element("p", {}, element("b", {}, upper(word)), ". " + TERMS[word]));
    this.place(place);
  },
  place(place) {
    const node = this.node,
      narrow = innerWidth < 640;
    node.hidden = false;
    node.classList.toggle("pinned", this.pinned);
    node.classList.toggle("narrow", narrow);
    if (narrow) return;
    const { width, height } = node.getBoundingClientRect();
    let left = place.right + 16,
      top = place.bottom + 14;
    if (left + width > innerWidth - 8) left = Math.max(8, place.left - width - 16);
    if (top + height > innerHeight - 8) top = Math.max(8, place.top - height - 14);
    node.style.left = left + "px";
    node.style.top = top + "px";
  },
};

const sub = (text) => element("p", { class: "sub" }, text);

function describe(layer) {
  const size = sub(`${grouped(layer.shape[1])} inputs → ${grouped(layer.shape[0])} outputs`);
  return [element("h3", {}, layer.name), size, ...layer.sides.flatMap((figure, s) => describeSide(layer, figure, s))];
}
function describeSide(layer, figure, s) {
  const title = compares ? `${letters[s]}: ${sides[s].label}` : "";
  if (!figure) return [sub(`${title}: no such layer`)];
  const states = [figure.before, figure.after, ...(s === 1 && layer.crossed ? [layer.crossed] : [])];
  const line = (label, show) =>
    element("tr", {}, element("th", { scope: "row" }, label), ...states.map((at) => element("td", {}, show(at))));
  const words = (at) => element("span", { class: at.risk && !figure.unused ? "bad" : "" }, riskWords(at, figure));
  const heads = ["current", "new", "A’s new"].slice(0, states.length).map((text) => element("th", { scope: "col" }, text));
  const body = [
    line("state", words),
    line("scale", (at) => number(at.scale)),
    line("range up to", (at) => number(at.scale && at.scale * at.max)),
    line("clipped", (at) => percent(at.clipped)),
    line("vanished", (at) => percent(at.vanished)),
    line("tokens lost", (at) => percent(at.rows_lost)),
    line("SQNR", (at) => (at.sqnr_db === null ? missing : decibels(at.sqnr_db) + " dB")),
  ];
  const head = element("thead", {}, element("tr", {}, element("th", { class: "whose" }, title), ...heads));
  const sizes = `largest ${number(figure.absmax)}, 99.9th percentile ${number(figure.p999)}, median ${number(figure.median)}`;
  const worth = work[s] ? `; ${percent(share(figure, s))} of the compute` : "";
  const lines = [
    element("table", {}, head, element("tbody", {}, ...body)),
    sub(`${sizes}; ${plural(figure.rows, "token")}${worth}`),
  ];
  if (states.some((at) => at.full_precision))
    lines.push(sub("Losses are those of FP8; in full precision there are none."));
  const found = figure.unused ? [] : states.map((at) => at.risk).filter(Boolean);
  for (const risk of new Set(found)) lines.push(sub(`${risk}: ${given.risks[risk]}`));
  const moves = figure.conditioning_dependent && "its range depends on the synthetic conditioning";
  const why = [figure.unused || figure.reason, moves].filter(Boolean).join("; ");
  if (why) lines.push(element("p", {}, element("span", { class: "sub" }, "reason: "), why));
  return lines;
}
/** A layer in a sentence, for screen readers. */
function gist(layer) {
  const at = (words, state, figure) => `${riskWords(state, figure)} at the ${words} scale ${number(state.scale)}`;
  const told = layer.sides.map((figure, s) => {
    const whose = compares ? `${letters[s]}: ` : "";
    if (!figure) return `${whose}no such layer`;
    const states = [at("current", figure.before, figure), at("new", figure.after, figure)];
    return whose + [...states, `largest ${number(figure.absmax)}`].join(", ");
  });
  return `${layer.name}: ${told.join("; ")}`;
}

// ---- the hash

function read() {
  const said = new URLSearchParams(location.hash.slice(1)),
    sort = said.get("sort") || "risk";
  const known = (list, key) => (list.some((one) => one.key === key) ? key : list[0].key);
  Object.assign(state, {
    view: known(VIEWS, said.get("view")),
    layout: known(LAYOUTS, said.get("layout")),
    heat: known(HEATS, said.get("heat")),
    q: said.get("q") || "",
    regex: said.get("regex") === "1",
    only: new Set((said.get("only") || "").split(",").filter((key) => FILTERS.some((one) => one.key === key))),
    sort: known(orders, sort.replace(/^-/, "")),
    descending: orders.some((order) => "-" + order.key === sort),
    theme: ["light", "dark"].includes(said.get("theme")) ? said.get("theme") : null,
  });
}
function write() {
  const said = new URLSearchParams(),
    put = (key, value, plain) => value && value !== plain && said.set(key, value);
  put("view", state.view, VIEWS[0].key);
  put("layout", state.layout, LAYOUTS[0].key);
  put("heat", state.heat, HEATS[0].key);
  put("q", state.q);
  put("regex", state.regex ? "1" : "");
  put("only", [...state.only].join(","));
  put("sort", (state.descending ? "-" : "") + state.sort, "risk");
  put("theme", state.theme);
  history.replaceState(null, "", location.pathname + location.search + (said.size ? "#" + said : ""));
}

/** The filtered layers in order; layers without the value come last in either direction. */
function choose() {
  let finds = () => true,
    problem = "";
  if (state.q) {
    const text = state.q.toLowerCase();
    finds = (layer) => layer.name.toLowerCase().includes(text);
    if (state.regex)
      try {
        const pattern = new RegExp(state.q, "i");
        finds = (layer) => pattern.test(layer.name);
      } catch {
        problem = "not a regular expression";
        finds = () => true;
      }
  }
  get("search-problem").textContent = problem;
  get("search").setAttribute("aria-invalid", Boolean(problem));
  const filters = FILTERS.filter((filter) => state.only.has(filter.key)),
    { value } = orders.find((order) => order.key === state.sort);
  const either = filters.filter((filter) => filter.either),
    passes = (layer) => (filter) => filter.test(layer),
    all = filters.filter((filter) => !filter.either);
  const fits = (layer) => all.every(passes(layer)) && (!either.length || either.some(passes(layer)));
  const chosen = layers.filter((layer) => finds(layer) && fits(layer));
  const sign = state.descending ? -1 : 1,
    values = new Map(chosen.map((layer) => [layer, value(layer) ?? null]));
  return chosen.sort((left, right) => {
    const [a, b] = [values.get(left), values.get(right)];
    if (a === null || b === null) return (a === null) - (b === null) || left.index - right.index;
    const order = typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b;
    return order * sign || left.index - right.index;
  });
}

// ---- the page

function segments(id, list, key, change) {
  const choose = (chosen) => {
    state[key] = chosen;
    change();
    mark();
    write();
  };
  const button = (one) =>
    element("button", { type: "button", "data-key": one.key, onclick: () => choose(one.key) }, one.label);
  get(id).replaceChildren(...list.map(button));
  return () => {
    for (const one of get(id).children) one.setAttribute("aria-pressed", one.dataset.key === state[key]);
  };
}

const plots = [];
let marks = [];

function refresh() {
  shown = choose();
  for (const plot of plots) plot.show(plot.paint?.has ? shown.filter(plot.paint.has) : shown);
  table.show(shown, state.sort, state.descending);
  const all = plural(layers.length, "layer");
  get("count").textContent = shown.length === layers.length ? all : `${grouped(shown.length)} of ${all}`;
  get("reset").hidden = shown.length === layers.length && !state.q;
  mark();
  write();
}
/** Updates legends, explanations and buttons. */
function mark() {
  for (const one of marks) one();
  get("search").value = state.q;
  get("regex").setAttribute("aria-pressed", state.regex);
  get("sort").value = state.sort;
  get("direction").textContent = state.descending ? "↓" : "↑";
  const turn = state.descending ? "Descending; switch to ascending" : "Ascending; switch to descending";
  get("direction").setAttribute("aria-label", turn);
  for (const chip of get("filters").children) chip.setAttribute("aria-pressed", state.only.has(chip.dataset.key));
  get("layouts").hidden = !compares || view().only !== undefined || plots[0].narrow;
  get("mix-legend").replaceChildren(...mixLegend());
  get("alone-legend").replaceChildren(...aloneLegend());
  get("picture-how").replaceChildren(...explained(view().how));
  get("picture-legend").replaceChildren(...pictureLegend());
  get("levels-how").textContent = heat().how;
  get("levels-legend").replaceChildren(...levelsLegend());
  const other = document.documentElement.dataset.theme === "dark" ? "Light" : "Dark";
  get("theme").textContent = other;
  get("theme").setAttribute("aria-label", `Switch to ${other.toLowerCase()} colors`);
}
function paint() {
  const system = matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  document.documentElement.dataset.theme = printing ? "light" : state.theme || system;
  readInks();
  for (const plot of plots) plot.layout();
  mark();
}
function sortBy(figure) {
  if (state.sort === figure.key) state.descending = !state.descending;
  else Object.assign(state, { sort: figure.key, descending: Boolean(figure.descending) });
  refresh();
}

let shown = layers;
read();
for (const id of ["tools", "figures", "theme"]) get(id).hidden = false;
get("picture").hidden = mixes.length && !(seen && layers.some(picture.has));
get("mix").hidden = get("alone").hidden = !mixes.length;
get("levels").hidden = !layers.some((layer) => layer.sides.some((figure) => figure && figure.sigma_absmax.some(Boolean)));
readInks();
const reads = "one row per layer. Use the arrow keys to read rows";
plots.push(
  new Plot(get("picture-plot"), `Distribution of each layer’s inputs, ${reads}; the table has the same measurements.`, picture),
  new Plot(get("levels-plot"), `Range of each layer at each noise level, ${reads}.`, levels),
);
if (mixes.length) {
  const said = `Quality with each layer alone in each format, ${reads}; the table has the same measurements.`;
  plots.push(new MixChart(get("mix-plot")), new Plot(get("alone-plot"), said, alone));
}
const table = new Table(get("figures-table"), sortBy);

marks = [
  segments("views", VIEWS, "view", () => {
    const top = plots[0].box.scrollTop;
    plots[0].layout();
    plots[0].box.scrollTop = top;
    plots[0].draw();
  }),
  segments("layouts", LAYOUTS, "layout", () => plots[0].layout()),
  segments("heats", HEATS, "heat", () => plots[1].layout()),
];
const chip = ({ key, label, test }) => {
  const number = layers.filter(test).length;
  const toggle = () => {
    if (!state.only.delete(key)) state.only.add(key);
    refresh();
  };
  const attributes = { type: "button", class: "chip", "data-key": key, disabled: !number, onclick: toggle };
  return element("button", attributes, label, element("b", {}, grouped(number)));
};
get("filters").replaceChildren(...FILTERS.map(chip));
get("sort").replaceChildren(...orders.map((order) => element("option", { value: order.key }, order.label)));
/** Changes the state on an event, and shows it. */
const on = (id, event, change) =>
  get(id).addEventListener(event, () => {
    change(get(id).value);
    refresh();
  });
on("sort", "change", (key) => {
  const order = orders.find((one) => one.key === key);
  Object.assign(state, { sort: key, descending: Boolean(order.descending) });
});
on("direction", "click", () => (state.descending = !state.descending));
on("search", "input", (text) => (state.q = text));
on("regex", "click", () => (state.regex = !state.regex));
on("reset", "click", () => Object.assign(state, { q: "", only: new Set() }));
get("theme").addEventListener("click", () => {
  state.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  paint();
  write();
});
for (const button of document.querySelectorAll(".copy")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.previousElementSibling.textContent);
    button.textContent = "Copied";
  });
}
get("save").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob(["\ufeff" + csv(shown)], { type: "text/csv" }));
  element("a", { href: url, download: given.title.replace(/[^\w.-]+/g, "_") + ".csv" }).click();
  URL.revokeObjectURL(url);
});
const dangers = Object.entries(given.risks).map(([risk, text]) => [`risk: ${risk}`, upper(text) + "."]);
const explanation = ([word, text]) => [element("dt", {}, word), element("dd", {}, text)];
get("glossary").replaceChildren(...[...Object.entries(TERMS), ...dangers].flatMap(explanation));

const wordAt = (event) => event.target.closest && event.target.closest("[data-term]");
for (const kind of ["pointerover", "pointerout", "focusin", "focusout"])
  document.addEventListener(kind, (event) => {
    const word = wordAt(event);
    if (!word || (kind === "focusin" && !word.matches(":focus-visible"))) return;
    if (kind.endsWith("out")) card.leave();
    else card.explain(word.dataset.term, word.getBoundingClientRect());
  });
document.addEventListener("click", (event) => {
  const word = wordAt(event);
  if (word && word.classList.contains("term")) return card.explain(word.dataset.term, word.getBoundingClientRect());
  if (!event.target.closest(".plot, .card")) card.hide();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") card.hide();
  if (event.key === "/" && !event.target.closest("input, select, textarea")) {
    event.preventDefault();
    get("search").focus();
  }
});
addEventListener("scroll", () => card.pinned || card.hide(), { passive: true });
addEventListener("hashchange", () => {
  read();
  paint();
  refresh();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", paint);
new ResizeObserver(() => {
  document.documentElement.style.setProperty("--tools", get("tools").offsetHeight + "px");
}).observe(get("tools"));
const print = (on) => {
  printing = on;
  paint();
  table.redraw();
};
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));
refresh();
