"use strict";
// Small charts in SVG: lines, stairs, dots and bands over samples seen, drawn anew when there is something new.

let clips = 0;
const SVG = "http://www.w3.org/2000/svg";

function element(name, attributes, ...children) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  made.append(...children);
  return made;
}

const whole = number => number === null || number === undefined ? "–" : Number(number) < 1e7 ? Number(number).toLocaleString("en-US") : compact(Number(number));

// 64, 1,500, 60k, 2M: as the report writes them.
function compact(number) {
  if (number === null || number === undefined) return "–";
  if (!Number.isFinite(number)) return String(number);
  const size = Math.abs(number);
  for (const [unit, suffix] of [[1e9, "G"], [1e6, "M"], [1e3, "k"]])
    if (size >= Math.max(unit, 1e4)) return trimmed(number / unit, 4) + suffix;
  if (size >= 1000) return Math.round(number).toLocaleString("en-US");
  return trimmed(number, 4);
}

function trimmed(number, digits) {
  if (number !== 0 && Math.abs(number) < 1e-4) return number.toExponential(1).replace("e-", "e−");
  return String(Number(number.toPrecision(digits)));
}

function linearTicks(low, high, count) {
  const rough = (high - low) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map(one => one * power).find(one => one >= rough * 0.999);
  const ticks = [];
  for (let tick = Math.ceil(low / step - 1e-9) * step; tick <= high + step * 1e-9; tick += step) ticks.push(tick);
  return ticks;
}

function logTicks(low, high, base, count) {
  let all = [];
  for (const factors of base === 10 ? [[1, 2, 5], [1, 3], [1]] : [[1]]) {
    all = [];
    for (let power = Math.floor(Math.log(low) / Math.log(base)); base ** power <= high * 1.001; power++)
      all.push(...factors.map(factor => factor * base ** power).filter(tick => tick >= low * 0.999 && tick <= high * 1.001));
    if (all.length <= count) return all;
  }
  const stride = Math.ceil(all.length / Math.max(2, count));
  return all.filter((_, place) => place % stride === 0);
}

function finite(points) {
  return points.filter(point => point[1] !== null && Number.isFinite(point[1]));
}

// What nearly all points lie between: the few outside are cut off, so that they do not press the others together.
function middle(points) {
  const sorted = points.map(point => point[1]).sort((a, b) => a - b);
  return sorted.length ? [sorted[Math.floor(0.02 * sorted.length)], sorted[Math.ceil(0.98 * sorted.length) - 1]] : [];
}

// Medians over a window of about one fortieth of the points, then means of them: what the eye would draw through.
function smooth(points) {
  if (points.length < 40) return points;
  const reach = Math.max(1, Math.round(points.length / 80));
  const near = (values, place) => values.slice(Math.max(0, place - reach), place + reach + 1);
  const values = points.map(point => point[1]);
  const medians = values.map((_, place) => near(values, place).sort((a, b) => a - b)).map(sorted => sorted[sorted.length >> 1]);
  return points.map((point, place) => [point[0], near(medians, place).reduce((a, b) => a + b) / near(medians, place).length]);
}

