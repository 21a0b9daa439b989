// The heads of one or more models: a grid of layer x head for each model, and four panels on the heads chosen.

const MAPS = {
  needle: ["attention on the needle", "the most that a word of the question gives to the picture asked about; 1 is all"],
  local: ["attention nearby", "share of attention within the length of one picture"],
  far: ["attention far away", "share of attention from half of the input on"],
  sink: ["attention on the first token", "share that goes to the first token, where heads leave what they do not need"],
  entropy: ["evenness of attention", "entropy: 1 is spread over all tokens alike, 0 is one token"],
  slow: ["keys that cannot tell places apart", "share of a key's energy in rotations too slow to turn once in this input"],
};
const KNOWN_COLOURS = { teacher: "var(--laid-teacher)", student: "var(--laid-student)", distilled: "var(--laid-distilled)" };
const OTHER_COLOURS = ["#2ca02c", "#c77700", "#9467bd", "#a8624f", "#d660b0", "#9a9a20", "#17a2b8"];
const AXES = [["T", "#1f77b4"], ["H", "#ff7f0e"], ["W", "#2ca02c"]];

function colourOfModel(name, i) {
  return Object.hasOwn(KNOWN_COLOURS, name) ? KNOWN_COLOURS[name] : OTHER_COLOURS[i % OTHER_COLOURS.length];
}

class HeadsView {
  constructor(model, root) {
    this.model = model;
    this.data = model.get("view");
    this.root = root;
    this.hovered = null;  // { name, layer, head }
    this.wave = null;  // wavelength under the pointer
    this.said = make("p", { class: "laid-said", "aria-live": "polite" });
    this.controls = make("div", { class: "laid-controls" });
    this.gridRow = make("div", { class: "laid-grids" });
    this.barBox = make("div", { class: "laid-grid-box" });
    this.legend = make("div", { class: "laid-legend" });
    this.tip = make("div", { class: "laid-tip", hidden: true });
    const panels = make("div", { class: "laid-panels" });
    root.append(this.said, this.controls, this.gridRow, this.legend, panels, this.tip);
    this.grids = this.data.models.map(entry => this.gridOf(entry));
    this.gridRow.append(this.barBox);
    this.plots = ["response", "power", "energy", "mass"].map(name => {
      const box = make("figure", { class: "laid-panel" }, make("figcaption"));
      panels.append(box);
      return [name, box.firstChild, new Plot(box)];
    });
  }

  get(name) { return this.model.get(name); }

  say(text) { return text.replaceAll("picture", this.data.models[0].item); }  // "item" where haystacks are of text

