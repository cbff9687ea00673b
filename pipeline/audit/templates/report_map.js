"use strict";
// ---- the map of the pictures' embeddings: one SVG; a point of a suspect opens its card
const MAP = { side: 1000, margin: 20, reach: 18 }; // units of the drawing; reach: of the pointer
const COLOURS = 7; // --map-0 ... in the style; colour and shape together name a detector
const SHAPES = [
  (r) => `M${-r},0a${r},${r} 0 1,0 ${2 * r},0a${r},${r} 0 1,0 ${-2 * r},0z`,
  (r) => `M${-r},${-r}h${2 * r}v${2 * r}h${-2 * r}z`,
  (r) => `M0,${-1.3 * r}L${1.2 * r},${r}H${-1.2 * r}z`,
  (r) => `M0,${-1.4 * r}L${1.4 * r},0L0,${1.4 * r}L${-1.4 * r},0z`,
];

// The detector that a pair is coloured by: the one that is filtered by, or of those that flag it the one that ranks it
// worst.
function mainFinding(item, wanted = state.detector) {
  if (wanted && item.flags.includes(wanted)) return wanted;
  const ranked = item.flags.filter((name) => item.r[name] !== undefined).sort((a, b) => item.r[a] - item.r[b]);
  return ranked[0] || item.flags[0] || item.worst;
}
function tally(points, wanted) {
  const counts = new Map();
  for (const { item } of points) {
    const name = mainFinding(item, wanted);
    counts.set(name, (counts.get(name) || 0) + 1);
  }
  return [...counts].sort((a, b) => b[1] - a[1]);
}
// The look of a detector is the same under every filter: by its place among `names`.
function symbol(names, name, x, y, r) {
  const place = names.indexOf(name);
  return svg("path", {
    d: SHAPES[place % SHAPES.length](r),
    transform: `translate(${x},${y})`,
    fill: `var(--map-${place % COLOURS})`,
  });
}

// The card of one pair over the page. Escape closes it, and the focus goes back to where it was.
function openCard(item) {
  const close = el("button", { onclick: () => box.close() }, "Close");
  const box = el("dialog", { class: "over", "aria-label": "pair", onclose: () => box.remove() }, pairCard(item), close);
  box.addEventListener("click", (event) => event.target === box && box.close());
  document.body.append(box);
  box.showModal();
  box.querySelector("article").focus();
}

function drawMap() {
  const node = document.getElementById("map");
  if (!node) return;
  const at = (v) => MAP.margin + v,
    full = MAP.side + 2 * MAP.margin;
  const suspects = D.map.suspects.map(([x, y, id]) => ({ x: at(x), y: at(y), item: D.items[id] })),
    others = D.map.others.map(([x, y, k, c]) => ({ x: at(x), y: at(y), item: { k, c } }));
  const height = Math.max(...[...suspects, ...others].map((p) => p.y), 0) + MAP.margin;
  const dots = others.map((p) => `M${p.x},${p.y}h0`).join("");
  // The commonest first, so that they are least alike; a detector that never comes first when unfiltered comes last.
  const names = [...tally(suspects, "").map(([name]) => name), ...D.detectors.map((d) => d.name)];
  const shown = suspects.filter((p) => fits(p.item));
  const ring = svg("circle", { r: 14, class: "ring", visibility: "hidden" });
  const box = svg(
    "svg",
    { viewBox: `0 0 ${full} ${height}`, "aria-hidden": "true" },
    svg("path", { d: dots, class: "dots" }),
    ...shown.toReversed().map((p) => symbol(names, mainFinding(p.item), p.x, p.y, 7)), // the worst on top
    ring,
  );
  const said = el("div", { class: "said small", role: "status" });
  let here = -1; // of `shown`, for the keyboard
  const pointAt = (point) => {
    ring.setAttribute("visibility", point ? "visible" : "hidden");
    if (!point) return said.replaceChildren(el("span", { class: "soft" }, "Point at a picture, or use the arrow keys."));
    ring.setAttribute("cx", point.x);
    ring.setAttribute("cy", point.y);
    const name = point.item.flags ? mainFinding(point.item) : null;
    said.replaceChildren(caption(point.item.k), caption(point.item.c), name ? el("b", {}, titles[name]) : "");
  };
  const nearest = (event) => {
    const rect = box.getBoundingClientRect(),
      scale = full / rect.width,
      x = (event.clientX - rect.left) * scale,
      y = (event.clientY - rect.top) * scale;
    const far = (p) => (p.x - x) ** 2 + (p.y - y) ** 2;
    // A suspect in reach is meant, even where another point is nearer: only it can be opened.
    for (const list of [shown, others]) {
      const best = list.reduce((a, b) => (a && far(a) <= far(b) ? a : b), null);
      if (best && far(best) <= (MAP.reach * Math.max(1, scale / 1.5)) ** 2) return best;
    }
    return null;
  };
  const open = (point) => point && point.item.flags && openCard(point.item);
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };
  const keys = (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "Enter" || event.key === " ") open(shown[here]);
    else if (step[event.key] && shown.length) {
      here = Math.min(shown.length - 1, Math.max(0, here + step[event.key]));
      pointAt(shown[here]);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  };
  const entry = ([name, n]) =>
    el("span", {}, svg("svg", { viewBox: "-9 -9 18 18" }, symbol(names, name, 0, 0, 6)), `${titles[name] || name} (${whole(n)})`);
  const area = el(
    "div",
    {
      class: "area",
      tabindex: "0",
      role: "application",
      "aria-label": "Map of the pictures. Arrow keys: next and previous suspect, the worst first. Enter: its card.",
      onpointermove: (event) => pointAt(nearest(event)),
      onpointerleave: () => pointAt(shown[here]),
      onclick: (event) => open(nearest(event)),
      onkeydown: keys,
    },
    box,
    said,
  );
  pointAt(null);
  node.replaceChildren(area, el("div", { class: "legend" }, ...tally(shown, state.detector).map(entry)));
}
const mapSection = () => [
  el("h2", {}, "Map"),
  el(
    "p",
    { class: "soft" },
    `Each point is a picture; near points look alike to the model, and distances between far groups say nothing (t-SNE). Coloured: ${whole(D.map.suspects.length)} of the ${whole(D.map.flagged)} flagged pairs, by detector. Grey: ${whole(D.map.others.length)} other pairs, drawn at random. Click a coloured point for its card.`,
  ),
  el("div", { id: "map", class: "card" }),
];
