// A layer x head grid as a heat map on a canvas, with axes; one colour bar for all grids of a view.

const MAP = [[68, 1, 84], [72, 40, 120], [62, 74, 137], [49, 104, 142], [38, 130, 142], [31, 158, 137], [53, 183, 121],
  [109, 205, 89], [180, 222, 44], [253, 231, 37]];  // ten stops of viridis

const COLOURS = Array.from({ length: 256 }, (_, n) => {
  const at = n/255*(MAP.length - 1), i = Math.min(Math.floor(at), MAP.length - 2), t = at - i;
  return `rgb(${MAP[i].map((c, k) => Math.round(c + t*(MAP[i + 1][k] - c))).join(",")})`;
});

function colourOf(share) { return Number.isFinite(share) ? COLOURS[Math.round(255*clip(share, 0, 1))] : "#8888"; }

const MARGIN = { left: 34, top: 30 };

class Grid {
  // events: { choose(layer, head), hover(layer, head, x, y) or hover(null) }
  constructor(box, events) {
    this.events = events;
    this.canvas = make("canvas", { class: "laid-cells", tabindex: 0, role: "application" });
    box.append(this.canvas);
    this.canvas.addEventListener("pointermove", event => this.moved(event));
    this.canvas.addEventListener("pointerleave", () => this.hover(null));
    this.canvas.addEventListener("click", event => {
      const cell = this.under(event);
      if (!cell) return;
      this.canvas.focus({ preventScroll: true });
      events.choose(...cell);
    });
    this.canvas.addEventListener("keydown", event => this.key(event));
  }

  // { rows, columns, group, values, chosen: [row, column], label }, pixels that there are
  draw(spec, width) {
    Object.assign(this, spec);
    const gaps = this.group > 1 ? this.columns/this.group - 1 : 0;
    this.gap = gaps ? 3 : 0;
    const across = Math.floor((width - MARGIN.left - gaps*this.gap)/this.columns);
    this.size = clip(Math.min(across, Math.floor(440/this.rows)), 6, 38);
    this.paint();
  }

  left(column) { return MARGIN.left + column*this.size + (this.gap ? Math.floor(column/this.group)*this.gap : 0); }

  paint() {
    const width = this.left(this.columns - 1) + this.size + 2, height = MARGIN.top + this.rows*this.size + 2;
    const scale = window.devicePixelRatio || 1, { canvas } = this;
    canvas.width = width*scale;
    canvas.height = height*scale;
    canvas.style.width = `${width}px`;
    canvas.style.height = `${height}px`;
    const context = canvas.getContext("2d");
    context.drawImage(this.ground(canvas, scale), 0, 0);
    context.scale(scale, scale);
    this.frame(context, this.chosen, "#fff", "#000");
    if (this.hovered) this.frame(context, this.hovered, "#000", "#fff");
    canvas.setAttribute("aria-label", `${this.label}. Layer ${this.chosen[0]}, head ${this.chosen[1]} is chosen: `
      + `${short(this.values[this.chosen[0]*this.columns + this.chosen[1]])}. Arrow keys choose another.`);
  }

  // Cells and labels, painted anew only where they are others: what moves is the frames.
  ground(canvas, scale) {
    const ink = getComputedStyle(canvas).color, key = [this.size, scale, ink].join();
    if (this.painted?.key === key && this.painted.values === this.values) return this.painted.image;
    const image = make("canvas", { width: canvas.width, height: canvas.height }), context = image.getContext("2d");
    context.scale(scale, scale);
    this.paintCells(context);
    this.paintLabels(context, ink);
    this.painted = { key, values: this.values, image };
    return image;
  }

  paintCells(context) {
    const side = this.size - (this.size > 9 ? 2 : 1);
    for (let row = 0; row < this.rows; row++) {
      for (let column = 0; column < this.columns; column++) {
        context.fillStyle = colourOf(this.values[row*this.columns + column]);
        context.fillRect(this.left(column), MARGIN.top + row*this.size, side, side);
      }
    }
  }

  paintLabels(context, ink) {
    context.fillStyle = ink;
    context.font = "11px system-ui, sans-serif";
    const every = Math.ceil(18/this.size), middle = this.size/2 - 1;
    context.textAlign = "center";
    for (let column = 0; column < this.columns; column += every) {
      context.fillText(column, this.left(column) + middle, MARGIN.top - 4);
    }
    context.textAlign = "right";
    for (let row = 0; row < this.rows; row += Math.ceil(13/this.size)) {
      context.fillText(row, MARGIN.left - 5, MARGIN.top + row*this.size + middle + 4);
    }
    context.textAlign = "left";
    context.globalAlpha = .75;
    context.fillText("head →", MARGIN.left, 11);
    context.fillText("layer", 0, MARGIN.top - 4);
    context.globalAlpha = 1;
  }

  frame(context, [row, column], outer, inner) {
    const side = this.size - (this.size > 9 ? 2 : 1), x = this.left(column), y = MARGIN.top + row*this.size;
    for (const [width, colour, inset] of [[4, inner, 1], [2, outer, 1]]) {
      context.lineWidth = width;
      context.strokeStyle = colour;
      context.strokeRect(x + inset, y + inset, side - 2*inset, side - 2*inset);
    }
  }

  under(event) {
    const box = this.canvas.getBoundingClientRect();
    const x = event.clientX - box.left, row = Math.floor((event.clientY - box.top - MARGIN.top)/this.size);
    if (row < 0 || row >= this.rows) return null;
    for (let column = 0; column < this.columns; column++) {
      if (x >= this.left(column) && x < this.left(column) + this.size) return [row, column];
    }
    return null;
  }

  moved(event) {
    const cell = this.under(event);
    if (String(cell) !== String(this.hovered ?? null)) this.hover(cell, event);
  }

  hover(cell, event) {
    this.hovered = cell;
    this.paint();
    this.events.hover(cell, event);
  }

  key(event) {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    event.stopPropagation();
    this.hovered = null;
    this.events.hover(null);
    this.events.choose(clip(this.chosen[0] + step[0], 0, this.rows - 1), clip(this.chosen[1] + step[1], 0, this.columns - 1));
  }
}

function colourBar(label, meaning) {
  const stops = MAP.map((_, i) => colourOf(i/(MAP.length - 1))).join(",");
  return make("div", { class: "laid-bar" },
    make("div", { class: "laid-bar-colours", style: { background: `linear-gradient(to right, ${stops})` } }),
    make("div", { class: "laid-bar-ends" }, make("span", {}, "0"), make("span", {}, label), make("span", {}, "1")),
    make("div", { class: "laid-bar-meaning" }, meaning));
}