  set(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  gridOf(entry) {
    const box = make("figure", { class: "laid-grid-box" });
    const title = make("figcaption", {}, make("b", {}, entry.name),
      make("small", {}, ` ${entry.layers} layers × ${entry.heads} heads`));
    this.gridRow.append(box);
    box.append(title);
    const grid = new Grid(box, {
      choose: (layer, head) => this.choose(entry.name, layer, head),
      hover: (cell, event) => this.hover(entry, cell, event),
    });
    return [entry, title, grid];
  }

  choose(name, layer, head) { this.set("chosen", { ...this.get("chosen"), [name]: [layer, head] }); }

  hover(entry, cell, event) {
    this.hovered = cell && { name: entry.name, layer: cell[0], head: cell[1] };
    this.tip.hidden = !cell;
    if (cell) this.explain(entry, cell, event);
    this.drawPanels();
  }

  spectra(entry) { return entry.sizes[this.get("images")]; }

  number(entry, name, [layer, head]) { return part(this.spectra(entry)[name], layer)[head]; }

  cellOf(entry) {
    const { name, layer, head } = this.hovered ?? {};
    return name === entry.name ? [layer, head] : this.get("chosen")[entry.name];
  }

  explain(entry, cell, event) {
    const value = this.number(entry, this.get("map"), cell);
    const [title, meaning] = MAPS[this.get("map")].map(text => this.say(text));
    const even = this.get("map") === "needle" ? ` Spread evenly, each of ${this.get("images")} pictures would get `
      + `${percent(1/this.get("images"))} or less.` : "";
    this.tip.replaceChildren(make("b", {}, `${entry.name}, layer ${cell[0]}, head ${cell[1]}`), make("br"),
      Number.isFinite(value) ? `${title}: ${value.toFixed(2)}` : this.whyNot(entry, cell[0]), make("br"),
      make("small", {}, `${meaning}.${this.say(even)}`));
    const box = this.root.getBoundingClientRect(), wide = Math.min(260, box.width - 16);
    this.tip.style.width = `${wide}px`;
    this.tip.style.left = `${clip(event.clientX - box.left + 14, 0, box.width - wide - 22)}px`;
    this.tip.style.top = `${event.clientY - box.top + 18}px`;
  }

  whyNot(entry, layer) { return `not measured: this layer ${entry.left_out[layer] ?? "was left out"}`; }

  draw() {
    this.drawSaid();
    this.drawControls();
    this.drawGrids();
    this.drawPanels();
  }

  drawSaid() {
    const images = this.get("images"), chosen = this.get("chosen");
    const best = this.data.models.every(entry => String(chosen[entry.name]) === String(this.best(entry)));
    const parts = this.data.models.map(entry => {
      const needle = this.number(entry, "needle", chosen[entry.name]);
      return `${percent(needle)} (${entry.name})`;
    });
    const who = best ? "the best head of each model gives the needle" : "the heads chosen give the needle";
    const among = this.say(`Among ${images} ${images === 1 ? "picture" : "pictures"}`);
    this.said.textContent = `${among}, ${who} this share of its attention: ${parts.join(", ")}.`;
  }

  best(entry) {
    const { needle } = this.spectra(entry);
    let top = -1, cell = [0, 0];
    for (let layer = 0; layer < entry.layers; layer++) {
      part(needle, layer).forEach((value, head) => { if (value > top) [top, cell] = [value, [layer, head]]; });
    }
    return cell;
  }

  drawControls() {
    const maps = Object.entries(MAPS).map(([name, [title]]) => [name, title]);
    const bests = () => this.set("chosen", Object.fromEntries(this.data.models.map(e => [e.name, this.best(e)])));
    this.controls.replaceChildren(
      ...this.data.sizes.length < 2 ? [] : [choice(this.say("pictures"), this.data.sizes.map(n => [n, String(n)]),
        this.get("images"), n => this.set("images", n))],
      dropdown("colours", maps, this.get("map"), name => this.set("map", name)),
      choice("distance in", [["tokens", "tokens"], ["positions", "positions"]], this.get("unit"),
        unit => this.set("unit", unit)),
      make("button", { type: "button", class: "laid-best", onclick: bests }, "best heads"));
  }

  drawGrids() {
    const map = this.get("map"), width = this.root.clientWidth, beside = this.grids.length;
    const least = Math.max(150, ...this.grids.map(([entry]) => MARGIN.left + 9*entry.heads));
    const across = clip(Math.floor(width/(least + 28)), 1, beside);
    for (const [entry, title, grid] of this.grids) {
      const values = part(this.spectra(entry)[map]);
      title.style.setProperty("--laid-colour", colourOfModel(entry.name, this.data.models.indexOf(entry)));
      grid.draw({ rows: entry.layers, columns: entry.heads, group: entry.heads/entry.kv_heads, values,
        chosen: this.get("chosen")[entry.name], label: `${entry.name}: ${MAPS[map][0]}` }, width/across - 28);
    }
    this.barBox.replaceChildren(colourBar(...MAPS[map].map(text => this.say(text))));
  }

  shown() {  // what is drawn: { entry, layer, head, colour, s }
    return this.data.models.map((entry, i) => {
      const [layer, head] = this.cellOf(entry);
      return { entry, layer, head, colour: colourOfModel(entry.name, i), s: this.spectra(entry) };
    });
  }

  drawPanels() {
    const shown = this.shown();
    this.legend.replaceChildren(...shown.map(({ entry, layer, head, colour }) => {
      const shares = [["needle", "needle"], ["local", "nearby"], ["far", "far"], ["sink", "first token"]].map(
        ([name, text]) => `${text} ${percent(this.number(entry, name, [layer, head]))}`);
      return make("div", { style: { "--laid-colour": colour } },
        make("b", {}, `${entry.name}, layer ${layer}, head ${head}`),
        make("small", {}, entry.left_out[layer] ? this.whyNot(entry, layer) : shares.join(" · ")));
    }));
    for (const [name, caption, plot] of this.plots) {
      const [title, why, spec] = PANELS[name](this, shown);
      caption.replaceChildren(make("b", {}, title), make("span", {}, why));
      plot.draw(spec);
    }
  }

  field(name) { return this.get("unit") === "tokens" ? name : `position_${name}`; }

  waves(entry, layer) {  // of RoPE: wavelengths by band in the unit of the plots, and the axis of each band
    const { wavelength, axis } = entry.rope[layer] ?? entry.rope.usual, s = this.spectra(entry);
    const scale = this.get("unit") === "positions" ? 1 : part(s.edges).at(-1)/part(s.position_edges).at(-1);
    return { wavelength: Array.from(part(wavelength), x => x*scale), axis };
  }

  pointWave(wavelength) {
    if (wavelength === this.wave) return;
    this.wave = wavelength;
    const [name, , plot] = this.plots[0];
    plot.draw(PANELS[name](this, this.shown())[2]);
  }
}

// --- the panels: (view, shown) -> [title, why it matters, spec of the plot] ------------
function distanceAxis(view, shown, edges) {
  const high = Math.max(...shown.map(({ s }) => part(s[edges]).at(-1))) + 1;
  return { scale: "log", low: 1, high, ticks: octaves(1, high), label: `distance in ${view.get("unit")}, plus one` };
}

function readLines(lines, words) {
  return at => `${words(at)}: ` + lines.filter(line => !line.dots)
    .map(({ name, points }) => `${name} ${short(valueAt(points, at))}`).join(", ");
}

function wavePoints(wavelength, high, amplitude) {  // six turns, then it is too dense to see
  const points = [], end = Math.min(high - 1, 6*wavelength);
  for (let i = 0; i <= 480; i++) {
    const distance = end*i/480;
    points.push([distance + 1, amplitude*Math.cos(2*Math.PI*distance/wavelength)]);
  }
  return points;
}

function onePicture(view, edges) { return edges.at(-1)/view.get("images") + 1; }

const PANELS = {
  response(view, shown) {
    const edges = view.field("edges"), unit = view.get("unit"), x = distanceAxis(view, shown, edges);
    const lines = shown.map(({ entry, layer, head, colour, s }) => ({ name: entry.name, colour,
      points: steps(part(s[view.field("response")], layer, head), part(s[edges])) }));
    const top = view.data.limits.response, far = onePicture(view, part(shown[0].s[edges]));
    const guides = [{ x: far, text: view.say("about one picture") }];
    if (view.wave) guides.push({ x: clip(view.wave + 1, 1, x.high), text: `one turn: ${short(view.wave)} ${unit}` });
    const ticks = [-64, -16, -4, -1, 0, 1, 4, 16, 64].filter(tick => Math.abs(tick) <= top);
    return ["How strongly it answers to each distance",
      " A head that finds things far away holds its line up to the right end.",
      { x, y: { scale: "asinh", low: -top, high: top, ticks }, lines, guides, label: "mean logit by distance",
        wave: view.wave && wavePoints(view.wave, x.high, top*.6),
        hint: "mean logit (scores before softmax) of query and key so far apart",
        read: readLines(lines, at => `${short(at - 1)} ${unit} apart, mean logit`) }];
  },

  power(view, shown) {
    const unit = view.get("unit"), wavelengths = view.field("wavelength"), edges = view.field("edges");
    const high = Math.max(...shown.map(({ s }) => part(s[edges]).at(-1))), floor = view.data.limits.power*1e-7;
    const lines = shown.map(({ entry, layer, head, colour, s }) => {
      const lengths = part(s[wavelengths]), powers = part(s[view.field("log_power")], layer, head);
      const points = Array.from(lengths, (length, i) => [length, Math.max(10**powers[i], floor)]);
      return { name: entry.name, colour, points: points.filter(p => p.every(Number.isFinite)).sort((a, b) => a[0] - b[0]) };
    });
    const { entry, layer } = shown[0], rope = view.waves(entry, layer);
    const marks = rope.wavelength.map((length, i) => ({ x: length, colour: AXES[rope.axis[i]][1], row: rope.axis[i] }))
      .filter(mark => mark.x >= 2 && mark.x <= high);
    return ["Which waves that answer is made of",
      view.say(" Only long waves tell far pictures apart. Ticks at the foot: the turns RoPE offers")
      + (rope.axis.some(a => a) ? " for time (blue), height (orange), width (green)." : "."),
      { x: { scale: "log", low: 2, high, ticks: octaves(2, high), label: `wavelength in ${unit}` },
        y: { scale: "log", low: floor, high: view.data.limits.power, ticks: decades(floor, view.data.limits.power) },
        lines, marks, label: "power by wavelength", hint: "point at a wave: it is drawn over the answer to distance",
        point: at => view.pointWave(at), read: readLines(lines, at => `a wave of ${short(at)} ${unit}, power`) }];
  },

  energy(view, shown) {
    const lines = [], bands = Math.max(...shown.map(({ s }) => s.q_energy.shape[2]));
    for (const { entry, layer, head, colour, s } of shown) {
      const kv = Math.floor(head*entry.kv_heads/entry.heads), points = values => Array.from(values, (v, i) => [i, v]);
      lines.push({ name: entry.name, colour, points: points(part(s.q_energy, layer, head)) });
      lines.push({ name: entry.name, colour, points: points(part(s.k_energy, layer, kv)), dots: true });
    }
    const { entry, layer } = shown[0], rope = view.waves(entry, layer), top = view.data.limits.energy;
    const of = at => rope.wavelength[clip(Math.round(at), 0, rope.wavelength.length - 1)];
    return ["Which rotations query and key use",
      " Left are fast ones, which tell neighbours apart; right slow ones, which carry what a thing is, not where.",
      { x: { scale: "linear", low: 0, high: bands - 1, label: "rotation (RoPE band), fast to slow",
             ticks: [0, 1, 2, 3, 4].map(i => Math.round((bands - 1)*i/4)) },
        y: { scale: "linear", low: 0, high: top, ticks: evenTicks(top), text: percent },
        lines, label: "share of energy by band", hint: "share of energy: query (line), key (dots)",
        point: at => view.pointWave(at == null ? null : of(at)),
        read: at => `band ${Math.round(at)}, one turn in ${short(of(at))} ${view.get("unit")}: ` + lines.map(
          ({ name, points, dots }) => `${dots ? "its key" : name} ${percent(valueAt(points, Math.round(at)))}`).join(", ") }];
  },

  mass(view, shown) {
    const lines = shown.map(({ entry, layer, head, colour, s }) => ({ name: entry.name, colour,
      points: steps(part(s.mass, layer, head), part(s.edges)).map(([x, y]) => [x, Math.max(y, 1e-4)]) }));
    const unit = view.get("unit"), edges = part(shown[0].s.edges), high = edges.at(-1) + 1;
    const x = { scale: "log", low: 1, high, ticks: octaves(1, high), label: "distance in tokens, plus one" };
    return ["Where its attention ends up",
      " Shaded: the far half of the input, where most of a haystack lies.",
      { x, y: { scale: "log", low: 1e-4, high: 1, ticks: [1e-4, 1e-3, .01, .1, 1] }, lines, label: "attention by distance",
        guides: [{ x: high/2, to: high, text: "" }, { x: onePicture(view, edges), text: view.say("about one picture") }],
        hint: "attention summed over each step of distance" + (unit === "positions" ? ", always in tokens" : ""),
        read: readLines(lines, at => `${short(at - 1)} tokens away, attention`) }];
  },
};
