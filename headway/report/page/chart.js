// One line chart: axes, lines, marks, a crosshair for pointer and keys, a table behind it.
// spec: id, title, unit, meaning, formula, series() → [{label, colour, x:{step,tokens,seconds}, y, recorded, dots, thin,
// dash, run}], and optionally band(), marks(), refs, cursor(), pick(x), log, canLog, zero, height, empty.

const CHARTS = [];
const PAD = { left: 56, right: 16, top: 12, bottom: 34 };

function lineChart(spec) {
  const plot = el("div", { class: "plot" });
  const legend = el("div", { class: "legend" });
  const note = el("span", { class: "note" });
  const table = el("div", { class: "scroll" });
  const details = el("details", { ontoggle: () => details.open && fillTable() }, el("summary", {}, "Table"), table);
  let log = Boolean(spec.log);
  const logButton = spec.canLog
    ? el("button", { type: "button", class: "small", "aria-pressed": String(log), title: "Logarithmic scale",
        onclick: () => { log = !log; logButton.setAttribute("aria-pressed", String(log)); draw(); } }, "log")
    : null;
  const figure = el("figure", { class: "chart card", id: `chart-${spec.id}` },
    el("figcaption", {},
      el("h3", { title: spec.formula || null }, spec.title, spec.unit ? el("span", { class: "unit" }, spec.unit) : null), logButton),
    spec.meaning ? el("p", { class: "meaning" }, spec.meaning) : null,
    legend, plot, el("div", { class: "under" }, note, details));
  let view = null;

  function shown() {
    return spec.series().filter((s) => s.run === undefined || !state.hidden.has(s.run));
  }

  function draw() {
    const all = spec.series();
    const lines = shown().filter((s) => s.y.some((v) => v !== null));
    const points = lines.reduce((n, s) => n + s.y.filter((v) => v !== null).length, 0);
    const recorded = lines.reduce((n, s) => n + s.recorded, 0);
    figure.dataset.points = points;
    figure.dataset.recorded = recorded;
    figure.dataset.axis = state.axis;
    plot.replaceChildren();
    legend.replaceChildren(...(spec.legend ? spec.legend() : lines.length > 1 || lines.some((s) => s.always) ? lines.map(legendItem) : []));
    details.hidden = !points;
    if (logButton) logButton.hidden = !points;
    if (!points) {
      note.textContent = "";
      plot.append(el("p", { class: "none" }, all.length && !lines.length ? "Every run is switched off." : spec.empty || "Not recorded in this run."));
      view = null;
      return;
    }
    const drawn = lines.reduce((n, s) => n + s.y.length, 0);
    note.textContent = drawn < recorded
      ? `${drawn.toLocaleString("en-US")} of ${recorded.toLocaleString("en-US")} points drawn: least and greatest of each interval`
      : `${points.toLocaleString("en-US")} points` + (points < recorded ? `, ${recorded - points} not finite` : "");
    if (details.open) fillTable();
    paint(lines);
  }

  function legendItem(s) {
    return el("span", { class: "key" }, el("span", { class: s.dots ? "swatch dot" : "swatch", style: { background: s.colour, opacity: s.thin ? "0.65" : "1" } }), s.label);
  }

  function paint(lines) {
    const width = Math.max(260, plot.clientWidth || 600), height = spec.height || 250;
    const xs = lines.flatMap((s) => s.x[state.axis]).filter((v) => v !== null);
    let ys = lines.flatMap((s) => s.y).filter((v) => v !== null);
    if (!xs.length) {
      plot.append(el("p", { class: "none" }, `This run did not record ${AXES[state.axis].unit}.`));
      return;
    }
    const useLog = log && ys.some((v) => v > 0);
    if (useLog) ys = ys.filter((v) => v > 0);
    for (const r of spec.refs || []) ys.push(r.y);
    let x0 = Math.min(...xs), x1 = Math.max(...xs);
    if (x0 === x1) { x0 -= 0.5; x1 += 0.5; } else if (x0 / x1 < 0.2) x0 = 0;
    let y0 = Math.min(...ys), y1 = Math.max(...ys);
    if (spec.zero && !useLog) y0 = Math.min(0, y0);
    if (y0 === y1) { const d = Math.abs(y0) * 0.1 || 0.5; y0 -= useLog ? 0 : d; y1 += d; }
    if (useLog) { const f = (y1 / y0) ** 0.05; y0 /= f; y1 *= f; }
    else { const d = (y1 - y0) * 0.06; y1 += d; if (!(spec.zero && y0 === 0)) y0 -= d; if (Math.min(...ys) >= 0) y0 = Math.max(0, y0); }
    const X = (v) => PAD.left + ((v - x0) / (x1 - x0)) * (width - PAD.left - PAD.right);
    const at = (v, a, b) => height - PAD.bottom - ((v - a) / (b - a)) * (height - PAD.top - PAD.bottom);
    const Y = useLog ? (v) => at(Math.log(v), Math.log(y0), Math.log(y1)) : (v) => at(v, y0, y1);
    const ok = (v) => v !== null && (!useLog || v > 0);

    const root = sv("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: "0", "aria-label": summary(lines) });
    const yTicks = useLog ? logTicks(y0, y1, 5) : ticks(y0, y1, height < 200 ? 4 : 5);
    for (const t of yTicks) root.append(
      sv("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: Y(t), y2: Y(t) }),
      sv("text", { class: "tick", x: PAD.left - 8, y: Y(t) + 4, "text-anchor": "end" }, brief(t)));
    for (const t of ticks(x0, x1, width / 95, state.axis)) root.append(
      sv("line", { class: "axis", x1: X(t), x2: X(t), y1: height - PAD.bottom, y2: height - PAD.bottom + 4 }),
      sv("text", { class: "tick", x: X(t), y: height - PAD.bottom + 17, "text-anchor": "middle" }, AXES[state.axis].text(t)));
    root.append(
      sv("line", { class: "axis", x1: PAD.left, x2: width - PAD.right, y1: height - PAD.bottom, y2: height - PAD.bottom }),
      sv("text", { class: "tick faint", x: width - PAD.right, y: height - 3, "text-anchor": "end" }, AXES[state.axis].unit));
    for (const r of spec.refs || []) root.append(
      sv("line", { class: "ref", x1: PAD.left, x2: width - PAD.right, y1: Y(r.y), y2: Y(r.y) }),
      sv("text", { class: "tick faint", x: width - PAD.right - 4, y: Y(r.y) - 5, "text-anchor": "end" }, r.text));
    const band = spec.band && spec.band();
    if (band) root.append(sv("path", { class: "band", d: bandPath(band, X, Y, ok), style: { fill: band.colour } }));
    for (const s of lines) {
      const px = s.x[state.axis];
      let d = "", pen = false;
      s.y.forEach((v, i) => {
        if (!ok(v) || px[i] === null) { pen = false; return; }
        d += `${pen ? "L" : "M"}${X(px[i]).toFixed(1)} ${Y(v).toFixed(1)}`;
        pen = true;
      });
      root.append(sv("path", { class: `line${s.thin ? " thin" : ""}`, d, "stroke-dasharray": s.dash || null, style: { stroke: s.colour }, "data-label": s.label }));
      // Dots for sparse lines, and for any point that stands alone between gaps.
      s.y.forEach((v, i) => {
        const alone = ok(v) && !ok(s.y[i - 1] ?? null) && !ok(s.y[i + 1] ?? null);
        if (ok(v) && px[i] !== null && ((s.dots && s.y.length <= 150) || alone))
          root.append(sv("circle", { class: "point", cx: X(px[i]), cy: Y(v), r: 3, style: { fill: s.colour } }));
      });
    }
    for (const m of (spec.marks && spec.marks()) || []) {
      const x = X(m.x);
      if (m.x === null || x < PAD.left - 1 || x > width) continue;
      root.append(sv("g", { class: `mark ${m.kind}` },
        sv("line", { x1: x, x2: x, y1: PAD.top + 7, y2: height - PAD.bottom }),
        sv("path", { d: `M${x - 5} ${PAD.top - 3}h10l-5 9z` }), sv("title", {}, m.text)));
    }
    if (spec.cursor && spec.cursor() !== null)
      root.append(sv("line", { class: "cursor", x1: X(spec.cursor()), x2: X(spec.cursor()), y1: PAD.top, y2: height - PAD.bottom }));
    const cross = sv("line", { class: "cross", y1: PAD.top, y2: height - PAD.bottom, visibility: "hidden" });
    const dots = lines.map((s) => sv("circle", { class: "hot", r: 4, visibility: "hidden", style: { fill: s.colour } }));
    root.append(cross, ...dots);
    plot.append(root);
    view = { lines, X, Y, ok, x0, x1, width, root, cross, dots, key: null };
    root.addEventListener("pointermove", (e) => {
      const box = root.getBoundingClientRect();
      const x = x0 + ((e.clientX - box.left - PAD.left) / (width - PAD.left - PAD.right)) * (x1 - x0);
      point(x, e.clientX, e.clientY);
    });
    root.addEventListener("pointerleave", leave);
    root.addEventListener("blur", leave);
    root.addEventListener("keydown", key);
    if (spec.pick) {
      root.classList.add("pickable");
      root.addEventListener("click", (e) => {
        const box = root.getBoundingClientRect();
        spec.pick(x0 + ((e.clientX - box.left - PAD.left) / (width - PAD.left - PAD.right)) * (x1 - x0));
      });
    }
  }

  function leave() {
    hideTip();
    if (!view) return;
    view.cross.setAttribute("visibility", "hidden");
    for (const d of view.dots) d.setAttribute("visibility", "hidden");
  }

  function point(x, clientX, clientY) {
    const { lines, X, Y, ok, cross, dots } = view;
    const hits = lines.map((s) => nearest(s.x[state.axis], x));
    const main = hits.reduce((best, i, j) => {
      if (i < 0) return best;
      const gap = Math.abs(lines[j].x[state.axis][i] - x);
      return best === null || gap < best.gap ? { j, i, gap } : best;
    }, null);
    if (!main) return;
    const px = lines[main.j].x[state.axis][main.i];
    cross.setAttribute("x1", X(px)); cross.setAttribute("x2", X(px)); cross.setAttribute("visibility", "visible");
    const rows = [];
    lines.forEach((s, j) => {
      const i = hits[j], v = i < 0 ? null : s.y[i];
      const good = i >= 0 && ok(v);
      dots[j].setAttribute("visibility", good ? "visible" : "hidden");
      if (good) { dots[j].setAttribute("cx", X(s.x[state.axis][i])); dots[j].setAttribute("cy", Y(v)); }
      const other = i >= 0 && s.x[state.axis][i] !== px;
      if (i >= 0) rows.push({ colour: s.colour, label: s.label, value: v === null ? "not finite" : exact(v), note: other ? `at ${AXES[state.axis].text(s.x[state.axis][i])}` : "" });
    });
    const s = lines[main.j].x, i = main.i;
    const head = [`step ${exact(s.step[i])}`, s.tokens[i] === null ? "" : `${brief(s.tokens[i])} tokens`, s.seconds[i] === null ? "" : duration(s.seconds[i])].filter(Boolean).join(" · ");
    showTip(clientX, clientY, head, rows);
    return `${head}: ${rows.map((r) => `${r.label} ${r.value} ${r.note}`).join(", ")}`;
  }

  function key(e) {
    const move = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[e.key];
    if (e.key === "Escape") leave();
    if (move === undefined || !view) return;
    e.preventDefault();
    const longest = view.lines.reduce((a, b) => (b.y.length > a.y.length ? b : a));
    const last = longest.y.length - 1;
    view.key = Math.max(0, Math.min(last, view.key === null ? (move < 0 ? last : 0) : view.key + move));
    const x = longest.x[state.axis][view.key];
    const box = view.root.getBoundingClientRect();
    say(point(x, box.left + view.X(x), box.top + 60) || "");
  }

  function summary(lines) {
    const said = lines.slice(0, 8).map((s) => {
      const known = s.y.map((v, i) => [v, s.x.step[i]]).filter(([v]) => v !== null);
      const values = known.map(([v]) => v);
      return `${s.label}: ${brief(known[0][0], 4)} at step ${known[0][1]}, ${brief(known.at(-1)[0], 4)} at step ${known.at(-1)[1]}, least ${brief(Math.min(...values), 4)}, greatest ${brief(Math.max(...values), 4)}`;
    });
    return `${spec.title}${spec.unit ? `, ${spec.unit}` : ""}, against ${AXES[state.axis].unit}. ${said.join(". ")}. Arrow keys read the points.`;
  }

  function fillTable() {
    const lines = shown().filter((s) => s.y.some((v) => v !== null));
    const rows = lines.flatMap((s) => s.y.map((v, i) => el("tr", {}, el("td", {}, s.label), ...["step", "tokens"].map((k) => el("td", { class: "num" }, exact(s.x[k][i]))),
      el("td", { class: "num" }, duration(s.x.seconds[i])), el("td", { class: "num" }, v === null ? "not finite" : exact(v)))));
    table.replaceChildren(el("table", {}, el("thead", {}, el("tr", {}, ...["Line", "Step", "Tokens", "Time", spec.unit || "Value"].map((t) => el("th", { scope: "col" }, t)))), el("tbody", {}, rows)));
  }

  function bandPath(band, X, Y, ok) {
    const forward = [], back = [];
    for (const [s, out] of [[band.high, forward], [band.low, back]])
      s.y.forEach((v, i) => ok(v) && s[state.axis][i] !== null && out.push(`${X(s[state.axis][i]).toFixed(1)} ${Y(v).toFixed(1)}`));
    return forward.length && back.length ? `M${forward.join("L")}L${back.reverse().join("L")}Z` : "";
  }

  CHARTS.push({ figure, draw });
  return figure;
}
