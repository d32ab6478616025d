// The table of all figures. Only the rows in view are in the page, so that sorting a thousand layers is immediate;
// rows are all of one height, and empty rows above and below keep the scroll bar true.

const LINE = 28, AROUND = 12;

class Table {
  constructor(place, sortBy) {
    this.rows = [];
    this.heads = figures.map((figure) => {
      const button = element("button", { type: "button", "data-term": figure.term, onclick: () => sortBy(figure) }, figure.label);
      return element("th", { scope: "col", class: (figure.text ? "text " : "") + (figure.printed ? "" : "screen"), "data-key": figure.key }, button);
    });
    const columns = figures.map((figure) => {
      const column = element("col", { class: figure.printed ? "" : "screen" });
      const words = Math.max(...figure.label.split(/[ ,]+/).map((word) => word.length), Math.ceil(figure.label.length / 3)) + 1;
      const longest = Math.min(Math.max(words, ...layers.map((layer) => String(figure.show(layer)).length)), figure.key === "name" ? 42 : 64);
      column.style.width = `calc(${longest}ch + 1.4rem)`;
      return column;
    });
    this.body = element("tbody");
    this.table = element("table", { "aria-labelledby": "figures-title" }, element("colgroup", {}, ...columns), element("thead", {}, element("tr", {}, ...this.heads)), this.body);
    this.table.style.width = `calc(${columns.map((column) => column.style.width).join(" + ")})`;
    this.box = element("div", { class: "table", tabindex: "0", role: "region", "aria-labelledby": "figures-title" }, this.table);
    place.append(this.box);
    this.box.addEventListener("scroll", () => {
      this.waiting = this.waiting || requestAnimationFrame(() => { this.waiting = 0; this.draw(); });
    }, { passive: true });
    new ResizeObserver(() => this.draw()).observe(this.box);
  }

  show(rows, sorted, descending) {
    this.rows = rows;
    this.heads.forEach((head, n) => {
      const here = figures[n].key === sorted;
      if (here) head.setAttribute("aria-sort", descending ? "descending" : "ascending"); else head.removeAttribute("aria-sort");
      head.firstChild.replaceChildren(...(here ? [element("i", { "aria-hidden": "true" }, descending ? "▼ " : "▲ ")] : []), figures[n].label);
    });
    this.table.setAttribute("aria-rowcount", rows.length + 1);
    this.box.scrollTop = 0;
    this.drawn = null;
    this.draw();
  }

  draw() {
    const few = this.rows.length <= 80 || printing;
    const first = few ? 0 : Math.max(Math.floor(this.box.scrollTop / LINE) - AROUND, 0);
    const last = few ? this.rows.length : Math.min(first + Math.ceil(this.box.clientHeight / LINE) + 2 * AROUND, this.rows.length);
    if (this.drawn === `${first}-${last}`) return;
    this.drawn = `${first}-${last}`;
    const pad = (lines) => { const cell = element("td", { colspan: figures.length }); cell.style.height = lines * LINE + "px"; return element("tr", { class: "pad", "aria-hidden": "true" }, cell); };
    const lines = this.rows.slice(first, last).map((layer, n) => element("tr", { "aria-rowindex": first + n + 2 }, ...figures.filter((figure) => figure.printed || !printing).map((figure) => {
      if (figure.key === "name") return element("th", { scope: "row" }, nameOf(layer));
      const text = String(figure.show(layer)), risky = figure.term === "at risk" && figure.value(layer) > 0;
      return element("td", { class: figure.text ? "text" : "", title: figure.key.startsWith("reason") ? text : null }, risky ? element("span", { class: "bad" }, text) : text);
    })));
    if (!this.rows.length) lines.push(element("tr", {}, element("td", { colspan: figures.length, class: "text muted" }, "No layer fits the search and the filters.")));
    this.body.replaceChildren(...(first ? [pad(first)] : []), ...lines, ...(last < this.rows.length ? [pad(this.rows.length - last)] : []));
  }
}

/** The rows shown as CSV. A text that a spreadsheet would run as a formula gets an apostrophe. */
function csv(rows) {
  const cell = (value) => {
    let text = value === null || value === undefined ? "" : String(value);
    if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = "'" + text;
    return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
  };
  const value = (figure, layer) => (figure.format ? figure.value(layer) : figure.show(layer));
  return [figures.map((figure) => figure.label), ...rows.map((layer) => figures.map((figure) => value(figure, layer)))]
    .map((line) => line.map(cell).join(",")).join("\r\n") + "\r\n";
}
