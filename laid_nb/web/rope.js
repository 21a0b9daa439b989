// RoPE under sliders: the numbers of laid_nb.rope and laid_nb.playground, and their picture.

const TURN = 2*Math.PI;

function wholeEven(x) {  // as Python rounds: a half goes to the even neighbour
  const up = Math.round(x);
  return x % 1 === .5 && up % 2 ? up - 1 : up;
}

function trainedOn({ window, factor }) { return Math.max(1, wholeEven(window/factor)); }

// Radians a position of each band, and the amplitude of cos and sin.
function ropeOf({ theta, head_dim: dim, scaling, factor, window }) {
  const trained = trainedOn({ window, factor }), bands = Array.from({ length: dim/2 }, (_, b) => b);
  const stretched = theta*(factor*Math.max(window, trained)/trained - (factor - 1))**(dim/(dim - 2));
  const plain = bands.map(b => (scaling === "dynamic" ? stretched : theta)**(-2*b/dim));
  if (scaling === "linear") return { rates: plain.map(w => w/factor), amplitude: 1 };
  if (scaling !== "yarn") return { rates: plain, amplitude: 1 };
  const band = turns => dim*Math.log(trained/(turns*TURN))/(2*Math.log(theta));
  const low = Math.max(Math.floor(band(32)), 0), high = Math.min(Math.ceil(band(1)), dim - 1);
  const ramp = b => clip((b - low)/(high - low || .001), 0, 1);
  return { rates: plain.map((w, b) => w*(1 - ramp(b)) + w/factor*ramp(b)), amplitude: 1 + .1*Math.log(factor) };
}

function axisOfBand(sections, b) {  // 0, 1, 2 for T, H, W
  return sections.length && b >= sections[0] ? b >= sections[0] + sections[1] ? 2 : 1 : 0;
}

function turnsWithin(rates, window) { return rates.map(w => w*window >= TURN*(1 - 1e-6)); }

function meanCosine(rates, distance) { return rates.reduce((sum, w) => sum + Math.cos(w*distance), 0)/rates.length; }

// Fourier coefficient of the sum of cosines over the window at bin k: for each band two geometric series in closed form.
function coefficient(terms, k, window) {
  const c = Math.cos(TURN*k/window), s = -Math.sin(TURN*k/window);
  let real = 0, imaginary = 0;
  for (const { cos, sin, topReal, topImaginary } of terms) {
    for (const sign of [1, -1]) {  // e^(iwn) and e^(-iwn)
      const a = 1 - (cos*c - sign*sin*s), b = -(cos*s + sign*sin*c), size = a*a + b*b, top = sign*topImaginary;
      real += size < 1e-22 ? window : (topReal*a + top*b)/size;
      imaginary += size < 1e-22 ? 0 : (top*a - topReal*b)/size;
    }
  }
  return [real/2, imaginary/2];
}

// Shares of the power over the window by octave of bins, on RoPE lines and on none.
function powerByOctave(rates, window) {
  const terms = rates.map(w => ({ cos: Math.cos(w), sin: Math.sin(w), topReal: 1 - Math.cos(w*window),
    topImaginary: -Math.sin(w*window) }));
  const most = Math.floor(window/2), octaves = Math.floor(Math.log2(most)) + 1;
  const on = Array(octaves).fill(0), off = Array(octaves).fill(0), lines = rates.map(w => w*window/TURN);
  let all = 0;
  for (let k = 1; k <= most; k++) {
    const [real, imaginary] = coefficient(terms, k, window);
    const power = (real*real + imaginary*imaginary)/(2*k === window ? 2 : 1);
    const near = lines.some(line => Math.abs(k - line) <= 1 + 1e-6);
    (near ? on : off)[Math.floor(Math.log2(k))] += power;
    all += power;
  }
  return { on: on.map(p => p/all), off: off.map(p => p/all) };
}

function ropeNumbers(settings) {
  const { rates, amplitude } = ropeOf(settings), power = powerByOctave(rates, settings.window);
  return { rates, amplitude, ...power, leakage: power.off.reduce((a, b) => a + b, 0),
    turning: turnsWithin(rates, settings.window) };
}

function ropeWords(settings, { turning, leakage }) {
  const { theta, head_dim, sections, scaling, factor, window } = settings, whole = x => Math.round(x).toLocaleString("en");
  const scaled = scaling === "none" ? "" : `, ${scaling} × ${Number(factor.toPrecision(6))}`;
  return `RoPE with theta ${whole(theta)}, head_dim ${head_dim}, sections ${sections.join("/") || "none"}${scaled}: `
    + `${turning.filter(Boolean).length} of ${head_dim/2} bands turn within ${whole(window)} positions, `
    + `leakage ${(100*leakage).toFixed(1)}%`;
}

