// The picture of a line chart: scales, axes, lines, marks. It reads nothing back; chart.js does.

const PAD = { left: 56, right: 16, top: 12, bottom: 34 };

// Returns {root, X, Y, …}, or null when no line has a place on the chosen axis.
function paintPlot(spec, lines, { width, log, zoom, label }) {
  const height = spec.height || 250;
  const xs = lines.flatMap((s) => s.x[state.axis]).filter((v) => v !== null);
  const inZoom = (x) => !zoom || zoom.axis !== state.axis || (x >= zoom.from && x <= zoom.to);
  let ys = lines.flatMap((s) => s.y.filter((v, i) => v !== null && inZoom(s.x[state.axis][i])));
  if (!ys.length) ys = [1];
  if (!xs.length) return null;
  const useLog = log && ys.some((v) => v > 0);
  if (useLog) ys = ys.filter((v) => v > 0);
  for (const r of spec.refs || []) ys.push(r.y);
  let [x0, x1] = extent(xs);
  if (x0 === x1) {
    x0 -= 0.5;
    x1 += 0.5;
  } else if (x0 / x1 < 0.2) x0 = 0;
  if (zoom && zoom.axis === state.axis) {
    x0 = zoom.from;
    x1 = zoom.to;
  }
  let [y0, y1] = extent(ys);
  const positive = y0 >= 0;
  if (spec.zero && !useLog) y0 = Math.min(0, y0);
  if (y0 === y1) {
    const d = Math.abs(y0) * 0.1 || 0.5;
    y0 -= useLog ? 0 : d;
    y1 += d;
  }
  if (useLog) {
    const f = (y1 / y0) ** 0.05;
    y0 /= f;
    y1 *= f;
  } else {
    const d = (y1 - y0) * 0.06;
    y1 += d;
    if (!(spec.zero && y0 === 0)) y0 -= d;
    if (positive) y0 = Math.max(0, y0);
  }
  const X = (v) => PAD.left + ((v - x0) / (x1 - x0)) * (width - PAD.left - PAD.right);
  const at = (v, a, b) =>
    height - PAD.bottom - ((v - a) / (b - a)) * (height - PAD.top - PAD.bottom);
  const Y = useLog ? (v) => at(Math.log(v), Math.log(y0), Math.log(y1)) : (v) => at(v, y0, y1);
  const ok = (v) => v !== null && (!useLog || v > 0);

  const root = sv("svg", {
    width,
    height,
    viewBox: `0 0 ${width} ${height}`,
    role: "img",
    tabindex: "0",
    "aria-label": label,
  });
  const yTicks = useLog ? logTicks(y0, y1, 5) : ticks(y0, y1, height < 200 ? 4 : 5, spec.unit);
  const yText = tickText(yTicks, spec.billion);
  for (const t of yTicks)
    root.append(
      sv("line", { class: "grid", x1: PAD.left, x2: width - PAD.right, y1: Y(t), y2: Y(t) }),
      sv(
        "text",
        { class: "tick", x: PAD.left - 8, y: Y(t) + 4, "text-anchor": "end" },
        yText(t),
      ),
    );
  for (const t of ticks(x0, x1, width / 95, state.axis))
    root.append(
      sv("line", {
        class: "axis",
        x1: X(t),
        x2: X(t),
        y1: height - PAD.bottom,
        y2: height - PAD.bottom + 4,
      }),
      sv(
        "text",
        { class: "tick", x: X(t), y: height - PAD.bottom + 17, "text-anchor": "middle" },
        AXES[state.axis].text(t),
      ),
    );
  root.append(
    sv("line", {
      class: "axis",
      x1: PAD.left,
      x2: width - PAD.right,
      y1: height - PAD.bottom,
      y2: height - PAD.bottom,
    }),
    sv(
      "text",
      { class: "tick faint", x: width - PAD.right, y: height - 3, "text-anchor": "end" },
      AXES[state.axis].unit,
    ),
  );
  for (const r of spec.refs || [])
    root.append(
      sv("line", { class: "ref", x1: PAD.left, x2: width - PAD.right, y1: Y(r.y), y2: Y(r.y) }),
    );
  const band = spec.band && spec.band();
  const clip = `clip-${spec.id}`;
  root.append(
    sv(
      "clipPath",
      { id: clip },
      sv("rect", { x: PAD.left - 4, y: 0, width: width - PAD.left - PAD.right + 8, height }),
    ),
  );
  const inside = sv("g", { "clip-path": `url(#${clip})` });
  if (band)
    inside.append(
      sv("path", { class: "band", d: bandPath(band, X, Y, ok), style: { fill: band.colour } }),
    );
  for (const s of lines) inside.append(...linePath(s, X, Y, ok));
  root.append(inside);
  const marks = ((spec.marks && spec.marks()) || []).filter(
    (m) => m.x !== null && m.x >= x0 && m.x <= x1,
  );
  root.append(...markLines(marks, X, width, height));
  if (spec.cursor && spec.cursor() !== null)
    root.append(
      sv("line", {
        class: "cursor",
        x1: X(spec.cursor()),
        x2: X(spec.cursor()),
        y1: PAD.top,
        y2: height - PAD.bottom,
      }),
    );
  const cross = sv("line", {
    class: "cross",
    y1: PAD.top,
    y2: height - PAD.bottom,
    visibility: "hidden",
  });
  const dots = lines.map((s) =>
    sv("circle", { class: "hot", r: 4, visibility: "hidden", style: { fill: s.colour } }),
  );
  root.append(cross, ...dots);
  return { lines, X, Y, ok, x0, x1, width, height, root, cross, dots, key: null };
}

