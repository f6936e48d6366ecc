// The picture: each GPU is a band with its tokens on the left and its experts on the right. A line that leaves its band
// crosses the wire.

const TOKEN_ROW = 15;

/** Draws landed copies of the ranks in `members`, and calls `tell(text)` for what is pointed at or focused ("" for nothing). */
function drawFlow(container, landed, grid, members, costs, tell) {
  const width = Math.max(300, container.clientWidth);
  const narrow = width < 560;
  const left = narrow ? 94 : 150;
  const right = width - (narrow ? 108 : 210);
  const nodes = sum(members.map((rank) => grid.ranks[rank].held));
  const expertRow = nodes <= 16 ? 24 : nodes <= 32 ? 18 : nodes <= 64 ? 12 : 7;
  const tokensOf = new Map(members.map((rank) => [rank, []]));
  for (const copy of landed) {
    const tokens = tokensOf.get(copy.from);
    if (tokens.at(-1)?.token !== copy.token) tokens.push(copy);
  }
  const bands = svg("g");
  const lines = svg("g", { class: "lines" });
  const tokens = svg("g", { role: "listbox", "aria-label": "Tokens", class: "tokens" });
  const experts = svg("g", { role: "listbox", "aria-label": "Experts", class: "experts" });
  const tokenAt = new Map();
  const expertAt = new Map();
  const most = Math.max(1, ...costs.perExpert.values());
  let top = 0;
  let group = null;
  for (const rank of members) {
    const { first, held, edp } = grid.ranks[rank];
    if (group !== null && edp !== group) top += 12;
    group = edp;
    const mine = tokensOf.get(rank);
    const inner = Math.max(mine.length * TOKEN_ROW, held * expertRow, 24);
    const fullest = rank === costs.fullest && members.length > 1;
    bands.append(
      svg("rect", { class: fullest ? "band fullest" : "band", x: 0.5, y: top + 0.5, width: width - 1, height: inner + 28, rx: 6 }),
      svg("text", { class: "band-title", x: 10, y: top + 16 }, `GPU ${rank}`),
      svg("text", { class: "band-title", x: right - 6, y: top + 16 }, range(first, held)),
    );
    mine.forEach((copy, n) => {
      const y = top + 24 + (inner - mine.length * TOKEN_ROW) / 2 + (n + 0.5) * TOKEN_ROW;
      tokenAt.set(copy.token, y);
      tokens.append(drawToken(copy, landed.filter((other) => other.token === copy.token), left, y, narrow));
    });
    for (let expert = first; expert < first + held; expert++) {
      const y = top + 24 + ((expert - first + 0.5) * inner) / held;
      expertAt.set(`${rank}/${expert}`, y);
      const got = landed.filter((copy) => copy.to === rank && copy.expert === expert);
      experts.append(drawExpert(expert, rank, got, { x: right, y, row: expertRow, width: width - right, most, narrow }));
    }
    top += inner + 34;
  }
  const heaviest = Math.max(...landed.map((copy) => copy.weight), 1e-9);
  for (const copy of landed) {
    const [x1, y1] = [left + 8, tokenAt.get(copy.token)];
    const [x2, y2] = [right - 2, expertAt.get(`${copy.to}/${copy.expert}`)];
    const bend = (x2 - x1) * 0.45;
    const line = svg("path", {
      d: `M${x1},${y1}C${x1 + bend},${y1} ${x2 - bend},${y2} ${x2},${y2}`,
      class: copy.crosses ? "line crosses" : "line stays",
      "stroke-width": (0.6 + (2.4 * copy.weight) / heaviest).toFixed(2),
      "data-token": copy.token,
      "data-expert": `${copy.to}/${copy.expert}`,
    });
    lines.append(paint(line, copy.expert));
  }
  const picture = svg("svg", { width, height: top, viewBox: `0 0 ${width} ${top}`, role: "group" }, bands, lines, tokens, experts);
  picture.setAttribute("aria-label", "Tokens on the left, experts on the right, one band for each GPU. Arrow keys move inside a list.");
  container.replaceChildren(picture);
  makeLists(picture, [tokens, experts], tell);
}

