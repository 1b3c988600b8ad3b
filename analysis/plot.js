"use strict";
// The plot of score against cost, as SVG. Sizes are in pixels of the drawing, which is as wide as its place.

function node(space, tag, attributes, ...children) {
  const made = space ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(attributes || {})) made.setAttribute(key, value);
  made.append(...children.map(c => (c instanceof Node ? c : document.createTextNode(String(c)))));
  return made;
}
const el = (tag, attributes, ...children) => node(false, tag, attributes, ...children);
const draw = (tag, attributes, ...children) => node(true, tag, attributes, ...children);

function scaled(value, base, names, digits = 3) {
  let power = 0;
  while (Math.abs(value) >= base && power < names.length - 1) { value /= base; power += 1; }
  const text = (digits <= 3 && Math.abs(value) >= 100) || Number.isInteger(value) ? value.toFixed(0) : String(Number(value.toPrecision(digits)));
  return [text, names[power]];
}
function write(value, unit) {
  if (value === null || value === undefined) return "–";
  if (unit === "bytes") return scaled(value, 1024, ["B", "KiB", "MiB", "GiB", "TiB"]).join(" ");
  if (unit === "s" && Math.abs(value) < 1) return Number((value * 1000).toPrecision(3)) + " ms";
  if (unit === "s") return Number(value.toPrecision(value < 1000 ? 3 : 6)) + " s";
  if (unit) return scaled(value, 1000, ["", "k", "M", "G", "T", "P", "E"].map(p => p + unit)).join(" ");
  return scaled(value, 1000, ["", "k", "M", "G"]).join("");
}

// Which points no other point beats: cost down, score up, equal points stay together.
function onFront(points) {
  return points.map(a => !points.some(b => b.x <= a.x && b.y >= a.y && (b.x < a.x || b.y > a.y)));
}

