// Plots in SVG, as wide as their box, with what stands under the pointer.

const SCALES = {
  linear: { to: x => x, from: x => x },
  log: { to: Math.log2, from: x => 2**x },
  asinh: { to: Math.asinh, from: Math.sinh },
  root: { to: Math.sqrt, from: x => x*x },
};

// { scale, low, high } and pixels -> functions of a value and of a pixel
function axis({ scale, low, high }, start, end) {
  const { to, from } = SCALES[scale], a = to(low), b = to(high);
  return {
    at: value => start + (end - start)*(to(value) - a)/(b - a),
    value: pixel => from(a + (b - a)*(pixel - start)/(end - start)),
  };
}

function powers(log, base, most) {  // (low, high) -> powers of a base
  return (low, high) => {
    const first = Math.ceil(log(low)), last = Math.floor(log(high));
    const step = Math.max(1, Math.ceil((last - first + 1)/most));
    const ticks = [];
    for (let i = first; i <= last; i += step) ticks.push(base**i);
    return ticks;
  };
}
const octaves = powers(Math.log2, 2, 7), decades = powers(Math.log10, 10, 5);

function evenTicks(high) {  // round steps from 0
  const step = [.01, .02, .05, .1, .2, .25, .5].find(s => high/s <= 5) ?? 1;
  return Array.from({ length: Math.floor(high/step) + 1 }, (_, i) => i*step);
}

function path(points, x, y) {
  return points.map(([a, b], i) => `${i ? "L" : "M"}${x.at(a).toFixed(1)} ${y.at(b).toFixed(1)}`).join("");
}

function steps(values, edges) {  // a level for each bin, on distance plus one: 0 has a place on a log axis
  const points = [];
  values.forEach((value, i) => {
    if (Number.isFinite(value)) points.push([edges[i] + 1, value], [edges[i + 1] + 1, value]);
  });
  return points;
}

const PAD = { left: 44, right: 12, top: 8, bottom: 34 };

// spec: { x, y: { scale, low, high, ticks, label }, lines: [{ name, colour, points, dots, hollow, dash, thin }], marks: [{ x, colour, row }],
// guides: [{ x, text }], wave: [[x, y]] or null, read: x -> text, point: x -> what the pointer means, or absent }
class Plot {
  constructor(box) {
    this.box = box;
    this.svg = makeSvg("svg", { class: "laid-plot", tabindex: 0, role: "img" });
    this.readout = make("div", { class: "laid-readout", "aria-live": "polite" });
    box.append(this.svg, this.readout);
    this.measured = null;  // asked once: the page is laid out for it
    new ResizeObserver(() => { this.measured = box.clientWidth; }).observe(box);
    this.svg.addEventListener("pointermove", event => this.pointed(event));
    this.svg.addEventListener("pointerdown", event => this.pointed(event));
    this.svg.addEventListener("pointerleave", event => {  // a finger that is lifted has pointed
      if (event.pointerType === "mouse") this.point(null);
    });
    this.svg.addEventListener("keydown", event => this.key(event));
    this.svg.addEventListener("blur", () => this.point(null));
  }

  draw(spec) {
    this.spec = spec;
    this.measured ??= this.box.clientWidth;
    this.width = Math.max(240, this.measured);
    this.height = this.width < 420 ? 190 : 220;
    this.x = axis(spec.x, PAD.left, this.width - PAD.right);
    this.y = axis(spec.y, this.height - PAD.bottom, PAD.top);
    this.svg.setAttribute("width", this.width);
    this.svg.setAttribute("height", this.height);
    this.svg.setAttribute("aria-label", spec.label);
    this.cursor = makeSvg("g", { class: "laid-cursor" });
    this.svg.replaceChildren(...this.frame(), ...this.content(), this.cursor);
    this.mark(this.at ?? null);
  }

