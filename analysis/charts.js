// Drawings of given numbers: lines, stacked bars, a matrix of pairs, mean ranks. Each fills `place` and knows nothing of the page.

const STYLES = 28, look = i => `c${i % 7} d${Math.floor(i / 7) % 4}`;
// Cut in the middle: what tells settings of one method apart is at the end.
const short = (text, most) => (text.length > most ? text.slice(0, Math.floor(most / 3)) + "…" + text.slice(text.length - most + Math.floor(most / 3) + 1) : text);

function tell(event, ...lines) {
  const tip = byId("tip");
  tip.hidden = !event;
  if (!event) return;
  tip.replaceChildren(...lines.map(l => el("div", {}, l)));
  const size = tip.getBoundingClientRect();
  tip.style.left = Math.max(4, Math.min(event.clientX + 12, innerWidth - size.width - 8)) + "px";
  tip.style.top = Math.max(4, event.clientY - size.height - 10) + "px";
}
function onHover(element, ...lines) {
  element.addEventListener("pointermove", e => tell(e, ...lines));
  element.addEventListener("pointerleave", () => tell(null));
  return element;
}
function legend(names, kind) {
  const swatch = i => draw("svg", { viewBox: "0 0 24 10", class: "swatch" }, kind === "line" ? draw("line", { class: "line " + look(i), x1: 0, x2: 24, y1: 5, y2: 5 })
    : draw("rect", { class: "fill c" + i, width: 24, height: 10 }));
  return el("ul", { class: "legend" }, ...names.map(([name, i]) => el("li", {}, swatch(i), name)));
}

// Ticks of an axis; logarithmic where the values span more than `factor`.
function lineScale(values, from, to, count, factor) {
  const low = Math.min(...values), high = Math.max(...values);
  if (factor && low > 0 && high > factor * low) {
    const [a, b] = [Math.log10(low) - 0.04, Math.log10(high) + 0.04], ticks = [];
    for (let p = Math.floor(a); p <= b; p += 1) for (const m of b - a > 3 ? [1] : b - a > 1 ? [1, 3] : [1, 2, 3, 5, 7]) ticks.push(Number((m * 10 ** p).toPrecision(6)));
    const at = v => from + (Math.log10(v) - a) / (b - a) * (to - from);
    return { at, ticks: ticks.filter(t => Math.log10(t) >= a && Math.log10(t) <= b), log: true };
  }
  const pad = (high - low) * 0.05 || Math.abs(high) * 0.05 || 1, [a, b] = [low - pad, high + pad];
  return { at: v => from + (v - a) / (b - a) * (to - from), ticks: niceTicks(a, b, count).filter(t => t >= 0 || low < 0), log: false };
}

// series: [{name, points: [x, y] or [x, y, low, high]}, ...]; style: its number in the legend.
function lines(place, series, titles) {
  const width = Math.max(320, Math.min(1150, place.clientWidth || 900)), box = { l: 62, r: width - 12, t: 10, b: width < 600 ? 260 : 330 };
  const svg = draw("svg", { viewBox: `0 0 ${width} ${box.b + 48}`, role: "img", "aria-label": `${titles.y} over ${titles.x}` });
  const every = k => series.flatMap(s => s.points[k] || []).filter(v => v !== null);
  const x = lineScale(every(0), box.l, box.r, (box.r - box.l) / 90, titles.log), y = lineScale([...every(1), ...every(2), ...every(3)], box.b, box.t, 6, 5);
  if (titles.log) x.ticks = [...new Set(every(0))].filter(t => Number.isInteger(Math.log2(t)));
  const thousand = t => (t >= 1e5 ? write(t, "") : t);
  for (const t of y.ticks) svg.append(draw("line", { class: "grid", x1: box.l, x2: box.r, y1: y.at(t), y2: y.at(t) }), draw("text", { class: "tick", x: box.l - 6, y: y.at(t) + 4, "text-anchor": "end" }, thousand(t)));
  for (const t of x.ticks) svg.append(draw("text", { class: "tick", x: x.at(t), y: box.b + 16, "text-anchor": "middle" }, thousand(t)));
  svg.append(draw("line", { class: "grid", x1: box.l, x2: box.r, y1: box.b, y2: box.b }), draw("text", { x: (box.l + box.r) / 2, y: box.b + 38, "text-anchor": "middle" }, titles.x + (x.log && titles.log ? ", log scale" : "")),
    draw("text", { x: -(box.t + box.b) / 2, y: 14, transform: "rotate(-90)", "text-anchor": "middle" }, titles.y + (y.log ? ", log scale" : "")));
  const marks = [];
  series.forEach((s, i) => {
    const [xs, ys, low, high] = s.points, shown = xs.map((v, k) => [v, ys[k], k]).filter(([, v]) => v !== null);
    if (low && low.every(v => v !== null)) svg.append(draw("path", { class: "band c" + (i % 7), d: "M" + [...xs.map((v, k) => `${x.at(v)},${y.at(high[k])}`), ...xs.map((v, k) => `${x.at(v)},${y.at(low[k])}`).reverse()].join("L") + "Z" }));
    svg.append(draw("path", { class: "line " + look(i), "data-name": s.name, d: "M" + shown.map(([v, w]) => `${x.at(v)},${y.at(w)}`).join("L") }));
    if (shown.length === 1) svg.append(draw("circle", { class: "dot c" + (i % 7), cx: x.at(shown[0][0]), cy: y.at(shown[0][1]), r: 3 }));
    marks.push(...shown.map(([v, w]) => ({ px: x.at(v), py: y.at(w), name: s.name, v, w })));
  });
  svg.addEventListener("pointermove", e => {
    const frame = svg.getBoundingClientRect(), scale = width / frame.width, [px, py] = [(e.clientX - frame.left) * scale, (e.clientY - frame.top) * scale];
    const near = marks.reduce((a, b) => (Math.hypot(a.px - px, a.py - py) < Math.hypot(b.px - px, b.py - py) ? a : b), marks[0]);
    if (near) tell(e, near.name, `${titles.x} ${near.v}: ${near.w}`);
  });
  svg.addEventListener("pointerleave", () => tell(null));
  place.replaceChildren(legend(series.map((s, i) => [s.name, i]), "line"), svg);
}