function linePath(s, X, Y, ok) {
  const px = s.x[state.axis];
  let d = "",
    pen = false;
  s.y.forEach((v, i) => {
    if (!ok(v) || px[i] === null) {
      pen = false;
      return;
    }
    d += `${pen ? "L" : "M"}${X(px[i]).toFixed(1)} ${Y(v).toFixed(1)}`;
    pen = true;
  });
  const out = [
    sv("path", {
      class: `line${s.thin ? " thin" : s.y.length > 400 ? " dense" : ""}`,
      d,
      style: { stroke: s.colour },
      "data-label": s.label,
    }),
  ];
  // Dots for sparse lines, and for any point that stands alone between gaps.
  s.y.forEach((v, i) => {
    const alone = ok(v) && !ok(s.y[i - 1] ?? null) && !ok(s.y[i + 1] ?? null);
    if (ok(v) && px[i] !== null && ((s.dots && s.y.length <= 150) || alone))
      out.push(
        sv("circle", {
          class: "point",
          cx: X(px[i]),
          cy: Y(v),
          r: 3,
          style: { fill: s.colour },
        }),
      );
  });
  return out;
}

// Events: a triangle and a dotted line, named when there are few.
function markLines(marks, X, width, height) {
  const named = new Map(marks.map((m) => [m.x, m])); // several at one place: the last names it
  return marks.map((m) => {
    const x = X(m.x),
      left = x > width - 90;
    return sv(
      "g",
      { class: `mark ${m.kind}` },
      sv("line", { x1: x, x2: x, y1: PAD.top + 7, y2: height - PAD.bottom }),
      sv("path", { d: `M${x - 5} ${PAD.top - 3}h10l-5 9z` }),
      named.size <= 3 && named.get(m.x) === m
        ? sv(
            "text",
            { x: x + (left ? -9 : 9), y: PAD.top + 6, "text-anchor": left ? "end" : "start" },
            m.kind,
          )
        : null,
      sv("title", {}, m.text),
    );
  });
}

function bandPath(band, X, Y, ok) {
  const forward = [],
    back = [];
  for (const [s, out] of [
    [band.high, forward],
    [band.low, back],
  ])
    s.y.forEach(
      (v, i) =>
        ok(v) &&
        s[state.axis][i] !== null &&
        out.push(`${X(s[state.axis][i]).toFixed(1)} ${Y(v).toFixed(1)}`),
    );
  return forward.length && back.length ? `M${forward.join("L")}L${back.reverse().join("L")}Z` : "";
}
