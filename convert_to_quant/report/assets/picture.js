// Density strips: the distribution of a layer's inputs over log2 |x|, or over log2 of |x| / scale, where FP8's zones are
// the same bands for all layers.

const state = {}; // from the hash; page.js fills it

const VIEWS = [
  {
    key: "before",
    label: currentScale,
    strips: (layer, s) => [strip(layer, s, "before")],
    how: "One row per layer. A stronger color means more inputs of that size, relative to the layer’s {scale}. FP8 represents blue values well, clips orange ones (right), and rounds violet ones (left) to 0.",
  },
  {
    key: "after",
    label: "new scale",
    strips: (layer, s) => [strip(layer, s, "after")],
    how: "The same inputs relative to the {scale} that calibration chose, so that the largest one fits. Gray layers compute in {full precision}.",
  },
  {
    key: "both",
    label: "current and new",
    strips: (layer, s) => [strip(layer, s, "before"), strip(layer, s, "after")],
    how: "Two strips per layer: the upper at the current {scale}, the lower at the new one.",
  },
  {
    key: "real",
    label: "real values",
    real: true,
    strips: (layer, s) => [strip(layer, s, null)],
    how: "The inputs without a scale. Brackets show the range of FP8: dotted orange at the current {scale}, solid at the new one. The thick part is the normal zone.",
  },
  {
    key: "crossed",
    label: "A’s new scale on B",
    only: 1,
    strips: (layer) => [{ ...strip(layer, 1, null), at: layer.crossed }],
    how: `The inputs of B (${sides.at(-1).label}) relative to the {scale} calibrated on A (${sides[0].label}): does a calibration on A fit B?`,
  },
].filter((one) => (seen || one.real) && (crosses || one.key !== "crossed")); // without observations there are only ranges
if (!compares && layers.some((layer) => layer.sides[0].changed))
  VIEWS.sort((one, other) => (other.key === "both") - (one.key === "both")); // shows what calibration changes first
const LAYOUTS = [
  { key: "beside", label: "A beside B" },
  { key: "over", label: "A over B" },
];

/** One strip: inputs, and the state they are shown at (null: without a scale). */
function strip(layer, s, when) {
  const figure = layer.sides[s];
  return { figure, at: figure && when ? figure[when] : null, side: s };
}
const view = () => VIEWS.find((one) => one.key === state.view) || VIEWS[0];
const beside = (plot) => compares && state.layout !== "over" && !plot.narrow && view().only === undefined;

/** The strips of a row in each panel. */
function panels(plot) {
  const { strips, only } = view();
  const over = (...shown) => (layer) => shown.flatMap((s) => strips(layer, s));
  if (only !== undefined || !compares) return [over(only || 0)];
  return beside(plot) ? [over(0), over(1)] : [over(0, 1)];
}

/** The FP8 scale with the same range as a layer's scale in its own format: FP8's zones are drawn. */
const unitOf = (at) => at && at.scale && (at.scale * at.max) / grid.max;

/** The ends of the axis, the same for current and new scales, so that switching moves the strips and not the axis. */
const extents = (() => {
  const real = [Infinity, -Infinity],
    scaled = [-14, 11],
    crossed = [-14, 11];
  const widen = (range, low, high) => range.splice(0, 2, Math.min(range[0], low), Math.max(range[1], high));
  for (const layer of layers)
    for (const figure of layer.sides) {
      if (!figure) continue;
      const high = log2(figure.absmax),
        low = (log2(figure.median) ?? high) - 2;
      if (high !== null) widen(real, low - 3, high);
      for (const scale of [figure.before, figure.after].map(unitOf))
        if (scale) {
          widen(real, log2(scale) - 6, log2(scale * grid.max));
          if (high !== null) widen(scaled, low - log2(scale), high - log2(scale));
        }
      const theirs = unitOf(layer.crossed);
      if (theirs && high !== null) widen(crossed, low - log2(theirs), high - log2(theirs));
    }
  if (real[0] > real[1]) widen(real, -10, 10);
  const within = ([low, high], least, most) => [Math.max(Math.floor(low), least), Math.min(Math.ceil(high + 0.5), most)];
  return { real: within(real, axis.low, axis.high), scaled: within(scaled, -24, 20), crossed: within(crossed, -24, 20) };
})();
const span = () => (view().real ? extents.real : view().only === undefined ? extents.scaled : extents.crossed);

