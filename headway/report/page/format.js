"use strict";
// Elements, numbers and ticks. Text enters the page only as text nodes, never as markup.

const SVG = "http://www.w3.org/2000/svg";
const DATA = JSON.parse(document.getElementById("data").textContent);
const RUNS = DATA.runs;
const state = { axis: "step", hidden: new Set(), run: 0, frame: Infinity, sorted: false };

function fill(node, attrs, children) {
  for (const [key, value] of Object.entries(attrs || {})) {
    if (value === null || value === undefined || value === false) continue;
    if (key === "style") for (const [k, v] of Object.entries(value)) node.style.setProperty(k, v);
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value === true ? "" : value);
  }
  node.append(...children.flat().filter((c) => c !== null && c !== undefined));
  return node;
}
const el = (tag, attrs, ...children) => fill(document.createElement(tag), attrs, children);
const sv = (tag, attrs, ...children) => fill(document.createElementNS(SVG, tag), attrs, children);

// As exact as recorded (7 significant digits), without noise.
function exact(v) {
  if (v === null || v === undefined) return "–";
  const a = Math.abs(v);
  if (a !== 0 && (a < 1e-4 || a >= 1e15)) return v.toExponential(3).replace(/\.?0+e/, "e");
  return v.toLocaleString("en-US", { maximumSignificantDigits: 7 });
}
function brief(v, digits = 3, billion = "B") {
  if (v === null || v === undefined) return "–";
  const a = Math.abs(v);
  for (const [size, letter] of [
    [1e12, "T"],
    [1e9, billion],
    [1e6, "M"],
    [1e3, "k"],
  ])
    if (a >= size * 0.99999) return Number((v / size).toPrecision(digits)) + letter;
  if (a !== 0 && a < 1e-3) return v.toExponential(digits - 1).replace(/\.?0+e/, "e");
  return String(Number(v.toPrecision(digits)));
}
function fixed(v, digits) {
  return v === null || v === undefined ? "–" : v.toFixed(digits);
}
function duration(s) {
  if (s === null || s === undefined) return "–";
  const pad = (n) => String(Math.floor(n)).padStart(2, "0");
  if (s < 60) return `${Number(s.toFixed(s < 10 ? 1 : 0))}s`;
  s = Math.round(s);
  if (s < 3600) return `${Math.floor(s / 60)}m${pad(s % 60)}s`;
  if (s < 86400) return `${Math.floor(s / 3600)}h${pad((s % 3600) / 60)}m`;
  return `${Math.floor(s / 86400)}d${pad((s % 86400) / 3600)}h`;
}
const AXES = {
  step: { title: "Steps", unit: "optimiser steps", text: brief },
  tokens: { title: "Tokens", unit: "tokens", text: brief },
  seconds: { title: "Time", unit: "training time", text: duration },
};
const SECONDS = [
  1, 2, 5, 10, 15, 30, 60, 120, 300, 600, 900, 1800, 3600, 7200, 14400, 21600, 43200,
];

// What is counted has no half.
const WHOLE = new Set(["step", "tokens", "experts"]);

// `axis`: a key of AXES, or the unit of an ordinate.
function ticks(lo, hi, n, axis) {
  if (!(hi > lo)) return [lo];
  const raw = (hi - lo) / n;
  const power = 10 ** Math.floor(Math.log10(raw));
  const fits = (s) => s >= raw * 0.8 && (Number.isInteger(s) || !WHOLE.has(axis));
  let step = [1, 2, 2.5, 5, 10].map((m) => m * power).find(fits) || 1;
  if (axis === "seconds" && raw > 1)
    step = SECONDS.find((s) => s >= raw) || Math.ceil(raw / 86400) * 86400;
  const out = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++)
    out.push(Number((i * step).toPrecision(12)));
  return out;
}
// All labels of one axis in one notation: 0.001 beside 0.0005, not beside 5e-4.
function tickText(ticks, billion) {
  const decimal = Math.max(...ticks.map(Math.abs)) >= 1e-3;
  return (v) =>
    decimal && Math.abs(v) < 1e-3 && Math.abs(v) >= 1e-5
      ? String(Number(v.toPrecision(3)))
      : brief(v, 3, billion);
}
function logTicks(lo, hi, n) {
  const out = [];
  for (const parts of [[1], [1, 3], [1, 2, 5], [1, 1.5, 2, 3, 5, 7]]) {
    out.length = 0;
    for (let p = Math.floor(Math.log10(lo)); p <= Math.log10(hi); p++)
      for (const m of parts) {
        const t = Number((m * 10 ** p).toPrecision(3));
        if (t >= lo * 0.999 && t <= hi * 1.001) out.push(t);
      }
    if (out.length >= Math.min(4, n)) break;
  }
  return out.length >= 3 ? out : ticks(lo, hi, n);
}

