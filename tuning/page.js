"use strict";
// The charts of a search: front, parallel coordinates, learning curves, marginal curves.

const { quality, size, choice } = data;
const finished = data.trials.filter((trial) => trial.s === "finished" && trial.q != null);
const seen = data.trials.filter((trial) => trial.q != null);
const better = (a, b) => (quality.up ? a > b : a < b);
const inFront = (trial) => (trial.n === choice ? 2 : trial.front ? 1 : 0);
const byWeight = [...seen].sort((a, b) => inFront(a) - inFront(b));

// --------------------------------------------------------------------------------------------------------------- front

function drawFront(plot, width) {
  const height = Math.round(Math.min(470, Math.max(330, width * 0.44)));
  const box = { left: 58, right: width - 20, top: 32, bottom: height - 48 };
  const svg = surface(plot, width, height, plot.dataset.title);
  const points = seen.filter((trial) => trial.z != null);
  const [low, high] = qualityRange(points);
  const y = scale({ low, high, a: box.bottom, b: box.top, count: height / 70, format: quality.format });
  const x = sizeScale([...points, ...data.baselines].map((one) => one.z), box);
  const place = placer(box);
  drawBounds(svg, box, x, y, place);
  axes(svg, box, x, y, `${size.label}${x.log ? " (log scale)" : ""}`, `${quality.label}, ${quality.up ? "higher" : "lower"} is better`);
  const places = new Map();
  const teacher = data.teacher != null && y.inside(data.teacher) ? y.at(data.teacher) : null;
  if (teacher !== null) svg.append(line(box.left, teacher, box.right, teacher, "teacher"));
  svg.append(make("path", { d: stairs(points, x, y, box), class: "stairs" }));
  const sheet = make("g");
  for (const trial of points.sort((a, b) => inFront(a) - inFront(b))) {
    const px = x.at(trial.z) + (trial.front ? 0 : x.spread * scatter(trial)), inside = y.inside(trial.q);
    const py = inside ? y.at(trial.q) : trial.q > y.high ? box.top + 5 : box.bottom - 6;
    sheet.append(trialMark(trial, px, py, inside, trial.q > y.high));
    places.set(trial.n, [px, py, trial.n]);
  }
  for (const one of data.baselines) {
    const at = { x: x.at(one.z) - 4.5, y: y.at(one.q) - 4.5, width: 9, height: 9, class: "baseline" };
    sheet.append(make("rect", at, make("title", {}, `${one.name}: ${FORMATS[quality.format](one.q)}`)));
  }
  svg.append(sheet);
  labelFront(svg, place, places, points, teacher, box);
  const all = [...places.values()];
  return {
    svg,
    near: (px, py) => nearest(all, px, py),
    at: (number) => places.get(number),
    mark: (number) => (places.has(number) ? [make("circle", { cx: places.get(number)[0], cy: places.get(number)[1], r: 8 })] : []),
  };
}

/** What was trained is to be seen; teacher and bounds, if they do not squeeze it. */
function qualityRange(points) {
  const values = (finished.length ? finished : points).map((trial) => trial.q);
  const always = [...data.baselines.map((one) => one.q), ...points.filter((trial) => trial.front).map((trial) => trial.q)];
  const [low, high] = robust(values, quality.up, always), near = 0.7 * (high - low);
  const marks = [data.teacher, ...data.bounds.filter((bound) => bound.axis === "quality").map((bound) => bound.at)];
  return robust(values, quality.up, [...always, ...marks.filter((at) => at != null && at > low - near && at < high + near)]);
}

/** Between -1 and 1, the same for a trial each time. */
const scatter = (trial) => ((trial.n * 0.618034) % 1) * 2 - 1;

/** Few sizes: a tick at each of them, and points of one size spread a little sideways. */
function sizeScale(values, box) {
  const sizes = [...new Set(values)].sort((a, b) => a - b);
  if (!sizes.length) return { ...scale({ low: 0, high: 1, a: box.left, b: box.right, format: size.format }), ticks: [], spread: 0 };
  const [low, high] = [sizes[0], sizes.at(-1)], log = low > 0 && high / low > 3;
  const room = Math.min(46, 0.08 * (box.right - box.left));
  const x = scale({ log, low, high, a: box.left + room, b: box.right - room, count: (box.right - box.left) / 90, format: size.format });
  const places = sizes.map(x.at), gaps = places.slice(1).map((place, i) => place - places[i]);
  const few = sizes.length <= 12;
  return { ...x, log, ticks: few ? sizes : x.ticks, spread: few ? Math.min(room * 0.7, 0.35 * Math.min(Infinity, ...gaps), 16) : 0 };
}

