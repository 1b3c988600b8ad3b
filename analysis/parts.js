// The sections below the table: what stands behind the rows that are shown. Text from records only ever becomes text nodes.
const ALPHA = 0.05, MOST = 12;
const MEMORY = ["weights", "gradients", "optimizer", "activations"], PHASES = ["setup", "train", "eval", "generation"];
const sameView = d => d.task === S.task && d.model === S.model && d.view === S.view;
const section = (id, shown) => { byId(id).hidden = !shown; return byId(id).querySelector(".drawing"); };
const say = (id, text) => { byId(id).querySelector(".caption").textContent = text; };
const mean = values => values.reduce((a, b) => a + b, 0) / values.length;

// The share of draws of seeds in which each row stays on the front; null where a row has one seed or the costs are unknown.
function chances(rows, cost) {
  const k = D.costs.indexOf(cost) + 3, runs = rows.map(r => r.runs.map(run => [run[k], run[2]]));
  if (k < 3 || S.score !== "score" || runs.some(r => r.length < 2 || r.some(v => v.includes(null)))) return rows.map(() => null);
  let state = 1; const random = n => { state = (Math.imul(state, 1664525) + 1013904223) >>> 0; return Math.floor(state / 4294967296 * n); };
  const counts = rows.map(() => 0), draws = Math.max(100, Math.min(1000, Math.floor(2e6 / rows.length ** 2)));
  const fixed = runs.map(r => [mean(r.map(v => v[0])), mean(r.map(v => v[1]))]);
  for (let d = 0; d < draws; d += 1) {
    const drawn = runs.map((r, i) => {
      const picked = r.map(() => r[random(r.length)]), wider = Math.sqrt(r.length / (r.length - 1));
      const [x, y] = [0, 1].map(c => fixed[i][c] + (mean(picked.map(v => v[c])) - fixed[i][c]) * wider);
      return { x, y };
    });
    onFront(drawn).forEach((on, i) => { counts[i] += on; });
  }
  return counts.map(c => c / draws);
}

function record(row) {
  const place = section("record", row);
  if (!row) return;
  byId("record").querySelector("h2").textContent = `Runs of ${row.label}: ${row.task}, ${row.model}`;
  const keys = ["score", ...D.costs].filter((c, i) => row.runs.some(r => r[i + 2] !== null)), at = c => (c === "score" ? 2 : D.costs.indexOf(c) + 3);
  const title = c => (columns.get(c) || { title: c }).title, text = (c, v) => (v === null ? "–" : c === "score" ? v.toFixed(4) : write(v, columns.get(c).unit));
  place.replaceChildren(el("p", {}, Object.entries(row.settings).map(([k, v]) => `${k} = ${v}`).join(", ")), rowsTable(["id", "seed", ...keys.map(title)], row.runs.map(r => [r[0], r[1], ...keys.map(c => text(c, r[at(c)]))])));
}
const rowsTable = (heads, rows) => el("div", { class: "scroll" }, el("table", {}, el("thead", {}, el("tr", {}, ...heads.map(h => el("th", {}, h)))), el("tbody", {}, ...rows.map(r => el("tr", {}, ...r.map(c => el("td", {}, c)))))));

