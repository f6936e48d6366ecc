// Bars, lines and heat maps of the load.

/** Vertical bars with a line at their mean. `colour(element, n)` paints a bar. */
function drawBars(container, values, { name, colour }) {
  const width = Math.max(260, container.clientWidth);
  const [height, left, bottom] = [190, 48, 24];
  const mean = sum(values) / values.length;
  const top = Math.max(...values, 1) * 1.12;
  const y = (value) => 8 + (height - bottom - 8) * (1 - value / top);
  const step = (width - left - 4) / values.length;
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  const fullest = values.indexOf(Math.max(...values));
  const least = values.indexOf(Math.min(...values));
  chart.setAttribute(
    "aria-label",
    `${values.length} bars. Fullest: ${name} ${fullest} with ${values[fullest]}; emptiest: ${name} ${least} with ${values[least]}; mean ${Math.round(mean)}.`,
  );
  values.forEach((value, n) => {
    const x = left + n * step;
    const thick = Math.min(56, step * (step > 6 ? 0.8 : 1));
    const bar = svg("rect", { x: x + (step - thick) / 2, y: y(value), width: thick, height: Math.max(0, height - bottom - y(value)), class: "bar" });
    bar.append(svg("title", {}, `${name} ${n}: ${whole.format(value)} tokens, ${times(mean ? value / mean : 1)} × mean`));
    chart.append(colour(bar, n));
    const every = Math.ceil(28 / step);
    if (n % every === 0) chart.append(svg("text", { x: x + step / 2, y: height - 8, "text-anchor": "middle", class: "tick" }, n));
  });
  chart.append(
    svg("line", { x1: left, x2: width - 4, y1: height - bottom, y2: height - bottom, class: "axis" }),
    svg("line", { x1: left, x2: width - 4, y1: y(mean), y2: y(mean), class: "mean" }),
    svg("text", { x: left - 6, y: y(mean) + 4, "text-anchor": "end", class: "tick" }, whole.format(Math.round(mean))),
    svg("text", { x: left - 6, y: height - bottom + 4, "text-anchor": "end", class: "tick" }, "0"),
  );
  const highest = Math.max(...values);
  if (y(mean) - y(highest) > 14) {
    chart.append(svg("text", { x: left - 6, y: y(highest) + 4, "text-anchor": "end", class: "tick" }, whole.format(highest)));
  }
  container.replaceChildren(chart);
}

/** Lines over steps: `series` is [name, class, values][], `steps` the labels of the columns. */
function drawLines(container, series, steps) {
  const width = Math.max(260, container.clientWidth);
  const [height, left, bottom, right] = [190, 48, 24, 12];
  const top = Math.max(...series.flatMap(([, , values]) => values), 1.1);
  const y = (value) => 24 + (height - bottom - 24) * (1 - (value - 1) / (top - 1));
  const x = (n) => left + ((width - left - right) * n) / Math.max(1, steps.length - 1);
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  const told = series.map(([name, , values]) => `${name}: first ${times(values[0])}, last ${times(values.at(-1))}, highest ${times(Math.max(...values))}`);
  chart.setAttribute("aria-label", `${told.join(". ")}.`);
  for (const value of [1, top]) {
    chart.append(
      svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: value === 1 ? "axis" : "faint" }),
      svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", class: "tick" }, times(value)),
    );
  }
  series.forEach(([name, style, values], n) => {
    const points = values.map((value, column) => `${x(column).toFixed(1)},${y(value).toFixed(1)}`);
    chart.append(
      svg("polyline", { points: points.join(" "), class: `curve ${style}` }),
      svg("line", { x1: left + n * 120, x2: left + n * 120 + 18, y1: 8, y2: 8, class: `curve ${style}` }),
      svg("text", { x: left + n * 120 + 23, y: 12, class: "tick" }, name),
    );
    if (values.length === 1) chart.append(svg("circle", { cx: x(0), cy: y(values[0]), r: 3, class: `curve ${style}` }));
  });
  chart.append(
    svg("text", { x: left, y: height - 8, class: "tick" }, `step ${steps[0]}`),
    svg("text", { x: width - right, y: height - 8, "text-anchor": "end", class: "tick" }, `step ${steps.at(-1)}`),
  );
  container.replaceChildren(chart);
}

