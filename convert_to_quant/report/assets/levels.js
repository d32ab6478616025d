// The range of each layer at each noise level.

const HEATS = [
  {
    key: "own",
    label: "share of the layer’s largest",
    how: "One row per layer, from noise (left) to image (right). A stronger color means inputs closer to the layer’s largest. Numbers are the largest |x| at that noise level.",
  },
  {
    key: "all",
    label: "same scale for all layers",
    how: "One color scale for all layers, so that layers with large inputs stand out.",
  },
];
const edges = given.sigma_edges,
  bins = edges.length - 1;
const heat = () => HEATS.find((one) => one.key === state.heat) || HEATS[0];
const known = layers.flatMap((layer) => layer.sides.filter((figure) => figure && figure.absmax));
const extent = (() => {
  const sizes = known.flatMap((figure) => figure.sigma_absmax.filter(Boolean).map(Math.log2));
  const low = sizes.reduce((least, size) => Math.min(least, size), Infinity),
    high = sizes.reduce((most, size) => Math.max(most, size), -Infinity);
  return low < high ? [low, high] : low === high ? [low - 1, low + 1] : [0, 1];
})();
/** The span of colors in octaves: how far a layer's range falls below its largest, except in the most extreme cells. */
const ownOctaves = (() => {
  const fallsOf = ({ absmax, sigma_absmax }) => sigma_absmax.filter(Boolean).map((x) => Math.log2(absmax / x));
  const falls = known.flatMap(fallsOf);
  falls.sort((a, b) => a - b);
  return Math.min(Math.max(Math.ceil(falls[Math.floor(falls.length * 0.97)] || 0), 1), 8);
})();
const RAMPS = {
  // colors of numbers on pale and on strong cells, and the share of the ramp at which they change
  light: { words: ["#0c1a24", "#ffffff"], from: 0.86 },
  dark: { words: ["#ffffff", "#0c1a24"], from: 0.8 },
};
const ramp = () => ({ ...RAMPS[document.documentElement.dataset.theme], colors: theme("ramp").split(" ") });
const limits = () => (state.heat === "all" ? extent : [-ownOctaves, 0]);
function warmth(value, figure) {
  if (!(value > 0)) return null;
  return state.heat === "all" ? Math.log2(value) : Math.max(Math.log2(value / figure.absmax), -ownOctaves);
}

const levels = {
  rowHeight: (plot) => (plot.narrow ? NAMED : 20),
  side: () => 0,
  grids(plot) {
    return plot.grids(compares ? 2 : 1, 16);
  },
  head(plot) {
    return this.grids(plot).flatMap(({ left, width }, s) => {
      const every = width / bins < 34 ? 4 : 1;
      const ticks = edges.map((edge, n) => {
        const style = "tick " + (n === 0 ? "start" : n === bins ? "end" : "");
        return n % every ? null : caption(style, String(+edge.toFixed(3)), left + (n / bins) * width);
      });
      const title = compares ? caption("side", `${letters[s]}: ${sides[s].label}`, left, width) : null;
      const ends = [caption("label start", "noise", left), caption("label end", "image", left + width)];
      return [title, ...ends, ...ticks].filter(Boolean);
    });
  },
  state: () => [],
  setup(plot) {
    const grids = this.grids(plot),
      [low, high] = limits();
    const axisOf = (g, data, inverse) => ({ type: "category", gridIndex: g, data, inverse, show: false });
    return {
      grid: grids.map(({ left, width }) => ({ left, width, show: false })),
      xAxis: grids.map((_, g) => axisOf(g, edges.slice(1).map(String), false)),
      yAxis: grids.map((_, g) => axisOf(g, ["0"], true)),
      visualMap: { show: false, type: "continuous", min: low, max: high, dimension: 2, inRange: { color: ramp().colors } },
      series: grids.map(({ width }, g) => ({
        type: "heatmap",
        xAxisIndex: g,
        yAxisIndex: g,
        silent: true,
        progressive: 0,
        label: { show: width / bins > 44, fontSize: 11, fontFamily: theme("sans") },
        itemStyle: { borderColor: theme("paper"), borderWidth: plot.narrow ? 0 : 1 },
      })),
    };
  },
  move(plot, first, last) {
    const grids = this.grids(plot),
      [low, high] = limits(),
      { words, from } = ramp();
    const lines = plot.narrow ? 2 : 1; // on a narrow page, every other line is a name
    const top = (first - plot.low) * plot.rowHeight,
      height = (last - first) * plot.rowHeight;
    const cells = (s) =>
      plot.rows.slice(first, last).flatMap((layer, number) => {
        const figure = layer.sides[s];
        if (!figure) return [];
        return figure.sigma_absmax.flatMap((value, bin) => {
          const size = warmth(value, figure);
          if (size === null) return [];
          const color = words[Number((size - low) / (high - low) > from)];
          const y = number * lines + lines - 1;
          return [{ value: [bin, y, size], label: { formatter: number3(value), color } }];
        });
      });
    const data = Array.from({ length: Math.max(last - first, 1) * lines }, (_, n) => String(n));
    return {
      grid: grids.map(() => ({ top, height })),
      yAxis: grids.map(() => ({ data })),
      series: grids.map((_, g) => ({ data: cells(g) })),
    };
  },
};
const number3 = (x) => (x >= 1000 && x < 1e6 ? grouped(x) : number(+x.toPrecision(3)));

function levelsLegend() {
  const bar = element("span", { class: "ramp" });
  bar.style.background = `linear-gradient(to right, ${ramp().colors.join(", ")})`;
  const [low, high] = limits();
  const gaps = known.some((figure) => figure.sigma_absmax.includes(null));
  const says =
    state.heat === "all"
      ? [
          element("span", {}, number3(2 ** low), bar, number3(2 ** high)),
          element("span", {}, "largest |x| at that noise level, on a log scale"),
        ]
      : [
          element("span", {}, `1/${2 ** ownOctaves} or less`, bar, "the layer’s largest"),
          element("span", {}, "half the range is one ", term("octave")),
        ];
  return gaps ? [...says, element("span", {}, "empty: no inputs observed")] : says;
}
