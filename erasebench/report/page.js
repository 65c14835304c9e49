const all = (selector, within = document) => [...within.querySelectorAll(selector)];
const make = (tag, parts = {}, ...children) => {
  const node = Object.assign(document.createElement(tag), parts);
  node.append(...children);
  return node;
};

// Tables: a click on a head sorts, the better end first.
function sortable(table) {
  const heads = all(".names th", table);
  heads.forEach((head, column) => head.firstElementChild?.addEventListener("click", () => {
    const best = head.firstElementChild.dataset.best || "ascending";
    const other = best === "ascending" ? "descending" : "ascending";
    const way = head.getAttribute("aria-sort") === best ? other : best;
    heads.forEach(h => h.removeAttribute("aria-sort"));
    head.setAttribute("aria-sort", way);
    const sign = way === "ascending" ? 1 : -1;
    const body = table.querySelector(".ranked");
    // A cell's number is the one at its start; a dash is no number, and sorts last.
    const cell = ({ cells: { [column]: at } }) => column ? parseFloat(at.dataset.v ?? (at.querySelector("b") ?? at).firstChild.data.replaceAll(",", "")) : at.dataset.v;
    const compare = (a, b) => a !== a || b !== b ? (a !== a) - (b !== b) : sign * (column ? a - b : a.localeCompare(b));
    body.append(...[...body.rows].sort((a, b) => compare(cell(a), cell(b))));
  }));
}
all("table").forEach(sortable);

for (const button of all(".wider")) button.addEventListener("click", () => {
  const table = button.parentElement.querySelector("table"), wide = table.classList.toggle("wide");
  button.setAttribute("aria-pressed", wide);
  for (const head of all(".kinds th", table)) head.colSpan = (wide ? 0 : head.dataset.few) || head.dataset.all;
});

// Meanings of the visible columns.
function meanings(details) {
  const heads = all(".names th[title]", details.closest(".group")).filter(head => head.checkVisibility());
  details.querySelector("dl")?.remove();
  details.append(make("dl", {}, ...heads.flatMap(h => [make("dt", { textContent: h.textContent }), make("dd", { textContent: h.title })])));
}
for (const details of all(".meanings")) details.addEventListener("toggle", () => meanings(details));

// Rates of a run, concept by concept, built on demand.
function byConcept(details) {
  for (const { split, metrics, concepts: lines } of concepts[details.closest(".run").id]) {
    const head = (label, best) => {
      const button = make("button", { type: "button", textContent: label });
      button.dataset.best = best;
      return make("th", { scope: "col" }, button);
    };
    const cell = (found, i) => {
      if (!found) return make("td", { className: "none", textContent: "–", title: "no image was judged" });
      const [value, low, high, n] = found, bar = make("i");
      bar.style.cssText = `--a:${100 * low};--b:${100 * high};--v:${100 * value}`;
      return make("td", { className: `k-${metrics[i][1]}`, title: `[${low}, ${high}] wilson, n_valid = ${n}` },
        make("b", { textContent: value.toFixed(3) }), make("small", { textContent: ` of ${n}` }), bar);
    };
    const line = ([name, ...cells]) => {
      const th = make("th", { scope: "row", textContent: name });
      th.dataset.v = name;
      return make("tr", {}, th, ...cells.map(cell));
    };
    const table = make("table", {}, make("caption", { textContent: split }),
      make("thead", {}, make("tr", { className: "names" }, head("concept", "ascending"), ...metrics.map(([label]) => head(label, "descending")))),
      make("tbody", { className: "ranked" }, ...lines.map(line)));
    sortable(table);
    details.append(make("div", { className: "box", tabIndex: 0 }, table));
  }
}
for (const details of all(".concepts")) details.addEventListener("toggle", () => byConcept(details), { once: true });

