// Quality by size: the best mix of formats by bits per weight, one format for all layers, and the file itself. Everything
// comes from the document, names of formats and the words of the legend included.

const MARKS = {
  // by key of the document's words; distinct in shape as well as in color
  curve: { type: "line", symbol: "circle", symbolSize: 5, ink: "normal" },
  uniform: { type: "scatter", symbol: "rect", symbolSize: 9, ink: "apart" },
  more: { type: "scatter", symbol: "circle", symbolSize: 10, ink: "normal" },
  measured: { type: "line", symbol: "rect", symbolSize: [12, 2], ink: "saturated" },
  chosen: { type: "scatter", symbol: "diamond", symbolSize: 16, ink: "saturated" },
};

/** Points of each marker: [bits per weight, dB, name]. */
const points = { curve: [], uniform: [], more: [], measured: [], chosen: [] };
for (const [s, mix] of mixes.entries()) {
  if (s === 0) {
    points.curve = mix.curve.map((point) => [...point, ""]);
    points.uniform = Object.entries(mix.uniform || {}).map(([name, point]) => [...point, name]);
  }
  const own = mixes.length > 1 ? `${letters[s]}: this file` : "this file"; // the legend has the rest
  if (mix.more) points.more.push([...mix.more, ""]);
  for (const db of mix.measured_db || []) points.measured.push([mix.bits, db, ""]);
  if (mix.bits && mix.expected_db !== undefined) points.chosen.push([mix.bits, mix.expected_db, own]);
}
const marked = Object.keys(MARKS).filter((key) => points[key].length);

/** The size of a file, or of its layers, by bits per weight. */
const sized = (bits) => {
  const megabytes = ((mixes[0].weights * bits) / 8 + (mixes[0].other_bytes || 0)) / 1e6;
  return megabytes < 1000 ? `${+megabytes.toPrecision(3)} MB` : `${+(megabytes / 1000).toPrecision(3)} GB`;
};
/** Labels of the curve go below it; others to the right, or above if another point is close there. */
function positionOf(key, [x, y]) {
  const crowded = points.uniform.some(([u, v]) => u > x && u < x + 1 && Math.abs(v - y) < 3);
  return key === "chosen" ? "bottom" : crowded ? "top" : "right";
}

class MixChart {
  constructor(place) {
    this.box = element("div", { class: "mix", role: "img", "aria-label": mixGist() });
    place.append(this.box);
    this.chart = echarts.init(this.box, null, { renderer: "canvas", width: 10, height: 10 });
    new ResizeObserver(() => this.layout()).observe(this.box);
  }

  activate() {}

  show() {
    this.layout();
  }

  layout() {
    const width = this.box.clientWidth;
    if (!width) return;
    const narrow = width < 640,
      all = marked.flatMap((key) => points[key]);
    const ends = (n, step, room) => {
      const sizes = all.map((point) => point[n] / step);
      const least = Math.floor(Math.min(...sizes) - room);
      return [step * least, step * Math.max(Math.ceil(Math.max(...sizes)), least + 1)];
    };
    const [left, right] = ends(0, 1, 0.5), // room for labels beside the first point
      [low, high] = ends(1, 10, 0);
    const grid = { left: 46, right: 16, top: mixes[0].weights ? 48 : 16, bottom: 46 };
    const soft = { color: theme("soft"), fontFamily: theme("sans"), fontSize: 12 };
    const axisLine = { show: true, lineStyle: { color: theme("strong") } };
    const bare = { axisTick: { show: false }, splitLine: { show: false } };
    const across = { type: "value", min: left, max: right, splitNumber: narrow ? 3 : 6, axisLine, ...bare };
    const titled = (name, gap) => ({ name, nameLocation: "middle", nameGap: gap, nameTextStyle: soft });
    const series = marked.map((key) => {
      const { ink, ...mark } = MARKS[key],
        color = theme(ink);
      return {
        ...mark,
        data: points[key].map((value) => ({ value, label: { position: positionOf(key, value) } })),
        itemStyle: key === "more" ? { color: theme("paper"), borderColor: color, borderWidth: 2 } : { color },
        lineStyle: { color, width: 2 },
        label: {
          show: ["uniform", "chosen"].includes(key),
          formatter: ({ value }) => value[2],
          ...soft,
          ...(key === "chosen" ? { color: theme("ink"), fontWeight: 600 } : {}),
        },
        z: key === "chosen" ? 4 : 3,
      };
    });
    this.chart.clear();
    this.chart.resize({ width, height: this.box.clientHeight });
    this.chart.setOption({
      animation: false,
      textStyle: soft,
      grid,
      tooltip: {
        renderMode: "richText",
        confine: true,
        backgroundColor: theme("raised"),
        borderColor: theme("strong"),
        textStyle: { ...soft, color: theme("ink") },
        formatter: ({ seriesIndex, value: [bits, db, name] }) => {
          const size = `${bits.toFixed(2)} bits per weight${mixes[0].weights ? `, ${sized(bits)}` : ""}`;
          return `${name || given.words[marked[seriesIndex]]}\n${size}: ${decibels(db)} dB`;
        },
      },
      xAxis: [
        { ...across, ...titled("bits per weight, scales included", 28), axisLabel: soft },
        {
          ...across,
          show: Boolean(mixes[0].weights),
          position: "top",
          axisLabel: { ...soft, formatter: sized },
          ...titled(mixes[0].other_bytes ? "size of the file" : "size of these layers", 26),
        },
      ],
      yAxis: {
        type: "value",
        min: low,
        max: high,
        ...titled(`SQNR, dB, expected on ${mixes[0].on || "noise"}`, 32),
        axisLabel: soft,
        splitLine: { lineStyle: { color: theme("rule") } },
      },
      series,
    });
  }
}

