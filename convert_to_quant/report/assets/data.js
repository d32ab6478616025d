// The document, and facts about its figures: what they are called, how they are written, in which order they stand.
// A "figure" is a column of the table and of the CSV, and a way to sort, all from one entry of `figures`; paper has no
// room but for those that are `printed`.

const given = JSON.parse(document.getElementById("document").textContent);
const sides = given.sides,
  compares = sides.length === 2,
  letters = ["A", "B"];
const axis = given.axis,
  grid = given.grid;
const ZONES = [
  // log2 of |x| / scale; half of the smallest code rounds to 0
  { key: "vanished", low: -Infinity, high: Math.log2(grid.smallest) - 1, says: "rounds to 0" },
  { key: "subnormal", low: Math.log2(grid.smallest) - 1, high: Math.log2(grid.smallest_normal), says: "few steps left" },
  { key: "normal", low: Math.log2(grid.smallest_normal), high: Math.log2(grid.max), says: "even, relative steps" },
  { key: "saturated", low: Math.log2(grid.max), high: Infinity, says: "cut off at " + grid.max },
];

const TERMS = {
  scale:
    `What a stored FP8 number is multiplied by to give the real one. The input scale sets which range of a layer’s inputs FP8 can hold: up to ${grid.max} times the scale.`,
  "at risk":
    "Quantized at this scale, the inputs lose more than FP8’s own rounding ever costs. The word says how: clips, vanishes, tokens lost, coarse.",
  clipped: `Share of the input values beyond ${grid.max} times the scale: they are cut off.`,
  vanished: "Share of the input values that are so small beside the scale that they become 0.",
  "tokens lost":
    "Share of tokens that lie wholly among FP8’s smallest steps because outlier tokens set the scale. Errors over the whole tensor hide them.",
  SQNR: "Signal to quantization noise of the inputs, in decibels: how much larger they are than the error that FP8 makes. About 31 dB is what FP8 gives usual inputs at best; each 6 dB less doubles the error.",
  largest: "The largest input magnitude that was seen (absmax).",
  octave: "A factor of two. One octave more range is twice as large.",
  "full precision":
    "The layer’s inputs are not quantized: its FP8 weights are widened and multiplied with the inputs as they are.",
  "multiply-adds": "Share of the model’s arithmetic that the layer does: what full precision costs.",
  saturated: `Beyond ${grid.max} times the scale: FP8 cuts such values off.`,
  normal: "FP8 keeps four significant bits here, whatever the size.",
  subnormal: "Below 2⁻⁶ times the scale FP8’s steps no longer shrink: the smaller a value, the coarser it is kept.",
};

const missing = "–";
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 }).format; // one for all: making them is slow
const clean = (text) => text.replace("e+", "e").replace("-", "−");
function number(x) {
  if (x === null || x === undefined) return missing;
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return clean(x.toExponential(2));
  return clean(size >= 1000 ? grouped(x) : String(+x.toPrecision(4)));
}
function percent(x) {
  if (x === null || x === undefined) return missing;
  if (x === 0) return "0 %";
  if (x < 1e-5) return "< 0.001 %";
  return (x >= 0.9995 ? 100 : +(100 * x).toPrecision(x < 0.1 ? 2 : 3)) + " %";
}
const decibels = (x) => (x === null || x === undefined ? missing : clean(x.toFixed(1)));
const octaves = (x) =>
  x === null || x === undefined ? missing : x === 0 ? "0" : (x > 0 ? "+" : "−") + Math.abs(x).toFixed(2);
const count = (x) => (x ? grouped(x) : missing);
const plural = (n, noun) => `${grouped(n)} ${noun}${n === 1 ? "" : "s"}`;
const log2 = (x) => (x > 0 ? Math.log2(x) : null);
const ratio = (a, b) => (a > 0 && b > 0 ? Math.log2(a / b) : null);

const risks = ["", ...Object.keys(given.risks || {}).reverse()]; // the least first
const severity = (risk) => Math.max(risks.indexOf(risk), 0);
const exact = (figure) => figure.after.full_precision || Boolean(figure.unused);

/** Levels of a density as an array over the whole axis, or null. */
function decode(density) {
  if (!density) return null;
  const levels = new Uint8Array((axis.high - axis.low) * axis.per_octave);
  levels.set(
    Uint8Array.from(atob(density[1]), (c) => c.charCodeAt(0)),
    density[0],
  );
  return levels;
}