// Position of a step on the chosen axis: events carry only their step.
function along(run, step, axis) {
  if (axis === "step") return step;
  const s = run.series.loss || Object.values(run.series)[0];
  if (!s) return null;
  let i = s.step.findIndex((v) => v >= step);
  if (i < 0) i = s.step.length - 1;
  const a = Math.max(0, i - 1);
  const [x0, x1, y0, y1] = [s.step[a], s.step[i], s[axis][a], s[axis][i]];
  if (y0 === null || y1 === null) return null;
  return x1 === x0 ? y1 : y0 + ((Math.min(step, x1) - x0) / (x1 - x0)) * (y1 - y0);
}
// Index of the value nearest to x in an ascending list that may hold nulls.
function nearest(xs, x) {
  let best = -1,
    gap = Infinity;
  for (let i = 0; i < xs.length; i++) {
    if (xs[i] === null) continue;
    const g = Math.abs(xs[i] - x);
    if (g < gap) {
      gap = g;
      best = i;
    }
  }
  return best;
}

const count = (n) => n.toLocaleString("en-US");
const plural = (n, word) => `${n.toLocaleString("en-US")} ${word}${n === 1 ? "" : "s"}`;
const runColour = (i) => `var(--c${i % 8})`;
// A sequential scale for layers, light enough and dark enough in both themes.
function layerColour(t) {
  return t < 0.5
    ? `color-mix(in oklab, var(--seq1) ${t * 200}%, var(--seq0))`
    : `color-mix(in oklab, var(--seq2) ${t * 200 - 100}%, var(--seq1))`;
}

// Least and greatest; a spread argument list would overflow the stack on a large map.
function extent(values) {
  let low = Infinity,
    high = -Infinity;
  for (const v of values) {
    if (v < low) low = v;
    if (v > high) high = v;
  }
  return [low, high];
}
// "step 600 · 2.46M tokens · 2m45s" of entry i of columns that may hold nulls.
function when(x, i) {
  const tokens = x.tokens[i] === null ? "" : `${brief(x.tokens[i])} tokens`;
  const time = x.seconds[i] === null ? "" : duration(x.seconds[i]);
  return [`step ${exact(x.step[i])}`, tokens, time].filter(Boolean).join(" · ");
}
function tableOf(heads, rows, attrs) {
  const head = heads.map((t) => el("th", { scope: "col" }, t));
  return el("table", attrs, el("thead", {}, el("tr", {}, head)), el("tbody", {}, rows));
}

const tip = document.getElementById("tip");
function showTip(x, y, head, rows) {
  tip.replaceChildren(
    el("div", { class: "tip-head" }, head),
    ...rows.map((r) =>
      el(
        "div",
        { class: "tip-row" },
        el("span", { class: "swatch", style: { background: r.colour } }),
        el("span", {}, r.label),
        el("b", {}, r.value),
        r.note ? el("i", {}, r.note) : null,
      ),
    ),
  );
  tip.hidden = false;
  const w = tip.offsetWidth,
    h = tip.offsetHeight;
  const left = x + 16 + w > innerWidth ? x - w - 16 : x + 16;
  tip.style.left = `${Math.max(4, left)}px`;
  tip.style.top = `${Math.max(4, Math.min(y - h / 2, innerHeight - h - 4))}px`;
}
function hideTip() {
  tip.hidden = true;
}
function say(text) {
  document.getElementById("live").textContent = text;
}
