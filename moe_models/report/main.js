// What is shown, the controls that change it, and the drawing of everything that follows from it.

const $ = (id) => document.getElementById(id);
const STAGES = ["route", "dispatch", "compute", "combine"];
const ALL_NODES = 128;
const shown = { sample: 0, layer: 0, file: data.start[0], world: data.start[1], group: "all", stage: "route" };
const layout = () => data.layouts.find(({ file }) => file === shown.file);
const ratios = data.run ? unpack(data.run.ratios) : null;

function start() {
  const { experts, top_k, blocks, routed, text, checkpoint, model_type } = data;
  $("about").textContent =
    `${checkpoint} (${model_type}): ${blocks.length} MoE layers of ${experts} experts, ${top_k} for each token; ` +
    `${whole.format(routed)} tokens of ${text} were routed.`;
  $("notes").replaceChildren(...data.notes.map((note) => html("li", { dir: "auto" }, note)));
  $("notes").hidden = data.notes.length === 0;
  $("layer").replaceChildren(...blocks.map((block, n) => html("option", { value: n }, block.replace(/^model\.layers\.(\d+)\.mlp$/, "$1"))));
  for (const { file, problem, worlds } of data.layouts) {
    const option = html("option", { value: file }, problem ? `${file} (${problem})` : file);
    option.disabled = Object.keys(worlds).length === 0;
    $("layout").append(option);
  }
  $("layout").value = shown.file;
  listWorlds();
  drawAll();
  listen();
}

function listWorlds() {
  const offered = Object.keys(layout().worlds);
  if (!offered.includes(shown.world)) shown.world = offered.includes("8") ? "8" : offered.at(-1);
  $("world").replaceChildren(...offered.map((world) => html("option", { value: world }, world)));
  $("world").value = shown.world;
  const grid = gridOf(layout(), shown.world);
  const nodes = sum(grid.ranks.map(({ held }) => held));
  const names = grid.groups.map((_, n) => html("option", { value: n }, `EP group ${n}`));
  // Too many experts for one picture: then one EP group at a time; the others do the same with other tokens.
  if (nodes <= ALL_NODES || grid.groups.length === 1) names.unshift(html("option", { value: "all" }, "all GPUs"));
  $("group").replaceChildren(...names);
  shown.group = names[0].value;
  $("group-label").hidden = names.length === 1;
}

function listen() {
  $("controls").addEventListener("submit", (event) => event.preventDefault());
  $("layer").addEventListener("change", () => showLayer(Number($("layer").value)));
  $("layout").addEventListener("change", () => {
    shown.file = $("layout").value;
    listWorlds();
    drawAll();
  });
  $("world").addEventListener("change", () => {
    shown.world = $("world").value;
    listWorlds();
    drawAll();
  });
  $("group").addEventListener("change", () => {
    shown.group = $("group").value;
    drawBatch();
  });
  $("route").addEventListener("click", () => {
    shown.sample = (shown.sample + 1) % data.samples.count;
    setStage("route");
    drawBatch();
  });
  $("step").addEventListener("click", () => setStage(STAGES[(STAGES.indexOf(shown.stage) + 1) % STAGES.length]));
  $("stages").addEventListener("change", (event) => setStage(event.target.value));
  let width = $("picture").clientWidth;
  new ResizeObserver(() => {
    if ($("picture").clientWidth === width) return;
    width = $("picture").clientWidth;
    drawAll();
  }).observe($("picture"));
}

function showLayer(layer) {
  shown.layer = layer;
  $("layer").value = layer;
  drawAll();
}

function setStage(stage) {
  shown.stage = stage;
  $("stages").querySelector(`[value=${stage}]`).checked = true;
  tellStage();
}

function drawAll() {
  drawBatch();
  drawLoad();
  if (data.run) drawRun();
  drawTop();
}

