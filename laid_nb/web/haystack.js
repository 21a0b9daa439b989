// One question about many pictures: where each model looks, and whether it is right.

class HaystackView {
  constructor(model, root) {
    this.model = model;
    this.data = model.get("view");
    this.root = root;
    this.picture = null;  // index of the picture that was clicked
    this.made = {};  // grids of pictures, by haystack, columns and model
    this.said = make("p", { class: "laid-said", "aria-live": "polite" });
    this.controls = make("div", { class: "laid-controls" });
    this.question = make("p", { class: "laid-question" });
    this.words = make("div", { class: "laid-words", role: "group", "aria-label": "words of the question" });
    this.panels = make("div", { class: "laid-models" });
    this.detail = make("p", { class: "laid-detail", "aria-live": "polite" });
    root.append(this.question, this.said, this.controls, this.words, this.panels, this.detail);
  }

  get(name) { return this.model.get(name); }

  set(name, value) {
    this.model.set(name, value);
    this.model.save_changes();
  }

  haystack() { return this.data.haystacks.find(h => h.id === this.get("haystack")); }

  asked() { return this.haystack().questions[this.get("question")]; }

  draw() {
    const asked = this.asked();
    this.looks = asked.readings.map(reading => look(reading, asked, this.get("token"), this.get("layer"),
      this.get("head")));
    this.drawControls();
    this.drawWords();
    this.drawPanels();
    this.drawSaid();
    this.drawDetail();
  }

  drawControls() {
    const { haystacks } = this.data, { questions } = this.haystack(), { readings } = this.asked();
    const most = dimension => Math.max(...readings.map(r => r.look.shape[dimension]));
    const numbers = n => [["best", "best"], ["mean", "mean"], ...Array.from({ length: n }, (_, i) => [i, String(i)])];
    const stacks = haystacks.map(h => [h.id, `${h.images} (${h.id})`]);
    const unique = new Set(haystacks.map(h => h.images)).size === haystacks.length;
    if (unique) stacks.forEach((stack, i) => { stack[1] = String(haystacks[i].images); });
    this.controls.replaceChildren(
      ...stacks.length < 2 ? [] : [choice("pictures", stacks, this.get("haystack"),
        id => this.change({ haystack: id, question: 0, token: "best" }))],
      dropdown("question", questions.map((q, i) => [i, q.text]), this.get("question"),
        question => this.change({ question, token: "best" })),
      dropdown("layer", numbers(most(1)), this.get("layer"), layer => this.change({ layer })),
      dropdown("head", numbers(most(2)), this.get("head"), head => this.change({ head })));
  }

  change(state) {
    if ("haystack" in state || "question" in state) this.picture = null;
    for (const [name, value] of Object.entries(state)) this.model.set(name, value);
    this.model.save_changes();
  }

  drawWords() {
    const asked = this.asked(), token = this.get("token");
    const button = (value, text, title, share) => make("button", { type: "button", title, "aria-pressed": String(token === value),
      style: { "--laid-share": share }, onclick: () => this.change({ token: value }) }, text);
    const dots = i => asked.readings.map((reading, m) => this.looks[m].token === i
      ? make("i", { style: { background: colourOfModel(reading.name, m) } }) : null);
    const words = asked.words.map((word, i) => {
      const on = Math.max(...asked.readings.map(r => look(r, asked, i, this.get("layer"), this.get("head")).needle ?? 0));
      const node = button(i, word.trim() || "⏎", `seen from “${word.trim() || "⏎"}”: ${percent(on)} on the needle at most`, on);
      node.append(...dots(i).filter(Boolean));
      return node;
    });
    this.words.replaceChildren(make("span", { class: "laid-label" }, "seen from"),
      button("best", "each model's best word", "the word that looks at the needle most", 0), ...words);
  }

  drawPanels() {
    const haystack = this.haystack(), asked = this.asked(), n = haystack.images;
    const wide = this.root.clientWidth > 520 ? 1.05 : 1.4;  // on a phone the grids stand one below another
    const columns = n > 60 ? 15 : Math.max(1, Math.min(n, Math.ceil(wide*Math.sqrt(n))));
    this.panels.replaceChildren(...asked.readings.map((reading, i) => {
      const seen = this.looks[i], colour = colourOfModel(reading.name, i);
      const answer = reading.yes > reading.no ? "Yes" : "No";
      const verdict = make("span", { class: reading.right ? "laid-right" : "laid-wrong" },
        `${answer}, ${reading.right ? "right ✓" : "wrong ✗"}`, make("small", {}, ` ${percent(Math.max(reading.yes, reading.no))} sure`));
      const head = make("header", { style: { "--laid-colour": colour } }, make("b", {}, reading.name), verdict);
      if (!seen.shares) return make("section", {}, head, make("p", {}, seen.why));
      const needles = asked.needles.length ? `${percent(seen.needle)} on the needle, ` : "";
      const rest = make("p", { class: "laid-shares" }, make("b", {}, needles),
        `${percent(seen.total - seen.needle)} on other pictures, ${percent(1 - seen.total)} on text`,
        make("small", {}, ` ${seen.where}`));
      return make("section", {}, head, rest, this.mosaic(haystack, asked, reading, seen, columns),
        this.bars(asked, reading, seen, colour));
    }));
  }