function costBars(rows) {
  const ordered = [...rows].sort((a, b) => (b.values.score?.[0] ?? -1) - (a.values.score?.[0] ?? -1)), get = (r, k) => (columns.has(k) ? r.values[k][0] : null);
  for (const [id, parts, prefix, unit, total] of [["memory", MEMORY, "memory_", "bytes", "memory_peak"], ["time", PHASES, "time_", "s", "time_total"]]) {
    const all = ordered.map(r => {
      const values = parts.map(p => get(r, prefix + p)), whole = get(r, total), known = values.reduce((a, b) => a + (b || 0), 0);
      return id === "time" ? { name: r.label, values: [...values, whole === null ? 0 : Math.max(0, whole - known)] } : { name: r.label, values, mark: whole };
    }).filter(r => r.values.some(v => v > 0));
    const place = section(id, all.length);
    if (all.length) bars(place, all, id === "time" ? [...parts, "rest"] : parts, { x: id, unit });
  }
}
function learning(rows) {
  const names = unique(rows.flatMap(r => Object.keys(r.curves))).sort((a, b) => (b === "loss") - (a === "loss") || a.localeCompare(b)), place = section("learning", names.length);
  if (!names.length) return;
  if (!names.includes(S.curve)) S.curve = names[0];
  byId("learning").querySelector(".pick").replaceChildren(picker("Quantity", "curve", names));
  const all = rows.filter(r => r.curves[S.curve]).sort((a, b) => (b.values.score?.[0] ?? -1) - (a.values.score?.[0] ?? -1)), shown = all.slice(0, MOST);
  lines(place, shown.map(r => ({ name: r.label, points: r.curves[S.curve] })), { x: "step", y: S.curve });
  say("learning", "Mean over seeds; the band is from the lowest to the highest seed." + (all.length > shown.length ? ` The ${MOST} rows with the best scores of ${all.length}: choose others under Methods.` : ""));
}
function tuningCurves() {
  const found = D.budgets.find(sameView), series = found ? found.series.filter(s => !S.methods || S.methods.includes(s.name)) : [], place = section("tuning", series.length);
  if (series.length) lines(place, series.slice(0, STYLES), { x: "trials", y: "expected test score", log: 2 });
}

const REASONS = { software: "different software: not compared", "other test rows": "scored on other test rows: not compared", "one seed": "one seed and no predictions: no test", "no common seed": "no common seed: no test",
  seeds: "paired over seeds (no predictions)", predictions: "paired on test rows and seeds", tasks: "Wilcoxon over tasks" };