/** What the current sample does in the current layer, on all ranks and on those that are shown. */
function routed() {
  const copies = copiesOf(shown.sample, shown.layer);
  const grid = gridOf(layout(), shown.world);
  const everywhere = land(copies, grid);
  const members = shown.group === "all" ? grid.ranks.map(({ rank }) => rank) : grid.groups[Number(shown.group)];
  const landed = everywhere.filter(({ from }) => members.includes(from));
  return { copies, grid, everywhere, members, landed, costs: cost(landed, members, layout()) };
}

function drawBatch() {
  const { copies, grid, everywhere, members, landed, costs } = routed();
  $("which").textContent = `sample ${shown.sample + 1} of ${data.samples.count}, ${data.samples.size} tokens`;
  const first = copies.filter((_, n) => n % data.top_k === 0);
  $("batch").replaceChildren(...first.map(({ piece, expert }) => paint(html("bdi", { title: `expert ${expert}` }, piece), expert)));
  $("copies").textContent = whole.format(costs.copies);
  $("crossing").textContent = `${whole.format(costs.crossing)} (${Math.round((100 * costs.crossing) / (costs.copies || 1))}%)`;
  $("bytes").textContent = size(costs.bytes);
  $("slowdown").textContent = times(costs.slowdown);
  drawFlow($("picture"), landed, grid, members, costs, (told) => ($("detail").textContent = told));
  $("detail").textContent = "";
  tellStage();
  drawGrid($("grid"), layout(), grid, cost(everywhere, grid.ranks.map(({ rank }) => rank), layout()));
  const replicas = grid.groups.length;
  $("grid-told").textContent =
    (layout().ep === 1
      ? "Every GPU holds all experts, so no token travels. "
      : `A row is an EP group: its ${layout().ep} GPUs share one copy of the experts and exchange tokens. `) +
    (replicas > 1 ? `A column is an EDP group: ${replicas} GPUs that hold the same experts and average their gradients. ` : "") +
    "Bars: copies that each GPU computes in this batch; the tick is the mean.";
  drawComparison($("compare"), copies, shown.layer, shown.world, layout());
}

function tellStage() {
  const { everywhere, grid, members, costs } = routed();
  const { kind, drops, zero } = layout();
  const [tokens, k] = [costs.copies / data.top_k, data.top_k];
  const told = {
    route: `The router scores ${data.experts} experts for each token and takes the best ${k}: ${tokens} tokens become ${costs.copies} copies. Nothing has moved yet.`,
    dispatch:
      layout().ep === 1
        ? "Every GPU holds all experts: nothing crosses" + (zero === 3 ? "; ZeRO-3 gathers the experts' weights instead." : ".")
        : `First all-to-all: ${costs.crossing} of ${costs.copies} copies leave for the GPU that holds their expert (${size(costs.bytes)}); ${costs.copies - costs.crossing} are there already.`,
    compute:
      members.length === 1 || costs.slowdown === 1
        ? "Every expert computes what it got; all GPUs have the same to do."
        : `Every expert computes what it got. GPU ${costs.fullest} got ${costs.received.get(costs.fullest)} copies where ${Number(times(costs.mean))} would be even: the others wait, and the experts take ${times(costs.slowdown)} times as long as they could.`,
    combine:
      (layout().ep === 1 ? "Nothing has to travel back. " : `Second all-to-all: the same ${costs.crossing} copies travel back (${size(costs.bytes)}). `) +
      "Each token becomes the sum of its copies, each times its weight.",
  };
  let note = "";
  if (kind === "native" && layout().ep > 1 && (shown.stage === "dispatch" || shown.stage === "combine") && shown.group === "all") {
    note = drops
      ? " Native layers send buffers of fixed capacity instead, and drop copies beyond it; not counted here."
      : ` Native layers fill every expert's share up to the fullest one, so buffers for ${padded(everywhere, grid)} copies cross.`;
  }
  $("told").textContent = told[shown.stage] + note;
  $("picture").dataset.stage = shown.stage;
}