function drawBounds(svg, box, x, y, place) {
  for (const bound of data.bounds) {
    const onSize = bound.axis === "size", [low, high] = onSize ? [box.left, box.right] : [box.top, box.bottom];
    const at = Math.min(high, Math.max(low, (onSize ? x : y).at(bound.at)));
    const area = onSize
      ? { x: bound.above ? box.left : at, y: box.top, width: bound.above ? at - box.left : box.right - at, height: box.bottom - box.top }
      : { x: box.left, y: bound.above ? at : box.top, width: box.right - box.left, height: bound.above ? box.bottom - at : at - box.top };
    svg.append(make("rect", { ...area, class: "bound" }));
    const ends = onSize ? [at, box.top, at, box.bottom] : [box.left, at, box.right, at];
    svg.append(line(...ends, "bound-line"));
    const text = `not kept: ${bound.label}`;
    if (onSize) place(svg, text, [[at + 6, box.top + 14, "start"], [at - 6, box.top + 14, "end"]], "halo");
    else place(svg, text, [[box.left + 6, bound.above ? at + 16 : at - 6, "start"]], "halo");
  }
}

/** What the front reaches at every size; with more objectives than these two, the part of it that is best in both. */
function stairs(points, x, y, box) {
  let path = "", last = null;
  for (const trial of points.filter((one) => one.front).sort((a, b) => a.z - b.z || (better(a.q, b.q) ? -1 : 1))) {
    if (last !== null && !better(trial.q, last)) continue;
    path += last === null ? `M${x.at(trial.z)} ${quality.up ? box.bottom : box.top}V${y.at(trial.q)}` : `H${x.at(trial.z)}V${y.at(trial.q)}`;
    last = trial.q;
  }
  return path && `${path}H${box.right}`;
}

function trialMark(trial, x, y, inside, above) {
  const state = trial.s === "finished" ? (trial.ok || trial.front ? "finished" : "failing") : trial.s;
  const kind = `trial ${state}${trial.front ? " front" : ""}`;
  if (!inside) {
    const tipped = above ? -4 : 4;
    return make("path", { d: `M${x - 4} ${y - tipped / 2}H${x + 4}L${x} ${y + tipped}Z`, class: `${kind} beyond` });
  }
  return make("circle", { cx: x.toFixed(1), cy: y.toFixed(1), r: trial.front ? 6 : state === "finished" || state === "failing" ? 4 : 2.6, class: kind });
}

function labelFront(svg, place, places, points, teacher, box) {
  const around = ([x, y], far = 0) => [
    [x - 10 - far, y - 9, "end"], [x + 11 + far, y + 17, "start"], [x + 11 + far, y - 9, "start"], [x - 10 - far, y + 18, "end"], [x, y - 15, "middle"],
  ];
  const front = points.filter((trial) => trial.front), chosen = byNumber.get(choice);
  for (const trial of front) place.taken.push([places.get(trial.n)[0] - 8, places.get(trial.n)[1] - 8, places.get(trial.n)[0] + 8, places.get(trial.n)[1] + 8]);
  if (chosen && places.has(choice)) {
    const [x, y] = places.get(choice);
    svg.append(make("circle", { cx: x, cy: y, r: 10, class: "chosen" }));
    place(svg, chosen.name, around([x, y], 4), "strong halo") || place(svg, data.students[chosen.l].label, around([x, y], 4), "strong halo");
  }
  if (teacher !== null) {
    const text = `teacher ${FORMATS[quality.format](data.teacher)}`;
    place(svg, text, [[box.right, teacher - 6, "end"], [box.left + 6, teacher - 6, "start"], [box.right, teacher + 15, "end"]], "halo");
  }
  for (const trial of front) if (trial.n !== choice) place(svg, data.students[trial.l].label, around(places.get(trial.n)), "halo");
}

// ------------------------------------------------------------------------------------------------ parallel coordinates

