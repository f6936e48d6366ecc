// The ranks of a layout, and what travels between them.

/** A hue for each number of a group, far from its neighbours'. */
function tint(element, number) {
  element.style.setProperty("--hue", (255 + number * 137.5) % 360);
  element.style.setProperty("--tone", number % 2 ? 0.1 : 0);
  return element;
}

/** The chosen layout's ranks by node, in the colour of one dimension. */
function drawRanks(plan) {
  const { title, nodes, dimensions, ranks } = data.layouts[plan.layout].worlds[plan.gpus].grid;
  if (!dimensions.includes(shown.dimension)) shown.dimension = dimensions.includes("ep") ? "ep" : dimensions[0];
  $("grid-told").textContent = `${title}; ${nodes} node${nodes === 1 ? "" : "s"}.`;
  $("dimensions").replaceChildren(
    html("legend", {}, "Colour"),
    ...dimensions.map((name) => {
      const input = html("input", { type: "radio", name: "dimension", value: name });
      input.checked = name === shown.dimension;
      return html("label", {}, input, " ", html("span", {}, data.dimensions[name][0]));
    }),
  );
  const [short, told] = data.dimensions[shown.dimension];
  $("dimension-told").textContent = `${short}: a rank ${told}.`;
  const at = dimensions.indexOf(shown.dimension);
  const byNode = new Map();
  for (const rank of ranks) byNode.set(rank[1], [...(byNode.get(rank[1]) ?? []), rank]);
  const parts = [];
  let last = -1;
  for (const [node, held] of byNode) {
    if (node !== last + 1) parts.push(html("p", { class: "more" }, `… ${node - last - 1} more nodes like these …`));
    last = node;
    const cells = held.map(([rank, , first, count, places]) => {
      const cell = html("button", { type: "button", class: "gpu", "data-rank": rank, "aria-pressed": "false" }, html("strong", {}, `GPU ${rank}`), html("span", {}, range(first, count)));
      dimensions.forEach((name, n) => cell.append(html("span", { class: name === shown.dimension ? "now" : "" }, `${data.dimensions[name][0]} ${places[n]}`)));
      cell.places = places;
      return tint(cell, places[at]);
    });
    parts.push(html("div", { class: "node" }, html("h3", {}, `node ${node}`), html("div", { class: "ranks" }, ...cells)));
  }
  $("grid").replaceChildren(...parts);
  $("grid").classList.remove("picked");
  $("rank-told").textContent = "Choose a GPU: the others that have the same place in the dimension stay bright.";
}

function pickRank(cell) {
  const { dimensions } = data.layouts[shown.layout].worlds[shown.gpus].grid;
  const at = dimensions.indexOf(shown.dimension);
  const again = cell.getAttribute("aria-pressed") === "true";
  $("grid").classList.toggle("picked", !again);
  for (const other of $("grid").querySelectorAll(".gpu")) {
    other.setAttribute("aria-pressed", String(other === cell && !again));
    other.classList.toggle("peer", other.places[at] === cell.places[at]);
  }
  const places = dimensions.map((name, n) => `${data.dimensions[name][0]} ${cell.places[n]}`);
  $("rank-told").textContent = `GPU ${cell.dataset.rank}: ${cell.children[1].textContent}; ${places.join(", ")}.`;
}

/** Bytes of each group, inside nodes and across them, and each message by itself. */
function drawWire(plan) {
  const groups = new Map();
  for (const [kind, size, sent, across] of plan.flows) {
    const [, , group] = data.kinds[kind];
    const of = groups.get(group) ?? { size, inside: 0, across: 0 };
    of[across ? "across" : "inside"] += sent;
    groups.set(group, of);
  }
  const most = Math.max(1, ...[...groups.values()].map(({ inside, across }) => inside + across));
  const rows = [...groups].flatMap(([group, { size, inside, across }]) => {
    const bar = html("div", { class: "bar-of", role: "img", "aria-label": `${group}: ${amount(inside)} inside nodes, ${amount(across)} across` });
    for (const [bytes, style] of [[inside, "in"], [across, "over"]]) {
      if (bytes === 0) continue;
      const part = html("span", { class: style });
      part.style.width = `${(100 * bytes) / most}%`;
      bar.append(part);
    }
    const told = inside && across ? `${amount(inside)} + ${amount(across)}` : amount(inside + across);
    return [html("span", {}, html("strong", {}, group), ` of ${whole.format(size)}`), bar, html("span", { class: "amount" }, told)];
  });
  $("wire").replaceChildren(...rows);
  const all = sum(plan.flows.map(([, , sent]) => sent));
  const over = sum(plan.flows.map(([, , sent, across]) => (across ? sent : 0)));
  $("wire-told").replaceChildren(
    all === 0 ? "Nothing is sent: one rank in every group. " : `A rank sends ${amount(all)} in a step of ${seconds(plan.seconds)}. `,
    html("span", { class: "key-in", "aria-hidden": "true" }), " in groups inside a node ",
    html("span", { class: "key-over", "aria-hidden": "true" }), ` in groups that span nodes: ${amount(over)}.`,
  );
  const head = html("tr", {}, ...["what", "collective", "group", "ranks", "a rank sends", "nodes"].map((name) => html("th", { scope: "col" }, name)));
  const body = plan.flows.map(([kind, size, sent, across]) => html("tr", {}, ...[...data.kinds[kind], whole.format(size), amount(sent), across ? "across" : "inside"].map((text) => html("td", {}, text))));
  $("flows").replaceChildren(html("thead", {}, head), html("tbody", {}, ...body));
}