  frame() {
    const { spec, width, height, x, y } = this, bottom = height - PAD.bottom, nodes = [];
    for (const tick of spec.y.ticks) {
      const at = y.at(tick);
      nodes.push(makeSvg("line", { class: "laid-rule", x1: PAD.left, x2: width - PAD.right, y1: at, y2: at }));
      nodes.push(makeSvg("text", { x: PAD.left - 6, y: at + 4, "text-anchor": "end" }, (spec.y.text ?? short)(tick)));
    }
    for (const tick of spec.x.ticks) {
      const at = x.at(tick);
      nodes.push(makeSvg("line", { class: "laid-tick", x1: at, x2: at, y1: bottom, y2: bottom + 4 }));
      nodes.push(makeSvg("text", { x: at, y: bottom + 16, "text-anchor": "middle" }, (spec.x.text ?? short)(tick)));
    }
    nodes.push(makeSvg("line", { class: "laid-axis", x1: PAD.left, x2: width - PAD.right, y1: bottom, y2: bottom }));
    const middle = (PAD.left + width - PAD.right)/2;
    nodes.push(makeSvg("text", { class: "laid-axis-label", x: middle, y: height - 3, "text-anchor": "middle" },
      spec.x.label));
    return nodes;
  }

  content() {
    const { spec, x, y, height } = this, bottom = height - PAD.bottom, nodes = [];
    for (const { x: from, to, text } of spec.guides ?? []) {
      const start = x.at(from);
      if (to) nodes.push(makeSvg("rect", { class: "laid-shade", x: start, width: Math.max(0, x.at(to) - start), y: PAD.top,
        height: bottom - PAD.top }));
      else nodes.push(makeSvg("line", { class: "laid-guide", x1: start, x2: start, y1: PAD.top, y2: bottom }));
      nodes.push(makeSvg("text", { class: "laid-guide-text", x: start + 4, y: PAD.top + 10 }, text));
    }
    for (const { x: at, colour, row } of spec.marks ?? []) {
      const foot = bottom - 3 - 8*row;
      nodes.push(makeSvg("line", { x1: x.at(at), x2: x.at(at), y1: foot, y2: foot - 6, style: { stroke: colour } }));
    }
    if (spec.wave) nodes.push(makeSvg("path", { class: "laid-wave", d: path(spec.wave, x, y) }));
    for (const { colour, points, dots, dash, hollow, thin } of spec.lines) {
      if (dots) {
        const style = { fill: hollow ? "none" : colour, stroke: colour };
        for (const [a, b] of points) nodes.push(makeSvg("circle", { cx: x.at(a), cy: y.at(b), r: 2.4, style }));
      } else {
        const dashed = dash ? "3 3" : null;
        nodes.push(makeSvg("path", { class: "laid-line", d: path(points, x, y), "stroke-dasharray": dashed,
          style: thin ? { stroke: colour, "stroke-width": 1 } : { stroke: colour } }));
      }
    }
    return nodes;
  }

  pointed(event) {
    const left = this.svg.getBoundingClientRect().left, pixel = event.clientX - left;
    this.point(this.x.value(clip(pixel, PAD.left, this.width - PAD.right)));
  }

  key(event) {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step || !this.spec) return;
    event.preventDefault();
    event.stopPropagation();
    const from = this.x.at(this.at ?? this.x.value(step > 0 ? PAD.left : this.width - PAD.right));
    const pixel = from + step*(this.width - PAD.left - PAD.right)/48;
    this.point(this.x.value(clip(pixel, PAD.left, this.width - PAD.right)));
  }

  point(at) {
    if (!this.spec) return;
    this.at = at;
    this.mark(at);
    this.spec.point?.(at);
  }

  mark(at) {
    this.cursor.replaceChildren();
    this.readout.textContent = at == null ? this.spec.hint ?? "" : this.spec.read(at);
    if (at == null) return;
    const pixel = this.x.at(at);
    this.cursor.append(makeSvg("line", { x1: pixel, x2: pixel, y1: PAD.top, y2: this.height - PAD.bottom }));
  }
}

// Value of a line of points that are sorted by x, at the last point up to x.
function valueAt(points, x) {
  let found = NaN;
  for (const [a, b] of points) {
    if (a > x) break;
    found = b;
  }
  return found;
}

function nearest(values, x) {  // index of the value closest to x, by ratio
  let best = 0;
  values.forEach((value, i) => {
    if (Math.abs(Math.log(value/x)) < Math.abs(Math.log(values[best]/x))) best = i;
  });
  return best;
}