const superscript = (n) => String(n).replace(/./g, (c) => "⁰¹²³⁴⁵⁶⁷⁸⁹"[c] || "⁻");
function ticks(real, room) {
  const [low, high] = span(),
    list = [];
  if (real) {
    const octave = Math.log2(10), // per power of ten
      step = (high - low) / octave > room / 52 ? 2 : 1;
    for (let power = Math.ceil(low / octave); power * octave <= high; power += step) {
      const short = power <= 4 && power >= -3;
      list.push([power * octave, short ? String(+(10 ** power).toPrecision(1)) : "10" + superscript(power)]);
    }
    return list;
  }
  const step = (high - low) / 4 > room / 40 ? 8 : 4,
    apart = (44 * (high - low)) / room; // the last label ends at its tick, the others are centered
  for (let power = Math.ceil(low / step) * step; power <= high; power += step)
    if (Math.abs(power - ZONES[3].low) > apart)
      list.push([power, power >= 0 && power < 16 ? String(2 ** power) : "2" + superscript(power)]);
  return [...list, [ZONES[3].low, String(grid.max)]];
}

/** Colors as numbers, read once per theme. */
let inks = {};
function readInks() {
  themed.clear();
  painted.clear();
  const rgb = (name) => theme(name).match(/[0-9a-f]{2}/gi).map((pair) => parseInt(pair, 16));
  inks = Object.fromEntries(["vanished", "subnormal", "normal", "saturated", "apart"].map((name) => [name, rgb(name)]));
}

/** Painted strips, while colors and widths stay the same. */
const painted = new Map();
function strips(figure, shift, ...rest) {
  const key = [figure.number, shift, ...rest].join();
  if (!painted.has(key)) {
    if (painted.size > 600) painted.clear();
    painted.set(key, pixels(figure.levels, shift, ...rest));
  }
  return painted.get(key);
}

/** Opacity of a level of a density, 0 to 1: a power of the share, full at 6 % in a quarter octave. */
const strength = Float64Array.from({ length: 256 }, (_, level) =>
  level ? Math.min(1, (10 ** (((level - 1) * 8) / 254 - 8) / 0.06) ** 0.4) : 0,
);

/** One strip as pixels, `width` × 1: the color shows the zone, the opacity the share of values. */
function pixels(levels, shift, low, high, width, plain, peak) {
  const canvas = document.createElement("canvas");
  canvas.width = width;
  canvas.height = 1;
  const context = canvas.getContext("2d"),
    image = context.createImageData(width, 1),
    data = image.data;
  let zone = 0;
  for (let x = 0; x < width; x++) {
    const at = low + ((x + 0.5) / width) * (high - low);
    if (at > peak) break;
    while (at >= ZONES[zone].high) zone++;
    const cell = (at + shift - axis.low) * axis.per_octave - 0.5,
      left = Math.floor(cell),
      part = cell - left;
    const level = levels[Math.round(cell)] ? (levels[left] || 0) * (1 - part) + (levels[left + 1] || 0) * part : 0;
    if (!level) continue;
    const ink = plain ? inks.apart : inks[ZONES[zone].key];
    const floor = plain ? 0.14 : zone === 3 ? 0.42 : 0.05; // clipped values must be visible
    data.set([ink[0], ink[1], ink[2], 255 * (floor + (1 - floor) * strength[Math.round(level)])], 4 * x);
  }
  context.putImageData(image, 0, 0);
  return canvas;
}


/** Shapes as ECharts' custom series takes them. */
const lineOf = (x1, y1, x2, y2, style) => ({ type: "line", shape: { x1, y1, x2, y2 }, style, silent: true });
const rectOf = (x, y, width, height, fill) => ({
  type: "rect",
  shape: { x, y, width, height },
  style: { fill },
  silent: true,
});
const textOf = (text, x, y, font, style) => ({
  type: "text",
  style: { text, x, y, font: `${font} ${theme("sans")}`, verticalAlign: "middle", ...style },
  silent: true,
});

