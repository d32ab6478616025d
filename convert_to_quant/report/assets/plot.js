// A chart with one row per layer. Names are text in the page. ECharts draws the rest on a canvas of the window's height
// that stays in view while rows scroll: only the rows in view are drawn, so a thousand layers cost as much as forty.

const HEAD = compares ? 64 : 44,
  NAMED = 18,
  LONGEST = 1500,
  PRINTED = 400,
  NOTHING = "No layer matches the search and the filters.";
let printing = false;

/** A text in the head of a plot, at most `width` wide. */
function caption(style, text, left, width) {
  const made = element("span", { class: style }, text);
  made.style.left = left + "px";
  if (width) made.style.maxWidth = width + "px";
  return made;
}

/** A function that draws at most once per frame. */
function oncePerFrame(draw) {
  let waiting = 0;
  return () => {
    waiting ||= requestAnimationFrame(() => {
      waiting = 0;
      draw();
    });
  };
}

/** An entry of a legend: a marker and its words. */
const keyed = (style, ...words) => element("span", {}, element("span", { class: "key " + style }), ...words);

/**
 * An ECharts option for panels side by side, with an axis from `low` to `high`. draw(layer, panel, api, params) makes each
 * row, over lines (at depth `z`) and bands.
 */
function panelsOf(plot, count, [low, high], draw, lines, bands = [], z = 0) {
  const grids = plot.grids(count);
  return {
    grid: grids.map(({ left, width }) => ({ top: 0, height: plot.height, left, width, show: false })),
    xAxis: grids.map((_, g) => ({ type: "value", gridIndex: g, min: low, max: high, show: false })),
    yAxis: grids.map((_, g) => ({ type: "value", gridIndex: g, inverse: true, show: false })),
    series: grids.map((_, g) => ({
      type: "custom",
      xAxisIndex: g,
      yAxisIndex: g,
      clip: true,
      silent: true,
      renderItem: (params, api) => draw(plot.rows[api.value(1)], g, api, params),
      markArea: { silent: true, animation: false, data: bands },
      markLine: { silent: true, z, animation: false, symbol: "none", label: { show: false }, data: lines },
    })),
  };
}
/** The option for the rows in view of such panels. */
function rowsOf(plot, count, low, first, last) {
  const data = Array.from({ length: last - first }, (_, n) => [low, first + n]),
    each = (one) => Array(count).fill(one);
  return { yAxis: each({ min: plot.low, max: plot.high }), series: each({ data }) };
}

class Plot {
  /**
   * @param place element to fill
   * @param label for screen readers
   * @param paint {
   *   rowHeight(plot), side(plot): width of the right column, head(plot): elements,
   *   setup(plot): an ECharts option for what stays while rows scroll, move(plot, first, last): one for the rows in view,
   *   state(layer): texts of the right column }
   */
  constructor(place, label, paint) {
    this.paint = paint;
    this.rows = [];
    this.head = element("div", { class: "head", "aria-hidden": "true" });
    this.canvas = element("div", { class: "canvas", "aria-hidden": "true" });
    this.names = element("div", { class: "rows" });
    this.inner = element("div", { class: "inner" }, this.head, this.canvas, this.names);
    this.box = element("div", { class: "plot", tabindex: "0", role: "group", "aria-label": label }, this.inner);
    this.box.style.setProperty("--head", HEAD + "px");
    place.append(this.box);
    this.chart = echarts.init(this.canvas, null, { renderer: "canvas", width: 10, height: 10 });
    this.active = null;
    this.made = new Map();
    this.box.addEventListener("scroll", oncePerFrame(() => this.draw()), { passive: true });
    this.box.addEventListener("pointermove", (event) => {
      if (event.pointerType === "mouse") card.hover(this.at(event), event);
    });
    this.box.addEventListener("pointerleave", () => card.leave());
    this.box.addEventListener("click", (event) => card.pin(this.at(event), event));
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("blur", () => this.activate(null));
    new ResizeObserver(() => {
      if (this.box.clientWidth !== this.width) this.layout();
    }).observe(this.box);
  }

  at(event) {
    if (event.clientY < this.head.getBoundingClientRect().bottom) return null;
    return this.rows[Math.floor((event.clientY - this.names.getBoundingClientRect().top) / this.rowHeight)] || null;
  }

