const D = JSON.parse(document.getElementById("data").textContent);
const main = document.getElementById("main");
const whole = (n) => n.toLocaleString("en-US");
const percent = (x, digits = 1) => (100 * x).toFixed(digits) + " %";

// All text, the captions above all, comes in as text nodes: nothing in it is ever read as markup.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.filter((child) => child !== null));
  return node;
}
function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
// Control and direction characters would hide or reorder what stands there; they are shown by their numbers.
const CONTROL =
  /[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]|[\u{e0000}-\u{e007f}]/gu;
function caption(text) {
  const box = el("bdi", { class: "caption", dir: "auto" });
  if (text === null) {
    box.append(el("span", { class: "soft" }, "no caption"));
    return box;
  }
  let end = 0;
  for (const match of text.matchAll(CONTROL)) {
    box.append(
      text.slice(end, match.index),
      el("span", { class: "control" }, "U+" + match[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0")),
    );
    end = match.index + match[0].length;
  }
  box.append(text.slice(end));
  return box;
}
function picture(item, small) {
  const kind = "picture" + (small ? " small" : "");
  if (!item.thumb) return el("span", { class: kind + " none" }, "no picture");
  const [source, side] = item.thumb;
  return el("img", { class: kind + (side < 80 ? " tiny" : ""), src: source, alt: "", loading: "eager" });
}

// ---- verdicts: by (shard, position); kept in this browser where it allows that
const store = "safeclip-review-" + D.fingerprint;
let verdicts = new Map();
try {
  verdicts = new Map(JSON.parse(localStorage.getItem(store) || "[]"));
} catch (error) {
  /* not here */
}
const place = (s, p) => s + "/" + p;
const verdictOf = (places) => {
  const all = new Set(places.map((key) => verdicts.get(key)));
  return all.size === 1 ? [...all][0] : undefined;
};
function mark(places, verdict) {
  for (const key of places) verdict ? verdicts.set(key, verdict) : verdicts.delete(key);
  try {
    localStorage.setItem(store, JSON.stringify([...verdicts]));
  } catch (error) {
    /* not here */
  }
  for (const node of document.querySelectorAll("[data-places]")) show(node);
  count();
}
function show(node) {
  const verdict = verdictOf(node.places);
  if (verdict) node.dataset.verdict = verdict;
  else delete node.dataset.verdict;
  for (const button of node.querySelectorAll(".marks button"))
    button.setAttribute("aria-pressed", String(button.dataset.v === verdict));
}
function marks(node, places, words) {
  node.places = places;
  node.dataset.places = places.length;
  const button = (v, text) =>
    el(
      "button",
      { "data-v": v, "aria-pressed": "false", onclick: () => mark(places, verdictOf(places) === v ? null : v) },
      text,
    );
  node.append(el("div", { class: "marks" }, button("poison", words[0]), button("fine", words[1])));
  show(node);
  return node;
}
function count() {
  const poison = [...verdicts.values()].filter((v) => v === "poison").length;
  document.getElementById("export").textContent = verdicts.size
    ? `Export ${whole(verdicts.size)} ticks`
    : "Export ticks";
  document.getElementById("ticked").textContent = verdicts.size
    ? `${whole(poison)} poison, ${whole(verdicts.size - poison)} fine`
    : "nothing ticked yet";
}
function save() {
  const quoted = (text) =>
    '"' + (/^['=+\-@\uff1d\uff0b\uff0d\uff20\u0000-\u001f]/.test(text) ? "'" + text : text).replaceAll('"', '""') + '"';
  const lines = [...verdicts].map(([key, verdict]) => {
    const at = key.indexOf("/"),
      s = +key.slice(0, at),
      p = +key.slice(at + 1);
    return [quoted(D.shards[s]), p, quoted(D.shard_prints[s]), quoted(verdict)].join(",");
  });
  const file = new Blob(['"shard","position","fingerprint","verdict"\n' + lines.map((line) => line + "\n").join("")], {
    type: "text/csv",
  });
  const link = el("a", { href: URL.createObjectURL(file), download: "review.csv" });
  document.body.append(link);
  link.click();
  link.remove();
}

// ---- charts: inline SVG, 420 x 230
const W = 420,
  H = 230,
  L = 46,
  R = 8,
  T = 10,
  B = 34;
function frame(x, y, labels) {
  const X = (v) => L + ((v - x[0]) / (x[1] - x[0] || 1)) * (W - L - R),
    Y = (v) => H - B - ((v - y[0]) / (y[1] - y[0] || 1)) * (H - T - B);
  const box = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": labels.title });
  for (let i = 0; i <= 4; i++) {
    const v = y[0] + ((y[1] - y[0]) * i) / 4,
      u = x[0] + ((x[1] - x[0]) * i) / 4;
    box.append(
      svg("line", { x1: L, x2: W - R, y1: Y(v), y2: Y(v), stroke: "var(--line)" }),
      svg("text", { x: L - 6, y: Y(v) + 4, "text-anchor": "end" }, labels.y(v)),
      svg("text", { x: X(u), y: H - B + 16, "text-anchor": "middle" }, labels.x(u)),
    );
  }
  box.append(svg("text", { x: (L + W - R) / 2, y: H - 2, "text-anchor": "middle" }, labels.along));
  return { box, X, Y };
}
const path = (points, X, Y, colour, dash) =>
  svg("polyline", {
    points: points.map(([a, b]) => `${X(a).toFixed(1)},${Y(b).toFixed(1)}`).join(" "),
    fill: "none",
    stroke: colour,
    "stroke-width": 2,
    "stroke-dasharray": dash || "none",
  });
const legend = (entries) =>
  el(
    "div",
    { class: "legend" },
    ...entries.map(([colour, text]) => {
      const line = el("i");
      line.style.background = colour;
      return el("span", {}, line, text);
    }),
  );
const chart = (title, text, box, entries) =>
  el("div", { class: "card" }, el("h3", {}, title), box, legend(entries), el("p", { class: "small soft" }, text));
function histogram() {
  const h = D.histogram,
    top = Math.max(...h.counts),
    width = (h.high - h.low) / h.counts.length;
  const { box, X, Y } = frame([h.low, h.high], [0, top * 1.05], {
    title: "Histogram of the cosines",
    x: (v) => v.toFixed(2),
    y: (v) => (v >= 1e4 ? (v / 1e3).toFixed(0) + "k" : v.toFixed(0)),
    along: D.ranked_by,
  });
  h.counts.forEach((n, i) =>
    box.append(
      svg("rect", {
        x: X(h.low + i * width) + 0.3,
        width: Math.max(0.5, X(width) - X(0) - 0.6),
        y: Y(n),
        height: Y(0) - Y(n),
        fill: "var(--bars)",
      }),
    ),
  );
  const entries = [["var(--bars)", "pairs"]];
  if (D.mixture)
    [
      ["var(--low)", "lower component: mismatched"],
      ["var(--high)", "upper component: matching"],
    ].forEach(([colour, name], c) => {
      const [m, s, w] = [D.mixture.mean[c], D.mixture.std[c], D.mixture.weight[c]];
      const curve = Array.from({ length: 161 }, (_, i) => h.low + (i * (h.high - h.low)) / 160).map((x) => [
        x,
        Math.min(
          top * 1.05,
          ((w * D.scored * width) / s / Math.sqrt(2 * Math.PI)) * Math.exp(-0.5 * ((x - m) / s) ** 2),
        ),
      ]);
      box.append(path(curve, X, Y, colour));
      entries.push([colour, `${name} (${percent(w, 0)})`]);
    });
  if (D.threshold !== null && D.threshold >= h.low && D.threshold <= h.high) {
    box.append(
      svg("line", {
        x1: X(D.threshold),
        x2: X(D.threshold),
        y1: T,
        y2: H - B,
        stroke: "var(--ink)",
        "stroke-width": 1.5,
        "stroke-dasharray": "4 3",
      }),
      svg("text", { x: X(D.threshold) - 4, y: T + 10, "text-anchor": "end" }, "threshold " + D.threshold.toFixed(3)),
    );
  }
  return chart(
    "How well pictures and captions match",
    D.mixture
      ? "Pairs right of the threshold are the mask's safe set. Poison and mistakes sit on the left."
      : "These cosines are no mixture of two groups, so nothing but their order says which pairs are suspect.",
    box,
    entries,
  );
}
function epochs() {
  const e = D.epochs,
    { box, X, Y } = frame([e[0].epoch, e.at(-1).epoch], [0, 1], {
      title: "Safe fraction over epochs",
      x: (v) => v.toFixed(0),
      y: (v) => percent(v, 0),
      along: "epoch",
    });
  const entries = [["var(--high)", "safe fraction"]];
  const controls = e.filter((one) => one.negative_controls);
  if (controls.length) {
    box.append(
      svg("polygon", {
        points: [
          ...controls.map((o) => [o.epoch, o.negative_controls.high]),
          ...controls.map((o) => [o.epoch, o.negative_controls.low]).reverse(),
        ]
          .map(([a, b]) => X(a) + "," + Y(b))
          .join(" "),
        fill: "var(--low)",
        opacity: 0.2,
      }),
      path(
        controls.map((o) => [o.epoch, o.negative_controls.fraction]),
        X,
        Y,
        "var(--low)",
      ),
    );
    entries.push(["var(--low)", "negative controls let in (95 % interval)"]);
  }
  box.append(
    path(
      e.map((o) => [o.epoch, o.fraction]),
      X,
      Y,
      "var(--high)",
    ),
  );
  return chart(
    "The safe set over the run",
    "Negative controls are pairs mismatched on purpose; few should pass. A low rate does not acquit: poison that was trained on scores higher than a control.",
    box,
    entries,
  );
}
const PALETTE = ["var(--high)", "var(--low)", "var(--third)", "var(--fourth)"];
function truthCharts() {
  const kinds = Object.keys(D.truth.poison),
    shown = D.truth.detectors,
    out = [];
  const size = [0, 1],
    axis = (v) => percent(v, 0);
  const roc = frame(size, size, { title: "ROC", x: axis, y: axis, along: "clean pairs flagged" }),
    pr = frame(size, size, { title: "Precision and recall", x: axis, y: axis, along: "poison found (recall)" });
  roc.box.append(
    path(
      [
        [0, 0],
        [1, 1],
      ],
      roc.X,
      roc.Y,
      "var(--line)",
    ),
  );
  kinds.forEach((kind, i) => {
    const one = shown.combined.attacks[kind];
    roc.box.append(path(one.roc, roc.X, roc.Y, PALETTE[i % 4]));
    pr.box.append(path(one.pr, pr.X, pr.Y, PALETTE[i % 4]));
  });
  out.push(
    chart(
      "ROC, all detectors together",
      "Area: how often a poisoned pair ranks worse than a clean one; 0.5 is chance.",
      roc.box,
      kinds.map((k, i) => [PALETTE[i % 4], `${k} ${shown.combined.attacks[k].auroc.toFixed(3)}`]),
    ),
  );
  out.push(
    chart(
      "Precision over recall, all detectors together",
      "Of the pairs flagged, the fraction that is poison of this kind.",
      pr.box,
      kinds.map((k, i) => [PALETTE[i % 4], `${k} ${shown.combined.attacks[k].average_precision.toFixed(3)}`]),
    ),
  );
  const m = D.truth.masks;
  if (m.length > 1) {
    const { box, X, Y } = frame([m[0].epoch, m.at(-1).epoch], size, {
      title: "Mask against truth",
      x: (v) => v.toFixed(0),
      y: axis,
      along: "epoch",
    });
    kinds.forEach((kind, i) =>
      box.append(
        path(
          m.map((o) => [o.epoch, o.recall_by_attack[kind]]),
          X,
          Y,
          PALETTE[i % 4],
        ),
      ),
    );
    box.append(
      path(
        m.filter((o) => o.precision !== null).map((o) => [o.epoch, o.precision]),
        X,
        Y,
        "var(--ink)",
        "5 4",
      ),
    );
    out.push(
      chart(
        "The mask against the truth",
        "Recall: fraction of the poison that is risky. Precision: fraction of the risky pairs that is poison.",
        box,
        [...kinds.map((k, i) => [PALETTE[i % 4], "recall " + k]), ["var(--ink)", "precision"]],
      ),
    );
  }
  const head = el(
    "tr",
    {},
    el("th", {}, "AUROC"),
    ...kinds.map((k) => el("th", { class: "num" }, k)),
    ...Object.keys(shown.combined.precision).map((s) => el("th", { class: "num" }, "precision at " + percent(+s))),
  );
  const rows = Object.entries(shown).map(([name, o]) =>
    el(
      "tr",
      {},
      el("td", {}, name.replaceAll("_", " ")),
      ...kinds.map((k) => el("td", { class: "num" }, o.attacks[k].auroc.toFixed(3))),
      ...Object.values(o.precision).map((v) => el("td", { class: "num" }, percent(v, 0))),
    ),
  );
  return [
    el("h2", {}, "Against the ground truth"),
    el(
      "p",
      { class: "soft" },
      `An attack manifest says which pairs are poison: ${kinds.map((k) => whole(D.truth.poison[k]) + " " + k).join(", ")}. Detectors never read it.`,
    ),
    el("div", { class: "charts" }, ...out),
    el("div", { class: "card scroll" }, el("table", {}, el("thead", {}, head), el("tbody", {}, ...rows))),
  ];
}
function sparkline(item) {
  const points = item.path.map((v, i) => [i, v]).filter(([, v]) => v !== null);
  if (points.length < 2) return null;
  const values = [...points.map((p) => p[1]), ...D.thresholds.filter((v) => v !== null)],
    low = Math.min(...values),
    high = Math.max(...values);
  const X = (i) => 2 + (i / (item.path.length - 1)) * 176,
    Y = (v) => 36 - ((v - low) / (high - low || 1)) * 32;
  const box = svg("svg", { viewBox: "0 0 180 40", role: "img", "aria-label": `${D.ranked_by} at every round` });
  box.append(
    path(
      D.thresholds.map((v, i) => [i, v]).filter(([, v]) => v !== null),
      X,
      Y,
      "var(--soft)",
      "3 3",
    ),
    path(points, X, Y, "var(--low)"),
  );
  return el(
    "div",
    { class: "small soft" },
    box,
    `${D.ranked_by} over ${item.path.length} rounds, ${points[0][1].toFixed(2)} to ${points.at(-1)[1].toFixed(2)} (dashed: the threshold)`,
  );
}

// ---- cards
const titles = Object.fromEntries(D.detectors.map((d) => [d.name, d.title]));
const where = (item) => el("div", { class: "place" }, caption(`${D.shards[item.s]} · ${item.p} · ${item.k}`));
function pairCard(item) {
  const why = item.flags.length ? item.flags : [item.worst];
  const node = el(
    "article",
    { class: "card pair", tabindex: "0" },
    el(
      "div",
      { class: "head" },
      picture(item),
      el(
        "div",
        {},
        caption(item.c),
        el("div", { class: "small soft" }, item.cos === null ? "could not be read" : `cosine ${item.cos.toFixed(3)}`),
      ),
    ),
    el(
      "ul",
      { class: "why" },
      ...why
        .filter((name) => name)
        .map((name) =>
          el(
            "li",
            {},
            el("b", {}, titles[name] || name),
            item.r[name] === undefined
              ? item.said[name]
                ? `: ${item.said[name]}`
                : ""
              : item.r[name] * D.pairs < 1
                ? ": the worst of all pairs"
                : `: among the worst ${percent(item.r[name], item.r[name] < 0.001 ? 3 : 2)}`,
          ),
        ),
    ),
    item.note ? el("div", { class: "small" }, caption(item.note)) : null,
    item.path.length > 1 ? sparkline(item) : null,
    item.near.length
      ? el(
          "details",
          {},
          el("summary", {}, "Its nearest pictures and their captions"),
          el(
            "div",
            { class: "near" },
            ...item.near.map(([id, cosine]) =>
              el(
                "div",
                {},
                picture(D.items[id], true),
                el("span", {}, caption(D.items[id].c), el("span", { class: "soft" }, ` ${cosine.toFixed(2)}`)),
              ),
            ),
          ),
        )
      : null,
    where(item),
  );
  return marks(node, [place(item.s, item.p)], ["Poison", "Fine"]);
}
function groupCard(group) {
  const strip = group.ids.map((id) => {
    const box = el("span", { class: "framed" }, picture(D.items[id], true));
    if (group.box && D.items[id].thumb) {
      const i = el("i"),
        [l, t, r, b] = group.box;
      Object.assign(i.style, {
        left: 100 * l + "%",
        top: 100 * t + "%",
        width: 100 * (r - l) + "%",
        height: 100 * (b - t) + "%",
      });
      box.append(i);
    }
    return box;
  });
  const texts = [...new Set(group.ids.map((id) => D.items[id].c))].slice(0, 4);
  const node = el(
    "article",
    { class: "card group", tabindex: "0" },
    el("h3", {}, titles[group.detector]),
    group.detector === "repeated_caption" ? caption(texts[0]) : null,
    el("div", { class: "small soft" }, group.text),
    el("div", { class: "strip" }, ...strip),
    group.detector === "repeated_caption"
      ? null
      : el("div", { class: "near small" }, ...texts.map((text) => el("div", {}, caption(text)))),
  );
  const all =
    group.members.length === group.n
      ? `all ${whole(group.n)}`
      : `first ${whole(group.members.length)} of ${whole(group.n)}`;
  return marks(
    node,
    group.members.map(([s, p]) => place(s, p)),
    [`Poison: ${all}`, `Fine: ${all}`],
  );
}

// ---- filter, pages
const state = { words: "", detector: "", shard: "", page: { groups: 0, gallery: 0, table: 0 } };
const SIZES = { groups: 6, gallery: 24, table: 50 };
const fits = (item) =>
  (!state.words || (item.c || "").toLowerCase().includes(state.words) || item.k.toLowerCase().includes(state.words)) &&
  (!state.detector || item.flags.includes(state.detector)) &&
  (state.shard === "" || item.s === +state.shard);
const lists = {
  groups: () =>
    D.groups.filter(
      (g) =>
        (!state.detector || g.detector === state.detector) &&
        (state.shard === "" || g.members.some(([s]) => s === +state.shard)) &&
        (!state.words || g.ids.some((id) => (D.items[id].c || "").toLowerCase().includes(state.words))),
    ),
  // Of one detector, also its findings that are on the map only.
  gallery: () =>
    [...new Set([...D.gallery, ...(state.detector && D.map ? D.map.suspects.map((point) => point[2]) : [])])]
      .map((id) => D.items[id])
      .filter(fits),
  table: () => D.table.filter(fits),
};
const tableRow = (item) =>
  el(
    "tr",
    {},
    el("td", { class: "name" }, caption(D.shards[item.s])),
    el("td", { class: "num" }, whole(item.p)),
    el("td", { class: "name" }, caption(item.k)),
    el("td", {}, caption(item.c)),
    el("td", { class: "num" }, item.cos === null ? "" : item.cos.toFixed(3)),
    el("td", {}, item.flags.map((name) => name.replaceAll("_", " ")).join(", ")),
  );
const drawn = {
  groups: (list) => el("div", { class: "groups" }, ...list.map(groupCard)),
  gallery: (list) => el("div", { class: "gallery" }, ...list.map(pairCard)),
  table: (list) =>
    el(
      "div",
      { class: "card scroll" },
      el(
        "table",
        {},
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            ...["shard", "position", "key", "caption", "cosine", "found by"].map((t, i) =>
              el("th", { class: [1, 4].includes(i) ? "num" : "" }, t),
            ),
          ),
        ),
        el("tbody", {}, ...list.map(tableRow)),
      ),
    ),
};
function draw(name) {
  const list = lists[name](),
    size = SIZES[name],
    last = Math.max(0, Math.ceil(list.length / size) - 1);
  const page = (state.page[name] = Math.min(Math.max(0, state.page[name]), last)),
    turn = (by) => {
      state.page[name] += by;
      draw(name);
      document.getElementById(name).scrollIntoView();
    };
  const pager = el(
    "div",
    { class: "pager" },
    el("button", { onclick: () => turn(-1), disabled: page === 0, "aria-label": "previous page" }, "←"),
    el(
      "span",
      { class: "small soft" },
      list.length
        ? `${whole(page * size + 1)} to ${whole(Math.min(list.length, (page + 1) * size))} of ${whole(list.length)}`
        : "nothing fits the filter",
    ),
    el("button", { onclick: () => turn(1), disabled: page === last, "aria-label": "next page" }, "→"),
  );
  document
    .getElementById(name)
    .replaceChildren(...(list.length ? [drawn[name](list.slice(page * size, (page + 1) * size))] : []), pager);
}
const drawAll = () => {
  for (const name of Object.keys(lists)) {
    state.page[name] = 0;
    draw(name);
  }
  drawMap();
};
let waiting = 0;
const select = (name, label, options) =>
  el(
    "select",
    {
      "aria-label": label,
      onchange: (event) => {
        state[name] = event.target.value;
        drawAll();
      },
    },
    el("option", { value: "" }, label),
    ...options.map(([value, text]) => el("option", { value }, text)),
  );
function theme() {
  const now = getComputedStyle(document.documentElement).colorScheme,
    dark = now === "dark" || (now === "light dark" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "light" : "dark";
}
document.addEventListener("keydown", (event) => {
  if (event.target.closest("input, select, textarea") || event.ctrlKey || event.metaKey || event.altKey) return;
  const cards = [...(document.querySelector("dialog[open]") || document).querySelectorAll("article[tabindex]")],
    here = cards.indexOf(event.target.closest("article"));
  const step = { j: 1, ArrowRight: 1, k: -1, ArrowLeft: -1 }[event.key],
    verdict = { p: "poison", f: "fine", u: null }[event.key];
  if (event.key === "/") {
    document.getElementById("search").focus();
    event.preventDefault();
  } else if (step && cards.length) {
    cards[Math.min(cards.length - 1, Math.max(0, here + step))].focus();
    event.preventDefault();
  } else if (verdict !== undefined && here >= 0) {
    mark(cards[here].places, verdict);
    event.preventDefault();
  }
});

// ---- the page
const tile = (number, text) =>
  el("div", { class: "card tile" }, el("b", {}, number), el("span", { class: "soft" }, text));
const detectorRow = (d) =>
  el(
    "tr",
    {},
    el(
      "td",
      {},
      el("b", {}, d.title),
      el("div", { class: "small soft" }, d.text),
      d.source ? el("div", { class: "small soft" }, d.source) : "",
    ),
    el("td", { class: "num" }, d.skipped ? "" : whole(d.issues)),
    el(
      "td",
      { class: d.skipped ? "small" : "small num" },
      d.skipped ? "not run: " + d.skipped : `${d.seconds.toFixed(1)} s`,
    ),
  );
main.replaceChildren(
  el(
    "div",
    { class: "top" },
    el("div", {}, el("h1", {}, D.headline), el("div", { class: "soft small" }, caption(D.about))),
    el("button", { onclick: theme, "aria-label": "switch between light and dark" }, "Light / dark"),
  ),
  el(
    "div",
    { class: "tiles" },
    tile(whole(D.pairs), `pairs in ${whole(D.shard_count)} shards`),
    tile(whole(D.suspects), `suspects to look at first (worst ${percent(D.suspects / D.pairs)})`),
    tile(whole(D.groups.length), "groups shown: repeated captions, copies, patches"),
    tile(whole(D.broken), "pairs that cannot be read"),
    ...(D.safe === null ? [] : [tile(percent(D.safe), "of the pairs are safe by the mask")]),
  ),
  el(
    "div",
    { class: "card" },
    el("h3", {}, "What to do next"),
    el(
      "ol",
      {},
      el(
        "li",
        {},
        "Look through the groups, then the suspects. A detector finds what is unusual, not what is wrong: many suspects are fine.",
      ),
      el(
        "li",
        {},
        "Tick Poison or Fine. On the keyboard: ",
        el("kbd", {}, "j"),
        " ",
        el("kbd", {}, "k"),
        " next and previous card, ",
        el("kbd", {}, "p"),
        " poison, ",
        el("kbd", {}, "f"),
        " fine, ",
        el("kbd", {}, "u"),
        " undo, ",
        el("kbd", {}, "/"),
        " search.",
      ),
      el(
        "li",
        {},
        ...(D.command
          ? [
              "Export the ticks and give them to ",
              el("code", {}, D.command),
              ": pairs ticked poison are left out, pairs ticked fine are kept.",
            ]
          : [
              "Export the ticks. They name parts of the embeddings and positions there, which no command applies to shards; findings.parquet has the key of each pair.",
            ]),
      ),
      el(
        "li",
        {},
        "Everything that was found, for every pair, is in findings.parquet and findings.csv beside this file; figures are in audit.json.",
      ),
    ),
  ),
  el("h2", {}, "The scores"),
  el("div", { class: "charts" }, histogram(), ...(D.epochs.length > 1 ? [epochs()] : [])),
  el(
    "div",
    { class: "bar", role: "search" },
    el("input", {
      type: "search",
      id: "search",
      placeholder: "Search captions and keys",
      "aria-label": "search captions and keys",
      oninput: (event) => {
        clearTimeout(waiting);
        waiting = setTimeout(() => {
          state.words = event.target.value.toLowerCase();
          drawAll();
        }, 150);
      },
    }),
    select(
      "detector",
      "all detectors",
      D.detectors.filter((d) => !d.skipped).map((d) => [d.name, d.title]),
    ),
    select(
      "shard",
      "all shards",
      Object.entries(D.shards),
    ),
    el("button", { class: "main", id: "export", onclick: save }, ""),
    el("span", { id: "ticked", class: "small soft", "aria-live": "polite" }, ""),
  ),
  ...(D.map ? mapSection() : []),
  el("h2", {}, "Groups"),
  el("p", { class: "soft" }, "Pairs that belong together, the worst first. A tick counts for every member."),
  el("div", { id: "groups" }),
  el("h2", {}, "Suspects"),
  el(
    "p",
    { class: "soft" },
    `The ${whole(D.gallery.length)} worst pairs of all detectors together${D.map ? "; of one detector also those on the map" : ""}.${D.no_pictures ? " No pictures: " + D.no_pictures : ""}`,
  ),
  el("div", { id: "gallery" }),
  el("h2", {}, "More suspects"),
  el("p", { class: "soft" }, `The ${whole(D.table.length)} worst pairs as a table, without pictures.`),
  el("div", { id: "table" }),
  el("h2", {}, "What was looked for"),
  el(
    "div",
    { class: "card scroll" },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, el("th", {}, "detector"), el("th", { class: "num" }, "pairs"), el("th", {}, ""))),
      el("tbody", {}, ...D.detectors.map(detectorRow)),
    ),
  ),
  ...(D.truth ? truthCharts() : []),
);
drawAll();
count();
