// What is shown, the controls that change it, and the list of layouts.

function start() {
  const { model, model_type, billions, experts, top_k, device, measured, adapter } = data;
  const trained = adapter ? `; an adapter of rank ${adapter} is trained` : "";
  $("about").textContent = `${model} (${model_type}): ${billions.toPrecision(3)} billion parameters, ${experts} experts in a layer, ${top_k} for each token${trained}. ${device}, ${data.per_node} in a node.`;
  const off = `Predicted, not measured. The memory was off by up to ${percent(data.error)} where it was compared with runs: a layout is tight where it fits only if the prediction is right.`;
  const { tokens, price } = data.run;
  const run = tokens ? [`The run has ${(tokens / 1e9).toPrecision(3)} billion tokens${price ? `, a GPU hour costs ${price}` : ""}. Its steps alone are counted.`] : [];
  const notes = [off, ...run, ...measured.map((line) => `calibrated by: ${line}`)];
  $("notes").replaceChildren(...notes.map((note) => html("li", { dir: "auto" }, note)));
  $("notes").hidden = false;
  for (const axis of AXES) {
    const values = data.axes[axis];
    $(axis).max = values.length - (axis === "micro" ? 0 : 1);
    if (axis in data.start) shown[axis] = values.indexOf(data.start[axis]);
    $(axis).value = shown[axis];
    $(axis).addEventListener("input", () => {
      shown[axis] = Number($(axis).value);
      drawAll();
    });
  }
  key($("memory-key"), "memory", data.parts);
  key($("time-key"), "time", data.times);
  shown.layout = ranking()[0]?.layout ?? 0;
  listen();
  drawAll();
}

function key(list, kind, names) {
  list.replaceChildren(...names.map((name, n) => html("li", {}, html("i", { class: `part ${kind}-${n}`, "aria-hidden": "true" }), name)));
}

function listen() {
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("layouts").addEventListener("change", (event) => {
    shown.layout = Number(event.target.value);
    drawAll();
    $("layouts").querySelector(":checked")?.focus();
  });
  $("dimensions").addEventListener("change", (event) => {
    shown.dimension = event.target.value;
    const plan = bestOf(shown.layout);
    if (plan) drawRanks(plan);
    $("dimensions").querySelector(":checked")?.focus();
  });
  $("batch").addEventListener("change", (event) => {
    shown.batch = event.target.value;
    drawScale(shown.layout);
  });
  $("grid").addEventListener("click", (event) => {
    const cell = event.target.closest(".gpu");
    if (cell) pickRank(cell);
  });
  let width = $("speed-chart").clientWidth;
  new ResizeObserver(() => {
    if ($("speed-chart").clientWidth === width) return;
    width = $("speed-chart").clientWidth;
    if (series(shown.layout).length) drawScale(shown.layout);
  }).observe($("speed-chart"));
}

function drawAll() {
  for (const axis of AXES) {
    const value = axis === "micro" && shown.micro === 0 ? "best" : data.axes[axis][shown[axis] - (axis === "micro" ? 1 : 0)];
    const text = typeof value === "number" ? whole.format(value) : value;
    $(`${axis}-told`).textContent = text;
    $(axis).setAttribute("aria-valuetext", text);
  }
  const plans = ranking();
  if (!plans.some((plan) => plan.layout === shown.layout) && plans.length) shown.layout = plans[0].layout;
  drawLayouts(plans);
  drawNumbers(plans);
  const chosen = plans.find((plan) => plan.layout === shown.layout);
  for (const part of document.querySelectorAll("main > section:not(#ranked)")) part.hidden = !chosen;
  if (!chosen) return;
  drawRanks(chosen);
  drawWire(chosen);
  if (series(shown.layout).length) drawScale(shown.layout);
}