function drawParallel(plot, width) {
  const titles = [...data.knobs.map((knob) => knob.label), ...data.axes.map((i) => data.metrics[i].label)];
  const flat = width / titles.length >= 96; // else the axes lie below each other
  const step = flat ? 0 : 74, height = flat ? 400 : 36 + step * titles.length;
  const svg = surface(plot, width, height, plot.dataset.title);
  const span = flat ? { a: height - 64, b: 54 } : { a: 62, b: width - 26 };
  const scales = titles.map((_, i) => axisScale(i, span));
  const left = Math.min(130, Math.max(62, ...scales[0].ticks.map(([, text]) => widthOf(text) + 16)));
  const rail = (i) => (flat ? left + (i * (width - left - 62)) / Math.max(1, titles.length - 1) : 44 + i * step);
  const point = (i, place) => (flat ? [rail(i), place] : [place, rail(i)]);
  // What a trial had reached when it was stopped does not compare: its line ends with its knobs.
  const reach = (trial) => (trial.s === "finished" ? scales.length : data.knobs.length);
  const shape = (trial) => scales.slice(0, reach(trial)).map((axis, i) => point(i, axis.place(trial)));
  const lines = make("g", { class: "lines" });
  const [low, high] = robust(finished.map((trial) => trial.q), quality.up);
  for (const trial of byWeight) {
    const over = trial.s !== "finished";
    const path = make("path", { d: pathOf(shape(trial)), class: ["pale", "front", "choice"][inFront(trial)] + (over ? " over" : "") });
    if (!over && trial.n !== choice) path.style.stroke = ramp((trial.q - low) / (high - low || 1), quality.up);
    if (!inFront(trial)) path.style.opacity = over ? faint(seen.length - finished.length, 0.4) : faint(finished.length, 0.7);
    lines.append(path);
  }
  // What was stopped lies below.
  lines.append(...[...lines.children].filter((path) => !path.classList.contains("over")));
  svg.append(lines);
  scales.forEach((axis, i) => drawRail(svg, axis, titles[i], rail(i), span, flat, (i ? rail(1) - rail(0) : left) - 16));
  return {
    svg,
    near: (x, y) => nearLine(scales, rail, reach, flat, x, y),
    at: (number) => shape(byNumber.get(number))[data.knobs.length - 1],
    mark: (number) => [make("path", { d: pathOf(shape(byNumber.get(number))) })],
  };
}

/** The more lines there are, the fainter each is. */
const faint = (count, most) => Math.max(0.05, Math.min(most, 25 / Math.max(1, count)));

/** A colour between worst and best; the page's light or dark ramp. */
function ramp(share, up) {
  const place = 100 * Math.min(1, Math.max(0, up ? share : 1 - share));
  return place < 50
    ? `color-mix(in oklab, var(--middle) ${2 * place}%, var(--low))`
    : `color-mix(in oklab, var(--high) ${2 * (place - 50)}%, var(--middle))`;
}

/** One axis: where a trial crosses it, and its ticks. A knob that a trial does not have lies beyond the low end. */
function axisScale(i, span) {
  const knob = data.knobs[i];
  const reach = span.b - span.a, nowhere = span.a - Math.sign(reach) * 26;
  if (knob?.values) {
    const at = (value) => span.a + (reach * (value + 0.5)) / knob.values.length;
    const loose = Math.min(7, Math.abs(reach) / knob.values.length / 5);
    const place = (t) => (t.x[i] == null ? nowhere : at(t.x[i]) + loose * scatter(t));
    return { place, nowhere, lacks: seen.some((t) => t.x[i] == null), ticks: knob.values.map((text, k) => [at(k), text]) };
  }
  const metric = knob ? null : data.metrics[data.axes[i - data.knobs.length]];
  const read = knob ? (t) => t.x[i] : (t) => t.m[data.axes[i - data.knobs.length]];
  const values = (knob ? seen : finished.length ? finished : seen).map(read).filter((value) => value != null);
  const [low, high] = knob || metric.cost ? [Math.min(...values), Math.max(...values)] : robust(values, metric.up);
  const log = knob ? knob.scale === "log" : metric.cost && low > 0 && high / low > 3;
  const axis = values.length ? scale({ log, low, high, a: span.a, b: span.b, count: 5, format: metric?.format }) : { ticks: [] };
  const inside = (value) => Math.min(Math.max(value, axis.low), axis.high);
  return {
    place: (t) => (read(t) == null ? nowhere : axis.at(inside(read(t)))), nowhere, lacks: seen.some((t) => read(t) == null),
    ticks: (metric?.cost && new Set(values).size <= 8 ? [...new Set(values)] : axis.ticks).map((tick) => [axis.at(tick), axis.text(tick)]),
  };
}

