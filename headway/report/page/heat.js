// Expert load, one cell per expert, coloured by log2(load / fair share): blue below, neutral at 1,
// orange above.
// Cells of one colour are one path, so a map of 100,000 experts is as quick as one of 100.

const BINS = 32; // from 1/4 to 4 times the fair share, symmetric in the logarithm
const binOf = (v) => Math.max(0, Math.min(BINS, Math.round(((Math.log2(v) + 2) / 4) * BINS)));
function binColour(b) {
  const t = (b / BINS) * 2 - 1;
  const share = Math.round(Math.abs(t) ** 0.75 * 100);
  return `color-mix(in oklab, var(${t < 0 ? "--low" : "--high"}) ${share}%, var(--fair))`;
}

function heatMap() {
  const plot = el("div", { class: "plot" });
  const note = el("span", { class: "note" });
  const place = el("output", { for: "heat-step" });
  const slider = el("input", {
    id: "heat-step",
    type: "range",
    min: 0,
    step: 1,
    "aria-label": "Step of the heat map",
    oninput: () => {
      state.frame = Number(slider.value);
      drawAll("frame");
    },
  });
  const play = el("button", { type: "button", class: "small", onclick: toggle }, "Play");
  const sort = el("input", {
    type: "checkbox",
    id: "heat-sort",
    onchange: () => {
      state.sorted = sort.checked;
      draw();
    },
  });
  const bar = el(
    "div",
    { class: "heat-bar" },
    play,
    slider,
    place,
    el("label", { for: "heat-sort" }, sort, " sort by load"),
  );
  const rowsOut = el("div", { class: "scroll" });
  const details = el(
    "details",
    { ontoggle: () => details.open && fillTable() },
    el("summary", {}, "Table"),
    rowsOut,
  );
  const figure = el(
    "figure",
    { class: "chart card wide", id: "chart-load" },
    el(
      "figcaption",
      {},
      el(
        "h3",
        { title: DATA.metrics.load.formula },
        "Expert load",
        el("span", { class: "unit" }, "× fair share"),
      ),
    ),
    el(
      "p",
      { class: "meaning" },
      "A cell is an expert, a row one head of one sparse layer. 1.0 is a fair share, 0.0 dead.",
    ),
    bar,
    plot,
    legend(),
    el("div", { class: "under" }, note, details),
  );
  let timer = null,
    cell = { row: 0, column: 0 };

  function toggle() {
    if (timer !== null) {
      clearInterval(timer);
      timer = null;
      play.textContent = "Play";
      return;
    }
    const last = RUNS[state.run].load.frames.length - 1;
    if (frameOf(RUNS[state.run]) >= last) state.frame = -1;
    play.textContent = "Pause";
    timer = setInterval(
      () => {
        state.frame = Math.min(last, state.frame + 1);
        drawAll("frame");
        if (state.frame >= last) toggle();
      },
      Math.max(40, Math.min(200, 8000 / (last + 1))),
    );
  }

  function rowsOf(run) {
    const first = run.config["model.moe.n_dense_layers"] || 0;
    return run.load.frames[frameOf(run)].flatMap((heads, l) =>
      heads.map((loads, h) => {
        const cells = loads.map((v, e) => ({ v, e }));
        if (state.sorted) cells.sort((a, b) => a.v - b.v || a.e - b.e);
        return { layer: first + l, head: h, heads: heads.length, cells };
      }),
    );
  }

  function draw() {
    const run = RUNS[state.run];
    plot.replaceChildren();
    if (!run.load) {
      if (timer !== null) toggle();
      figure.dataset.points = 0;
      figure.classList.add("empty");
      note.textContent = "";
      plot.append(el("p", { class: "none" }, `No expert load was recorded: ${noExperts(run)}.`));
      return;
    }
    figure.classList.remove("empty");
    const frame = frameOf(run),
      frames = run.load.frames.length;
    slider.max = frames - 1;
    slider.value = frame;
    slider.disabled = play.disabled = frames < 2;
    const x = run.load;
    place.textContent = when(x, frame);
    slider.setAttribute("aria-valuetext", place.textContent);
    const rows = rowsOf(run);
    const values = rows.flatMap((r) => r.cells.map((c) => c.v)).filter((v) => v !== null);
    const dead = values.filter((v) => v === 0).length;
    figure.dataset.points = values.length;
    figure.dataset.frames = frames;
    figure.dataset.step = x.step[frame];
    figure.dataset.dead = dead;
    const [least, greatest] = extent(values).map((v) => brief(v));
    const range = `${dead} dead, least ${least}, greatest ${greatest}`;
    const steps = frames < x.recorded ? `${frames} of ${count(x.recorded)} recorded` : frames;
    note.textContent = `${count(values.length)} experts, ${range} · ${steps} steps on the slider`;
    if (details.open) fillTable();
    const where = `${plural(values.length, "expert")} in ${plural(rows.length, "row")}`;
    const label = `Expert load at step ${x.step[frame]}: ${where}, ${range} times the fair share`;
    paint(rows, `${label}. Arrow keys read the cells.`);
  }

  function paint(rows, label) {
    const left = rows.some((r) => r.heads > 1) ? 92 : 64,
      right = 8,
      top = 22,
      gap = 8;
    const width = Math.max(260, plot.clientWidth || 800);
    const columns = Math.max(...rows.map((r) => r.cells.length));
    const cw = (width - left - right) / columns;
    const layers = new Set(rows.map((r) => r.layer)).size;
    const ch = Math.max(2, Math.min(22, Math.floor((560 - layers * gap) / rows.length)));
    let y = top,
      before = null;
    for (const r of rows) {
      if (before !== null && r.layer !== before) y += r.heads > 1 ? gap : ch > 6 ? 2 : 0;
      r.y = y;
      y += ch;
      before = r.layer;
    }
    const height = y + 6,
      inset = cw > 6 && ch > 6 ? 0.75 : 0;
    const paths = new Map();
    let crosses = "";
    for (const r of rows)
      r.cells.forEach((c, i) => {
        const x = left + i * cw;
        const bin = c.v === null ? "unknown" : c.v === 0 ? "dead" : binOf(c.v);
        const [w, t] = [(cw - 2 * inset).toFixed(2), ch - 2 * inset];
        const box = `M${(x + inset).toFixed(2)} ${r.y + inset}h${w}v${t}h${-w}z`;
        paths.set(bin, (paths.get(bin) || "") + box);
        if (bin === "dead" && cw > 5 && ch > 5) {
          const mx = x + cw / 2,
            my = r.y + ch / 2,
            s = Math.min(cw, ch) * 0.22;
          const d = 2 * s;
          crosses += `M${mx - s} ${my - s}l${d} ${d}M${mx + s} ${my - s}l${-d} ${d}`;
        }
      });
    const root = sv("svg", {
      width,
      height,
      viewBox: `0 0 ${width} ${height}`,
      role: "img",
      tabindex: "0",
      "aria-label": label,
    });
    for (const [bin, d] of paths)
      root.append(
        sv("path", {
          class: `cells ${bin}`,
          d,
          style: {
            fill: bin === "dead" ? "var(--dead)" : bin === "unknown" ? "none" : binColour(bin),
          },
        }),
      );
    if (crosses) root.append(sv("path", { class: "crosses", d: crosses }));
    const every = Math.ceil(34 / cw);
    root.append(
      sv(
        "text",
        { class: "tick faint", x: left - 8, y: top - 8, "text-anchor": "end" },
        state.sorted ? "rank" : "expert",
      ),
    );
    for (let e = 0; e < columns; e += every)
      root.append(
        sv(
          "text",
          { class: "tick", x: left + (e + 0.5) * cw, y: top - 8, "text-anchor": "middle" },
          String(e),
        ),
      );
    let labelled = -Infinity;
    rows.forEach((r, i) => {
      if (i === 0 || rows[i - 1].layer !== r.layer) {
        const mid = r.y + Math.min(r.heads * ch, height) / 2 + 4;
        if (mid - labelled >= 12) {
          root.append(sv("text", { class: "tick strong", x: 4, y: mid }, `layer ${r.layer}`));
          labelled = mid;
        }
      }
      if (r.heads > 1 && ch >= 11)
        root.append(
          sv(
            "text",
            { class: "tick faint", x: left - 8, y: r.y + ch / 2 + 4, "text-anchor": "end" },
            `h${r.head}`,
          ),
        );
    });
    const hot = sv("rect", { class: "hot-cell", visibility: "hidden", width: cw, height: ch });
    root.append(hot);
    plot.append(root);
    const show = (r, i, clientX, clientY) => {
      const c = r.cells[i];
      hot.setAttribute("x", left + i * cw);
      hot.setAttribute("y", r.y);
      hot.setAttribute("visibility", "visible");
      const where = `layer ${r.layer}${r.heads > 1 ? ` · head ${r.head}` : ""} · expert ${c.e}`;
      const colour = c.v === 0 ? "var(--dead)" : c.v === null ? "none" : binColour(binOf(c.v));
      showTip(clientX, clientY, where, [
        {
          colour,
          label: c.v === 0 ? "dead" : "load",
          value: c.v === null ? "not finite" : `${exact(c.v)} × fair share`,
        },
      ]);
      return `${where}: ${c.v === 0 ? "dead" : exact(c.v)}`;
    };
    const leave = () => {
      hideTip();
      hot.setAttribute("visibility", "hidden");
    };
    root.addEventListener("pointermove", (e) => {
      const box = root.getBoundingClientRect(),
        py = e.clientY - box.top,
        i = Math.floor((e.clientX - box.left - left) / cw);
      const r = rows.find((q) => py >= q.y && py < q.y + ch);
      if (r && i >= 0 && i < r.cells.length) show(r, i, e.clientX, e.clientY);
      else leave();
    });
    root.addEventListener("pointerleave", leave);
    root.addEventListener("blur", leave);
    root.addEventListener("keydown", (e) => {
      const move = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] }[
        e.key
      ];
      if (!move) return;
      e.preventDefault();
      cell.row = Math.max(0, Math.min(rows.length - 1, cell.row + move[0]));
      cell.column = Math.max(0, Math.min(rows[cell.row].cells.length - 1, cell.column + move[1]));
      const box = root.getBoundingClientRect();
      say(
        show(
          rows[cell.row],
          cell.column,
          box.left + left + cell.column * cw,
          box.top + rows[cell.row].y,
        ),
      );
    });
  }

  function fillTable() {
    const run = RUNS[state.run];
    if (!run.load) return;
    const heads = ["Layer", "Head", state.sorted ? "Load, ascending" : "Load of expert 0, 1 …"];
    const rows = rowsOf(run).map((r) => {
      const loads = r.cells.map((c) => exact(c.v)).join("  ");
      const where = [r.layer, r.head].map((n) => el("td", {}, String(n)));
      return el("tr", {}, where, el("td", { class: "cells-text" }, loads));
    });
    rowsOut.replaceChildren(tableOf(heads, rows));
  }

  CHARTS.push({ figure, draw });
  return figure;
}