const layers = given.layers.map((layer, index) => ({
  ...layer,
  index,
  sides: layer.sides.map((figure, s) => figure && { ...figure, number: 2 * index + s, levels: decode(figure.density) }),
  cut: Math.max(layer.name.lastIndexOf(".", layer.name.lastIndexOf(".") - 1), 0),
}));
const seen = layers.some((layer) => layer.sides.some((figure) => figure && figure.levels));
const present = sides.some((side) => side.model) ? "present scale" : "scale 1.0"; // what ComfyUI reads where there is none
const work = sides.map((_, s) =>
  layers.reduce((sum, layer) => sum + (layer.sides[s] ? layer.sides[s].multiply_adds : 0), 0),
);

const of = (read) => (s) => (layer) => (layer.sides[s] ? read(layer.sides[s], s) : null);
const riskOf = (state, figure) =>
  state.full_precision || figure.unused ? -1 : severity(state.risk) + (figure.source === "none" ? -0.5 : 0);
function riskWords(state, figure) {
  if (!state) return missing;
  if (figure.unused) return "not used";
  if (state.full_precision) return "full precision";
  return state.risk || (figure.source === "none" ? "not seen" : "fine");
}
const PER_SIDE = [
  {
    key: "now",
    printed: true,
    label: "risk now",
    term: "at risk",
    text: true,
    descending: true,
    value: of((f) => riskOf(f.before, f)),
    show: of((f) => riskWords(f.before, f)),
  },
  {
    key: "calibrated",
    printed: true,
    label: "risk calibrated",
    term: "at risk",
    text: true,
    descending: true,
    value: of((f) => riskOf(f.after, f)),
    show: of((f) => riskWords(f.after, f)),
  },
  {
    key: "scale_before",
    printed: true,
    label: present,
    term: "scale",
    descending: true,
    value: of((f) => f.before.scale),
    format: number,
  },
  {
    key: "scale_after",
    printed: true,
    label: "new scale",
    term: "scale",
    descending: true,
    value: of((f) => f.after.scale),
    format: number,
  },
  {
    key: "change",
    label: "change, octaves",
    term: "octave",
    descending: true,
    value: of((f) => ratio(f.after.scale, f.before.scale)),
    format: octaves,
  },
  {
    key: "absmax",
    printed: true,
    label: "largest |x|",
    term: "largest",
    descending: true,
    value: of((f) => f.absmax),
    format: number,
  },
  { key: "p999", label: "99.9th percentile", descending: true, value: of((f) => f.p999), format: number },
  { key: "median", label: "median |x|", descending: true, value: of((f) => f.median), format: number },
  { key: "rms", label: "root mean square", descending: true, value: of((f) => f.rms), format: number },
  {
    key: "clipped_before",
    printed: true,
    label: "clipped now",
    term: "clipped",
    descending: true,
    value: of((f) => f.before.clipped),
    format: percent,
  },
  {
    key: "clipped_after",
    label: "clipped calibrated",
    term: "clipped",
    descending: true,
    value: of((f) => f.after.clipped),
    format: percent,
  },
  {
    key: "vanished_before",
    printed: true,
    label: "vanished now",
    term: "vanished",
    descending: true,
    value: of((f) => f.before.vanished),
    format: percent,
  },
  {
    key: "vanished_after",
    label: "vanished calibrated",
    term: "vanished",
    descending: true,
    value: of((f) => f.after.vanished),
    format: percent,
  },
  {
    key: "rows_lost_before",
    label: "tokens lost now",
    term: "tokens lost",
    descending: true,
    value: of((f) => f.before.rows_lost),
    format: percent,
  },
  {
    key: "rows_lost_after",
    label: "tokens lost calibrated",
    term: "tokens lost",
    descending: true,
    value: of((f) => f.after.rows_lost),
    format: percent,
  },
  {
    key: "sqnr_before",
    printed: true,
    label: "SQNR now, dB",
    term: "SQNR",
    value: of((f) => f.before.sqnr_db),
    format: decibels,
  },
  {
    key: "sqnr_after",
    printed: true,
    label: "SQNR calibrated, dB",
    term: "SQNR",
    value: of((f) => f.after.sqnr_db),
    format: decibels,
  },
  { key: "zeros", label: "zeros", descending: true, value: of((f) => f.zeros), format: percent },
  { key: "rows", label: "tokens seen", descending: true, value: of((f) => f.rows), format: count },
  {
    key: "work",
    label: "multiply-adds",
    term: "multiply-adds",
    descending: true,
    value: of((f, s) => (work[s] ? f.multiply_adds / work[s] : null)),
    format: percent,
  },
  { key: "reason", label: "why", text: true, long: true, value: of((f) => f.unused || f.reason) },
];
const between = (read) => (layer) =>
  layer.sides[0] && layer.sides[1] ? read(layer.sides[0], layer.sides[1], layer) : null;
