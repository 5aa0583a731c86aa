"use strict";
// Scales, axes, tooltips: what every chart of the page is made of. Drawn at the width the page has, so text keeps its size.

const data = JSON.parse(document.getElementById("data").textContent);
const charts = [];
const byNumber = new Map(data.trials.map((trial) => [trial.n, trial]));

window.addEventListener("error", (event) => {
  document.documentElement.dataset.error = `${event.message} (${event.lineno})`;
});

// ------------------------------------------------------------------------------------------------------------- numbers

function short(value) {
  if (value === 0) return "0";
  const size = Math.abs(value);
  if (size < 1e-3 || size >= 1e5) return value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  return String(parseFloat(value.toPrecision(3)));
}

function counted(value) {
  for (const [size, unit] of [[1e12, "T"], [1e9, "G"], [1e6, "M"], [1e3, "k"]]) {
    if (Math.abs(value) >= size) return `${parseFloat((value / size).toPrecision(3))} ${unit}`;
  }
  return String(Math.round(value));
}

const FORMATS = {
  percent: (value, digits = 1) => `${(100 * value).toFixed(digits)} %`,
  count: counted,
  bytes: (value) => `${parseFloat((value / 1e6).toPrecision(3))} MB`,
  ms: (value) => `${parseFloat(value.toPrecision(3))} ms`,
  number: short,
};

function quantile(sorted, share) {
  const place = share * (sorted.length - 1), below = Math.floor(place);
  return sorted[below] + (place - below) * ((sorted[below + 1] ?? sorted[below]) - sorted[below]);
}

/** Lowest and highest value worth showing: a few bad trials must not squeeze all others. `always` stays inside. */
function robust(values, up, always = []) {
  if (!values.length) values = always;
  if (!values.length) return [0, 1];
  const sorted = [...values].sort((a, b) => a - b), last = sorted.length - 1;
  let low = sorted[0], high = sorted[last];
  const [q1, q3] = [quantile(sorted, 0.25), quantile(sorted, 0.75)];
  if (up) low = sorted.find((value) => value >= q1 - 1.2 * (high - q1));
  else high = sorted.findLast((value) => value <= q3 + 1.2 * (q3 - low));
  [low, high] = [Math.min(low, ...always), Math.max(high, ...always)];
  const pad = 0.07 * (high - low) || 0.05 * Math.abs(high) || 1;
  return [low - pad, high + pad];
}

// -------------------------------------------------------------------------------------------------------------- scales

function niceTicks(low, high, count) {
  const raw = (high - low) / Math.max(1, count), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((one) => one >= raw * 0.7);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(parseFloat((i * step).toPrecision(12)));
  return ticks;
}

