// The layout's grid of ranks, and all layouts beside each other.

/** EP groups as rows, EP ranks as columns: a row exchanges tokens, a column holds the same experts (EDP). */
function drawGrid(table, layout, grid, costs) {
  const columns = grid.groups[0].map((rank) => grid.ranks[rank]);
  const head = html("tr", {}, html("td"));
  for (const { ep, first, held } of columns) {
    head.append(html("th", { scope: "col" }, `EP rank ${ep}`, html("small", {}, range(first, held))));
  }
  const body = grid.groups.map((group, n) => {
    const row = html("tr", {}, html("th", { scope: "row" }, `EP group ${n}`, html("small", {}, `EDP replica ${n}`)));
    for (const rank of group) {
      const { dp, part } = grid.ranks[rank];
      const got = costs.received.get(rank);
      const cell = html("td", { class: "rank", "data-rank": rank }, html("strong", {}, `GPU ${rank}`));
      if (layout.tp > 1) cell.append(html("small", {}, `TP ${part}, DP ${dp}`));
      if (layout.sp > 1) cell.append(html("small", {}, `SP ${part}, DP ${dp}`));
      cell.append(html("span", { class: "got" }, `${whole.format(got)} copies`));
      const meter = html("span", { class: "meter", "aria-hidden": "true" });
      meter.style.setProperty("--part", Math.min(1, costs.mean ? got / costs.mean / 2 : 0));
      cell.append(meter);
      row.append(cell);
    }
    return row;
  });
  table.replaceChildren(html("caption", {}, grid.title), html("thead", {}, head), html("tbody", {}, ...body));
}

/** One row for each group of layouts that place ranks alike; `chosen` is the layout that the page shows. */
function drawComparison(table, copies, layer, world, chosen) {
  const alike = new Map();
  for (const layout of data.layouts) {
    const key = [layout.ep, layout.tp, layout.sp, layout.bytes].join();
    alike.set(key, [...(alike.get(key) ?? []), layout]);
  }
  const names = ["Layouts", "EP × EDP", "Experts per GPU", "Cross the wire", "Weights and gradients", "Fullest GPU / mean", "Over all text"];
  const head = html("tr", {}, ...names.map((name) => html("th", { scope: "col" }, name)));
  const rows = [...alike.values()].sort((a, b) => a[0].ep - b[0].ep).map((layouts) => {
    const files = layouts.map(({ file }) => file.replace(/\.json$/, "")).join(", ");
    const row = html("tr", {}, html("th", { scope: "row" }, files));
    if (layouts.includes(chosen)) row.setAttribute("aria-current", "true");
    const [layout] = layouts;
    if (!layout.worlds[world]) {
      const why = layout.problem || `not on ${world} GPU${world === "1" ? "" : "s"}`;
      row.append(html("td", { colspan: names.length - 1, class: "not" }, why));
      return row;
    }
    const grid = gridOf(layout, world);
    const { crossing, copies: all, slowdown } = cost(land(copies, grid), grid.ranks.map(({ rank }) => rank), layout);
    const cells = [
      `${layout.ep} × ${grid.groups.length}`,
      grid.ranks[0].held,
      `${whole.format(crossing)} of ${whole.format(all)}`,
      size(Math.round(replicaBytes(layout, grid.groups.length))),
      times(slowdown),
      times(maxOverMean(rankLoads(layer, layout.ep))),
    ];
    row.append(...cells.map((text) => html("td", {}, text)));
    return row;
  });
  table.replaceChildren(html("thead", {}, head), html("tbody", {}, ...rows));
}
