// Puts the page together: controls, sections, redraw.

const one = (run, i, name, label, more) => {
  const s = run.series[name];
  return s
    ? [{ label, run: i, colour: runColour(i), x: s, y: s.y, recorded: s.recorded, ...more }]
    : [];
};

// Training and validation of every run: one run in two colours, several runs in one colour each.
function learning(train, val) {
  return () =>
    RUNS.flatMap((run, i) =>
      many
        ? [
            ...one(run, i, train, `${run.name} training`, { thin: true }),
            ...one(run, i, val, `${run.name} validation`, { dots: true }),
          ]
        : [
            ...one(run, i, train, "training", { thin: true }),
            ...one(run, i, val, "validation", { dots: true, colour: runColour(1) }),
          ],
    );
}
const overlay = (name) => () => RUNS.flatMap((run, i) => one(run, i, name, run.name));

function metric(name, more) {
  const m = DATA.metrics[name];
  return {
    id: name,
    title: m.title,
    unit: m.unit,
    meaning: m.meaning,
    formula: m.formula,
    series: overlay(name),
    ...more,
  };
}
function marks(kinds) {
  return () =>
    RUNS.flatMap((run, i) =>
      state.hidden.has(i)
        ? []
        : run.events
            .filter((e) => kinds.includes(e.event))
            .map((e) => ({
              kind: e.event,
              x: along(run, e.step, state.axis),
              text: [many ? `${run.name}:` : "", `${e.event} at step ${e.step}`, e.detail]
                .filter(Boolean)
                .join(" "),
            })),
    );
}

function loadStrip() {
  const lines = () => {
    const run = RUNS[state.run];
    return [
      ["load_max", "greatest", "var(--high)"],
      ["load_p95", "95th percentile", "var(--mid)"],
      ["load_min", "least", "var(--low)"],
    ].flatMap(([name, label, colour]) => one(run, undefined, name, label, { colour }));
  };
  return lineChart({
    id: "load-strip",
    title: "Load over time",
    unit: "× fair share",
    series: lines,
    zero: true,
    height: 230,
    meaning: "Over all experts. The bar marks the step of the map; click to move it.",
    formula: DATA.metrics.load.formula,
    refs: [{ y: 1, text: "fair share" }],
    band: () => {
      const s = RUNS[state.run].series;
      return s.load_min && s.load_max
        ? { low: s.load_min, high: s.load_max, colour: "var(--band)" }
        : null;
    },
    cursor: () => {
      const run = RUNS[state.run];
      return run.load ? run.load[state.axis][frameOf(run)] : null;
    },
    pick: (x) => {
      const run = RUNS[state.run];
      if (run.load) {
        state.frame = nearest(run.load[state.axis], x);
        drawAll("frame");
      }
    },
    get empty() {
      return `No balance: ${noExperts(RUNS[state.run])}.`;
    },
  });
}

function entropyChart() {
  const m = DATA.metrics.entropy;
  const lines = () => {
    const run = RUNS[state.run],
      first = run.config["model.moe.n_dense_layers"] || 0,
      n = run.entropy.length;
    return run.entropy.map((s, i) => ({
      label: `layer ${first + s.layer}`,
      colour: layerColour(n > 1 ? i / (n - 1) : 0),
      x: s,
      y: s.y,
      recorded: s.recorded,
      always: true,
    }));
  };
  return lineChart({
    id: "entropy",
    title: m.title,
    unit: m.unit,
    meaning: m.meaning,
    formula: m.formula,
    series: lines,
    height: 230,
    get empty() {
      return `No routing: ${noExperts(RUNS[state.run])}.`;
    },
  });
}

function chooser() {
  if (!many) return null;
  const choice = el(
    "select",
    {
      id: "routing-run",
      onchange: () => {
        const old = RUNS[state.run].load;
        const step = old ? old.step[frameOf(RUNS[state.run])] : Infinity;
        state.run = Number(choice.value);
        const now = RUNS[state.run].load;
        state.frame = now && Number.isFinite(step) ? nearest(now.step, step) : Infinity;
        drawAll();
      },
    },
    RUNS.map((r, i) => el("option", { value: i }, r.name)),
  );
  return el(
    "p",
    { class: "lead" },
    el(
      "label",
      { for: "routing-run" },
      "Map, strip, entropy, reliability and the wire by layer show the run ",
    ),
    choice,
  );
}

