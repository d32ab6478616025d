// The table of all measurements. Only the rows in view are in the page, so that sorting a thousand layers is immediate.
// Rows have one height and an absolute position, so a new row moves no other. That takes them out of the table's layout,
// so ARIA roles mark them as rows and cells.

const LINE = 28,
  AROUND = 6;

class Table {
  constructor(place, sortBy) {
    this.rows = [];
    this.made = new Map();
    this.heads = figures.map((figure) => {
      const sort = { type: "button", "data-term": figure.term, onclick: () => sortBy(figure) };
      const head = { scope: "col", role: "columnheader", class: this.style(figure), "data-key": figure.key };
      return element("th", head, element("button", sort, figure.label));
    });
    const widths = figures.map((figure) => {
      const label = figure.label,
        words = Math.max(...label.split(/[ ,]+/).map((word) => word.length), Math.ceil(label.length / 3)) + 1;
      const longest = Math.max(words, ...layers.map((layer) => String(figure.show(layer)).length));
      if (figure.key === "name") return `min(${Math.min(longest, 42)}ch + 1.4rem, 50vw)`;
      return `calc(${Math.min(longest, 64)}ch + 1.4rem)`;
    });
    const named = { "aria-labelledby": "figures-title" };
    const head = element("thead", { role: "rowgroup" }, element("tr", { role: "row" }, ...this.heads));
    this.body = element("tbody", { role: "rowgroup" });
    this.table = element("table", { role: "table", ...named }, head, this.body);
    this.table.style.setProperty("--columns", widths.join(" "));
    this.table.style.width = `calc(${widths.join(" + ")})`;
    this.box = element("div", { class: "table", tabindex: "0", role: "region", ...named }, this.table);
    place.append(this.box);
    this.box.addEventListener("scroll", oncePerFrame(() => this.draw()), { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  style(figure) {
    return (figure.text ? "text " : "") + (figure.printed ? "" : "screen");
  }

  show(rows, sorted, descending) {
    this.rows = rows;
    this.heads.forEach((head, n) => {
      const here = figures[n].key === sorted;
      if (here) head.setAttribute("aria-sort", descending ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      head.firstChild.replaceChildren(
        ...(here ? [element("i", { "aria-hidden": "true" }, descending ? "▼ " : "▲ ")] : []),
        figures[n].label,
      );
    });
    this.table.setAttribute("aria-rowcount", rows.length + 1);
    this.box.scrollTop = 0;
    this.redraw();
  }

  redraw() {
    this.made.clear();
    this.body.replaceChildren();
    this.body.style.height = Math.max(this.rows.length, 1) * LINE + "px";
    const none = element("td", { role: "cell", class: "text empty" }, NOTHING);
    if (!this.rows.length) this.body.append(element("tr", { role: "row" }, none));
    this.draw();
  }

  draw() {
    const few = this.rows.length <= 40 || printing,
      top = this.box.scrollTop / LINE,
      bottom = top + this.box.clientHeight / LINE;
    const edge = this.box.scrollLeft + this.box.clientWidth,
      hidden = this.heads.filter((head) => head.offsetLeft + head.offsetWidth > edge + 1).length;
    this.box.classList.toggle("cut", hidden > 0);
    get("more").hidden = !hidden;
    get("more").textContent = `Scroll sideways for ${plural(hidden, "more column")} →`;
    const first = few ? 0 : Math.max(Math.floor(top) - AROUND, 0);
    const last = few ? this.rows.length : Math.min(Math.ceil(bottom) + AROUND, this.rows.length);
    fill(this.body, this.made, first, last, (number) => this.line(number));
  }

  line(number) {
    const layer = this.rows[number];
    const cells = figures.map((figure) => {
      if (figure.key === "name") return element("th", { scope: "row", role: "rowheader" }, nameOf(layer));
      const text = String(figure.show(layer)),
        risky = figure.term === "at risk" && figure.value(layer) > 0;
      const attributes = { role: "cell", class: this.style(figure), title: figure.long ? text : null };
      return element("td", attributes, risky ? element("span", { class: "bad" }, text) : text);
    });
    const line = element("tr", { role: "row", "aria-rowindex": number + 2 }, ...cells);
    line.style.top = number * LINE + "px";
    return line;
  }
}

/** Rows as CSV. Texts that a spreadsheet would run as formulas get an apostrophe. */
function csv(rows) {
  const cell = (value) => {
    let text = value === null || value === undefined || value === missing ? "" : String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const value = (figure, layer) => (figure.format ? figure.value(layer) : figure.show(layer));
  const lines = rows.map((layer) => figures.map((figure) => value(figure, layer)));
  const whole = [figures.map((figure) => figure.label), ...lines];
  return whole.map((line) => line.map(cell).join(",") + "\r\n").join("");
}