function drawToken(copy, all, x, y, narrow) {
  const where = ({ expert, weight, to, crosses }) =>
    `expert ${expert} at ${weight.toFixed(2)} (GPU ${to}${crosses ? ", crosses" : ", stays"})`;
  const told = `Token “${label(copy.piece, 60)}” on GPU ${copy.from}: ${all.map(where).join(", ")}.`;
  return svg(
    "g",
    { class: "token", role: "option", "aria-label": told, "data-token": copy.token },
    svg("rect", { x: 4, y: y - TOKEN_ROW / 2, width: x + 8, height: TOKEN_ROW, rx: 3, class: "focus" }),
    svg("text", { x: x - 2, y: y + 4, "text-anchor": "end" }, label(copy.piece, narrow ? 11 : 18)),
    paint(svg("circle", { cx: x + 6, cy: y, r: 3.5, class: "dot" }), all[0].expert),
  );
}

function drawExpert(expert, rank, got, { x, y, row, width, most, narrow }) {
  const away = got.filter((copy) => copy.crosses).length;
  const told =
    `Expert ${expert} on GPU ${rank}: ${got.length} ${got.length === 1 ? "copy" : "copies"}, ${away} from other GPUs` +
    (got.length ? `: ${[...new Set(got.map((copy) => `“${label(copy.piece)}”`))].slice(0, 12).join(" ")}` : ".");
  const named = row >= 12;
  const start = named ? (narrow ? 34 : 78) : 18;
  const length = ((width - start - 40) * got.length) / most;
  const node = svg(
    "g",
    { class: "expert", role: "option", "aria-label": told, "data-expert": `${rank}/${expert}` },
    svg("rect", { x: x - 4, y: y - row / 2, width: width - 2, height: row, rx: 3, class: "focus" }),
    paint(svg("rect", { x, y: y - row / 2 + 1, width: 10, height: row - 2, rx: Math.min(3, row / 3), class: "node" }), expert),
    paint(svg("rect", { x: x + start, y: y - row * 0.32, width: length, height: row * 0.64, rx: 2, class: "bar" }), expert),
  );
  if (named) {
    node.append(
      svg("text", { x: x + 15, y: y + 4 }, narrow ? `E${expert}` : `expert ${expert}`),
      svg("text", { x: x + start + length + 5, y: y + 4, class: "count" }, whole.format(got.length)),
    );
  }
  return node;
}

/** Pointing and focus. Each list is one stop of the Tab key; the arrow keys, Home and End move inside it. */
function makeLists(picture, lists, tell) {
  const pick = (item) => {
    picture.classList.toggle("picked", Boolean(item));
    for (const part of picture.querySelectorAll(".on")) part.classList.remove("on");
    if (!item) return tell("");
    const key = item.dataset.token === undefined ? "expert" : "token";
    const lines = [...picture.querySelectorAll(".line")].filter((line) => line.dataset[key] === item.dataset[key]);
    const ends = new Set(lines.flatMap((line) => [`token ${line.dataset.token}`, `expert ${line.dataset.expert}`]));
    for (const end of picture.querySelectorAll("[role=option]")) {
      const name = end.dataset.token === undefined ? `expert ${end.dataset.expert}` : `token ${end.dataset.token}`;
      end.classList.toggle("on", end === item || ends.has(name));
      end.setAttribute("aria-selected", end === item);
    }
    for (const line of lines) line.classList.add("on");
    tell(item.getAttribute("aria-label"));
  };
  const focused = () => (picture.contains(document.activeElement) ? document.activeElement : null);
  for (const list of lists) {
    const items = [...list.children];
    items.forEach((item, n) => item.setAttribute("tabindex", n ? -1 : 0));
    list.addEventListener("keydown", (event) => {
      const at = items.indexOf(document.activeElement);
      const next = { ArrowDown: at + 1, ArrowUp: at - 1, Home: 0, End: items.length - 1 }[event.key];
      if (event.key === "Escape") return pick(null);
      if (next === undefined || !items[next]) return;
      event.preventDefault();
      for (const item of items) item.setAttribute("tabindex", -1);
      items[next].setAttribute("tabindex", 0);
      items[next].focus();
    });
    for (const item of items) {
      // Not on the list: Chromium makes an SVG group with such listeners a stop of the Tab key itself.
      item.addEventListener("focus", () => pick(item));
      item.addEventListener("blur", () => pick(null));
      item.addEventListener("pointerenter", () => pick(item));
      item.addEventListener("pointerleave", () => pick(focused()));
      item.addEventListener("click", () => item.focus());
    }
  }
}