function controls() {
  const axis = el(
    "div",
    { class: "segments", role: "radiogroup", "aria-label": "Horizontal axis" },
    Object.entries(AXES).map(([key, a]) =>
      el(
        "label",
        {},
        el("input", {
          type: "radio",
          name: "axis",
          value: key,
          checked: key === state.axis,
          onchange: () => {
            state.axis = key;
            drawAll();
          },
        }),
        el("span", {}, a.title),
      ),
    ),
  );
  const legend = many
    ? el(
        "div",
        { class: "runs", role: "group", "aria-label": "Runs shown" },
        RUNS.map((run, i) => {
          const button = el(
            "button",
            {
              type: "button",
              "aria-pressed": "true",
              "data-run": i,
              onclick: () => {
                if (state.hidden.has(i)) state.hidden.delete(i);
                else state.hidden.add(i);
                button.setAttribute("aria-pressed", String(!state.hidden.has(i)));
                drawAll();
              },
            },
            dot(i),
            run.name,
          );
          return button;
        }),
      )
    : null;
  const links = el(
    "div",
    { class: "links" },
    [
      ["learning", "Learning"],
      ["routing", "Routing"],
      ["samples", "Samples"],
      ["optimisation", "Optimisation"],
      ["speed", "Speed"],
      ["config", "Configuration"],
      ["provenance", "Provenance"],
    ].map(([id, text]) => el("a", { href: `#${id}` }, text)),
  );
  document.getElementById("controls").append(axis, legend || "", links);
}

function dark() {
  const chosen = document.documentElement.dataset.theme;
  return chosen ? chosen === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
}
function nameTheme() {
  document.getElementById("theme").textContent = dark() ? "Light" : "Dark";
}
function switchTheme() {
  document.documentElement.dataset.theme = dark() ? "light" : "dark";
  nameTheme();
}

// "frame": only what depends on the slider.
function drawAll(what) {
  hideTip();
  for (const chart of CHARTS)
    if (what !== "frame" || ["chart-load", "chart-load-strip"].includes(chart.figure.id))
      chart.draw();
}

const sparse = RUNS.some((r) => r.load || r.entropy.length || r.series.load_max);
headline();
controls();
// Names the runs once, and says how training and validation differ.
const learningLegend = !many
  ? null
  : () => [
      ...RUNS.flatMap((run, i) =>
        state.hidden.has(i) ? [] : [el("span", { class: "key" }, dot(i), run.name)],
      ),
      el("span", { class: "key faint" }, "thin: training, with dots: validation"),
    ];
const loss = {
  canLog: true,
  log: true,
  height: 300,
  legend: learningLegend,
  marks: marks(["resumed", "interrupted"]),
};
document.getElementById("main").append(
  section(
    "learning",
    "Learning",
    grid(
      lineChart({
        ...metric("val_bits_per_byte"),
        id: "bits-per-byte",
        title: "Bits/byte",
        meaning: "Loss per byte of text: comparable across tokenizers.",
        series: learning("bits_per_byte", "val_bits_per_byte"),
        ...loss,
      }),
      lineChart({
        ...metric("loss"),
        id: "loss",
        title: "Loss",
        meaning: "What the optimiser lowers; depends on the tokenizer.",
        series: learning("loss", "val_loss"),
        ...loss,
      }),
    ),
    ...(RUNS.some((r) => r.reliability.length)
      ? [
          grid(
            lineChart(metric("val_calibration_error", { zero: true, height: 230 })),
            reliability(),
          ),
        ]
      : []),
  ),
  section(
    "routing",
    "Routing",
    ...(sparse
      ? [
          chooser(),
          heatMap(),
          grid(loadStrip(), entropyChart()),
          grid(
            lineChart(metric("dead", { zero: true, height: 170 })),
            lineChart(metric("balance_loss", { height: 170 })),
          ),
        ]
      : [heatMap()]),
  ),
  samples(),
  section(
    "optimisation",
    "Optimisation",
    grid(
      lineChart(
        metric("grad_norm", {
          canLog: true,
          log: true,
          marks: marks(["skipped"]),
          meaning: "Global norm before clipping. A triangle marks a skipped step.",
        }),
      ),
      lineChart(metric("lr", { zero: true })),
    ),
  ),
  section(
    "speed",
    "Speed and memory",
    grid(
      lineChart(metric("tokens_per_second", { zero: true, height: 190 })),
      lineChart(metric("flops_per_second", { zero: true, height: 190, billion: "G" })),
      lineChart(metric("memory_gib", { zero: true, height: 190 })),
    ),
    ...(RUNS.some((r) => r.series.wire_bytes) ? [wire(), wireLayers()] : []),
  ),
  events(),
  configuration(),
  provenance(),
  definitions(),
);
document
  .getElementById("foot")
  .append("Made by headway. This file holds its data and asks nothing of the network.");
nameTheme();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", nameTheme);
drawAll();
let drawnWidth = innerWidth;
addEventListener("resize", () => {
  if (innerWidth !== drawnWidth) {
    drawnWidth = innerWidth;
    drawAll();
  }
});
addEventListener("scroll", hideTip, { passive: true });
document.documentElement.dataset.ready = "true";
