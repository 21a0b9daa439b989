// Elements, numbers and packed arrays. Whatever comes from data goes to the page as text or as an attribute,
// never as markup: nothing in these files sets innerHTML.

const SVG = "http://www.w3.org/2000/svg";

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (name === "style") for (const [key, v] of Object.entries(value)) node.style.setProperty(key, v);
    else if (value === true) node.setAttribute(name, "");
    else if (value !== false && value != null) node.setAttribute(name, value);
  }
  node.append(...children.flat().filter(child => child != null));
  return node;
}

// make("p", { class: "x", onclick: f }, "text", node)
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function makeSvg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

// Buttons of which one is pressed: [[value, text]].
function choice(label, options, value, choose) {
  const buttons = options.map(([option, text]) =>
    make("button", { type: "button", "aria-pressed": String(option === value), onclick: () => choose(option) }, text));
  return make("div", { class: "laid-choice", role: "group", "aria-label": label },
    make("span", { class: "laid-label" }, label), ...buttons);
}

function dropdown(label, options, value, choose) {
  const items = options.map(([option, text], i) => make("option", { value: i, selected: option === value }, text));
  const change = event => choose(options[Number(event.target.value)][0]);
  return make("label", { class: "laid-choice" }, make("span", { class: "laid-label" }, label),
    make("select", { onchange: change }, ...items));
}

// --- numbers -------------------------------------------------------------------
function percent(share) {
  if (!Number.isFinite(share)) return "–";
  return share > 0 && share < .0095 ? "under 1%" : `${Math.round(100*share)}%`;
}

function short(value) {
  if (!Number.isFinite(value)) return "–";
  const size = Math.abs(value);
  if (size === 0) return "0";
  if (size >= 1e5 || size < 1e-3) return value.toExponential(0).replace("e+", "e");
  return size >= 100 ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(2)));
}

function clip(x, low, high) { return Math.max(low, Math.min(high, x)); }

// --- arrays: { shape, type, base64 } ---------------------------------------------
function bytesOf(text) {
  const raw = atob(text);
  const bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return bytes;
}

function half(bits) {  // a float16 as a number
  const sign = bits & 0x8000 ? -1 : 1, exponent = bits >> 10 & 31, fraction = bits & 1023;
  if (exponent === 31) return fraction ? NaN : sign*Infinity;
  return exponent ? sign*2**(exponent - 15)*(1 + fraction/1024) : sign*2**-14*fraction/1024;
}

const READ = {
  f4: bytes => new Float32Array(bytes.buffer),
  f2: bytes => Float32Array.from(new Uint16Array(bytes.buffer), half),
  root: bytes => Float32Array.from(bytes, b => (b/255)**2),  // shares: the root in 255 steps
};

// The array at an index of its first dimensions: part(packed, 2, 0) is packed[2, 0].
function part(packed, ...index) {
  packed.values ??= READ[packed.type](bytesOf(packed.base64));
  if (!index.length) return packed.values;
  let length = packed.values.length, start = 0;
  index.forEach((at, dimension) => {
    length /= packed.shape[dimension];
    start += at*length;
  });
  return packed.values.subarray(start, start + length);
}