function drawRail(svg, axis, title, rail, span, flat, room) {
  svg.append(flat ? line(rail, span.a, rail, span.b, "axis") : line(span.a, rail, span.b, rail, "axis"));
  const ticks = axis.lacks ? [...axis.ticks, [axis.nowhere, "none"]] : axis.ticks;
  let free = -Infinity;
  for (const [place, text] of [...ticks].sort((a, b) => a[0] - b[0])) {
    const most = Math.floor((flat ? room : Math.abs(span.b - span.a) / ticks.length) / 6.7);
    const shortened = text.length > most ? `${text.slice(0, most - 1)}…` : text, half = flat ? 7 : widthOf(shortened) / 2 + 4;
    svg.append(flat ? line(rail - 3, place, rail + 3, place, "axis") : line(place, rail - 3, place, rail + 3, "axis"));
    if (place - half < free) continue;
    free = place + half;
    svg.append(flat ? label(shortened, rail - 6, place + 4, "end", "halo") : label(shortened, place, rail + 17, "middle", "halo"));
  }
  if (!flat) return svg.append(label(title, 8, rail - 8, "start", "strong halo"));
  const parts = title.length > 13 ? title.split(/(?<=[._ ])/) : [title], half = Math.ceil(parts.length / 2);
  const rows = parts.length > 1 ? [parts.slice(0, half).join(""), parts.slice(half).join("")] : parts;
  rows.forEach((row, i) => svg.append(label(row, rail, 18 + 15 * (i + 2 - rows.length), "middle", "strong")));
}

function nearLine(scales, rail, reach, flat, x, y) {
  const [along, across] = flat ? [x, y] : [y, x];
  let i = 0;
  while (i < scales.length - 2 && along > rail(i + 1)) i++;
  if (scales.length < 2) return null;
  const share = (along - rail(i)) / (rail(i + 1) - rail(i));
  let best = null, least = 14;
  for (const trial of byWeight.filter((one) => i + 1 < reach(one))) {
    const [from, to] = [scales[i].place(trial), scales[i + 1].place(trial)], away = Math.abs(from + share * (to - from) - across);
    if (away <= least) [best, least] = [trial.n, away];
  }
  return best;
}

// ------------------------------------------------------------------------------------------------------ learning curves

function drawCurves(plot, width, student) {
  const height = 210, box = { left: 54, right: width - 14, top: 14, bottom: height - 44 };
  const svg = surface(plot, width, height, plot.dataset.title);
  const curves = byWeight.filter((trial) => trial.l === student && trial.c);
  const y = scale({ ...curveRange, a: box.bottom, b: box.top, count: 5, format: quality.format });
  const x = scale({ low: 0, high: data.rows, a: box.left, b: box.right, count: 4, format: "count" });
  axes(svg, box, x, y, "rows seen");
  const id = `clip-${student}`, points = [];
  svg.append(make("clipPath", { id }, make("rect", { x: box.left, y: box.top - 4, width: box.right - box.left + 6, height: box.bottom - box.top + 4 })));
  const lines = make("g", { class: "lines", "clip-path": `url(#${id})` }), ends = make("g", { "clip-path": `url(#${id})` });
  const placed = (one) => one.c[0].map((rows, i) => [x.at(rows), y.at(one.c[1][i])]);
  for (const trial of curves) {
    const path = placed(trial), over = trial.s === "stopped" || trial.s === "failed";
    const shape = make("path", { d: pathOf(path), class: over ? "over" : ["pale", "front", "choice"][inFront(trial)] });
    if (!inFront(trial)) shape.style.opacity = faint(curves.length, 0.5);
    lines.append(shape);
    if (trial.s !== "finished") ends.append(make("circle", { cx: path.at(-1)[0], cy: path.at(-1)[1], r: 2.3, class: "end" }));
    for (const [px, py] of path) points.push([px, py, trial.n]);
  }
  for (const one of data.baselines.filter((other) => other.l === student && other.c)) {
    lines.append(make("path", { d: pathOf(placed(one)), class: "without" }));
  }
  svg.append(lines, ends);
  const of = new Map(curves.map((trial) => [trial.n, trial]));
  return {
    svg,
    near: (px, py) => nearest(points, px, py),
    at: (number) => of.has(number) && placed(of.get(number)).at(-1),
    mark: (number) => (of.has(number) ? [make("path", { d: pathOf(placed(of.get(number))), "clip-path": `url(#${id})` })] : []),
  };
}