function drawLoad() {
  const loads = data.load[shown.layer];
  const { ep } = layout();
  const ranks = rankLoads(shown.layer, ep);
  const slowdowns = data.load.map((_, layer) => maxOverMean(rankLoads(layer, ep)));
  const worst = slowdowns.indexOf(Math.max(...slowdowns));
  const dead = loads.filter((count) => count === 0).length;
  $("load-told").textContent =
    `Over all ${whole.format(data.routed)} tokens, layer ${$("layer").selectedOptions[0].text}: the fullest expert has ${times(maxOverMean(loads))} times the mean` +
    `${dead ? `, ${dead} got nothing` : ""}. ` +
    (ep > 1
      ? `At EP ${ep} the fullest rank has ${times(maxOverMean(ranks))} times the mean: that is how much longer than balanced the experts of this layer take. ` +
        `Over all layers: ${times(sum(slowdowns) / slowdowns.length)} on average, ${times(slowdowns[worst])} in layer ${$("layer").options[worst].text}, the worst.`
      : "Without expert parallelism this costs no time: every GPU holds all experts.");
  drawBars($("experts-chart"), loads, { name: "expert", colour: paint });
  drawBars($("ranks-chart"), ranks, { name: "EP rank", colour: (bar) => (bar.classList.add("plain"), bar) });
  const held = data.experts / ep;
  const mean = sum(loads) / loads.length || 1;
  const head = html("tr", {}, ...["Expert", "EP rank", "Tokens", "Over mean"].map((name) => html("th", { scope: "col" }, name)));
  const rows = loads.map((count, expert) =>
    html("tr", {}, ...[expert, Math.floor(expert / held), whole.format(count), times(count / mean)].map((text) => html("td", {}, text))),
  );
  $("load-table").replaceChildren(html("thead", {}, head), html("tbody", {}, ...rows));
  drawHeat($("layers-map"), {
    rows: data.blocks.length,
    columns: data.experts,
    rowName: "layer",
    columnName: "expert",
    selected: shown.layer,
    pick: showLayer,
    value: (layer, expert) => (data.load[layer][expert] * data.experts) / (sum(data.load[layer]) || 1),
    describe: (layer, expert) =>
      `${data.blocks[layer]}, expert ${expert}: ${whole.format(data.load[layer][expert])} tokens, ${times((data.load[layer][expert] * data.experts) / (sum(data.load[layer]) || 1))} × mean`,
  });
}

function drawRun() {
  const { first, last, unit, fullest, ranks } = data.run;
  const ratio = (expert, column) => ratios[(shown.layer * first.length + column) * data.experts + expert] * unit;
  const steps = first.map((step, n) => (step === last[n] ? `${step}` : `${step}–${last[n]}`));
  $("run").hidden = false;
  drawHeat($("steps-map"), {
    rows: data.experts,
    columns: first.length,
    rowName: "expert",
    columnName: "step",
    value: ratio,
    describe: (expert, column) => `step ${steps[column]}, expert ${expert}: ${times(ratio(expert, column))} × mean`,
  });
  drawLines($("steps-chart"), [["fullest expert", "a", fullest[shown.layer]], ["fullest EP rank", "b", ranks[shown.layer]]], steps);
}

function drawTop() {
  const cards = data.top[shown.layer].map((tokens, expert) => {
    const list = html("ul", {});
    for (const [piece, seen, of] of tokens) {
      list.append(html("li", {}, html("bdi", {}, label(data.pieces[piece])), html("span", {}, `${seen} of ${of}`)));
    }
    const held = data.experts / layout().ep;
    const title = html("h3", {}, `Expert ${expert}`, html("small", {}, layout().ep > 1 ? ` EP rank ${Math.floor(expert / held)}` : ""));
    return paint(html("article", {}, title, tokens.length ? list : html("p", {}, "no token stands out")), expert);
  });
  $("top").replaceChildren(...cards);
}

start();
markEdges();