/** A row for each layout: how fast, whether it fits, and the two bars. */
function drawLayouts(plans) {
  const most = Math.max(data.usable, ...plans.map((plan) => plan.needed));
  const longest = Math.max(0, ...plans.map((plan) => plan.seconds / plan.tokens));
  const rows = plans.map((plan) => {
    const verdict = data.verdicts[plan.verdict];
    const input = html("input", { type: "radio", name: "layout", value: plan.layout });
    input.checked = plan.layout === shown.layout;
    const batch = `${plan.micro_batch} × ${plan.accumulation}${plan.recompute ? ", recomputed" : ""}`;
    const memory = stack("memory", data.parts, plan.memory, most, (mib) => `${gib(mib)} GiB`);
    const mark = html("span", { class: "limit-mark", "aria-hidden": "true" });
    mark.style.left = `${(100 * data.usable) / most}%`;
    memory.append(mark);
    // Steps of different batches: the bar is the time for as many tokens.
    const time = stack("time", data.times, plan.time, longest * plan.tokens, seconds);
    const bars = html("div", { class: "bars" },
      memory, time,
      html("span", { class: "what" }, plan.host > data.host ? `host: ${whole.format(plan.host)} of ${whole.format(data.host)} GiB` : `${gib(plan.needed)} of ${gib(data.usable)} GiB`),
      html("span", { class: "what" }, `${seconds(plan.seconds)} a step`));
    bars.insertBefore(bars.children[2], time);
    return html("label", { class: `layout${plan.verdict === 2 ? " not" : ""}` }, input,
      html("strong", {}, data.layouts[plan.layout].name, html("small", {}, batch)),
      html("span", { class: "speed" }, `${whole.format(Math.round(plan.each))} tokens/s and GPU`, ...(data.run.tokens ? [html("small", {}, runOf(plan))] : [])),
      html("span", { class: `verdict ${verdict}` }, verdict === "yes" ? "fits" : verdict === "tight" ? "fits tightly" : "does not fit"), bars);
  });
  const left = data.layouts.filter((_, n) => !plans.some((plan) => plan.layout === n)).map(({ name }) => name);
  if (left.length) rows.push(html("p", { class: "more" }, `Not with this batch on ${whole.format(data.axes.gpus[shown.gpus])} GPUs: ${left.join(", ")}.`));
  $("layouts").replaceChildren(...rows);
  const fits = plans.filter((plan) => plan.verdict === 0).length;
  const tight = plans.filter((plan) => plan.verdict === 1).length;
  const first = plans[0];
  $("told").textContent = first
    ? `${fits} of ${plans.length} layouts fit, ${tight} tightly. ${first.verdict === 2 ? "Least memory" : "First"}: ${data.layouts[first.layout].name}, ${whole.format(Math.round(first.speed))} tokens a second on ${whole.format(data.axes.gpus[shown.gpus])} GPUs.`
    : "No layout has this batch on so many GPUs.";
}

function stack(kind, names, values, most, unit) {
  const told = names.map((name, n) => `${name} ${unit(values[n])}`).join(", ");
  const bar = html("div", { class: "stack", role: "img", "aria-label": `${kind}: ${told}`, title: told });
  values.forEach((value, n) => {
    const part = html("span", { class: `part ${kind}-${n}` });
    part.style.width = `${(100 * value) / most}%`;
    bar.append(part);
  });
  return bar;
}

function drawNumbers(plans) {
  const names = ["layout", "batch", "ckpt", "fits", ...data.parts.map((part) => `${part}, GiB`), "in all, GiB", "host, GiB", ...data.times.map((part) => `${part}, ms`), "step, ms", "tokens/s/GPU"];
  const head = html("tr", {}, ...names.map((name) => html("th", { scope: "col" }, name)));
  const rows = plans.map((plan) => html("tr", {},
    html("th", { scope: "row" }, data.layouts[plan.layout].name),
    ...[`${plan.micro_batch} x ${plan.accumulation}`, plan.recompute ? "yes" : "no", data.verdicts[plan.verdict],
      ...plan.memory.map(gib), gib(plan.needed), whole.format(plan.host), ...plan.time.map((time) => whole.format(Math.round(1e3 * time))),
      whole.format(Math.round(1e3 * plan.seconds)), whole.format(Math.round(plan.each))].map((text) => html("td", {}, text))));
  $("numbers").replaceChildren(html("thead", {}, head), html("tbody", {}, ...rows));
}

start();
markEdges();
