// Making elements. Text goes in as text only, and styles through the object model, as the page's policy asks.

function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function html(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

/** Gives an element its expert's colour; the style sheet turns hue and tone into one that fits light or dark. */
function paint(element, expert) {
  const few = [255, 40, 155, 85, 310, 350, 120, 205];
  const hue = data.experts <= few.length ? few[expert] : (expert * 360) / data.experts;
  element.style.setProperty("--hue", hue);
  element.style.setProperty("--tone", data.experts > few.length && expert % 2 ? 0.12 : 0);
  return element;
}

/** A token for a list or label: spaces shown, shortened by whole characters. */
function label(piece, length = 24) {
  const characters = [...piece.replaceAll(" ", "·")];
  return characters.length > length ? characters.slice(0, length - 1).join("") + "…" : characters.join("");
}

const whole = new Intl.NumberFormat("en");

function times(ratio) {
  return ratio.toFixed(2);
}

function size(bytes) {
  if (bytes < 1000) return `${bytes} B`;
  if (bytes < 1e6) return `${(bytes / 1e3).toFixed(1)} kB`;
  return bytes < 1e9 ? `${(bytes / 1e6).toFixed(2)} MB` : `${(bytes / 1e9).toFixed(2)} GB`;
}

function range(first, count) {
  return count === 1 ? `expert ${first}` : `experts ${first}–${first + count - 1}`;
}
