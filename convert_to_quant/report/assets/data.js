// The document, and its measurements: names, number formats, and sorting. Each entry of `figures` is a column of the table
// and of the CSV, and a sort order. A print has room only for those that are `printed`.

const given = JSON.parse(document.getElementById("document").textContent);
const sides = given.sides,
  compares = sides.length === 2,
  letters = ["A", "B"];
const mixes = sides.map((side) => side.mix).filter((mix) => mix.curve && mix.curve.length);
const axis = given.axis,
  grid = given.grid;
const ZONES = [
  // log2 of |x| / scale; half of the smallest code rounds to 0
  { key: "vanished", low: -Infinity, high: Math.log2(grid.smallest) - 1, says: given.zones.vanished },
  { key: "subnormal", low: Math.log2(grid.smallest) - 1, high: Math.log2(grid.smallest_normal), says: given.zones.subnormal },
  { key: "normal", low: Math.log2(grid.smallest_normal), high: Math.log2(grid.max), says: given.zones.normal },
  { key: "saturated", low: Math.log2(grid.max), high: Infinity, says: given.zones.saturated },
];

const TERMS = {
  scale: `The factor from stored FP8 numbers to real ones. The input scale sets the range of inputs that FP8 can represent: up to ${grid.max} times the scale.`,
  "at risk": "At this scale, quantizing the inputs costs more than FP8 rounding ever does. The label says how: clips, vanishes, tokens lost, coarse.",
  clipped: `Share of input values above ${grid.max} times the scale. They are clipped.`,
  vanished: "Share of input values that are too small for the scale and round to 0.",
  "tokens lost": "Share of tokens that lie entirely among FP8’s smallest steps, because outlier tokens set the scale. The error over the whole tensor hides them.",
  SQNR: "Signal-to-quantization-noise ratio of the inputs, in decibels. FP8 reaches about 31 dB on typical inputs; 6 dB less means twice the error.",
  alone: "SQNR of the model’s output (velocity), in decibels, with only this layer in that format and all others in full precision.",
  "half a bit more": "The layer’s format in the best mix with half a bit more per weight.",
  largest: "The largest observed input magnitude (absmax).",
  octave: "A factor of two.",
  "full precision": "The layer’s inputs are not quantized: its FP8 weights are converted and multiplied with the original inputs.",
  compute: "The layer’s share of the model’s compute (MACs): the cost of full precision.",
  saturated: `Above ${grid.max} times the scale: FP8 clips these values.`,
  normal: "FP8 keeps four significant bits here, at any magnitude.",
  subnormal: "Below 2⁻⁶ times the scale, FP8’s steps stop shrinking: smaller values keep fewer bits.",
};

const missing = "–";
const grouped = new Intl.NumberFormat("en", { maximumFractionDigits: 0 }).format; // shared, since creating one is slow
const clean = (text) => text.replace("e+", "e").replace("-", "−");
/** A number format with a dash for unknown values. */
const written = (write) => (x) => (x === null || x === undefined ? missing : write(x));
const number = written((x) => {
  const size = Math.abs(x);
  if (size === 0) return "0";
  if (size >= 1e6 || size < 1e-3) return clean(x.toExponential(2));
  return clean(size >= 1000 ? grouped(x) : String(+x.toPrecision(4)));
});
const percent = written((x) => {
  if (x === 0) return "0 %";
  if (x < 1e-5) return "< 0.001 %";
  return (x >= 0.9995 ? 100 : +(100 * x).toPrecision(x < 0.1 ? 2 : 3)) + " %";
});
const decibels = written((x) => clean(x.toFixed(1)));
const octaves = written((x) => (x === 0 ? "0" : (x > 0 ? "+" : "−") + Math.abs(x).toFixed(2)));
const count = (x) => (x ? grouped(x) : missing);
const plural = (n, noun) => `${grouped(n)} ${noun}${n === 1 ? "" : "s"}`;
const log2 = (x) => (x > 0 ? Math.log2(x) : null);
const ratio = (a, b) => (a > 0 && b > 0 ? Math.log2(a / b) : null);

const risks = ["", ...Object.keys(given.risks || {}).reverse()]; // the mildest first
const severity = (risk) => Math.max(risks.indexOf(risk), 0);
const exact = (figure) => figure.after.full_precision || Boolean(figure.unused);