// Dark is little, bright is much; the same in light and dark, and for every kind of colour vision (viridis).
const SCALE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];

function shade(ratio) {
  const at = Math.min(1, ratio / 2) * (SCALE.length - 1);
  const low = Math.min(SCALE.length - 2, Math.floor(at));
  return SCALE[low].map((from, n) => Math.round(from + (SCALE[low + 1][n] - from) * (at - low)));
}

/**
 * A heat map of load over mean on a canvas, one pixel for each cell, stretched by the style sheet.
 * Pointing or the arrow keys read out a cell; a click or Enter calls `pick(row)` where that is given.
 */
function drawHeat(container, { rows, columns, value, describe, rowName, columnName, selected, pick }) {
  const canvas = html("canvas", { width: columns, height: rows, tabindex: 0, role: "img" });
  canvas.setAttribute("aria-label", `Heat map: ${rows} ${rowName}s by ${columns} ${columnName}s. Arrow keys read out one cell${pick ? ", Enter shows its layer" : ""}.`);
  canvas.style.height = `${Math.max(120, Math.min(380, rows * 11))}px`;
  const pen = canvas.getContext("2d");
  const image = pen.createImageData(columns, rows);
  for (let row = 0; row < rows; row++) {
    for (let column = 0; column < columns; column++) {
      image.data.set([...shade(value(row, column)), 255], (row * columns + column) * 4);
    }
  }
  pen.putImageData(image, 0, 0);
  const cursor = html("div", { class: "cursor", hidden: "" });
  const readout = html("p", { class: "readout", "aria-live": "polite" }, " ");
  let at = [selected ?? 0, 0];
  const show = (row, column, cell = true) => {
    at = [Math.max(0, Math.min(rows - 1, row)), Math.max(0, Math.min(columns - 1, column))];
    readout.textContent = describe(...at);
    cursor.hidden = !cell;
    cursor.style.left = `${(at[1] * 100) / columns}%`;
    cursor.style.top = `${(at[0] * 100) / rows}%`;
    cursor.style.width = `${100 / columns}%`;
    cursor.style.height = `${100 / rows}%`;
  };
  const hide = () => {
    cursor.hidden = true;
    readout.textContent = " ";
  };
  canvas.addEventListener("pointermove", (event) => {
    const box = canvas.getBoundingClientRect();
    show(Math.floor(((event.clientY - box.top) * rows) / box.height), Math.floor(((event.clientX - box.left) * columns) / box.width));
  });
  canvas.addEventListener("pointerleave", hide);
  canvas.addEventListener("blur", hide);
  canvas.addEventListener("focus", () => show(...at));
  canvas.addEventListener("click", () => pick?.(at[0]));
  canvas.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (event.key === "Enter") pick?.(at[0]);
    if (!move) return;
    event.preventDefault();
    show(at[0] + move[0], at[1] + move[1]);
  });
  const frame = html("div", { class: "heat" }, canvas, cursor);
  if (selected !== undefined) {
    const mark = html("div", { class: "row-mark" });
    mark.style.top = `${((selected + 0.5) * 100) / rows}%`;
    frame.append(mark);
  }
  const legend = html("p", { class: "legend" }, "0 ", html("span", { class: "scale", "aria-hidden": "true" }), " 2 × mean and more");
  const axes = html("p", { class: "axes" }, `${rowName}s 0 to ${rows - 1} from top to bottom, ${columnName}s from left to right`);
  container.replaceChildren(frame, html("div", { class: "below" }, axes, legend), readout);
}
