// The card of one line chart: title, legend, the plot, reading it by pointer and keys, its table.
// spec: id, title, unit, meaning, formula,
//   series() → [{label, colour, x: {step, tokens, seconds}, y, recorded, dots, thin, run}],
//   and as wanted: legend(), band(), marks(), refs, cursor(), pick(x), log, canLog, zero, billion,
//   height, empty.

const CHARTS = [];

function lineChart(spec) {
  const plot = el("div", { class: "plot" });
  const legend = el("div", { class: "legend" });
  const note = el("span", { class: "note" });
  const table = el("div", { class: "scroll" });
  const details = el(
    "details",
    { ontoggle: () => details.open && fillTable() },
    el("summary", {}, "Table"),
    table,
  );
  let log = Boolean(spec.log),
    zoom = null;
  const logButton = spec.canLog
    ? el(
        "button",
        {
          type: "button",
          class: "small",
          "aria-pressed": String(log),
          title: "Logarithmic scale",
          onclick: () => {
            log = !log;
            logButton.setAttribute("aria-pressed", String(log));
            draw();
          },
        },
        "log",
      )
    : null;
  const figure = el(
    "figure",
    { class: "chart card", id: `chart-${spec.id}` },
    el(
      "figcaption",
      {},
      el(
        "h3",
        { title: spec.formula || null },
        spec.title,
        spec.unit ? el("span", { class: "unit" }, spec.unit) : null,
      ),
      logButton,
    ),
    spec.meaning ? el("p", { class: "meaning" }, spec.meaning) : null,
    legend,
    plot,
    el("div", { class: "under" }, note, details),
  );
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
    const refs = (spec.refs || []).map((r) =>
      el("span", { class: "key" }, el("span", { class: "swatch dashed" }), r.text),
    );
    legend.replaceChildren(
      ...(spec.legend
        ? spec.legend()
        : lines.length > 1 || lines.some((s) => s.always)
          ? [...lines.map(legendItem), ...refs]
          : []),
    );
    details.hidden = !points;
    if (logButton) logButton.hidden = !points;
    if (!points) {
      note.textContent = "";
      plot.append(
        el(
          "p",
          { class: "none" },
          all.length && !lines.length
            ? "Every run is switched off."
            : spec.empty || "Not recorded in this run.",
        ),
      );
      view = null;
      return;
    }
    const drawn = lines.reduce((n, s) => n + s.y.length, 0);
    note.title = "Drag over the chart to zoom, double-click or press Escape to undo";
    note.textContent =
      drawn < recorded
        ? `${count(drawn)} of ${count(recorded)} points drawn: least and greatest of each interval`
        : `${count(points)} points` +
          (points < recorded ? `, ${recorded - points} not finite` : "");
    if (details.open) fillTable();
    const width = Math.max(260, plot.clientWidth || 600);
    view = paintPlot(spec, lines, { width, log, zoom, label: summary(lines) });
    plot.append(
      view
        ? view.root
        : el("p", { class: "none" }, `This run did not record ${AXES[state.axis].unit}.`),
    );
    if (view) listen(view);
  }

  function legendItem(s) {
    return el(
      "span",
      { class: "key" },
      el("span", {
        class: s.dots ? "swatch dot" : "swatch",
        style: { background: s.colour, opacity: s.thin ? "0.65" : "1" },
      }),
      s.label,
    );
  }

  // Hover reads points; drag zooms, a double click undoes it; a click on a strip picks the step.
  function listen({ root, x0, x1, width, height }) {
    const place = (e) => {
      const px = Math.max(
        PAD.left,
        Math.min(width - PAD.right, e.clientX - root.getBoundingClientRect().left),
      );
      return { px, x: x0 + ((px - PAD.left) / (width - PAD.left - PAD.right)) * (x1 - x0) };
    };
    const box = sv("rect", {
      class: "zoom",
      y: PAD.top,
      height: height - PAD.top - PAD.bottom,
      visibility: "hidden",
    });
    let from = null;
    root.append(box);
    root.classList.toggle("pickable", Boolean(spec.pick));
    root.addEventListener("pointerdown", (e) => {
      if (e.pointerType === "mouse" && e.button === 0) from = place(e);
    });
    root.addEventListener("pointermove", (e) => {
      const here = place(e);
      if (from && e.buttons === 1) {
        box.setAttribute("x", Math.min(from.px, here.px));
        box.setAttribute("width", Math.abs(from.px - here.px));
        box.setAttribute("visibility", "visible");
      }
      point(here.x, e.clientX, e.clientY);
    });
    root.addEventListener("pointerup", (e) => {
      const start = from,
        here = place(e);
      from = null;
      if (start && Math.abs(start.px - here.px) > 8) {
        zoom = { axis: state.axis, from: Math.min(start.x, here.x), to: Math.max(start.x, here.x) };
        draw();
      } else if (spec.pick) spec.pick(here.x);
    });
    root.addEventListener("dblclick", () => {
      zoom = null;
      draw();
    });
    root.addEventListener("pointerleave", () => {
      from = null;
      box.setAttribute("visibility", "hidden");
      leave();
    });
    root.addEventListener("blur", leave);
    root.addEventListener("keydown", key);
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
    cross.setAttribute("x1", X(px));
    cross.setAttribute("x2", X(px));
    cross.setAttribute("visibility", "visible");
    const rows = [];
    lines.forEach((s, j) => {
      const i = hits[j],
        v = i < 0 ? null : s.y[i];
      const good = i >= 0 && ok(v);
      dots[j].setAttribute("visibility", good ? "visible" : "hidden");
      if (good) {
        dots[j].setAttribute("cx", X(s.x[state.axis][i]));
        dots[j].setAttribute("cy", Y(v));
      }
      const other = i >= 0 && s.x[state.axis][i] !== px;
      if (i >= 0)
        rows.push({
          colour: s.colour,
          label: s.label,
          value: v === null ? "not finite" : exact(v),
          note: other ? `at ${AXES[state.axis].text(s.x[state.axis][i])}` : "",
        });
    });
    const head = when(lines[main.j].x, main.i);
    showTip(clientX, clientY, head, rows);
    return `${head}: ${rows.map((r) => `${r.label} ${r.value} ${r.note}`).join(", ")}`;
  }

  function key(e) {
    const move = {
      ArrowLeft: -1,
      ArrowRight: 1,
      PageUp: -10,
      PageDown: 10,
      Home: -Infinity,
      End: Infinity,
    }[e.key];
    if (e.key === "Escape") {
      leave();
      if (zoom) {
        zoom = null;
        draw();
        plot.firstChild.focus();
      }
    }
    if (move === undefined || !view) return;
    e.preventDefault();
    const longest = view.lines.reduce((a, b) => (b.y.length > a.y.length ? b : a));
    const last = longest.y.length - 1;
    const start = view.key ?? (move === -1 || move === -10 ? last + 1 : -1);
    view.key = Math.max(0, Math.min(last, start + move));
    const x = longest.x[state.axis][view.key];
    const box = view.root.getBoundingClientRect();
    say(point(x, box.left + view.X(x), box.top + 60) || "");
  }

  function summary(lines) {
    const said = lines.slice(0, 8).map((s) => {
      const known = s.y.map((v, i) => [v, s.x.step[i]]).filter(([v]) => v !== null);
      const [least, greatest] = extent(known.map(([v]) => v));
      const at = ([v, step]) => `${brief(v, 4)} at step ${step}`;
      const range = `least ${brief(least, 4)}, greatest ${brief(greatest, 4)}`;
      return `${s.label}: ${at(known[0])}, ${at(known.at(-1))}, ${range}`;
    });
    const name = `${spec.title}${spec.unit ? `, ${spec.unit}` : ""}`;
    return [
      `${name}, against ${AXES[state.axis].unit}`,
      ...said,
      "Arrow keys read the points.",
    ].join(". ");
  }

  function fillTable() {
    const lines = shown().filter((s) => s.y.some((v) => v !== null));
    const rows = lines.flatMap((s) =>
      s.y.map((v, i) =>
        el(
          "tr",
          {},
          el("td", {}, s.label),
          ...["step", "tokens"].map((k) => el("td", { class: "num" }, exact(s.x[k][i]))),
          el("td", { class: "num" }, duration(s.x.seconds[i])),
          el("td", { class: "num" }, v === null ? "not finite" : exact(v)),
        ),
      ),
    );
    const heads = ["Line", "Step", "Tokens", "Time", spec.unit || "Value"];
    table.replaceChildren(tableOf(heads, rows));
  }

  CHARTS.push({ figure, draw });
  return figure;
}
