// State in the address, pickers, table, CSV. Text from records only ever becomes text nodes.
const D = JSON.parse(document.getElementById("payload").textContent);
const byId = id => document.getElementById(id), columns = new Map(D.columns.map(c => [c.key, c]));
const unique = values => [...new Set(values)];
const ALL = "(all tasks)";

function readHash() {
  const state = {};
  for (const part of location.hash.slice(1).split("&")) {
    const at = part.indexOf("=");
    try { if (at > 0) state[part.slice(0, at)] = part.slice(at + 1).split(",").map(decodeURIComponent); } catch { /* a broken address */ }
  }
  const first = key => (state[key] || [])[0];
  return { task: first("task"), model: first("model"), view: Number(first("view") || 0), cost: first("cost"), score: first("score"),
    methods: state.methods || null, find: first("find") || "", sort: first("sort") || "score", up: first("up") === "1", theme: first("theme") || "auto",
    table: first("table") || "task", curve: first("curve") || "loss", weights: first("weights") || "", row: first("row") || "" };
}
function writeHash() {
  const keep = { ...S, view: S.view || "", up: S.up ? "1" : "", curve: S.curve === "loss" ? "" : S.curve, theme: S.theme === "auto" ? "" : S.theme, table: S.table === "task" ? "" : S.table };
  const parts = Object.entries(keep).filter(([, v]) => v !== null && v !== "").map(([k, v]) => k + "=" + [v].flat().map(encodeURIComponent).join(","));
  history.replaceState(null, "", "#" + parts.join("&"));
}
// Unknown values in the address fall back to the first option, and the pickers show which one it is.
function settle(state) {
  const pick = (value, options) => (options.includes(value) ? value : options[0]);
  const costs = D.columns.filter(c => !c.score).map(c => c.key);
  state.task = pick(state.task, unique(D.rows.map(r => r.task)));
  state.model = pick(state.model, unique(D.rows.filter(r => r.task === state.task).map(r => r.model)));
  const here = D.rows.filter(r => r.task === state.task && r.model === state.model);
  state.view = pick(state.view, unique(here.map(r => r.view)).sort());
  state.cost = pick(state.cost, costs);
  const scores = D.columns.filter(c => c.score && here.some(r => r.values[c.key][0] !== null)).map(c => c.key);
  state.score = pick(state.score, scores.length ? scores : ["score"]);
  return { state, here, costs, scores };
}
let S = readHash();
const chosen = row => !S.methods || S.methods.includes(row.method) || S.methods.includes(row.label);
const found = row => `${row.task} ${row.model} ${row.label}`.toLowerCase().includes(S.find.toLowerCase());

