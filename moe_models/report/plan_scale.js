// The chosen layout on more and more GPUs.

/** The layout's best batch at every number of GPUs where it can be. */
function series(layout) {
  const plans = data.axes.gpus.map((_, n) => (shown.batch === "one" ? withOneBatch(layout, n) : bestOf(layout, n)));
  return plans.filter((plan) => plan !== null);
}

function withOneBatch(layout, gpus) {
  const row = data.layouts[layout].one_batch[gpus];
  return row && named(layout, gpus, data.start.lengths, row[0], row[1], row[2], row.slice(3));
}

const count = (plan) => data.axes.gpus[plan.gpus];
const short = new Intl.NumberFormat("en", { notation: "compact", maximumSignificantDigits: 3 });

function drawScale(layout) {
  const plans = series(layout);
  tellScale(plans);
  drawSpeed($("speed-chart"), plans);
  // Of one GPU for a million tokens: steps of all batches can be compared.
  const spent = (plan) => plan.time.map((time) => (1e6 * time * count(plan)) / plan.tokens);
  drawColumns($("time-chart"), plans, { kind: "time", names: data.times, values: spent, unit: (time) => `${time.toPrecision(3)} s` });
  drawColumns($("memory-chart"), plans, { kind: "memory", names: data.parts, values: (plan) => plan.memory, unit: (mib) => `${gib(mib)} GiB`, limit: data.usable });
}

/** Where a GPU is fastest, how much of that it does with few and with many others, and what takes the rest. */
function tellScale(plans) {
  const name = data.layouts[plans[0].layout].name;
  const best = fastest(plans);
  const parts = [`${name}: a GPU is fastest on ${whole.format(count(best))}, with ${whole.format(Math.round(best.each))} tokens a second.`];
  for (const plan of new Set([plans.at(-1), plans[0]])) {
    if (plan === best) continue;
    const share = plan.each / best.each;
    // Seconds for each token of a GPU, so that steps of other batches can be compared.
    const per = (one, n) => one.time[n] / (one.tokens / count(one));
    const longer = data.times.map((part, n) => [part, per(plan, n) - per(best, n)]).filter(([, more]) => more > 0.002 * (1 / best.each));
    longer.sort((one, other) => other[1] - one[1]);
    const why = longer.slice(0, 2).map(([part, more]) => `${part} (+${percent(more * best.each)} of a step)`).join(" and ");
    parts.push(`On ${whole.format(count(plan))} it does ${percent(share)} of that${why ? `: what takes longer is ${why}` : ""}${batchOf(plan, best)}.`);
  }
  if (shown.batch === "one") {
    const tokens = data.one_batch * data.start.lengths;
    parts.push(`All sizes have ${whole.format(data.one_batch)} sequences of ${whole.format(data.start.lengths)} tokens in a step, ${(tokens / 1e6).toPrecision(2)} million tokens, and a load of ${data.start.skews}, whatever the sliders say.`);
  }
  $("scale-told").textContent = parts.join(" ");
}

function batchOf(plan, best) {
  const name = ({ micro_batch, recompute }) => `${micro_batch} sequence${micro_batch > 1 ? "s" : ""} at a time${recompute ? ", recomputed" : ""}`;
  return name(plan) === name(best) ? "" : `; it has ${name(plan)} instead of ${name(best)}`;
}

/** The plan with the most tokens a second for each GPU. */
function fastest(plans) {
  return plans.reduce((best, plan) => (plan.each > best.each ? plan : best));
}