  // The pictures of one model: made once for a haystack, then only faded anew.
  mosaic(haystack, asked, reading, seen, columns) {
    const key = `${haystack.id} ${columns} ${reading.name}`, grid = this.made[key] ??= this.pictures(haystack, reading, columns);
    const top = [...seen.shares.keys()].sort((a, b) => seen.shares[b] - seen.shares[a]).slice(0, 3)
      .filter(i => seen.shares[i] >= .005);
    [...grid.children].forEach((cell, i) => {
      const [thumb, label] = cell.children;
      thumb.style.opacity = .22 + .78*Math.sqrt(seen.shares[i]);
      label.textContent = top.includes(i) ? percent(seen.shares[i]).replace("under ", "<") : "";
      cell.classList.toggle("laid-needle", asked.needles.includes(i));
      cell.classList.toggle("laid-picked", i === this.picture);
    });
    return grid;
  }

  pictures(haystack, reading, columns) {
    const grid = make("div", { class: "laid-mosaic", tabindex: 0, role: "group",
      style: { "grid-template-columns": `repeat(${columns}, 1fr)`, "--laid-sheet": `url("${sheetOf(haystack)}")`,
        "--laid-size": `${100*haystack.columns}% ${100*Math.ceil(haystack.images/haystack.columns)}%` },
      "aria-label": `${haystack.images} pictures as ${reading.name} looks at them. Arrow keys choose one.` });
    const rows = Math.ceil(haystack.images/haystack.columns), at = (i, n) => n > 1 ? `${100*i/(n - 1)}%` : "0";
    for (let i = 0; i < haystack.images; i++) {
      const place = `${at(i % haystack.columns, haystack.columns)} ${at(Math.floor(i/haystack.columns), rows)}`;
      const thumb = make("span", { class: "laid-thumb", style: { "background-position": place } });
      grid.append(make("span", { class: "laid-cell", "data-picture": i }, thumb, make("em")));
    }
    const pick = event => event.target.closest("[data-picture]")?.dataset.picture;
    grid.addEventListener("click", event => pick(event) && this.pick(Number(pick(event))));
    grid.addEventListener("pointerover", event => {
      if (pick(event) && event.pointerType === "mouse") this.drawDetail(Number(pick(event)));
    });
    grid.addEventListener("pointerleave", () => this.drawDetail());
    grid.addEventListener("keydown", event => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -columns, ArrowDown: columns }[event.key];
      if (!step) return;
      event.preventDefault();
      event.stopPropagation();
      this.pick(clip((this.picture ?? -1) + (this.picture == null ? 1 : step), 0, haystack.images - 1));
    });
    return grid;
  }

  bars(asked, reading, seen, colour) {
    const n = seen.shares.length, nodes = [], height = 46;
    seen.shares.forEach((share, i) => {
      const tall = height*Math.sqrt(share), fill = asked.needles.includes(i) ? "var(--laid-needle)" : colour;
      nodes.push(makeSvg("rect", { x: i + .12, width: .76, y: height - tall, height: tall, style: { fill } }));
    });
    const even = height*(1 - Math.sqrt(1/n));
    nodes.push(makeSvg("line", { class: "laid-even", x1: 0, x2: n, y1: even, y2: even, "vector-effect": "non-scaling-stroke" }));
    const svg = makeSvg("svg", { class: "laid-shares-bars", viewBox: `0 0 ${n} ${height}`, preserveAspectRatio: "none", role: "img",
      "aria-label": `${reading.name}: attention by picture, dotted where all would get the same` }, ...nodes);
    svg.addEventListener("click", event => {
      const box = svg.getBoundingClientRect();
      this.pick(clip(Math.floor(n*(event.clientX - box.left)/box.width), 0, n - 1));
    });
    return svg;
  }

  pick(i) {
    this.picture = i;
    for (const cell of this.panels.querySelectorAll("[data-picture]")) {
      cell.classList.toggle("laid-picked", Number(cell.dataset.picture) === i);
    }
    this.drawDetail();
  }

  drawSaid() {
    const asked = this.asked(), n = this.haystack().images;
    this.question.replaceChildren(make("b", {}, asked.text), make("span", {}, ` The answer is ${asked.reply}.`));
    this.said.textContent = asked.readings.map((reading, i) => sentence(reading, this.looks[i], n, asked)).join(" ");
  }

  drawDetail(hovered) {
    const i = hovered ?? this.picture, { names, images } = this.haystack();
    if (i == null) {
      this.detail.textContent = "The needle, the picture asked about, has an orange frame; a picture fades with the attention it gets. Click a picture or a word.";
      return;
    }
    const shares = this.asked().readings.map((reading, m) => this.looks[m].shares
      ? `${reading.name} ${percent(this.looks[m].shares[i])}` : null).filter(Boolean);
    const needle = this.asked().needles.includes(i) ? ", the needle" : "";
    this.detail.textContent = `Picture ${i + 1} of ${images} (${names[i]}${needle}): ${shares.join(", ")}.`;
  }
}