/** Levels of a density as an array over the whole axis, or null. */
function decode(density) {
  if (!density) return null;
  const levels = new Uint8Array((axis.high - axis.low) * axis.per_octave);
  const bytes = Uint8Array.from(atob(density[1]), (c) => c.charCodeAt(0));
  levels.set(bytes, density[0]);
  return levels;
}

const layers = given.layers.map((layer, index) => ({
  ...layer,
  index,
  sides: layer.sides.map((figure, s) => figure && { ...figure, number: 2 * index + s, levels: decode(figure.density) }),
  cut: Math.max(layer.name.lastIndexOf(".", layer.name.lastIndexOf(".") - 1), 0),
}));
const seen = layers.some((layer) => layer.sides.some((figure) => figure && figure.levels));
const currentScale = sides.some((side) => side.model) ? "current scale" : "scale 1.0"; // which ComfyUI assumes
const work = sides.map((_, s) => layers.reduce((sum, { sides }) => sum + (sides[s]?.multiply_adds ?? 0), 0));
/** A layer's share of a side's compute. */
const share = (figure, s) => (work[s] ? figure.multiply_adds / work[s] : null);

const of = (read) => (s) => (layer) => (layer.sides[s] ? read(layer.sides[s], s) : null);
const riskOf = (state, figure) =>
  state.full_precision || figure.unused ? -1 : severity(state.risk) + (figure.source === "none" ? -0.5 : 0);
function riskWords(state, figure) {
  if (!state) return missing;
  if (figure.inputs) return figure.inputs;
  if (figure.unused) return "not used";
  if (state.full_precision) return "full precision";
  return state.risk || (figure.source === "none" ? "not observed" : "fine");
}
/** A measurement on one side: its key, heading, number format, and how to read it; sorted by the largest first. */
const column = (key, label, format, read, more) => ({ key, label, format, descending: true, ...more, value: of(read) });
const risk = (key, label, when) => ({
  ...column(key, label, null, (f) => riskOf(f[when], f), { printed: true, term: "at risk", text: true }),
  show: of((f) => riskWords(f[when], f)),
});
const loss = (key, word, printed) => [
  column(key + "_before", word + " now", percent, (f) => f.before[key], { term: word, printed }),
  column(key + "_after", word + " calibrated", percent, (f) => f.after[key], { term: word }),
];
const word = (key, label, term) =>
  column(key, label, null, (f) => f[key] || missing, { text: true, term, printed: true, descending: false });
const FORMAT = [
  word("stored", "format"),
  column("bits", "bits", written((x) => x.toFixed(2)), (f) => f.bits),
  word("more", "with half a bit more", "half a bit more"),
].filter(() => mixes.length);
const PER_SIDE = [
  risk("now", "risk now", "before"),
  risk("calibrated", "risk calibrated", "after"),
  column("scale_before", currentScale, number, (f) => f.before.scale, { printed: true, term: "scale" }),
  column("scale_after", "new scale", number, (f) => f.after.scale, { printed: true, term: "scale" }),
  column("change", "change, octaves", octaves, (f) => ratio(f.after.scale, f.before.scale), { term: "octave" }),
  column("absmax", "largest |x|", number, (f) => f.absmax, { printed: true, term: "largest" }),
  column("p999", "99.9th percentile", number, (f) => f.p999),
  column("median", "median |x|", number, (f) => f.median),
  column("rms", "root mean square", number, (f) => f.rms),
  ...loss("clipped", "clipped", true),
  ...loss("vanished", "vanished", true),
  ...loss("rows_lost", "tokens lost", false),
  ...["before", "after"].map((when) => {
    const label = `SQNR ${when === "before" ? "now" : "calibrated"}, dB`;
    const more = { printed: true, term: "SQNR", descending: false };
    return column("sqnr_" + when, label, decibels, (f) => f[when].sqnr_db, more);
  }),
  column("zeros", "zeros", percent, (f) => f.zeros),
  column("rows", "tokens", count, (f) => f.rows),
  column("work", "compute", percent, share, { term: "compute" }),
  column("reason", "reason", null, (f) => f.unused || f.reason, { text: true, long: true, descending: false }),
];
const between = (read) => (layer) => (layer.sides.includes(null) ? null : read(...layer.sides, layer));
const crosses = layers.some((layer) => layer.crossed);
/** A measurement of B relative to A. */
const compared = (key, label, format, read, more) => ({
  ...column(key, label, format, read, more),
  value: between(read),
});
const COMPARED = [
  compared("range_difference", "range, B to A, octaves", octaves, (a, b) => ratio(b.absmax, a.absmax), { term: "octave" }),
  compared("scale_difference", "new scale, B to A, octaves", octaves, (a, b) => ratio(b.after.scale, a.after.scale), {
    term: "octave",
  }),
];
if (crosses)
  COMPARED.push(
    {
      ...risk("crossed", "risk of A’s new scale on B"),
      printed: false,
      value: between((a, b, { crossed }) => crossed && riskOf(crossed, b)),
      show: between((a, b, { crossed }) => crossed && riskWords(crossed, b)),
    },
    compared("crossed_sqnr", "SQNR of that, dB", decibels, (a, b, { crossed }) => crossed && crossed.sqnr_db, {
      term: "SQNR",
      descending: false,
    }),
  );