function drawSpeed(container, plans) {
  const width = Math.max(280, container.clientWidth);
  const [height, left, right, bottom, top] = [280, 56, 64, 34, 16];
  const [first, last] = [plans[0], plans.at(-1)];
  const low = Math.min(...plans.map((plan) => Math.log2(plan.speed)));
  const most = fastest(plans).each;
  const ideal = (plan) => Math.log2(most * count(plan));
  const high = Math.max(...plans.map((plan) => Math.max(Math.log2(plan.speed), ideal(plan))));
  const span = Math.max(1, high - low);
  const reach = Math.max(1, Math.log2(count(last) / count(first)));
  const x = (plan) => left + ((width - left - right) * Math.log2(count(plan) / count(first))) / reach;
  const y = (value) => top + (height - top - bottom) * (1 - (value - low) / span);
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  chart.setAttribute("aria-label", plans.map((plan) => `${count(plan)} GPUs: ${whole.format(Math.round(plan.speed))} tokens a second`).join("; "));
  for (let value = Math.ceil(low); value <= high; value++) {
    chart.append(svg("line", { x1: left, x2: width - right, y1: y(value), y2: y(value), class: "faint" }));
    if ((value - Math.ceil(low)) % Math.ceil(span / 6) === 0) chart.append(svg("text", { x: left - 6, y: y(value) + 4, "text-anchor": "end", class: "tick" }, short.format(2 ** value)));
  }
  const line = (value) => plans.map((plan) => `${x(plan).toFixed(1)},${y(value(plan)).toFixed(1)}`).join(" ");
  chart.append(svg("polyline", { points: line(ideal), class: "ideal" }), svg("polyline", { points: line((plan) => Math.log2(plan.speed)), class: "curve" }));
  const narrow = (width - left - right) / plans.length < 44;
  plans.forEach((plan, n) => {
    const now = plan.gpus === shown.gpus ? " now" : "";
    const share = plan.each / most;
    const dot = svg("circle", { cx: x(plan), cy: y(Math.log2(plan.speed)), r: 5, class: `at${now}` });
    dot.append(svg("title", {}, `${whole.format(count(plan))} GPUs: ${whole.format(Math.round(plan.speed))} tokens/s, ${percent(share)} of the fastest GPU`));
    chart.append(dot);
    if (narrow && (plans.length - 1 - n) % 2) return;
    chart.append(svg("text", { x: x(plan), y: height - 14, "text-anchor": "middle", class: `tick${now}` }, whole.format(count(plan))));
    chart.append(svg("text", { x: x(plan) + 8, y: y(Math.log2(plan.speed)) + 16, class: `tick${now}` }, percent(share)));
  });
  chart.append(svg("text", { x: x(last) - 4, y: y(ideal(last)) - 6, "text-anchor": "end", class: "tick" }, "linear"));
  container.replaceChildren(chart);
}

/** A stacked column for each number of GPUs. */
function drawColumns(container, plans, { kind, names, values, unit, limit }) {
  const width = Math.max(260, container.clientWidth);
  const [height, left, bottom, top] = [230, 8, 40, 20];
  const most = Math.max(...plans.map((plan) => sum(values(plan))), limit ?? 0) * 1.02;
  const y = (value) => top + (height - top - bottom) * (1 - value / most);
  const step = (width - left) / plans.length;
  const chart = svg("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img" });
  const told = plans.map((plan) => `${count(plan)} GPUs: ${names.map((name, n) => `${name} ${unit(values(plan)[n])}`).join(", ")}`);
  chart.setAttribute("aria-label", told.join("; "));
  plans.forEach((plan, n) => {
    const column = svg("g", { class: plan.gpus === shown.gpus ? "column now" : "column" });
    column.append(svg("title", {}, told[n]));
    let below = 0;
    values(plan).forEach((value, part) => {
      column.append(svg("rect", { x: left + n * step + step * 0.12, width: step * 0.76, y: y(below + value), height: Math.max(0, y(below) - y(below + value)), class: `part ${kind}-${part}` }));
      below += value;
    });
    const style = plan.gpus === shown.gpus ? "tick now" : "tick";
    const middle = left + (n + 0.5) * step;
    column.append(svg("text", { x: middle, y: height - 24, "text-anchor": "middle", class: style }, whole.format(count(plan))));
    if (step > 30 || n % 2 === 0) column.append(svg("text", { x: middle, y: y(below) - 5, "text-anchor": "middle", class: style }, unit(below).replace(/ (s|GiB)$/, "")));
    chart.append(column);
  });
  if (limit) chart.append(svg("line", { x1: left, x2: width, y1: y(limit), y2: y(limit), class: "limit-line" }));
  const under = limit ? `GPUs; GiB, the line is what the GPU has: ${gib(limit)}` : "GPUs; seconds of a GPU";
  chart.append(svg("text", { x: left, y: height - 6, class: "tick" }, under));
  container.replaceChildren(chart);
}