/** The chart in a sentence. */
function mixGist() {
  const said = marked.filter((key) => key !== "curve").flatMap((key) =>
    points[key].map(([bits, db, name]) => `${name || given.words[key]}: ${decibels(db)} dB at ${bits.toFixed(2)} bits`),
  );
  const ends = points.curve.map(([bits, db]) => `${decibels(db)} dB at ${bits} bits`);
  return `Best mix: ${ends.join(", ")}. ${said.join("; ")}.`;
}

/** Quality with only one layer quantized: a marker for each format that was tried, another one for its own. */
const alone = (() => {
  const all = layers.flatMap((layer) => Object.values(layer.alone_db));
  const low = 10 * Math.floor((all.reduce((a, b) => Math.min(a, b), Infinity) - 2) / 10),
    high = 10 * Math.ceil((all.reduce((a, b) => Math.max(a, b), -Infinity) + 2) / 10);
  const own = (layer) => layer.sides.find(Boolean)?.stored;
  const shade = (name) => {
    const ramp = theme("ramp").split(" "),
      bits = given.format_bits[name] ?? 8;
    return ramp[Math.max(Math.min(Math.round((bits / 8) * (ramp.length - 1)), ramp.length - 1), 1)];
  };
  return {
    has: (layer) => Object.keys(layer.alone_db).length > 0,
    rowHeight: () => 20,
    side: (plot) => (plot.narrow ? 0 : 124),
    head(plot) {
      const [{ left, width }] = plot.grids(1),
        step = width < 400 ? 20 : 10;
      const ticks = Array.from({ length: Math.floor((high - low) / step) + 1 }, (_, n) => low + n * step);
      const at = (db) => left + ((db - low) / (high - low)) * width;
      const end = (db) => (db === low ? "start" : db === high ? "end" : "");
      const marks = ticks.map((db) => caption("tick " + end(db), String(db), at(db)));
      const side = plot.narrow ? [] : [caption("tick end", "format", plot.width)];
      return [caption("label", "SQNR of the output, dB", left + width / 2), ...marks, ...side];
    },
    state: (layer) => [own(layer) || ""],
    setup(plot) {
      const line = { lineStyle: { color: theme("rule"), type: "solid" } };
      const lines = Array.from({ length: (high - low) / 10 + 1 }, (_, n) => ({ xAxis: low + 10 * n, ...line }));
      const draw = (layer, _, api) => {
        const middle = plot.rowHeight - 10;
        const marks = Object.entries(layer.alone_db).map(([name, db]) => {
          const [x, y] = api.coord([db, api.value(1)]),
            here = name === own(layer);
          const shape = { x: x - 4, y: y + middle - 4, width: 8, height: 8 };
          const turned = here ? { rotation: Math.PI / 4, originX: x, originY: y + middle } : {};
          const style = { fill: here ? theme("saturated") : shade(name) };
          return { type: "rect", shape, ...turned, style, z2: here ? 2 : 1 };
        });
        return { type: "group", children: marks };
      };
      return panelsOf(plot, 1, [low, high], draw, lines);
    },
    move: (plot, first, last) => rowsOf(plot, 1, low, first, last),
  };
})();
const aloneLegend = () => [
  marked.includes("chosen") ? keyed("mark-chosen", "the layer’s own format") : "",
  keyed("mark-tried", given.words.tried),
];

const mixLegend = () => marked.map((key) => keyed("mark-" + key, given.words[key]));