// Address of the sheet of thumbnails: a short one, since every picture repeats it in its style.
function sheetOf(haystack) {
  const jpeg = new Blob([bytesOf(haystack.sheet)], { type: "image/jpeg" });
  return haystack.address ??= URL.createObjectURL(jpeg);
}

// What one model does, in a sentence.
function sentence(reading, seen, n, asked) {
  const who = subject(reading.name), verdict = reading.right ? "right" : "wrong";
  if (!seen.shares) return `${who} ${seen.why}.`;
  if (!asked.needles.length) return `${who} is ${verdict}.`;
  const needle = percent(seen.needle), others = [...seen.shares].filter((_, i) => !asked.needles.includes(i));
  let does = `spreads its attention over ${n} pictures; ${needle} reach the needle`;
  if (seen.needle >= .4) does = `puts ${needle} of its attention on the needle`;
  else if (seen.total < .2) does = `hardly looks at the pictures here; ${needle} reach the needle`;
  else if (Math.max(0, ...others) >= .4) does = `looks at another picture; ${needle} reach the needle`;
  return `${who} ${does}, and it is ${verdict}.`;
}

function subject(name) {
  const known = { teacher: "The teacher", student: "The student", distilled: "The distilled student" };
  return Object.hasOwn(known, name) ? known[name] : name;
}

// --- looking: the same choice as look() in laid_nb.viewer -------------------------------
function candidates(value, n, last) {  // indices that are left to choose from, or null
  if (value === "answer") return [last];
  if (typeof value === "string") return Array.from({ length: n }, (_, i) => i);
  return value < n ? [value] : null;
}

// The shares of one token, layer and head or their mean; "best": what gives the needle most of what is left.
function look(reading, { needles, words: texts }, token, layer, head) {
  const [words, layers, heads] = reading.look.shape, chosen = [];
  for (const [what, value, n] of [["token", token, words], ["layer", layer, layers], ["head", head, heads]]) {
    const left = candidates(value, n, words - 1);
    if (!left) return { shares: null, why: `has no ${what} ${value}` };
    chosen.push(value === "mean" ? [left] : left.map(i => [i]));
  }
  let best = null;
  for (const t of chosen[0]) for (const l of chosen[1]) for (const h of chosen[2]) {
    const needle = mean(reading.needle, t, l, h);
    if (needle > (best?.needle ?? -1)) best = { needle, t, l, h };
  }
  if (!best) return { shares: null, why: `is not shown here: ${reading.left_out}` };
  const { needle, t, l, h } = best, images = reading.look.shape[3], shares = new Float32Array(images);
  const told = l.filter(layer => Number.isFinite(part(reading.needle, t[0], layer)[0]));
  for (const a of t) for (const b of told) for (const c of h) {
    part(reading.look, a, b, c).forEach((share, i) => { shares[i] += share/(t.length*told.length*h.length); });
  }
  needles.forEach(i => { if (needles.length === 1) shares[i] = needle; });  // as exact as it is measured
  return { shares, needle, total: mean(reading.total, t, l, h), token: t[0], where: inWords(texts, t[0], l, h) };
}

function mean(packed, tokens, layers, heads) {  // over what was measured: the attention of some layers is nan
  let sum = 0, n = 0;
  for (const t of tokens) for (const l of layers) for (const h of heads) {
    const value = part(packed, t, l)[h];
    if (Number.isFinite(value)) [sum, n] = [sum + value, n + 1];
  }
  return sum/n;
}

function inWords(texts, token, l, h) {
  const word = token === texts.length - 1 ? "the answer" : `“${texts[token].trim() || "⏎"}”`;
  const name = (what, chosen) => chosen.length > 1 ? `mean of ${what}s` : `${what} ${chosen[0]}`;
  if (l.length > 1 && h.length > 1) return `at ${word}, mean of all heads`;
  return `at ${word}, ${name("layer", l)}, ${name("head", h)}`;
}