// The picture of one chart. layers: [{kind: line|step|dots|band, points, color, dash, width, opacity, quiet, extent}];
// a quiet layer does not widen the axis, but for its extent.
function draw(plot, layers, options) {
  const width = Math.max(220, plot.clientWidth), height = width < 420 ? 176 : 212;
  const values = layers.flatMap(layer => layer.quiet ? layer.extent ?? [] : layer.points.map(point => point[1]));
  if (!values.length) { plot.replaceChildren(); plot.scale = null; return; }
  let low = options.floor ?? values.reduce((a, b) => Math.min(a, b)), high = values.reduce((a, b) => Math.max(a, b));
  const logarithmic = options.log && low > 0 && high / low > (options.logFrom ?? 4);
  const base = options.base ?? 10;
  if (logarithmic) {
    const room = (high / low) ** 0.06;
    low /= room; high *= room;
  } else {
    if (options.zero) low = Math.min(0, low);
    if (high - low < 1e-12 * Math.max(1, Math.abs(high))) { low -= Math.abs(low) * 0.5 || 0.5; high += Math.abs(high) * 0.5 || 0.5; if (options.zero) low = 0; }
    const room = (high - low) * 0.06;
    if (!(options.zero && low === 0)) low -= room;
    high += room;
    if (options.ceiling !== undefined && high > options.ceiling) high = options.ceiling + (options.ceiling - low) * 0.02;
  }
  const spread = logarithmic ? logTicks(low, high, base, height / 34) : [];
  const yTicks = spread.length > 2 ? spread : linearTicks(low, high, height / 44);
  const label = Math.max(...yTicks.map(tick => compact(tick).length), 2) * 7 + 8;
  const box = {left: label, right: width - 6, top: 8, bottom: height - 24};
  const end = options.end || 1;
  const x = seen => box.left + (box.right - box.left) * seen / end;
  const scaled = logarithmic ? Math.log : value => value;
  const y = value => {
    const part = (scaled(Math.max(value, logarithmic ? 1e-300 : -1e300)) - scaled(low)) / (scaled(high) - scaled(low));
    return box.bottom - (box.bottom - box.top) * Math.min(9, Math.max(-9, part));
  };
  const svg = element("svg", {viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": options.title});
  for (const tick of yTicks) {
    svg.append(element("line", {class: "grid", x1: box.left, x2: box.right, y1: y(tick), y2: y(tick)}));
    svg.append(element("text", {x: box.left - 7, y: y(tick) + 4, "text-anchor": "end"}, compact(tick)));
  }
  svg.append(element("line", {class: "axis", x1: box.left, x2: box.right, y1: box.bottom, y2: box.bottom}));
  for (const tick of linearTicks(0, end, width / 110)) {
    const anchor = x(tick) > box.right - 16 ? "end" : tick === 0 ? "start" : "middle";
    svg.append(element("text", {x: x(tick), y: height - 7, "text-anchor": anchor}, compact(tick)));
  }
  const clip = `clip-${clips++}`;
  svg.append(element("clipPath", {id: clip}, element("rect", {x: box.left - 4, y: 0, width: width - box.left + 4, height: box.bottom + 3})));
  svg.append(element("g", {"clip-path": `url(#${clip})`}, ...layers.flatMap(layer => shapes(layer, x, y))));
  const cross = element("line", {class: "cross", y1: box.top, y2: box.bottom, visibility: "hidden"});
  svg.append(cross);
  plot.replaceChildren(svg);
  plot.scale = {box, end, cross, x, width};
}

function shapes(layer, x, y) {
  const place = value => value.toFixed(1);
  const style = {stroke: layer.color, fill: "none", "stroke-width": layer.width ?? 1.9, "stroke-linejoin": "round",
                 "stroke-linecap": "round", opacity: layer.opacity ?? 1};
  if (layer.dash) style["stroke-dasharray"] = layer.dash;
  const points = layer.points;
  if (!points.length) return [];
  if (layer.kind === "dots")
    return [element("path", {...style, "stroke-width": layer.width ?? 4,
                             d: points.map(([a, b]) => `M${place(x(a))} ${place(y(b))}h0`).join("")})];
  if (layer.kind === "band") {
    const up = points.map(([a, , high]) => `${place(x(a))} ${place(y(high))}`);
    const down = points.map(([a, low]) => `${place(x(a))} ${place(y(low))}`).reverse();
    return [element("path", {d: `M${up.join("L")}L${down.join("L")}Z`, fill: layer.color, stroke: "none", opacity: layer.opacity ?? 0.16})];
  }
  let d = `M${place(x(points[0][0]))} ${place(y(points[0][1]))}`;
  for (let index = 1; index < points.length; index++) {
    const [a, b] = points[index];
    d += layer.kind === "step" ? `V${place(y(b))}H${place(x(a))}` : `L${place(x(a))} ${place(y(b))}`;
  }
  const drawn = [element("path", {...style, d})];
  if (layer.tip !== false) {
    const [a, b] = points[points.length - 1];
    drawn.push(element("circle", {cx: place(x(a)), cy: place(y(b)), r: 3, fill: layer.color}));
  }
  return drawn;
}

// The last point at or before a place; null before the first.
function at(points, seen) {
  let low = 0, high = points.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (points[middle][0] <= seen) low = middle + 1; else high = middle;
  }
  return low ? points[low - 1] : null;
}