  key(event) {
    const steps = { ArrowDown: 1, ArrowUp: -1, PageDown: 10, PageUp: -10, Home: -1e9, End: 1e9 }[event.key];
    if (steps === undefined || !this.rows.length) return;
    event.preventDefault();
    const now = this.rows.indexOf(this.active),
      from = now < 0 && steps < 0 ? this.rows.length : now;
    const next = Math.min(Math.max(from + steps, 0), this.rows.length - 1);
    this.reveal(next);
    this.activate(this.rows[next]);
    const line = this.made.get(next);
    if (line) card.show(this.rows[next], line.getBoundingClientRect(), true);
  }

  reveal(number) {
    const top = number * this.rowHeight,
      view = this.box.clientHeight - HEAD;
    if (top < this.box.scrollTop) this.box.scrollTop = top;
    if (top + this.rowHeight > this.box.scrollTop + view) this.box.scrollTop = top + this.rowHeight - view;
    this.draw();
  }

  activate(layer) {
    this.active = layer;
    for (const [number, line] of this.made) line.classList.toggle("on", this.rows[number] === layer);
  }

  show(rows) {
    this.rows = rows;
    this.box.scrollTop = 0;
    this.layout();
  }

  /** Sets all sizes, from the width and the number of rows. */
  layout() {
    this.width = this.box.clientWidth;
    if (!this.width) return;
    this.narrow = this.width < 640;
    this.box.classList.toggle("narrow", this.narrow);
    this.name = this.narrow ? 0 : Math.round(Math.min(this.width * 0.3, 19 * 16));
    this.side = this.paint.side(this);
    this.rowHeight = this.paint.rowHeight(this) + (this.narrow ? NAMED : 0);
    const total = Math.max(this.rows.length, 2) * this.rowHeight + 4;
    const tall = printing ? PRINTED * this.rowHeight : LONGEST;
    this.flat = total <= tall;
    this.height = this.flat ? total : printing ? tall : Math.max(320, Math.round(innerHeight * 0.76) - HEAD);
    this.box.classList.toggle("flat", this.flat);
    this.box.style.height = HEAD + this.height + 2 + "px";
    this.inner.style.height = HEAD + (printing ? this.height : total) + "px";
    this.head.replaceChildren(...this.paint.head(this));
    this.canvas.style.height = this.height + "px";
    this.chart.clear(); // first, since resizing draws rows that may be gone
    this.chart.resize({ width: this.width, height: this.height });
    const textStyle = { fontFamily: theme("sans"), color: theme("soft") };
    this.chart.setOption({ animation: false, textStyle, ...this.paint.setup(this) });
    this.made.clear();
    this.names.replaceChildren();
    if (!this.rows.length)
      this.names.append(element("p", { class: "empty" }, NOTHING));
    this.draw();
  }

  /** Draws the rows in view. */
  draw() {
    if (!this.width) return;
    this.low = (this.flat ? 0 : this.box.scrollTop) / this.rowHeight;
    this.high = this.low + this.height / this.rowHeight;
    const first = Math.max(Math.floor(this.low), 0),
      last = Math.min(Math.ceil(this.high), this.rows.length);
    this.chart.setOption(this.paint.move(this, first, last), { silent: true });
    fill(this.names, this.made, first, last, (number) => this.line(number));
    if (printing) this.chart.getZr().flush();
  }

  line(number) {
    const layer = this.rows[number],
      line = element("div", { class: "row" }, nameOf(layer));
    if (!this.narrow) line.firstChild.style.width = this.name + "px";
    const state = element("span", { class: "state" }, ...this.paint.state(layer, this));
    if (!this.narrow) state.style.width = this.side + "px";
    if (this.side || this.narrow) line.append(state);
    line.style.top = number * this.rowHeight + "px";
    line.style.height = this.rowHeight + "px";
    if (layer === this.active) line.classList.add("on");
    return line;
  }

  /** Panels side by side between the names and the right column. */
  grids(number, gap = 28) {
    const room = this.width - this.name - this.side - 2;
    const width = (room - gap * (number - 1)) / number;
    return Array.from({ length: number }, (_, n) => ({ left: this.name + n * (width + gap), width }));
  }
}