// Filters: a run is visible if it matches, a table if one of its runs does; the base stays beside visible runs.
const form = document.getElementById("filters"), seen = new Set();
function filter() {
  const { name, base, world, images, verified } = form.elements, wanted = name.value.trim().toLowerCase();
  const fits = ({ dataset: d }) => d.name.toLowerCase().includes(wanted) && +d.images >= +(images?.value ?? 0)
    && (!verified.checked || "verified" in d);
  const placed = ({ dataset: d }) => (!base?.value || d.base === base.value) && (!world?.value || d.world === world.value);
  seen.clear();
  for (const group of all(".group")) {
    const runs = group.matches("[data-name]") ? [group] : all(".run", group);
    const found = placed(group) ? runs.filter(fits) : [];
    for (const run of runs) run.hidden = !found.includes(run);
    group.hidden = !found.length;
    for (const list of all(".each", group)) list.open ||= wanted;  // open lists that hold a run searched for by name
    document.querySelector(`nav a[href="#${group.id}"]`).hidden = group.hidden;
    for (const run of runs) if (found.includes(run) || (found.length && "reference" in run.dataset)) seen.add(run.id);
    for (const line of all("[data-run]", group)) line.hidden = !seen.has(line.dataset.run);
    for (const list of all(".apart", group)) list.hidden = list.previousElementSibling.hidden = all("li:not([hidden])", list).length === 0;
  }
  const every = all(".run"), left = every.filter(run => !run.hidden && !run.closest(".group").hidden).length;
  form.querySelector("output").textContent = left === every.length ? `${left} runs` : `${left} of ${every.length} runs`;
  again();
}
form.addEventListener("input", filter);
form.addEventListener("submit", event => event.preventDefault());

// Plots
const color = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
const text = said => said.replace(/[&<>]/g, c => ({ "&": "&amp;", "<": "&lt;", ">": "&gt;" })[c]);
const visible = part => part.runs.some(run => seen.has(run));
const grid = () => ({ gridcolor: color("line"), zerolinecolor: color("soft"), linecolor: color("line"), ticks: "", zeroline: false });