const rank = new Map(given.riskiest.map((index, place) => [index, place]));
const RISK = { key: "risk", label: "risk", value: (layer) => rank.get(layer.index) };
const ORDER = { key: "order", label: "place in the model", value: (layer) => layer.index };
const NAME = { key: "name", printed: true, label: "layer", text: true, value: (layer) => layer.name };
const SHAPE = {
  key: "shape",
  label: "out × in",
  descending: true,
  value: (layer) => layer.shape[0] * layer.shape[1],
  show: (layer) => layer.shape.join(" × "),
};
/** Quality with only one layer quantized, by format. */
const ALONE = [...new Set(layers.flatMap((layer) => Object.keys(layer.alone_db)))].map((name) => ({
  key: "alone_" + name,
  label: `alone in ${name}, dB`,
  format: decibels,
  term: "alone",
  value: (layer) => layer.alone_db[name] ?? null,
}));
/** A column of one side. */
const onSide = (figure, s) => ({
  ...figure,
  key: figure.key + (compares ? "." + letters[s].toLowerCase() : ""),
  label: (compares ? letters[s] + ": " : "") + figure.label,
  value: figure.value(s),
  show: figure.show && figure.show(s),
});
const figures = [
  NAME,
  SHAPE,
  ...sides.flatMap((_, s) => FORMAT.map((figure) => onSide(figure, s))),
  ...ALONE,
  ...(compares ? COMPARED : []),
  ...sides.flatMap((_, s) => PER_SIDE.map((figure) => onSide(figure, s))),
].map((figure) => ({
  ...figure,
  show: (layer) =>
    figure.format ? figure.format(figure.value(layer)) : ((figure.show || figure.value)(layer) ?? missing),
}));
const orders = [RISK, ORDER, ...figures];

const anySide = (test) => (layer) => layer.sides.some((figure) => figure && test(figure));
const FILTERS = [
  { key: "now", label: "at risk now", test: anySide((f) => f.before.risk) },
  { key: "after", label: "at risk after", test: anySide((f) => f.after.risk) },
  { key: "crossed", label: "A’s scale at risk on B", test: (layer) => layer.crossed && layer.crossed.risk },
  { key: "full", label: "full precision", test: anySide((f) => f.after.full_precision) },
  { key: "changed", label: "changed", test: anySide((f) => f.changed) },
  ...(mixes.length ? [...new Set(layers.flatMap((layer) => layer.sides.map((figure) => figure?.stored)))] : [])
    .filter(Boolean)
    .map((name) => ({ key: "is " + name, label: name, either: true, test: anySide((f) => f.stored === name) })),
].filter(({ key }) => key !== "crossed" || crosses);

/** An element; texts never become markup. */
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
/** A layer's name that is shortened at its beginning: block numbers and the end distinguish layers. */
const nameOf = (layer) => {
  const [front, back] = [layer.name.slice(0, layer.cut), layer.name.slice(layer.cut)];
  const first = front ? element("span", { class: "front" }, element("bdi", { dir: "ltr" }, front)) : null;
  return element("span", { class: "name", title: layer.name }, first, element("span", { class: "back" }, back));
};
/** A text whose words in braces become terms with a tooltip. */
const explained = (text) => text.split(/\{(scale|full precision)\}/).map((part, n) => (n % 2 ? term(part) : part));
const term = (word, text) => element("button", { type: "button", class: "term", "data-term": word }, text || word);

/** A variable of the style sheet, cached per theme. */
const themed = new Map();
function theme(name) {
  const style = () => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  if (!themed.has(name)) themed.set(name, style());
  return themed.get(name);
}

/** Makes a parent hold exactly the lines of a window, in order; `made` maps numbers to its lines. */
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