function picker(title, key, options, name = o => o) {
  const select = el("select", { id: "pick-" + key }, ...options.map(o => el("option", o === S[key] ? { value: o, selected: "" } : { value: o }, name(o))));
  select.addEventListener("change", () => { S[key] = key === "view" ? Number(select.value) : select.value; render(); });
  return el("label", {}, title, select);
}
function controls({ here, costs, scores }) {
  const open = byId("methods") ? byId("methods").open : S.methods !== null;
  const title = key => columns.get(key).title, views = unique(here.map(r => r.view)).sort();
  const conditions = v => { const row = here.find(r => r.view === v); return unique([row.protocol, row.device, row.metric].filter(Boolean)).join(", ") || "set " + (v + 1); };
  const names = unique(here.map(r => r.method)), boxes = el("div", { class: "methods" });
  for (const name of names) {
    const box = el("input", { type: "checkbox", value: name });
    box.checked = !S.methods || S.methods.includes(name) || here.some(r => r.method === name && S.methods.includes(r.label));
    box.addEventListener("change", () => {
      const on = [...boxes.querySelectorAll("input")].filter(b => b.checked).map(b => b.value);
      S.methods = on.length === names.length ? null : on; render();
    });
    boxes.append(el("label", {}, box, name));
  }
  const all = el("button", { type: "button" }, "All"), none = el("button", { type: "button" }, "None");
  all.addEventListener("click", () => { S.methods = null; render(); });
  none.addEventListener("click", () => { S.methods = []; render(); });
  const count = names.filter(n => here.some(r => r.method === n && chosen(r))).length;
  const details = el("details", { id: "methods" }, el("summary", {}, `Methods: ${count} of ${names.length}`), el("div", { class: "row" }, all, none), boxes);
  details.open = open;
  const find = el("input", { type: "search", id: "find", placeholder: "part of a name", value: S.find });
  find.addEventListener("input", () => { S.find = find.value; table(); writeHash(); });
  byId("controls").replaceChildren(picker("Task", "task", unique(D.rows.map(r => r.task))), picker("Model", "model", unique(here.map(r => r.model).concat(
    D.rows.filter(r => r.task === S.task).map(r => r.model)))), ...(views.length > 1 ? [picker("Conditions", "view", views, conditions)] : []),
    picker("Cost", "cost", costs, title), picker("Score", "score", scores.length ? scores : ["score"], k => (columns.get(k) || { title: "Score" }).title),
    picker("Table", "table", ["task", ALL], o => (o === ALL ? "all tasks" : "this task")), el("label", {}, "Find in the table", find), details);
}
function hover(point, dot) {
  const tip = byId("tip");
  tip.hidden = !point;
  document.querySelectorAll("tr.lit").forEach(r => r.classList.remove("lit"));
  if (!point) return;
  const row = point.row, line = (k, v) => el("div", {}, `${k}: ${v}`);
  const chance = point.chance === null ? [] : [line("On the front", `in ${(100 * point.chance).toFixed(0)} % of the draws of seeds`)];
  tip.replaceChildren(el("div", {}, row.label), line(columns.get(S.score).title, spread(row, S.score)),
    ...unique([S.cost, ...D.main]).map(k => line(columns.get(k).title, spread(row, k))), ...chance, line("Seeds", row.n + (row.missing ? `, ${row.missing} without score` : "")),
    line("Runs", row.runs.map(r => r[0]).slice(0, 5).join(", ") + (row.runs.length > 5 ? ", …" : "")), ...Object.entries(row.settings).slice(0, 8).map(([k, v]) => line(k, short(v, 60))),
    ...["metric", "protocol", "device", "software"].filter(k => row[k]).map(k => line(k, row[k])), ...(row.standin ? [line("Data", "generated stand-in")] : []));
  const at = dot.getBoundingClientRect(), size = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(at.right + 10, innerWidth - size.width - 8)) + "px";
  tip.style.top = Math.max(4, at.top - size.height - 8 > 0 ? at.top - size.height - 8 : at.bottom + 10) + "px";
  if (point.line) point.line.classList.add("lit");
}
function spread(row, key) {
  const [mean, , low, high] = row.values[key], column = columns.get(key);
  if (mean === null) return "–";
  const half = low === null || high - low <= 1e-12 * Math.abs(mean) ? null : (high - low) / 2;
  if (column.score) return mean.toFixed(3) + (half === null ? "" : ` ± ${half.toFixed(3)}`);
  return write(mean, column.unit) + (half === null ? "" : ` ± ${write(half, column.unit)}`);
}
const long = text => (String(text).length > 36 ? "long" : "");
const plural = (n, word) => `${n} ${word}${n === 1 ? "" : "s"}`;
let points = [];
function chart(here) {
  const rows = here.filter(r => r.view === S.view && chosen(r)), cost = columns.get(S.cost), known = rows.filter(r => cost && r.values[S.cost][0] !== null && columns.has(S.score) && r.values[S.score][0] !== null);
  points = known.map(row => { const [x, , xlow, xhigh] = row.values[S.cost], [y, , low, high] = row.values[S.score]; return { x, y, xlow, xhigh, low, high, name: row.label, row }; });
  const shares = chances(known, S.cost);
  points.forEach((p, i) => { p.chance = shares[i]; });
  const standin = here.some(r => r.standin);
  byId("front-head").textContent = `Score against cost: ${S.task}, ${S.model}`;
  byId("caption").textContent = `Filled: on the Pareto front of what is shown; hollow: another is at least as good in both. Bars: 95 % t interval over seeds. Select a mark to see its runs.` +
    (rows.length > known.length ? ` ${rows.length - known.length} of ${rows.length} rows have no score or no such cost and are not drawn.` : "");
  if (!points.length) return byId("plot").replaceChildren(el("p", { class: "notice" }, rows.length ? "No row here has both this score and this cost." : "No method is chosen."));
  const metric = S.score === "score" && rows[0].metric ? `Score: ${rows[0].metric}, test` : columns.get(S.score).title;
  plot(byId("plot"), points, { x: cost.unit ? `${cost.title} (${cost.unit})` : cost.title, y: metric, unit: cost.unit, standin }, hover, p => { S.row = S.row === p.row.label ? "" : p.row.label; record(S.row && p.row); writeHash(); });
}
const heads = () => [...(S.table === ALL ? ["task", "model"] : []), "label", "score", ...(S.score === "score" ? [] : [S.score]), "n", ...(points.some(p => p.chance !== null) && S.table !== ALL ? ["chance"] : []), ...unique([...D.main, ...(columns.has(S.cost) ? [S.cost] : [])])].filter(k => !(k === "score") || columns.has(k));
const chanceOf = row => points.find(p => p.row === row)?.chance ?? null;
const value = (row, key) => (columns.has(key) ? row.values[key][0] : key === "chance" ? chanceOf(row) : row[key]);
function visible() {
  const rows = D.rows.filter(r => (S.table === ALL || (r.task === S.task && r.model === S.model)) && chosen(r) && found(r)), sign = S.up ? 1 : -1;
  return rows.sort((a, b) => {
    const [x, y] = [value(a, S.sort), value(b, S.sort)];
    if (x === null || y === null || x === undefined) return (x === null) - (y === null);
    return sign * (typeof x === "string" ? x.localeCompare(y) : x - y);
  });
}
function table() {
  const rows = visible(), keys = heads(), number = k => (columns.has(k) || k === "n" || k === "chance" ? "number" : ""), share = v => (v === null ? "–" : `${(100 * v).toFixed(0)} %`);
  const head = keys.map(k => {
    const button = el("button", { type: "button" }, (k === "label" ? "method" : k === "chance" ? "On the front" : columns.has(k) ? columns.get(k).title : k) + (S.sort === k ? (S.up ? " ▲" : " ▼") : ""));
    button.addEventListener("click", () => { S.up = S.sort === k ? !S.up : !columns.has(k) || !columns.get(k).score; S.sort = k; table(); writeHash(); });
    return el("th", { class: number(k), "aria-sort": S.sort === k ? (S.up ? "ascending" : "descending") : "none" }, button);
  });
  const body = rows.map(row => {
    const point = points.find(p => p.row === row);
    const cell = k => el("td", { class: number(k) || long(row[k]) }, columns.has(k) ? spread(row, k) : k === "chance" ? share(chanceOf(row)) : k === "n" ? row.n + (row.missing ? ` of ${row.n + row.missing}` : "") : row[k],
      ...(k === "label" && row.standin ? [el("span", { class: "tag" }, "stand-in data")] : []));
    const line = el("tr", { class: point && point.front ? "front" : "" }, ...keys.map(cell));
    if (point) point.line = line;
    return line;
  });
  byId("results").replaceChildren(el("thead", {}, el("tr", {}, ...head)), el("tbody", {}, ...body));
  byId("shown").textContent = `${rows.length} of ${D.rows.length} rows${S.table === ALL ? "" : `: ${S.task}, ${S.model}`}`;
}
function csv() {
  const keys = D.columns.map(c => c.key), ends = ["", "_sd", "_low", "_high"], facts = ["task", "model", "method", "label", "standin", "n", "missing", "metric", "protocol", "device", "cpu", "memory_kind", "software"];
  // A leading = + - @ would run as a formula in a spreadsheet: such text gets an apostrophe.
  const quote = v => (typeof v === "string" ? '"' + v.replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""') + '"' : v === null ? "" : String(v));
  const lines = visible().map(r => [...facts.map(f => r[f]), ...keys.flatMap(k => r.values[k])].map(quote).join(","));
  return [[...facts, ...keys.flatMap(k => ends.map(e => k + e))].map(quote).join(","), ...lines].join("\r\n") + "\r\n";
}
function plainTable(section, heads, rows) {
  byId(section).hidden = !rows.length;
  byId(section).querySelector("table").replaceChildren(el("thead", {}, el("tr", {}, ...heads.map(h => el("th", {}, h)))),
    el("tbody", {}, ...rows.map(r => el("tr", {}, ...r.map(c => el("td", { class: long(c) }, c))))));
}
function theme() {
  const dark = S.theme === "dark" || (S.theme === "auto" && matchMedia("(prefers-color-scheme: dark)").matches);
  document.documentElement.dataset.theme = dark ? "dark" : "light";
  byId("theme").textContent = `Theme: ${S.theme}`;
}
function render() {
  const settled = settle(S);
  theme(); controls(settled); chart(settled.here); table(); parts(settled.here); writeHash();
}
function start() {
  const total = Object.values(D.counts).reduce((a, b) => a + b, 0), statuses = Object.entries(D.counts).filter(([, n]) => n).map(([s, n]) => `${n} ${s}`);
  byId("title").textContent = document.title = D.title;
  byId("summary").textContent = `${plural(total, "run")} (${statuses.join(", ")}): ${plural(unique(D.rows.map(r => r.method)).length, "method")}, ` +
    `${plural(unique(D.rows.map(r => r.task)).length, "task")}, ${plural(unique(D.rows.map(r => r.model)).length, "model")}. Made ${D.made}.`;
  const fake = unique(D.rows.filter(r => r.standin).map(r => r.task));
  byId("notice").hidden = !fake.length;
  byId("notice").textContent = `Generated stand-in data, no result about any method: ${fake.join(", ")}`;
  const facts = ["task", "model", "method", "seed", "status", "reason"];
  plainTable("absent", facts, D.absent.map(a => facts.map(f => a[f])));
  plainTable("problems", ["file", "problem"], D.problems);
  for (const name of ["data", "environment"]) plainTable(name, D[name].heads, D[name].rows);
  byId("theme").addEventListener("click", () => { S.theme = { auto: "light", light: "dark", dark: "auto" }[S.theme] || "auto"; theme(); writeHash(); });
  byId("csv").addEventListener("click", () => {
    const link = el("a", { href: URL.createObjectURL(new Blob([csv()], { type: "text/csv" })), download: "results.csv" });
    link.click(); URL.revokeObjectURL(link.href);
  });
  byId("controls").addEventListener("submit", e => e.preventDefault());
  addEventListener("hashchange", () => { S = readHash(); render(); });
  addEventListener("resize", () => { if (Math.abs(innerWidth - drawn) > 20) { drawn = innerWidth; render(); } });
  render();
}
let drawn = innerWidth;
start();