/** A layer's strips in a panel, one below the other, under its name. */
function drawLayer(plot, layer, shown, low, high, api, params) {
  const [left, top] = api.coord([low, api.value(1)]),
    width = params.coordSys.width;
  const above = plot.narrow ? NAMED : 3,
    below = plot.narrow ? 5 : 3;
  const each = (plot.rowHeight - above - below) / shown.length;
  const place = (at) => left + ((at - low) / (high - low)) * width;
  const children = shown.flatMap(({ figure, at, side }, n) => {
    const box = { left, width, y: top + above + n * each, height: each - (shown.length > 1 ? 2 : 0) };
    const middle = box.y + box.height / 2,
      silent = !figure || !figure.levels;
    if (silent && !(figure && view().real)) {
      const text = !figure ? "not in " + letters[side] : figure.absmax === 0 ? "only zeros" : "not observed";
      return [textOf(text, left + 6, middle, "11px", { fill: theme("soft") })];
    }
    if (!view().real && at && !at.scale) return [];
    return [
      ...(silent ? [] : drawStrip(figure, at, box, low, high, place)),
      ...(view().real ? drawReaches(figure, box, place) : []),
    ];
  });
  return { type: "group", children };
}

/** A strip, and a mark at the largest input, or an arrow if that lies beyond the axis. */
function drawStrip(figure, at, { left, width, y, height }, low, high, place) {
  const { real } = view(),
    shift = Math.log2(unitOf(at) || 1),
    plain = real || Boolean(at && (at.full_precision || figure.unused));
  const dots = Math.round(width * Math.min(devicePixelRatio || 1, 2));
  const largest = Math.log2(figure.absmax) - shift,
    peak = place(largest);
  const thick = real ? Math.max(height - 8, 4) : height,
    edge = y + (height - thick) / 2;
  const image = strips(figure, shift, low, high, dots, plain, largest);
  const drawn = [{ type: "image", style: { image, x: left, y: edge, width, height: thick }, silent: true }];
  const fill = theme("ink");
  if (peak > left + width)
    drawn.push(textOf("›", left + width - 1, y + height / 2, "bold 13px", { fill, align: "right" }));
  else if (peak > left) drawn.push(rectOf(peak - 0.75, edge, 1.5, thick, fill));
  return drawn;
}

/** Brackets around the range of FP8: dotted above at the current scale, solid below at the new one. */
function drawReaches(figure, { left, width, y, height }, place) {
  const used = (when) => figure[when].scale && !figure[when].full_precision && !figure.unused;
  return ["before", "after"].filter(used).flatMap((when) => {
    const now = when === "before",
      edge = now ? y + 1 : y + height - 1,
      origin = Math.log2(unitOf(figure[when]));
    const [far, near, end] = [ZONES[1].low, ZONES[2].low, ZONES[2].high].map((zone) =>
      Math.min(Math.max(place(zone + origin), left), left + width),
    );
    const stroke = theme(now ? "saturated" : "ink");
    return [
      lineOf(far, edge, near, edge, { stroke, lineWidth: 1, lineDash: now ? [2, 2] : null }),
      lineOf(near, edge, end, edge, { stroke, lineWidth: 2.5, lineDash: now ? [3, 2] : null }),
      lineOf(end, edge - (now ? 1 : -1), end, edge + (now ? 3 : -3), { stroke, lineWidth: 1.5 }),
    ];
  });
}

/** The side that a panel shows, or the order in which its strips show both. */
function panelTitle(panel, count) {
  const s = view().only ?? (count > 1 ? panel : null);
  if (s !== null) return `${letters[s]}: ${sides[s].label}`;
  return state.view === "both" ? "from top: A now, A calibrated, B now, B calibrated" : "A above, B below";
}

const difference = () => (seen && (view().real || state.view === "before") ? "range_difference" : "scale_difference");

const pen = document.createElement("canvas").getContext("2d");

/** The width of a label over a plot in the reader's font, with a margin. */
function wide(plot, words) {
  const { fontFamily, fontSize } = getComputedStyle(plot.head);
  pen.font = `600 ${fontSize} ${fontFamily}`;
  return pen.measureText(words).width + 4;
}

/** The names of FP8's zones over a panel, with explanations if there is room. */
function zoneWords(plot, left, width, place) {
  const [low, high] = span();
  const room = (zone) => place(Math.min(zone.high, high)) - place(Math.max(zone.low, low));
  const long = ({ key }) => wide(plot, key);
  const last = ZONES.at(-1),
    spill = Math.max(long(last) - room(last), 0); // of the last word, into the zone before
  return ZONES.flatMap((zone) => {
    const free = room(zone) - (zone.key === "normal" ? spill : 0),
      middle = place(Math.max(zone.low, low)) + free / 2;
    const words = free > wide(plot, `${zone.key}: ${zone.says}`) ? `${zone.key}: ${zone.says}` : zone.key;
    if (zone === last && spill) return [caption("label saturated end", words, left + width)];
    if (free > long(zone)) return [caption("label " + zone.key, words, middle)];
    return zone.key === "vanished" && free >= 50 ? [caption("label vanished start", words, left)] : [];
  });
}