// --- the view -------------------------------------------------------------------
const SLIDERS = {  // of a slider's position: value, and step
  theta: { to: Math.log10, from: at => 10**at, step: .05, text: x => Math.round(x).toLocaleString("en") },
  head_dim: { to: x => x, from: x => x, step: 8, text: String },
  window: { to: Math.log2, from: at => wholeEven(2**at), step: .125, text: x => x.toLocaleString("en") },
  factor: { to: Math.log2, from: at => 2**at, step: .125, text: x => x.toFixed(2) },
};
const SCALED = [["none", "none"], ["linear", "linear"], ["dynamic", "dynamic (NTK)"], ["yarn", "YaRN"]];
const REACH = Array.from({ length: 500 }, (_, i) => Math.round(10**(6*i/499))).filter((d, i, all) => d !== all[i - 1]);

function decadeText(x) { return x < 1e4 ? short(x) : x < 1e6 ? `${x/1e3}k` : `${x/1e6}M`; }

class RopeView {
  constructor(model, root) {
    this.model = model;
    this.data = model.get("view");
    this.wave = null;  // band under the pointer
    this.said = make("p", { class: "laid-said", "aria-live": "polite" });
    this.sliders = Object.fromEntries(Object.keys(SLIDERS).map(name => [name, this.slider(name)]));
    this.lists = make("div", { class: "laid-controls" });
    const panels = make("div", { class: "laid-panels" });
    root.append(this.said, make("div", { class: "laid-controls" }, ...Object.values(this.sliders).map(s => s.box)), this.lists, panels);
    this.plots = ["reach", "bands", "octaves"].map(name => {
      const box = make("figure", { class: name === "reach" ? "laid-panel laid-wide" : "laid-panel" }, make("figcaption"));
      panels.append(box);
      return [name, box.firstChild, new Plot(box)];
    });
  }

  slider(name) {
    const { to, from, step } = SLIDERS[name], [low, high] = this.data.limits[name].map(to);
    const input = make("input", { type: "range", min: low, max: high, step, "aria-label": name });
    const shown = make("output", {});
    input.addEventListener("input", () => this.change({ [name]: from(Number(input.value)) }));
    return { input, shown, box: make("label", { class: "laid-slider" }, make("span", { class: "laid-label" }, name), input, shown) };
  }

  settings() {
    return Object.fromEntries(["theta", "head_dim", "sections", "scaling", "factor", "window"].map(n => [n, this.model.get(n)]));
  }

  preset() {
    const sections = String(this.model.get("sections")), bands = this.model.get("head_dim")/2;
    return Object.keys(this.data.presets).find(name => String(this.data.presets[name][bands]) === sections) ?? "typed";
  }

  change(values) {  // sections follow head_dim
    if ("head_dim" in values) {
      const preset = this.preset(), name = preset === "typed" ? Object.keys(this.data.presets)[1] : preset;
      this.model.set("sections", this.data.presets[name][values.head_dim/2]);
    }
    for (const [name, value] of Object.entries(values)) this.model.set(name, value);
    this.model.save_changes();
  }

  draw() {
    this.now = this.settings();
    this.numbers = ropeNumbers(this.now);
    this.plain = this.now.scaling === "none" ? null : ropeOf({ ...this.now, scaling: "none" }).rates;
    this.said.textContent = ropeWords(this.now, this.numbers);
    for (const [name, { input, shown }] of Object.entries(this.sliders)) {
      const { to, text } = SLIDERS[name];
      if (document.activeElement !== input) input.value = to(this.now[name]);
      shown.textContent = text(this.now[name]);
    }
    this.sliders.factor.input.disabled = this.now.scaling === "none";
    this.drawLists();
    this.plots.forEach(panel => this.drawPanel(panel));
  }

  drawLists() {
    const preset = this.preset(), names = Object.keys(this.data.presets).map(name => [name, name]);
    if (preset === "typed") names.push(["typed", this.now.sections.join("/")]);
    const choose = name => { if (name !== "typed") this.change({ sections: this.data.presets[name][this.now.head_dim/2] }); };
    this.lists.replaceChildren(dropdown("sections", names, preset, choose),
      dropdown("scaling", SCALED, this.now.scaling, scaling => this.change({ scaling })));
  }

  drawPanel([name, caption, plot]) {
    const [title, why, spec] = ROPE_PANELS[name](this);
    caption.replaceChildren(make("b", {}, title), make("span", {}, why));
    plot.draw(spec);
  }

  pointBand(band) {
    if (band === this.wave) return;
    this.wave = band;
    this.drawPanel(this.plots[0]);
  }

  axes() {  // [name, colour, bands] of each axis that there is
    const bands = this.numbers.rates.map((_, b) => b), { sections } = this.now;
    if (!sections.length) return [["all", "var(--laid-ink)", bands]];
    return AXES.map(([name, colour], a) => [name, colour, bands.filter(b => axisOfBand(sections, b) === a)]);
  }
}