function logTicks(low, high, count) {
  for (const mantissas of [[1, 2, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let power = Math.floor(Math.log10(low)); power <= Math.log10(high); power++) {
      ticks.push(...mantissas.map((one) => parseFloat(`${one}e${power}`)).filter((tick) => tick >= low * 0.999 && tick <= high * 1.001));
    }
    if (ticks.length <= count + 1) return ticks.length > 1 ? ticks : niceTicks(low, high, count).filter((tick) => tick > 0);
  }
  return [low, high];
}

/** From values to pixels a..b. at: the value's place; ticks; text: a tick's label. */
function scale({ log = false, low, high, a, b, count = 5, format = "number" }) {
  if (low === high) [low, high] = log ? [low / 1.5, high * 1.5] : [low - (Math.abs(low) || 1) * 0.1, high + (Math.abs(high) || 1) * 0.1];
  const turn = log ? Math.log : (value) => value;
  const at = (value) => a + ((b - a) * (turn(value) - turn(low))) / (turn(high) - turn(low));
  const ticks = log ? logTicks(low, high, count) : niceTicks(low, high, count);
  const digits = ticks.length > 1 ? Math.max(0, -Math.floor(Math.log10(100 * (ticks[1] - ticks[0])) + 1e-9)) : 1;
  const text = format === "percent" ? (value) => FORMATS.percent(value, digits) : FORMATS[format];
  return { at, ticks, text, low, high, inside: (value) => value >= low && value <= high };
}

// ----------------------------------------------------------------------------------------------------------------- svg

function make(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

const line = (x1, y1, x2, y2, kind) => make("line", { x1, y1, x2, y2, class: kind });
const label = (text, x, y, anchor = "start", kind = "") => make("text", { x, y, "text-anchor": anchor, class: kind }, text);
const pathOf = (points) => points.map(([x, y], i) => `${i ? "L" : "M"}${x.toFixed(1)} ${y.toFixed(1)}`).join("");
const widthOf = (text, kind = "") => (kind.includes("strong") ? 7.7 : 6.7) * text.length;

function surface(plot, width, height, title) {
  const svg = make("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": title }, make("title", {}, title));
  plot.replaceChildren(svg);
  return svg;
}

/** Grid, ticks and titles round the box {left, right, top, bottom}. Labels that would touch are left out. */
function axes(svg, box, x, y, xTitle, yTitle) {
  for (const tick of y.ticks) {
    svg.append(line(box.left, y.at(tick), box.right, y.at(tick), "grid"), label(y.text(tick), box.left - 8, y.at(tick) + 4, "end"));
  }
  let free = -Infinity;
  const edge = box.right + (box.margin ?? 12);
  for (const tick of x.ticks) {
    const text = x.text(tick), half = widthOf(text) / 2, place = Math.min(Math.max(x.at(tick), half), edge - half);
    svg.append(line(x.at(tick), box.bottom, x.at(tick), box.bottom + 4, "axis"));
    if (place - half < free + 8) continue;
    svg.append(label(text, place, box.bottom + 18, "middle"));
    free = place + half;
  }
  svg.append(line(box.left, box.bottom, box.right, box.bottom, "axis"));
  if (xTitle) svg.append(label(xTitle, (box.left + box.right) / 2, box.bottom + 36, "middle"));
  if (yTitle) svg.append(label(yTitle, 8, 16));
}

/** Places labels inside a box so that none covers another: at the first of the given places that is free, if one is. */
function placer(box) {
  const place = (svg, text, places, kind) => {
    for (const [x, y, anchor] of places) {
      const wide = widthOf(text, kind), left = anchor === "end" ? x - wide : anchor === "middle" ? x - wide / 2 : x;
      const area = [left - 2, y - 12, left + wide + 2, y + 4];
      if (area[0] < box.left - 2 || area[2] > box.right + 14 || area[1] < 0 || area[3] > box.bottom) continue;
      if (place.taken.some((other) => area[0] < other[2] && other[0] < area[2] && area[1] < other[3] && other[1] < area[3])) continue;
      place.taken.push(area);
      svg.append(label(text, x, y, anchor, kind));
      return true;
    }
    return false;
  };
  place.taken = [];
  return place;
}

// ------------------------------------------------------------------------------------------------------------ pointing

const tip = document.getElementById("tip");
let shown = null;

function describe(trial) {
  const title = document.createElement("b"), list = document.createElement("dl");
  title.textContent = `${trial.n}  ${trial.name}`;
  const state = document.createElement("div");
  state.className = "soft";
  const marks = [trial.n === data.choice ? "chosen" : trial.front ? "on the front" : "", trial.s === "finished" ? "" : trial.s];
  state.textContent = [...marks.filter(Boolean), `${counted(trial.rows)} rows seen`].join(", ");
  const add = (name, value) => {
    const [term, text] = [document.createElement("dt"), document.createElement("dd")];
    [term.textContent, text.textContent] = [name, value];
    list.append(term, text);
  };
  data.metrics.forEach((metric, i) => trial.m[i] != null && add(metric.label, FORMATS[metric.format](trial.m[i])));
  data.knobs.forEach((knob, i) => trial.x[i] != null && add(knob.label, knob.values ? knob.values[trial.x[i]] : short(trial.x[i])));
  tip.replaceChildren(title, state, list);
}

/** Show a trial in every chart, and what it is beside the place (in the page's pixels). */
function show(number, place) {
  if (number !== shown) {
    shown = number;
    for (const chart of charts) chart.overlay?.replaceChildren(...(number === null ? [] : chart.mark(number)));
    tip.hidden = number === null;
    if (number !== null) describe(byNumber.get(number));
  }
  if (number === null || !place) return;
  const [wide, high] = [tip.offsetWidth, tip.offsetHeight], page = document.documentElement.clientWidth;
  const left = place.x + 16 + wide < page - 8 ? place.x + 16 : place.x - 16 - wide;
  const bottom = window.scrollY + window.innerHeight;
  const top = place.y + 16 + high < bottom - 8 ? place.y + 16 : Math.max(window.scrollY + 8, place.y - 16 - high);
  tip.style.left = `${Math.max(8, Math.min(left, page - wide - 8))}px`;
  tip.style.top = `${top}px`;
}

/** A chart: draw(width) gives {svg, near(x, y) -> number or null, mark(number) -> shapes, at(number) -> [x, y] or null}. */
function chart(plot, draw) {
  const one = { overlay: null, mark: () => [] };
  let drawn = 0, made = null;
  const redraw = () => {
    const width = plot.clientWidth;
    if (!width || width === drawn) return;
    drawn = width;
    made = draw(width);
    one.overlay = make("g", { class: "shown" });
    made.svg.append(one.overlay);
    one.mark = made.mark ?? (() => []);
  };
  new ResizeObserver(redraw).observe(plot);
  redraw();
  charts.push(one);
  if (!made?.near) return;
  const point = (event) => {
    const box = plot.getBoundingClientRect();
    show(made.near(event.clientX - box.left - 1, event.clientY - box.top - 1), { x: event.pageX, y: event.pageY });
  };
  plot.addEventListener("pointermove", point);
  plot.addEventListener("pointerdown", point);
  plot.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(null));
  plot.addEventListener("keydown", (event) => walk(event, plot, made));
  plot.addEventListener("blur", () => show(null));
}

/** Arrow keys go through the trials from the best to the worst. */
function walk(event, plot, made) {
  const step = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") show(null);
  if (!step) return;
  event.preventDefault();
  const order = data.trials.filter((trial) => made.at(trial.n)).sort((a, b) => (data.quality.up ? b.q - a.q : a.q - b.q));
  if (!order.length) return;
  const place = order.findIndex((trial) => trial.n === shown);
  const next = order[place < 0 ? 0 : Math.min(order.length - 1, Math.max(0, place + step))];
  const [x, y] = made.at(next.n), box = plot.getBoundingClientRect();
  show(next.n, { x: box.left + window.scrollX + x, y: box.top + window.scrollY + y });
}

/** The nearest of [x, y, number] within some pixels, or null. */
function nearest(points, x, y, reach = 26) {
  let best = null, least = reach * reach;
  for (const [px, py, number] of points) {
    const away = (px - x) ** 2 + (py - y) ** 2;
    if (away < least) [best, least] = [number, away];
  }
  return best;
}

document.addEventListener("pointerdown", (event) => event.target.closest(".plot") || show(null));