const picture = {
  has: (layer) => layer.sides.some((figure) => figure && !figure.inputs),
  rowHeight: (plot) => (view().real ? 26 : 20) + (panels(plot)[0](layers[0] || { sides: [] }).length - 1) * 13,
  side: (plot) => (plot.narrow ? 0 : compares ? Math.min(172, Math.round(plot.width * 0.19)) : 124),
  head(plot) {
    const { real } = view(),
      [low, high] = span(),
      grids = plot.grids(panels(plot).length);
    const made = grids.flatMap(({ left, width }, number) => {
      const place = (at) => left + ((at - low) / (high - low)) * width;
      const title = compares ? [caption("side", panelTitle(number, grids.length), left, width)] : [];
      const marks = ticks(real, width).map(([at, text]) => {
        const x = place(at);
        return caption("tick " + (x < left + 10 ? "start" : x > left + width - 14 ? "end" : ""), text, x);
      });
      const size = caption("label", "size of an input, |x|", left + width / 2);
      const words = real ? [size] : zoneWords(plot, left, width, place);
      return [...title, ...words, ...marks];
    });
    if (plot.narrow) return made;
    const alone = { before: "as the file is", after: "calibrated", crossed: "on B" }[state.view] || "now → calibrated";
    const both = difference() === "range_difference" ? "range, B to A" : "new scale, B to A";
    return [...made, caption("tick end", compares && state.view !== "crossed" ? both : alone, plot.width)];
  },
  state(layer) {
    const words = (at, figure, told) => {
      const risky = at.risk && !figure.unused;
      const lost = risky && told && { clips: at.clipped, vanishes: at.vanished, "tokens lost": at.rows_lost }[at.risk];
      const text = riskWords(at, figure) + (lost ? " " + percent(+lost.toPrecision(2)) : "");
      return element("span", { class: risky ? "bad" : "" }, text);
    };
    if (compares && state.view !== "crossed") {
      const value = orders.find((order) => order.key === difference()).value(layer);
      return [value === null ? missing : Math.abs(value) < 0.05 ? "equal" : `${octaves(value)} octaves`];
    }
    const figure = layer.sides.at(-1);
    const at = { before: figure?.before, after: figure?.after, crossed: layer.crossed }[state.view];
    if (!figure || at === null) return [missing];
    if (at) return [words(at, figure, true)];
    const after = figure.unused ? "not used" : exact(figure) ? "full" : words(figure.after, figure);
    return [words(figure.before, figure), " → ", after];
  },
  setup(plot) {
    const { real } = view(),
      [low, high] = span(),
      each = panels(plot);
    const bands = ZONES.map((zone) => [
      {
        xAxis: Math.max(zone.low, low),
        itemStyle: { color: theme(zone.key), opacity: zone.key === "normal" ? 0.045 : 0.1 },
      },
      { xAxis: Math.min(zone.high, high) },
    ]);
    const line = (xAxis, color, width) => ({ xAxis, lineStyle: { color: theme(color), type: "solid", width } });
    const lines = real
      ? ticks(true, plot.grids(each.length)[0].width).map(([at]) => line(at, "rule", 1))
      : ZONES.slice(1).map(({ key, low }) =>
          key === "saturated" ? line(low, key, 1.5) : line(low, "strong", 1),
        );
    const draw = (layer, g, api, params) => drawLayer(plot, layer, each[g](layer), low, high, api, params);
    return panelsOf(plot, each.length, [low, high], draw, lines, real ? [] : bands, real ? 0 : 5);
  },
  move: (plot, first, last) => rowsOf(plot, panels(plot).length, span()[0], first, last),
};

function pictureLegend() {
  const largest = keyed("peak", "the ", term("largest", "largest input"));
  if (view().real) {
    const then = keyed("reach then", "range of FP8 at the current ", term("scale"));
    return [keyed("apart", "inputs"), largest, then, keyed("reach", "at the new one")];
  }
  const precise = (f) => f && exact({ ...f, after: state.view === "before" ? f.before : f.after });
  const zones = ZONES.map((zone) => keyed(zone.key, TERMS[zone.key] ? term(zone.key) : zone.key, ": " + zone.says));
  if (state.view === "before" && !layers.some((layer) => layer.sides.some(precise))) return [...zones, largest];
  return [...zones, largest, keyed("apart", term("full precision"), ": not quantized")];
}