// --- the panels: view -> [title, why it matters, spec of the plot] ---------------------
const ROPE_PANELS = {
  reach(view) {
    const { rates, amplitude } = view.numbers, { window, sections, scaling } = view.now, lines = [];
    const line = (name, colour, some, more) =>
      lines.push({ name, colour, points: REACH.map(d => [d, meanCosine(some, d)]), ...more });
    if (view.plain) line("without scaling", "var(--laid-soft)", view.plain, { dash: true });
    if (sections.length) for (const [name, colour, bands] of view.axes()) line(name, colour, bands.map(b => rates[b]), { thin: true });
    line("all bands", "var(--laid-ink)", rates);
    const wave = view.wave == null ? null : REACH.filter(d => d*rates[view.wave] <= 6*TURN).map(d => [d, .6*Math.cos(rates[view.wave]*d)]);
    const ofAxes = sections.length ? ", and of the bands of each axis (T blue, H orange, W green)" : "";
    const dotted = view.plain ? " Dotted: without scaling." : "";
    const sharper = scaling === "yarn" ? ` All logits are multiplied by ${(amplitude**2).toFixed(2)}.` : "";
    return ["What is left of a match at each distance",
      ` The mean of all bands (thick)${ofAxes}. Shaded: the window.${dotted}${sharper}`,
      { x: { scale: "log", low: 1, high: 1e6, ticks: [1, 10, 100, 1e3, 1e4, 1e5, 1e6], text: decadeText, label: "distance in positions" },
        y: { scale: "linear", low: -1.05, high: 1.05, ticks: [-1, 0, 1] }, lines, wave, label: "mean of the bands by distance",
        guides: [{ x: 1, to: window, text: "" }, { x: window, text: "window" }], hint: "point at a distance, or at a band below",
        read: readLines(lines, at => `${short(at)} positions apart`) }];
  },

  bands(view) {
    const { rates, turning } = view.numbers, { window } = view.now, last = rates.length - 1;
    const dots = (bands, colour, hollow) => ({ name: "", colour, dots: true, hollow, points: bands.map(b => [b, TURN/rates[b]]) });
    const lines = view.axes().flatMap(([, colour, bands]) => [dots(bands.filter(b => turning[b]), colour, false),
      dots(bands.filter(b => !turning[b]), colour, true)]);
    lines.push({ name: "window", colour: "var(--laid-soft)", dash: true, points: [[0, window], [last, window]] });
    const band = at => clip(Math.round(at), 0, last);
    return ["How long each band takes to turn",
      " Filled: within the window (dashed). A hollow one cannot be told from a constant there. Point at one to see its wave above.",
      { x: { scale: "linear", low: 0, high: last, ticks: [0, 1, 2, 3, 4].map(i => Math.round(last*i/4)), label: "band, fast to slow" },
        y: { scale: "log", low: 1, high: 1e9, ticks: [1, 1e2, 1e4, 1e6, 1e8], text: decadeText }, lines, label: "wavelength by band",
        hint: "wavelength in positions", point: at => view.pointBand(at == null ? null : band(at)),
        read: at => `band ${band(at)}: a turn in ${short(TURN/rates[band(at)])} positions` }];
  },

  octaves(view) {
    const { on, off, rates, leakage } = view.numbers, { window, sections } = view.now, low = 1e-6;
    const edges = Array.from({ length: on.length + 1 }, (_, o) => window/2**o);
    const stairs = values => values.flatMap((v, o) => [[edges[o], Math.max(v, low)], [edges[o + 1], Math.max(v, low)]]).reverse();
    const lines = [{ name: "on lines", colour: "var(--laid-soft)", points: stairs(on) },
      { name: "on none", colour: "var(--laid-distilled)", points: stairs(off) }];
    const marks = rates.map((w, b) => ({ x: TURN/w, colour: AXES[axisOfBand(sections, b)][1], row: 0 })).filter(mark => mark.x <= 1e5);
    const at = x => clip(Math.floor(Math.log2(window/x)), 0, on.length - 1);
    return ["Where its power lies over the window",
      ` Grey: near a wavelength of RoPE (ticks). Red: near none, the leakage, ${(100*leakage).toFixed(1)}% of all.`,
      { x: { scale: "log", low: 1, high: 1e5, ticks: [1, 10, 100, 1e3, 1e4, 1e5], text: decadeText, label: "period in positions" },
        y: { scale: "log", low, high: 1, ticks: [1e-6, 1e-4, .01, 1] }, lines, marks, label: "share of power by period",
        hint: "share of power, by octave of periods",
        read: x => `periods of ${short(edges[at(x) + 1])} to ${short(edges[at(x)])}: ${percent(on[at(x)])} on lines, ${percent(off[at(x)])} on none` }];
  },
};