function pareto({ names, turned, points: every }, { width, height, font }) {
  const points = every.filter(visible), attacked = points.some(p => p.attack);
  const margin = { l: 62, r: 18, t: attacked ? 58 : 12, b: 54, autoexpand: false };
  const range = axis => {
    const ends = points.flatMap(p => p[axis]), low = Math.min(...ends), high = Math.max(...ends), pad = (high - low || 1) * .07;
    return turned[axis === "x" ? 0 : 1] ? [high + pad, low - pad] : [low - pad, high + pad];
  };
  const ranges = { x: range("x"), y: range("y") };
  const at = (axis, value, size) => (value - ranges[axis][0]) / (ranges[axis][1] - ranges[axis][0]) * size;
  const inner = [width - margin.l - margin.r, height - margin.t - margin.b];
  const centre = p => [at("x", p.x[1], inner[0]), inner[1] - at("y", p.y[1], inner[1])];
  // Each label takes the first free place around its point, further out with a line to it.
  const taken = points.map(p => { const [x, y] = centre(p); return [x - 5, y - 5, x + 5, y + 5]; });
  const spots = [12, 26, 44, 66, 92].flatMap(far => [-45, 45, -135, 135, -90, 90, 0, 180, -20, 20, -70, 70, -110, 110, -160, 160]
    .map(turn => [far, Math.cos(turn * Math.PI / 180), Math.sin(turn * Math.PI / 180)]));
  const note = p => {
    const [x, y] = centre(p), w = 7.2 * p.name.length + 6, h = 17;
    for (const [far, dx, dy] of spots) {
      const ax = dx * far + (Math.abs(dx) > .2 ? Math.sign(dx) * w / 2 : 0), ay = dy * (far + 4);
      const b = [x + ax - w / 2, y + ay - h / 2, x + ax + w / 2, y + ay + h / 2];
      if (b[0] < 2 || b[1] < -8 || b[2] > inner[0] + 12 || b[3] > inner[1]) continue;
      if (taken.some(t => b[0] < t[2] && t[0] < b[2] && b[1] < t[3] && t[1] < b[3])) continue;
      taken.push(b);
      // The line ends at the near edge of the label, so its box is shifted off the end of the line.
      const side = Math.abs(dx) > .2 ? Math.sign(dx) : 0;
      return { x: p.x[1], y: p.y[1], ax: ax - side * w / 2, ay, text: text(p.name), xanchor: { "1": "left", "-1": "right", "0": "center" }[side],
        showarrow: true, arrowhead: 0, arrowwidth: 1, standoff: 5, arrowcolor: far > 12 ? color("soft") + "99" : "transparent",
        font: { size: 12.5, color: p.reference ? color("soft") : font.color } };
    }
  };
  const series = (mine, marker, shade) => {
    const bars = axis => ({ type: "data", symmetric: false, thickness: 1, width: 0, color: color("soft") + "66",
      array: mine.map(p => p[axis][2] - p[axis][1]), arrayminus: mine.map(p => p[axis][1] - p[axis][0]) });
    const said = p => p.attack ? `<br>attack success ${p.attack[0].toFixed(3)} (${text(p.attack[1])})` : "";
    return { mode: "markers", x: mine.map(p => p.x[1]), y: mine.map(p => p.y[1]), error_x: bars("x"), error_y: bars("y"), cliponaxis: false,
      marker: { ...marker, ...(shade ? { color: mine.map(p => p.attack[0]), coloraxis: "coloraxis" } : {}) },
      customdata: mine.map(p => [text(p.label), said(p)]),
      hovertemplate: "<b>%{customdata[0]}</b><br>%{x:.4~f}, %{y:.4~f}%{customdata[1]}<extra></extra>" };
  };
  const of = test => points.filter(p => !p.reference && test(p)), soft = color("soft");
  const front = of(p => p.front).sort((a, b) => (a.x[1] - b.x[1]) * (turned[0] ? -1 : 1));
  const ring = on => ({ size: on ? 12 : 9, line: { width: on ? 2 : 1, color: on ? color("ink") : soft } });
  const axis = (name, way) => ({ ...grid(), title: { text: text(name) }, range: ranges[way], nticks: 6 });
  return [[
    { mode: "lines", x: front.map(p => p.x[1]), y: front.map(p => p.y[1]), line: { shape: "vh", width: 1.5, dash: "dot", color: soft }, hoverinfo: "skip" },
    ...[false, true].flatMap(on => [
      series(of(p => p.front === on && !p.attack), { ...ring(on), color: color("paper") }),
      series(of(p => p.front === on && p.attack), ring(on), true),
    ]),
    series(points.filter(p => p.reference), { size: 9, color: soft, symbol: "x-thin", line: { width: 2, color: soft } }),
  ], { margin, annotations: points.map(note).filter(Boolean), xaxis: axis(names[0], "x"), yaxis: axis(names[1], "y"),
    coloraxis: { cmin: 0, cmax: 1, colorscale: [[0, color("safe")], [1, color("broken")]], showscale: attacked,
      colorbar: { orientation: "h", x: 1, xanchor: "right", y: 1.01, yanchor: "bottom", len: Math.min(220, inner[0]), lenmode: "pixels", thickness: 8,
        outlinewidth: 0, tickvals: [0, .5, 1], tickfont: { size: 11 }, title: { text: "attack success", side: "top", font: { size: 12 } } } },
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom" }];
}

// One panel a run: its line and interval before the lines of all others.
function ripple({ lines: every }, { width, font }) {
  const lines = every.filter(visible), columns = Math.max(2, Math.min(4, Math.floor(width / 250))), rows = Math.ceil(lines.length / columns);
  const margin = { l: 44, r: 26, t: 6, b: 40, autoexpand: false }, panel = 150, gap = { x: 26, y: 34 };
  const inner = [width - margin.l - margin.r, rows * panel], x = [1, 2, 3, 4, 5];
  const ends = lines.flatMap(l => l.ends.flat()), low = Math.min(0, ...ends), high = Math.max(.1, ...ends), pad = (high - low) * .06;
  const traces = [], layout = { height: inner[1] + margin.t + margin.b, margin, dragmode: false, annotations: [] };
  const step = [(inner[0] + gap.x) / columns, panel];
  lines.forEach(({ name, ends }, i) => {
    const [column, row] = [i % columns, Math.floor(i / columns)], k = i ? i + 1 : "", axes = { xaxis: `x${k}`, yaxis: `y${k}` };
    const left = column * step[0] / inner[0], top = 1 - (row * step[1] + gap.y) / inner[1], last = i + columns >= lines.length;
    const x0 = left, x1 = Math.min(1, left + (step[0] - gap.x) / inner[0]), y0 = Math.max(0, 1 - (row + 1) * step[1] / inner[1]);
    layout[`xaxis${k}`] = { ...grid(), domain: [x0, x1], anchor: `y${k}`, range: [.8, 5.2], tickvals: x, ticktext: ["nearest", "", "", "", "farthest"], showticklabels: last, ticklabeloverflow: "allow", tickfont: { size: 11, color: color("soft") } };
    layout[`yaxis${k}`] = { ...grid(), domain: [y0, top], anchor: `x${k}`, range: [low - pad, high + pad], zeroline: true, zerolinecolor: color("soft"), zerolinewidth: 1, nticks: 4, showticklabels: !column, tickfont: { size: 11, color: color("soft") } };
    layout.annotations.push({ text: text(name), x: x0, y: top, xref: "paper", yref: "paper", xanchor: "left", yanchor: "bottom", showarrow: false, font: { ...font, size: 12.5 } });
    const [least, value, most] = [0, 1, 2].map(j => ends.map(e => e[j]));
    const others = lines.filter((_, j) => j !== i).flatMap(l => [...l.ends.map(e => e[1]), null]);
    traces.push(
      { ...axes, x: others.map((_, j) => j % 6 + 1), y: others, mode: "lines", line: { color: color("soft") + "40", width: 1 }, hoverinfo: "skip" },
      { ...axes, x: [...x, ...[...x].reverse()], y: [...most, ...least.reverse()], fill: "toself", fillcolor: color("keep") + "38", line: { width: 0 }, mode: "lines", hoverinfo: "skip" },
      { ...axes, x, y: value, mode: "lines+markers", line: { color: color("keep"), width: 2 }, marker: { size: 5 }, customdata: ends.map(e => [e[0], e[2]]),
        hovertemplate: `<b>${text(name)}</b><br>%{y:.3f} [%{customdata[0]:.3f}, %{customdata[1]:.3f}]<extra></extra>` });
  });
  return [traces, layout];
}

function curve({ name, step, values }) {
  return [[{ x: values.map((_, i) => 1 + i * step), y: values, mode: values.length < 40 ? "lines+markers" : "lines", line: { color: color("keep"), width: 1.5 },
    marker: { size: 4 }, hovertemplate: `%{x}: %{y:.4~g}<extra></extra>` }],
  { margin: { l: 46, r: 8, t: 6, b: 24 }, xaxis: { ...grid(), nticks: 6 }, yaxis: { ...grid(), nticks: 4 }, dragmode: false }];
}

function forest({ points }, { width }) {
  const shapes = { better: ["keep", "circle"], worse: ["forget", "square"], undecided: ["soft", "circle-open"] };
  const traces = Object.entries(shapes).map(([verdict, [hue, symbol]]) => {
    const mine = points.map((p, i) => [p, i]).filter(([p]) => p.verdict === verdict), ends = mine.map(([p]) => p.ends);
    return { name: verdict === "undecided" ? verdict : `the second is ${verdict}`, mode: "markers", x: ends.map(e => e[1]), y: mine.map(([, i]) => i),
      marker: { color: color(hue), size: 9, symbol, line: { width: symbol === "circle-open" ? 2 : 0 } },
      error_x: { type: "data", symmetric: false, thickness: 1.5, width: 0, color: color(hue), array: ends.map(e => e[2] - e[1]), arrayminus: ends.map(e => e[1] - e[0]) },
      customdata: mine.map(([p]) => [text(p.name), p.ends[0], p.ends[2]]), hovertemplate: "<b>%{customdata[0]}</b><br>%{x:+.4~g} [%{customdata[1]:+.4~g}, %{customdata[2]:+.4~g}]<extra></extra>" };
  }).filter(trace => trace.x.length);
  const low = Math.min(0, ...points.map(p => p.ends[0])), high = Math.max(0, ...points.map(p => p.ends[2])), pad = (high - low || 1) * .05;
  return [traces, { height: 74 + 24 * points.length, margin: { l: 10, r: 18, t: 34, b: 28 }, showlegend: true, legend: { orientation: "h", x: 0, y: 1, yanchor: "bottom", font: { size: 12 } },
    xaxis: { ...grid(), range: [low - pad, high + pad], zeroline: true, zerolinewidth: 1.5, nticks: width < 560 ? 4 : 8 },
    yaxis: { ...grid(), range: [points.length - .4, -.6], tickvals: points.map((_, i) => i), ticktext: points.map(p => text(p.name)), automargin: true }, dragmode: false }];
}

const kinds = { pareto, ripple, curve, forest };
function draw(box) {
  if (!box.clientWidth) return;  // hidden by a filter; drawn again once it is visible
  const font = { family: getComputedStyle(document.body).fontFamily, size: 13, color: color("ink") };
  const size = { width: box.clientWidth, height: box.clientHeight };
  const small = box.dataset.kind === "curve" ? { ...font, size: 11, color: color("soft") } : font;
  const [traces, layout] = kinds[box.dataset.kind](drawn[box.dataset.plot], { ...size, font });
  Plotly.react(box, traces, { ...size, font: small, paper_bgcolor: "transparent", plot_bgcolor: "transparent", showlegend: false, hovermode: "closest",
    hoverlabel: { bgcolor: color("raised"), bordercolor: color("line"), font }, ...layout }, { displayModeBar: false });
}
const watch = new IntersectionObserver(found => found.forEach(s => { if (s.isIntersecting) { watch.unobserve(s.target); draw(s.target); } }), { rootMargin: "400px" });
function again() { all(".plot.js-plotly-plot").forEach(draw); }
all(".plot").forEach(box => watch.observe(box));
filter();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", again);
addEventListener("resize", again);