function legend() {
  const bars = Array.from({ length: BINS + 1 }, (_, b) =>
    sv("rect", { x: 70 + b * 7, y: 4, width: 7.5, height: 12, style: { fill: binColour(b) } }),
  );
  const at = (v) => 70 + binOf(v) * 7 + 3.5;
  return el(
    "div",
    { class: "scale" },
    sv(
      "svg",
      {
        width: 330,
        height: 36,
        viewBox: "0 0 330 36",
        role: "img",
        "aria-label":
          "Colours: dead experts have a cross; blue is below, orange above the fair share",
      },
      sv("rect", { x: 16, y: 4, width: 22, height: 12, style: { fill: "var(--dead)" } }),
      sv("path", { class: "crosses", d: "M23.5 6.5l7 7M30.5 6.5l-7 7" }),
      sv("text", { class: "tick", x: 27, y: 31, "text-anchor": "middle" }, "dead"),
      bars,
      [
        [0.25, "≤ ¼"],
        [0.5, "½"],
        [1, "1 fair"],
        [2, "2"],
        [4, "≥ 4"],
      ].map(([v, t]) => sv("text", { class: "tick", x: at(v), y: 31, "text-anchor": "middle" }, t)),
    ),
  );
}

function frameOf(run) {
  return run.load ? Math.max(0, Math.min(run.load.frames.length - 1, state.frame)) : 0;
}
function noExperts(run) {
  return run.config["model.moe.kind"] === "dense"
    ? "this run is dense (model.moe.kind = dense)"
    : "no interval of this run is complete";
}