function cellOf(names, pairs) {
  const at = new Map(pairs.map(p => [p[0] + "," + p[1], p]));
  return (i, j) => {
    const flip = i > j, [, , gap, p, why] = at.get(flip ? `${j},${i}` : `${i},${j}`) || [0, 0, null, null, "no test"], own = gap === null ? null : flip ? -gap : gap;
    const kind = p === null ? "none" : p >= ALPHA ? "same" : own === null ? "apart" : own > 0 ? "better" : "worse";
    const text = kind === "none" ? "·" : own === null ? (kind === "same" ? "" : "≠") : (own > 0 ? "+" : "") + (100 * own).toFixed(1).replace("-", "−");
    return { kind, text, lines: [`${names[i]} minus ${names[j]}`, own === null ? "" : `difference ${own.toFixed(4)}`, p === null ? "no p-value" : `p ${p} (Holm)`, REASONS[why] || why].filter(Boolean) };
  };
}
function significance() {
  const found = D.matrices.find(sameView), place = section("significance", found);
  if (!found) return;
  const keep = found.names.map((n, i) => i).filter(i => D.rows.some(r => r.label === found.names[i] && sameView(r) && chosen(r))), names = keep.map(i => found.names[i]), cell = cellOf(found.names, found.pairs);
  matrix(place, names, (i, j) => cell(keep[i], keep[j]));
  const used = unique(found.pairs.map(p => p[4]));
  say("significance", `Row minus column, × 100. Coloured: told apart at 5 % (Holm over all ${found.pairs.length} pairs of this task); grey: not; dot: no test. Tests: ${used.map(u => REASONS[u]).join("; ")}.`);
}
function overTasks() {
  const blocks = D.overviews.filter(o => o.model === S.model), place = section("tasks", blocks.length || heatRows().length > 1);
  place.replaceChildren();
  heat(place.appendChild(el("div", { class: "scroll" })));
  for (const data of blocks) {
    const left = data.left.length ? ` Left out, as they did not finish every task: ${data.left.join(", ")}.` : "";
    place.append(el("h3", {}, `Mean ranks over ${plural(data.tasks.length, "task")}`));
    if (data.reason) { place.append(el("p", { class: "notice" }, `Not compared: ${data.reason.replace(/[.]+$/, "")}.${left}`)); continue; }
    const ranks = place.appendChild(el("div", {})), square = place.appendChild(el("div", { class: "scroll" }));
    diagram(ranks, data);
    ranks.after(el("p", { class: "quiet" }, `1 is best; a bar joins methods that Nemenyi's test cannot tell apart at 5 %. Friedman p = ${data.friedman}.${left} Below: Wilcoxon's test of each pair, Holm over all; ≠ where it tells them apart.` +
      (2 ** (1 - data.tasks.length) > ALPHA ? ` It cannot: ${data.tasks.length} tasks give no p below ${2 ** (1 - data.tasks.length)}.` : "")));
    matrix(square, data.names, cellOf(data.names, data.pairs));
  }
}
// Of each task the rows of its largest view: one row per method, of several settings the one that val chose.
function heatRows() {
  return unique(D.rows.filter(r => r.model === S.model).map(r => r.task)).map(task => {
    const rows = D.rows.filter(r => r.task === task && r.model === S.model && r.picked && chosen(r) && r.values.score), sizes = unique(rows.map(r => r.view)).map(v => rows.filter(r => r.view === v));
    return { task, rows: sizes.sort((a, b) => b.length - a.length)[0] || [] };
  }).filter(t => t.rows.length);
}
function heat(place) {
  const tasks = heatRows(), gap = (t, r) => r.values.score[0] - mean(t.rows.map(q => q.values.score[0]));
  const lead = m => mean(tasks.flatMap(t => t.rows.filter(r => r.method === m).map(r => gap(t, r)))), methods = unique(tasks.flatMap(t => t.rows.map(r => r.method))).sort((a, b) => lead(b) - lead(a));
  const gaps = tasks.flatMap(t => t.rows.map(r => Math.abs(gap(t, r)))).sort((a, b) => a - b);
  const limit = gaps[Math.floor(0.95 * (gaps.length - 1))] || 1;
  const cells = t => methods.map(m => {
    const row = t.rows.find(r => r.method === m), cell = el("td", { class: "number heat" }, row ? row.values.score[0].toFixed(3) : "");
    if (!row) return cell;
    const share = Math.min(1, Math.abs(gap(t, row)) / limit);
    cell.style.setProperty("--share", (70 * share).toFixed(0) + "%");
    cell.classList.add(gap(t, row) < 0 ? "below" : "above");
    return onHover(cell, `${row.label} on ${t.task}`, spread(row, "score"), `${(100 * gap(t, row)).toFixed(1)} points from the mean of the task`);
  });
  const link = t => { const b = el("button", { type: "button" }, t.task); b.addEventListener("click", () => { S.task = t.task; render(); scrollTo(0, 0); }); return el("th", { scope: "row" }, b); };
  place.replaceChildren(el("table", { class: "map" }, el("thead", {}, el("tr", {}, el("th", {}, "task"), ...methods.map(m => el("th", { class: "number" }, m)))), el("tbody", {}, ...tasks.map(t => el("tr", {}, link(t), ...cells(t))))));
}
function spectraSection(rows) {
  const known = rows.filter(r => r.spectra.matrices !== undefined), place = section("spectra", known.length);
  if (!known.length) return;
  const heads = [["intruders", "intruders"], ["intruders_right", "right"], ["share", "matrices with one"], ["changed", "changed"], ["matrices", "matrices"], ["effective_rank", "effective rank of the change"], ["stable_rank", "stable rank"], ["norm_ratio", "|change| / |weight|"]];
  const chart = el("div", {}), at = key => Number(key.slice("intruders_at_".length)), steps = r => Object.keys(r.spectra).filter(k => k.startsWith("intruders_at_")).sort((a, b) => at(a) - at(b));
  const lost = known.filter(r => r.forgetting.measure), extra = lost.length ? [`forgetting (${unique(lost.map(r => r.forgetting.measure)).join(", ")})`] : [];
  place.replaceChildren(rowsTable(["method", ...heads.map(h => h[1]), ...extra], known.map(r => [r.label, ...heads.map(([k]) => (r.spectra[k] === undefined ? "–" : Number(r.spectra[k].toPrecision(3)))), ...extra.map(() => r.forgetting.lost ?? "–")])), chart, ...layerMaps(known.filter(r => r.layers.layers)));
  const series = known.filter(r => steps(r).length > 1).slice(0, MOST).map(r => ({ name: r.label, points: [steps(r).map(at), steps(r).map(k => r.spectra[k])] }));
  if (series.length) lines(chart, series, { x: "threshold ε", y: "intruder dimensions" });
  const one = known[0].spectra;
  say("spectra", `Leading ${one.k} singular vectors of each matrix against the pretrained ones; an intruder is like none of them (|cosine| < ${one.epsilon}). Mean over seeds.`);
}
// Where in the model it happened: a map of layers and kinds of matrix for one row, which a picker chooses.
function layerMaps(rows) {
  if (!rows.length) return [];
  if (!rows.some(r => r.label === S.weights)) S.weights = rows[0].label;
  const own = rows.find(r => r.label === S.weights).layers, pick = el("div", { class: "row" }, picker("By layer", "weights", rows.map(r => r.label)));
  const map = (title, key, text) => {
    const most = Math.max(...own[key].flat(), 0) || 1;
    const cell = (v, layer, kind) => {
      const made = el("td", { class: "number heat above" }, v === null ? "" : text(v));
      made.style.setProperty("--share", (70 * (v || 0) / most).toFixed(0) + "%");
      return v === null ? el("td", {}) : onHover(made, `layer ${layer}, ${kind}`, `${title}: ${text(v)}`);
    };
    const lines = own.layers.map((layer, i) => el("tr", {}, el("th", { scope: "row" }, layer), ...own.kinds.map((kind, j) => cell(own[key][i][j], layer, kind))));
    return el("div", { class: "scroll" }, el("h3", {}, title), el("table", { class: "map" }, el("thead", {}, el("tr", {}, el("th", {}, "layer"), ...own.kinds.map(k => el("th", { class: "number" }, k.replaceAll("_", " "))))), el("tbody", {}, ...lines)));
  };
  return [pick, el("div", { class: "maps" }, map("Intruders, mean over seeds", "intruders", v => Number(v.toPrecision(3))), map("Share of the squared change", "share", v => (100 * v).toFixed(1) + " %"))];
}
// Is an intruder the cause? Score and forgetting against the factor on one vector of each matrix, beside its neighbour.
function causalSection(rows) {
  const known = rows.filter(r => r.sweep.score), place = section("causal", known.length);
  if (!known.length) return;
  const { label, sweep } = known.find(r => r.label === S.weights) || known[0], charts = [];
  for (const key of ["score", "forgetting"]) if (Object.keys(sweep[key]).length) charts.push([key, el("div", {})]);
  place.replaceChildren(el("div", { class: "row" }, picker("Method", "weights", known.map(r => r.label))), ...charts.flatMap(([key, chart]) => [el("h3", {}, key === "score" ? `Score on ${sweep.split}` : "Forgetting"), chart]));
  for (const [key, chart] of charts) lines(chart, Object.entries(sweep[key]).map(([name, points]) => ({ name, points })), { x: "factor λ", y: key });
  say("causal", `${label}: ${sweep.which === "top" ? "the top intruder" : "all intruders"} of each matrix times λ, and as many neighbours that are none; λ = 1 is the model itself, 0 is without. Mean and span of ${plural(sweep.runs, "run")}.`);
}
function parts(here) {
  const rows = here.filter(r => r.view === S.view && chosen(r));
  record(rows.find(r => r.label === S.row));
  significance(); costBars(rows); learning(rows); tuningCurves(); overTasks(); spectraSection(rows); causalSection(rows);
}