// rows: [{name, values: [..] in the order of parts, mark}]; a mark is a number on the same axis, e.g. the peak.
function bars(place, rows, parts, titles) {
  const width = Math.max(320, Math.min(1150, place.clientWidth || 900)), left = width < 600 ? 112 : 210, right = width - 70, high = 22;
  const known = parts.map((p, i) => i).filter(i => rows.some(r => r.values[i] > 0)), sum = r => r.values.reduce((a, b) => a + (b || 0), 0);
  const most = Math.max(...rows.map(r => Math.max(sum(r), r.mark || 0))), at = v => left + v / most * (right - left);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${rows.length * (high + 6) + 30}`, role: "img", "aria-label": titles.x });
  const ticks = niceTicks(0, most, Math.max(3, (right - left) / 110), titles.unit), bottom = rows.length * (high + 6);
  for (const t of ticks) svg.append(draw("line", { class: "grid", x1: at(t), x2: at(t), y1: 0, y2: bottom }), draw("text", { class: "tick", x: at(t), y: bottom + 16, "text-anchor": "middle" }, t ? write(t, titles.unit) : "0"));
  rows.forEach((r, i) => {
    let start = 0; const top = i * (high + 6) + 3;
    svg.append(draw("text", { x: left - 8, y: top + 15, "text-anchor": "end" }, draw("title", {}, r.name), short(r.name, width < 600 ? 16 : 32)));
    for (const k of known) if (r.values[k] > 0) {
      svg.append(onHover(draw("rect", { class: "fill c" + k, x: at(start), y: top, width: Math.max(at(start + r.values[k]) - at(start) - 0.6, 0.4), height: high }), r.name, `${parts[k]}: ${write(r.values[k], titles.unit)}`));
      start += r.values[k];
    }
    if (r.mark) svg.append(draw("line", { class: "peak", x1: at(r.mark), x2: at(r.mark), y1: top - 2, y2: top + high + 2 }));
    svg.append(draw("text", { class: "tick", x: at(Math.max(start, r.mark || 0)) + 6, y: top + 15 }, write(r.mark || start, titles.unit)));
  });
  place.replaceChildren(legend(known.map(k => [parts[k], k]), "fill"), svg);
}

// A square of pairs as a table. cell(i, j) gives {kind: "better" | "worse" | "same" | "none", text, lines} of row i against column j.
function matrix(place, names, cell) {
  const head = el("tr", {}, el("th", {}, ""), ...names.map((n, j) => el("th", { class: "number", title: n }, j + 1)));
  const body = names.map((name, i) => el("tr", {}, el("th", { scope: "row" }, `${i + 1} ${short(name, 30)}`), ...names.map((_, j) => {
    if (i === j) return el("td", { class: "self" });
    const { kind, text, lines } = cell(i, j);
    return onHover(el("td", { class: "pair " + kind, "aria-label": lines.join("; ") }, text), ...lines);
  })));
  place.replaceChildren(el("table", { class: "matrix" }, el("thead", {}, head), el("tbody", {}, ...body)));
}

// Mean ranks on a line, best at the left; a bar joins what cannot be told apart (Demšar 2006).
function diagram(place, data) {
  const width = Math.max(320, Math.min(900, place.clientWidth || 900)), k = data.names.length, half = Math.ceil(k / 2), side = width < 600 ? 108 : 210;
  const at = r => side + (r - 1) / (k - 1) * (width - 2 * side), start = 52 + 11 * data.bars.length, height = start + 19 * half + 8;
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "Critical-difference diagram" });
  svg.append(draw("line", { class: "ink", x1: at(1), x2: at(k), y1: 36, y2: 36 }));
  for (let r = 1; r <= k; r += Math.max(1, Math.ceil(k / ((width - 2 * side) / 24)))) svg.append(draw("line", { class: "ink", x1: at(r), x2: at(r), y1: 31, y2: 36 }), draw("text", { class: "tick", x: at(r), y: 26, "text-anchor": "middle" }, r));
  if (data.cd) svg.append(draw("line", { class: "ink", x1: at(1), x2: Math.min(width - 2, at(1 + data.cd)), y1: 9, y2: 9 }), draw("text", { class: "tick", x: 2, y: 13 }, `CD ${data.cd.toFixed(2)}`));
  data.bars.forEach(([a, b], i) => svg.append(draw("line", { class: "join", x1: at(data.ranks[a]) - 3, x2: at(data.ranks[b]) + 3, y1: 46 + 11 * i, y2: 46 + 11 * i })));
  data.names.forEach((name, i) => {
    const left = i < half, y = start + 19 * (left ? i : k - 1 - i) + 6, edge = left ? side - 8 : width - side + 8, r = data.ranks[i];
    svg.append(draw("path", { class: "lead", d: `M${at(r)},36V${y}H${edge}` }), draw("text", { x: left ? edge - 4 : edge + 4, y: y + 4, "text-anchor": left ? "end" : "start" }, draw("title", {}, name),
      left ? `${short(name, width < 600 ? 11 : 26)} ${r.toFixed(1)}` : `${r.toFixed(1)} ${short(name, width < 600 ? 11 : 26)}`));
  });
  place.replaceChildren(svg);
}
