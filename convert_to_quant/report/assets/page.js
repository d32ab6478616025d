// What the reader asks for (view, search, filters, order) stands in the hash, and governs charts and table alike.

const get = (id) => document.getElementById(id);
const card = {
  node: get("card"),
  layer: null,
  pinned: false,

  hover(layer, event) {
    if (this.pinned) return;
    if (!layer) return this.leave();
    this.show(layer, { left: event.clientX, right: event.clientX, top: event.clientY, bottom: event.clientY });
  },
  leave() {
    if (!this.pinned) this.hide();
  },
  pin(layer, event) {
    if (!layer || (this.pinned && this.layer === layer)) return this.hide();
    this.pinned = true;
    this.layer = null;
    this.show(layer, { left: event.clientX, right: event.clientX, top: event.clientY, bottom: event.clientY });
  },
  hide() {
    this.pinned = false;
    this.layer = null;
    this.node.hidden = true;
    this.node.classList.remove("pinned");
    for (const plot of plots) plot.activate(null);
  },
  /** Shows a layer's figures next to a place; `spoken` reads the gist to those who cannot see it. */
  show(layer, place, spoken = false) {
    if (this.layer !== layer) {
      this.layer = layer;
      this.node.replaceChildren(...describe(layer));
      if (this.pinned)
        this.node.append(
          element("button", { type: "button", class: "close", "aria-label": "Close", onclick: () => this.hide() }, "×"),
        );
      for (const plot of plots) plot.activate(layer);
    }
    this.place(place);
    if (spoken) get("spoken").textContent = gist(layer);
  },
  explain(word, place) {
    this.pinned = false;
    this.layer = null;
    this.node.replaceChildren(
      element("p", {}, element("b", {}, word[0].toUpperCase() + word.slice(1)), ". " + TERMS[word]),
    );
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

function describe(layer) {
  const lines = [
    element("h3", {}, layer.name),
    element("p", { class: "sub" }, `${grouped(layer.shape[1])} inputs → ${grouped(layer.shape[0])} outputs`),
  ];
  layer.sides.forEach((figure, s) => {
    const title = compares ? `${letters[s]}: ${sides[s].label}` : "";
    if (!figure) return lines.push(element("p", { class: "sub" }, `${title}: not in this file`));
    const states = [figure.before, figure.after, ...(s === 1 && layer.crossed ? [layer.crossed] : [])];
    const row = (label, show) =>
      element("tr", {}, element("th", { scope: "row" }, label), ...states.map((at) => element("td", {}, show(at))));
    const words = (at) => element("span", { class: at.risk && !figure.unused ? "bad" : "" }, riskWords(at, figure));
    lines.push(
      element(
        "table",
        {},
        element(
          "thead",
          {},
          element(
            "tr",
            {},
            element("th", { class: "whose" }, title),
            ...["present", "new", "A’s new"]
              .slice(0, states.length)
              .map((text) => element("th", { scope: "col" }, text)),
          ),
        ),
        element(
          "tbody",
          {},
          row("state", words),
          row("scale", (at) => number(at.scale)),
          row("holds up to", (at) => number(at.scale * grid.max)),
          row("clipped", (at) => percent(at.clipped)),
          row("vanished", (at) => percent(at.vanished)),
          row("tokens lost", (at) => percent(at.rows_lost)),
          row("SQNR", (at) => (at.sqnr_db === null ? missing : decibels(at.sqnr_db) + " dB")),
        ),
      ),
    );
    lines.push(
      element(
        "p",
        { class: "sub" },
        `largest ${number(figure.absmax)}, 99.9 % under ${number(figure.p999)}, median ${number(figure.median)}; ${plural(figure.rows, "token")} seen` +
          (work[s] ? `; ${percent(figure.multiply_adds / work[s])} of the multiply-adds` : ""),
      ),
    );
    if (states.some((at) => at.full_precision))
      lines.push(
        element("p", { class: "sub" }, "Losses are those that FP8 would have; in full precision there are none."),
      );
    for (const risk of new Set(states.map((at) => !figure.unused && at.risk)))
      if (risk) lines.push(element("p", { class: "sub" }, `${risk}: ${given.risks[risk]}`));
    const why = [
      figure.unused || figure.reason,
      figure.conditioning_dependent && "its range moves with the made-up conditioning",
    ]
      .filter(Boolean)
      .join("; ");
    if (why) lines.push(element("p", {}, element("span", { class: "sub" }, "why: "), why));
  });
  return lines;
}
/** A layer in a sentence, to be read aloud. */
function gist(layer) {
  const at = (words, state, figure) => `${riskWords(state, figure)} at the ${words} scale ${number(state.scale)}`;
  const told = layer.sides.map((figure, s) => {
    const whose = compares ? `${letters[s]}: ` : "";
    if (!figure) return `${whose}not there`;
    const states = [at("present", figure.before, figure), at("new", figure.after, figure)];
    return whose + [...states, `largest ${number(figure.absmax)}`].join(", ");
  });
  return `${layer.name}: ${told.join("; ")}`;
}

// ---- the hash

function read() {
  const said = new URLSearchParams(location.hash.slice(1)),
    sort = said.get("sort") || "order";
  const known = (list, key) => (list.some((one) => one.key === key) ? key : list[0].key);
  Object.assign(state, {
    view: known(VIEWS, said.get("view")),
    layout: known(LAYOUTS, said.get("layout")),
    heat: known(HEATS, said.get("heat")),
    q: said.get("q") || "",
    regex: said.get("regex") === "1",
    only: new Set((said.get("only") || "").split(",").filter((key) => FILTERS.some((filter) => filter.key === key))),
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
  put("sort", (state.descending ? "-" : "") + state.sort, "order");
  put("theme", state.theme);
  history.replaceState(null, "", location.pathname + location.search + (said.size ? "#" + said : ""));
}

/** The layers asked for, in the order asked for; layers without the figure come last either way. */
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
  const chosen = layers.filter((layer) => finds(layer) && filters.every((filter) => filter.test(layer)));
  const sign = state.descending ? -1 : 1,
    values = new Map(chosen.map((layer) => [layer, value(layer)]));
  return chosen.sort((left, right) => {
    const a = values.get(left),
      b = values.get(right);
    if (a === null || a === undefined) return b === null || b === undefined ? left.index - right.index : 1;
    if (b === null || b === undefined) return -1;
    return (
      (typeof a === "string" ? a.localeCompare(b, "en", { numeric: true }) : a - b) * sign || left.index - right.index
    );
  });
}

// ---- what stands on the page

function segments(id, list, key, change) {
  get(id).replaceChildren(
    ...list.map((one) =>
      element("button", { type: "button", "data-key": one.key, onclick: () => change(one.key) }, one.label),
    ),
  );
  return () => {
    for (const button of get(id).children) button.setAttribute("aria-pressed", button.dataset.key === state[key]);
  };
}

const plots = [];
let marks = [];

function refresh() {
  const rows = choose();
  shown = rows;
  for (const plot of plots) plot.show(rows);
  table.show(rows, state.sort, state.descending);
  get("count").textContent =
    rows.length === layers.length
      ? plural(layers.length, "layer")
      : `${grouped(rows.length)} of ${plural(layers.length, "layer")}`;
  get("reset").hidden = rows.length === layers.length && !state.q;
  mark();
  write();
}
/** What charts say about themselves, and which buttons are down. */
function mark() {
  for (const one of marks) one();
  get("search").value = state.q;
  get("regex").setAttribute("aria-pressed", state.regex);
  get("sort").value = state.sort;
  get("direction").textContent = state.descending ? "↓" : "↑";
  get("direction").setAttribute(
    "aria-label",
    state.descending ? "Descending; make it ascending" : "Ascending; make it descending",
  );
  for (const chip of get("filters").children) chip.setAttribute("aria-pressed", state.only.has(chip.dataset.key));
  get("layouts").hidden = !compares || view().only !== undefined || plots[0].narrow;
  get("picture-how").replaceChildren(...explained(view().how));
  get("picture-legend").replaceChildren(...pictureLegend());
  get("levels-how").textContent = heat().how;
  get("levels-legend").replaceChildren(...levelsLegend());
  get("theme").textContent = document.documentElement.dataset.theme === "dark" ? "Light" : "Dark";
  get("theme").setAttribute(
    "aria-label",
    `Switch to ${document.documentElement.dataset.theme === "dark" ? "light" : "dark"} colours`,
  );
}
function paint() {
  document.documentElement.dataset.theme = printing
    ? "light"
    : state.theme || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
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
for (const id of ["tools", "picture", "figures", "theme"]) get(id).hidden = false;
get("levels").hidden = !layers.some((layer) => layer.sides.some((figure) => figure && figure.sigma_absmax.some(Boolean)));
readInks();
plots.push(
  new Plot(
    get("picture-plot"),
    "Density of each layer’s inputs, one line per layer. Arrow keys read the lines; the table below has the same figures.",
    picture,
  ),
);
plots.push(
  new Plot(
    get("levels-plot"),
    "Range of each layer at each noise level, one line per layer. Arrow keys read the lines.",
    levels,
  ),
);
const table = new Table(get("figures-table"), sortBy);

marks = [
  segments("views", VIEWS, "view", (key) => {
    const from = state.view;
    state.view = key;
    slide(plots[0], from, () => {
      const top = plots[0].box.scrollTop;
      plots[0].layout();
      plots[0].box.scrollTop = top;
      plots[0].draw();
    });
    mark();
    write();
  }),
  segments("layouts", LAYOUTS, "layout", (key) => {
    state.layout = key;
    plots[0].layout();
    mark();
    write();
  }),
  segments("heats", HEATS, "heat", (key) => {
    state.heat = key;
    plots[1].layout();
    mark();
    write();
  }),
];
get("filters").replaceChildren(
  ...FILTERS.map((filter) => {
    const number = layers.filter(filter.test).length;
    return element(
      "button",
      {
        type: "button",
        class: "chip",
        "data-key": filter.key,
        disabled: !number,
        onclick: () => {
          if (!state.only.delete(filter.key)) state.only.add(filter.key);
          refresh();
        },
      },
      filter.label,
      element("b", {}, grouped(number)),
    );
  }),
);
get("sort").replaceChildren(...orders.map((order) => element("option", { value: order.key }, order.label)));
get("sort").addEventListener("change", () => {
  const order = orders.find((one) => one.key === get("sort").value);
  Object.assign(state, { sort: order.key, descending: Boolean(order.descending) });
  refresh();
});
get("direction").addEventListener("click", () => {
  state.descending = !state.descending;
  refresh();
});
get("search").addEventListener("input", () => {
  state.q = get("search").value;
  refresh();
});
get("regex").addEventListener("click", () => {
  state.regex = !state.regex;
  refresh();
});
get("reset").addEventListener("click", () => {
  state.q = "";
  state.only.clear();
  refresh();
});
get("theme").addEventListener("click", () => {
  state.theme = document.documentElement.dataset.theme === "dark" ? "light" : "dark";
  paint();
  write();
});
get("save").addEventListener("click", () => {
  const url = URL.createObjectURL(new Blob(["\ufeff" + csv(shown)], { type: "text/csv" }));
  element("a", { href: url, download: given.title.replace(/[^\w.-]+/g, "_") + ".csv" }).click();
  URL.revokeObjectURL(url);
});
const words = {
  ...TERMS,
  ...Object.fromEntries(
    Object.entries(given.risks).map(([risk, text]) => [`risk: ${risk}`, text[0].toUpperCase() + text.slice(1) + "."]),
  ),
};
get("glossary").replaceChildren(
  ...Object.entries(words).flatMap(([word, text]) => [element("dt", {}, word), element("dd", {}, text)]),
);

const wordAt = (event) => event.target.closest && event.target.closest("[data-term]");
for (const [kind, open] of [
  ["pointerover", true],
  ["pointerout", false],
  ["focusin", true],
  ["focusout", false],
]) {
  document.addEventListener(kind, (event) => {
    const word = wordAt(event);
    if (!word || (kind === "focusin" && !word.matches(":focus-visible"))) return;
    if (open) card.explain(word.dataset.term, word.getBoundingClientRect());
    else card.leave();
  });
}
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
new ResizeObserver(() =>
  document.documentElement.style.setProperty("--tools", get("tools").offsetHeight + "px"),
).observe(get("tools"));
const print = (on) => {
  printing = on;
  paint();
  table.redraw();
};
addEventListener("beforeprint", () => print(true));
addEventListener("afterprint", () => print(false));
refresh();