const crosses = layers.some((layer) => layer.crossed);
const COMPARED = [
  {
    key: "range_difference",
    label: "range, B to A, octaves",
    term: "octave",
    descending: true,
    value: between((a, b) => ratio(b.absmax, a.absmax)),
    format: octaves,
  },
  {
    key: "scale_difference",
    label: "new scale, B to A, octaves",
    term: "octave",
    descending: true,
    value: between((a, b) => ratio(b.after.scale, a.after.scale)),
    format: octaves,
  },
  ...(crosses
    ? [
        {
          key: "crossed",
          label: "risk of A’s new scale on B",
          term: "at risk",
          text: true,
          descending: true,
          value: between((a, b, l) => l.crossed && riskOf(l.crossed, b)),
          show: between((a, b, l) => l.crossed && riskWords(l.crossed, b)),
        },
        {
          key: "crossed_sqnr",
          label: "SQNR of that, dB",
          term: "SQNR",
          value: between((a, b, l) => l.crossed && l.crossed.sqnr_db),
          format: decibels,
        },
      ]
    : []),
];
const ORDER = { key: "order", label: "place in the model", value: (layer) => layer.index };
const NAME = { key: "name", printed: true, label: "layer", text: true, value: (layer) => layer.name };
const figures = [
  NAME,
  {
    key: "shape",
    label: "out × in",
    descending: true,
    value: (layer) => layer.shape[0] * layer.shape[1],
    show: (layer) => layer.shape.join(" × "),
  },
  ...(compares ? COMPARED : []),
  ...sides.flatMap((_, s) =>
    PER_SIDE.map((column) => ({
      ...column,
      key: column.key + (compares ? "." + letters[s].toLowerCase() : ""),
      label: (compares ? letters[s] + ": " : "") + column.label,
      value: column.value(s),
      show: column.show && column.show(s),
    })),
  ),
].map((figure) => ({
  ...figure,
  show: (layer) =>
    figure.format ? figure.format(figure.value(layer)) : ((figure.show || figure.value)(layer) ?? missing),
}));
const orders = [ORDER, ...figures];

const anySide = (test) => (layer) => layer.sides.some((figure) => figure && test(figure));
const FILTERS = [
  { key: "now", label: "at risk now", test: anySide((f) => f.before.risk) },
  { key: "after", label: "at risk after", test: anySide((f) => f.after.risk) },
  ...(crosses
    ? [{ key: "crossed", label: "A’s scale at risk on B", test: (layer) => layer.crossed && layer.crossed.risk }]
    : []),
  { key: "full", label: "full precision", test: anySide((f) => f.after.full_precision) },
  { key: "changed", label: "changed", test: anySide((f) => f.changed) },
];

/** An element; texts are always texts, never markup. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (value === true) made.setAttribute(key, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(key, value);
  }
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}
/** A layer's name of which the beginning gives way where room is short: block numbers and the end tell layers apart. */
const nameOf = (layer) =>
  element(
    "span",
    { class: "name", title: layer.name },
    layer.cut
      ? element("span", { class: "front" }, element("bdi", { dir: "ltr" }, layer.name.slice(0, layer.cut)))
      : null,
    element("span", { class: "back" }, layer.name.slice(layer.cut)),
  );
/** Words in braces as terms that explain themselves. */
const explained = (text) => text.split(/\{(scale|full precision)\}/).map((part, n) => (n % 2 ? term(part) : part));
const term = (word, text) => element("button", { type: "button", class: "term", "data-term": word }, text || word);

/** What a variable of the style sheet says; asked once per theme, since asking is slow. */
const themed = new Map();
function theme(name) {
  if (!themed.has(name))
    themed.set(
      name,
      getComputedStyle(document.documentElement)
        .getPropertyValue("--" + name)
        .trim(),
    );
  return themed.get(name);
}

/** Has a parent hold the lines of a window and no others, in their order; `made` knows those that it has. */
function fill(parent, made, first, last, make) {
  for (const [number, line] of made)
    if (number < first || number >= last) {
      line.remove();
      made.delete(number);
    }
  let next = parent.firstChild;
  for (let number = first; number < last; number++) {
    if (made.has(number)) next = made.get(number).nextSibling;
    else {
      made.set(number, make(number));
      parent.insertBefore(made.get(number), next);
    }
  }
}
const still = () => matchMedia("(prefers-reduced-motion: reduce)").matches;
