// The views on a page: as a widget of a kernel (render), or from data that stand in the page (mountAll).

const VIEWS = { heads: HeadsView, haystack: HaystackView, rope: RopeView };

// A state without a kernel, with the part of anywidget's model that the views use.
class State {
  constructor(values) {
    this.values = values;
    this.listeners = [];
  }

  get(name) { return this.values[name]; }

  set(name, value) {
    this.values[name] = value;
    this.listeners.forEach(listener => listener());
  }

  on(_, listener) { this.listeners.push(listener); }

  off() { this.listeners = []; }

  save_changes() {}
}

function keepFocus(root, draw) {  // controls are made anew: the focus goes to the one in the same place
  const places = [];
  for (let node = document.activeElement; node && node !== root && root.contains(node); node = node.parentNode) {
    places.unshift([...node.parentNode.children].indexOf(node));
  }
  draw();
  if (!places.length || root.contains(document.activeElement)) return;
  let node = root;
  for (const place of places) node = node?.children[place];
  node?.focus?.({ preventScroll: true });
}

function render({ model, el }) {
  const root = make("div", { class: "laid-view" });
  el.append(root);
  const view = new VIEWS[model.get("view").kind](model, root);
  let waiting = false, width = 0;
  const draw = () => {
    waiting = false;
    keepFocus(root, () => view.draw());
  };
  const later = () => {  // several changes, one drawing
    if (!waiting) queueMicrotask(draw);
    waiting = true;
  };
  const resized = new ResizeObserver(() => {
    if (root.clientWidth === width) return;
    width = root.clientWidth;
    draw();
  });
  const themed = new MutationObserver(draw), dark = matchMedia("(prefers-color-scheme: dark)");
  model.on("change", later);
  draw();
  resized.observe(root);
  themed.observe(document.body, { attributes: true, attributeFilter: ["data-md-color-scheme", "data-jp-theme-light"] });
  dark.addEventListener("change", draw);
  return () => {
    model.off("change", later);
    resized.disconnect();
    themed.disconnect();
    dark.removeEventListener("change", draw);
  };
}

function mountAll() {
  for (const script of document.querySelectorAll("script.laid-data")) {
    const state = JSON.parse(script.textContent), el = make("div");
    script.parentNode.replaceChildren(el);  // the picture that stands there without a script goes
    render({ model: new State(state), el });
  }
}