function niceTicks(low, high, count, unit) {
  const rough = (high - low) / count, size = 10 ** Math.floor(Math.log10(rough));
  const step = unit === "bytes" ? 2 ** Math.ceil(Math.log2(rough)) : size * [1, 2, 5, 10].find(m => size * m >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high * (1 + 1e-12) + 1e-12; i += 1) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

// x scale: logarithmic beyond a decade, with a place of its own for 0 at the left.
function costScale(values, left, right, unit) {
  const positive = values.filter(v => v > 0), low = Math.min(...positive), high = Math.max(...positive);
  const log = positive.length > 0 && high > 10 * low, zero = log && values.some(v => v <= 0);
  if (!log) {
    const pad = (Math.max(...values) - Math.min(...values)) * 0.08 || Math.abs(values[0]) * 0.1 || 1;
    const from = Math.min(...values) < pad ? 0 - (Math.min(...values) === 0 ? pad : 0) : Math.min(...values) - pad, to = Math.max(...values) + pad;
    const at = v => left + (v - from) / (to - from) * (right - left);
    return { at, log, zero, ticks: niceTicks(from, to, (right - left) / 95, unit).filter(t => t >= 0) };
  }
  const start = zero ? left + 60 : left, from = Math.log10(low) - 0.25, to = Math.log10(high) + 0.3;
  const at = v => (v <= 0 ? left + 26 : start + (Math.log10(v) - from) / (to - from) * (right - start));
  const every = Math.max(1, Math.ceil((to - from) / ((right - start) / 60))), ticks = zero ? [0] : [];
  for (let p = Math.ceil(from); p <= to; p += every) ticks.push(10 ** p);
  if (ticks.filter(t => t > 0).length < 2) for (const t of [2, 5]) ticks.push(...[low, high].map(v => t * 10 ** Math.floor(Math.log10(v))));
  return { at, log, zero, start, ticks: [...new Set(ticks)].filter(t => t <= 0 || (at(t) >= start && at(t) <= right)) };
}

const overlap = (a, b) => a.l < b.r && b.l < a.r && a.t < b.b && b.t < a.b;
const around = (x, y, r) => ({ l: x - r, r: x + r, t: y - r, b: y + r });
const SIDES = [[1, -1], [1, 1], [-1, -1], [-1, 1], [0, -1], [0, 1], [1, 0], [-1, 0], [0.5, -1], [-0.5, -1], [0.5, 1], [-0.5, 1], [1, -0.5], [1, 0.5], [-1, -0.5], [-1, 0.5]];
// The same rule as analysis.placement: near first, no name on a point, bar, name or leader. A leader is a chain of small boxes.
function chain(p, spot) {
  const x = Math.min(spot.r, Math.max(spot.l, p.px)), y = Math.min(spot.b, Math.max(spot.t, p.py)), length = Math.hypot(x - p.px, y - p.py);
  if (length <= 20) return [];
  const parts = Math.ceil((length - 10) / 2.8), at = i => (10 + (length - 10) * i / parts) / length;
  return Array.from({ length: parts + 1 }, (_, i) => around(p.px + (x - p.px) * at(i), p.py + (y - p.py) * at(i), 2));
}
// A leader crosses nothing that is drawn and does not run along a bar.
const clear = (line, drawn, bars) => !line.some(s => drawn.some(t => overlap(s, t))) && 2 * line.filter(s => bars.some(t => overlap(s, t))).length < line.length;
function spotOf(p, points, box, drawn, bars) {
  const distance = (s, q) => Math.hypot(Math.max(0, s.l - q.px, q.px - s.r), Math.max(0, s.t - q.py, q.py - s.b));
  for (const gap of [4, 9, 16, 28, 44, 64, 90, 120]) for (const [h, v] of SIDES) {
    const x = p.px + h * (p.width / 2 + 2 + gap), y = p.py + v * (8 + gap), spot = { l: x - p.width / 2 - 2, r: x + p.width / 2 + 2, t: y - 8, b: y + 8, x, y };
    if (spot.l < box.l || spot.r > box.r || spot.t < box.t || spot.b > box.b || [...drawn, ...bars].some(t => overlap(spot, t))) continue;
    spot.line = chain(p, spot);
    if (spot.line.length ? clear(spot.line, drawn, bars) : points.every(q => distance(spot, q) >= distance(spot, p) - 1e-6)) return spot;
  }
  return null;
}
// Names the points; where some find no room all are placed anew with those first. Returns how many have a name.
function placeNames(named, points, box, bars) {
  let order = [...named].sort((a, b) => b.front - a.front), best = new Map();
  for (let i = 0; i < 5; i += 1) {
    const drawn = points.map(p => around(p.px, p.py, 6)), spots = new Map();
    for (const p of order) {
      const spot = spotOf(p, points, box, drawn, bars);
      if (spot) { spots.set(p, spot); drawn.push(spot, ...spot.line); }
    }
    if (spots.size > best.size) best = spots;
    if (spots.size === order.length || spots.size < 0.75 * order.length) break;
    order = [...order.filter(p => !spots.has(p)), ...order.filter(p => spots.has(p))];
  }
  for (const p of points) p.spot = best.get(p) || null;
  return best.size;
}
// Where there is no room for every name: the front, and the least and the most in both. Returns what to say.
function nameAll(points, box, bars) {
  if (placeNames(points, points, box, bars) === points.length) return "";
  const ends = ["x", "y"].flatMap(k => [Math.min, Math.max].map(f => points.find(p => p[k] === f(...points.map(q => q[k])))));
  const count = placeNames(points.filter(p => p.front || ends.includes(p)), points, box, bars);
  return `${count} of ${points.length} named; hover for the rest`;
}

// Ticks in so many digits that no two read alike: costs may differ in the fourth.
function tickTexts(ticks, unit) {
  const bases = { bytes: [1024, ["B", "KiB", "MiB", "GiB", "TiB"]] }, texts = ticks.map(t => (t === 0 ? "0" : write(t, unit)));
  for (let digits = 4; bases[unit] && new Set(texts).size < ticks.length && digits < 10; digits += 1) ticks.forEach((t, i) => { texts[i] = t === 0 ? "0" : scaled(t, ...bases[unit], digits).join(" "); });
  return texts;
}
function axes(svg, x, y, box, titles) {
  for (const t of y.ticks) svg.append(draw("line", { class: "grid", x1: box.l, x2: box.r, y1: y.at(t), y2: y.at(t) }),
    draw("text", { class: "tick", x: box.l - 6, y: y.at(t) + 4, "text-anchor": "end" }, t));
  const texts = tickTexts(x.ticks, titles.unit);
  for (const [i, t] of x.ticks.entries()) svg.append(draw("line", { class: "grid", x1: x.at(t), x2: x.at(t), y1: box.t, y2: box.b }),
    draw("text", { class: "tick", x: Math.min(x.at(t), box.r + 10 - 3 * texts[i].length), y: box.b + 16, "text-anchor": "middle" }, texts[i]));
  if (x.zero) svg.append(draw("line", { class: "zero", x1: x.start - 4, x2: x.start - 4, y1: box.t, y2: box.b }));
  svg.append(draw("text", { x: (box.l + box.r) / 2, y: box.b + 38, "text-anchor": "middle" }, titles.x + (x.log ? ", log scale" : "")),
    draw("text", { x: -(box.t + box.b) / 2, y: 14, transform: "rotate(-90)", "text-anchor": "middle" }, titles.y));
}

function barsOf(p, x, y, clamp) {
  const upright = p.low === null ? [] : [{ x1: p.px, x2: p.px, y1: y.at(p.low), y2: y.at(p.high) }];
  return p.xlow === null || !(p.xhigh > p.xlow) ? upright : [...upright, { y1: p.py, y2: p.py, x1: clamp(x.at(Math.max(p.xlow, 0))), x2: clamp(x.at(p.xhigh)) }];
}
const thin = b => ({ l: Math.min(b.x1, b.x2) - 1.5, r: Math.max(b.x1, b.x2) + 1.5, t: Math.min(b.y1, b.y2) - 1.5, b: Math.max(b.y1, b.y2) + 1.5 });

// Points: {x, y, low, high, xlow, xhigh, name, row}. Returns the SVG.
function plot(place, points, titles, hover, choose) {
  const width = Math.max(320, Math.min(1150, place.clientWidth || 900)), height = width < 600 ? 380 : 470;
  const box = { l: 58, r: width - 12, t: 22, b: height - 50 };
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": `${titles.y} against ${titles.x}` });
  const ends = points.flatMap(p => [p.low ?? p.y, p.high ?? p.y, p.y]), pad = (Math.max(...ends) - Math.min(...ends)) * 0.07 || 0.01;
  const bottom = Math.min(...ends) - pad, top = Math.max(...ends) + pad;
  const y = { at: v => box.b - (v - bottom) / (top - bottom) * (box.b - box.t), ticks: niceTicks(bottom, top, 6) };
  const x = costScale(points.map(p => p.x), box.l, box.r, titles.unit);
  axes(svg, x, y, box, titles);
  if (titles.standin) svg.append(draw("text", { class: "watermark", x: (box.l + box.r) / 2, y: (box.t + box.b) / 2, "text-anchor": "middle",
    "font-size": width / 14 }, "STAND-IN DATA"));
  place.replaceChildren(svg);
  const flags = onFront(points);
  points.forEach((p, i) => Object.assign(p, { front: flags[i], px: x.at(p.x), py: y.at(p.y), spot: null }));
  const stair = points.filter(p => p.front).sort((a, b) => a.px - b.px || a.py - b.py);
  if (stair.length > 1) svg.append(draw("path", { class: "stair", d: stair.map((p, i) => (i ? `H${p.px}V${p.py}` : `M${p.px},${p.py}`)).join("") }));
  for (const p of points) {
    p.text = draw("text", { class: p.front ? "name front" : "name", "text-anchor": "middle" }, p.name.length > 34 ? p.name.slice(0, 33) + "…" : p.name);
    svg.append(p.text); p.width = p.text.getBBox().width; p.text.remove();
  }
  const clamp = v => Math.min(box.r, Math.max(box.l, v)), bars = points.flatMap(p => barsOf(p, x, y, clamp));
  const steps = stair.slice(1).flatMap((p, i) => [{ x1: stair[i].px, x2: p.px, y1: stair[i].py, y2: stair[i].py }, { x1: p.px, x2: p.px, y1: stair[i].py, y2: p.py }]);
  const said = nameAll(points, box, [...bars, ...steps].map(thin));
  if (said) svg.append(draw("text", { class: "tick said", x: box.r, y: 14, "text-anchor": "end" }, said));
  for (const p of [...points].sort((a, b) => a.front - b.front)) {
    const mark = draw("g", { class: p.front ? "mark front" : "mark" });
    mark.append(...barsOf(p, x, y, clamp).map(b => draw("line", { class: "bar", ...b })));
    if (p.spot && p.spot.line.length) mark.append(draw("line", { class: "leader", x1: p.px, y1: p.py, x2: Math.min(p.spot.r, Math.max(p.spot.l, p.px)), y2: Math.min(p.spot.b, Math.max(p.spot.t, p.py)) }));
    const dot = draw("circle", { class: "point", cx: p.px, cy: p.py, r: 5.5, tabindex: 0, "aria-label": `${p.name}: ${p.y}` });
    for (const on of ["pointerenter", "focus"]) dot.addEventListener(on, () => hover(p, dot));
    for (const off of ["pointerleave", "blur"]) dot.addEventListener(off, () => hover(null));
    dot.addEventListener("click", () => choose(p));
    dot.addEventListener("keydown", e => { if (e.key === "Enter") choose(p); });
    mark.append(dot); svg.append(mark);
    if (p.spot) { p.text.setAttribute("x", p.spot.x); p.text.setAttribute("y", p.spot.y + 4); svg.append(p.text); }
  }
  return points;
}