/** All panels share it. The steep beginning may leave the picture: what matters is how the curves end. */
const curveRange = (() => {
  const values = seen.flatMap((trial) => (trial.c ? trial.c[1] : [])).sort((a, b) => a - b);
  if (!values.length) return { low: 0, high: 1 };
  const low = quality.up ? quantile(values, 0.12) : values[0];
  const high = quality.up ? values.at(-1) : quantile(values, 0.88);
  const pad = 0.04 * (high - low);
  return { low: low - pad, high: high + pad };
})();

// ------------------------------------------------------------------------------------------------------ marginal curves

function drawMarginal(plot, width, i) {
  const knob = data.knobs[i], bins = data.marginals[i];
  const height = 200, box = { left: 54, right: width - 14, top: 14, bottom: height - 30 };
  const svg = surface(plot, width, height, plot.dataset.title);
  const points = finished.filter((trial) => trial.x[i] != null);
  const [low, high] = robust(finished.map((trial) => trial.q), quality.up, bins.map((bin) => bin.mean));
  const y = scale({ low, high, a: box.bottom, b: box.top, count: 4, format: quality.format });
  const x = knob.values ? categories(knob.values, box) : numbers(knob, points.map((trial) => trial.x[i]), box);
  axes(svg, box, x, y);
  const inside = (value) => y.at(Math.min(y.high, Math.max(y.low, value)));
  const places = points.map((t) => [x.at(t.x[i]) + (knob.values ? 9 * scatter(t) : 0), inside(t.q), t.n]);
  const cloud = make("g", { class: "points" });
  for (const [cx, cy] of places) cloud.append(make("circle", { cx: cx.toFixed(1), cy: cy.toFixed(1), r: 2.6 }));
  svg.append(cloud);
  const middle = bins.map((bin) => [x.at(bin.x), inside(bin.mean)]);
  const known = bins.filter((bin) => bin.low != null);
  if (knob.values) for (const bin of known) svg.append(line(x.at(bin.x), inside(bin.low), x.at(bin.x), inside(bin.high), "whisker"));
  else {
    const around = [...known.map((bin) => [x.at(bin.x), inside(bin.high)]), ...known.map((bin) => [x.at(bin.x), inside(bin.low)]).reverse()];
    svg.append(make("path", { d: around.length ? `${pathOf(around)}Z` : "", class: "band" }), make("path", { d: pathOf(middle), class: "mean" }));
  }
  for (const [cx, cy] of middle) svg.append(make("circle", { cx, cy, r: 4, class: "mean-dot" }));
  const of = new Map(places.map((place) => [place[2], place]));
  return {
    svg,
    near: (px, py) => nearest(places, px, py),
    at: (number) => of.get(number),
    mark: (number) => (of.has(number) ? [make("circle", { cx: of.get(number)[0], cy: of.get(number)[1], r: 6 })] : []),
  };
}

function numbers(knob, values, box) {
  return scale({ log: knob.scale === "log", low: Math.min(...values), high: Math.max(...values), a: box.left + 12, b: box.right - 8, count: 4 });
}

function categories(values, box) {
  const room = (box.right - box.left) / values.length, most = Math.max(3, Math.floor(room / 6.9));
  return {
    at: (value) => box.left + room * (value + 0.5), ticks: values.map((_, i) => i),
    text: (i) => (values[i].length > most ? `${values[i].slice(0, most - 1)}…` : values[i]),
  };
}

// ----------------------------------------------------------------------------------------------------------------- all

const DRAW = { front: drawFront, parallel: drawParallel, curves: drawCurves, marginal: drawMarginal };
for (const plot of document.querySelectorAll(".plot")) {
  chart(plot, (width) => DRAW[plot.dataset.chart](plot, width, Number(plot.dataset.of)));
}
document.documentElement.dataset.drawn = charts.length;
