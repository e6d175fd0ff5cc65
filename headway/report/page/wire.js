// What travels between ranks: counted bytes beside those of the formula, and what waiting costs.

function wire() {
  const lines = () =>
    RUNS.flatMap((run, i) => [
      ...one(run, i, "wire_bytes", many ? `${run.name} counted` : "counted"),
      ...one(run, i, "wire_expected", many ? `${run.name} by formula` : "by formula", {
        thin: true,
        ...(many ? {} : { colour: runColour(1) }),
      }),
    ]);
  const sent = metric("wire_bytes", { zero: true, height: 190, billion: "G", series: lines });
  return grid(lineChart(sent), lineChart(metric("wire_wait", { zero: true, height: 190 })));
}

// A row per layer, each number with a bar; means over the run.
function wireLayers() {
  const m = DATA.metrics.wire_layers;
  const plot = el("div", { class: "scroll tall" });
  const figure = el(
    "figure",
    { class: "chart card", id: "chart-wire_layers" },
    el(
      "figcaption",
      {},
      el("h3", { title: m.formula }, m.title, el("span", { class: "unit" }, m.unit)),
    ),
    el("p", { class: "meaning" }, m.meaning),
    plot,
  );
  const share = (v) => `${fixed(100 * v, 2)} %`;
  const columns = [
    ["bytes", "Sub-tokens, counted", "var(--c0)", exact],
    ["expected", "by formula", "var(--c1)", exact],
    ["weights", "Weights and their gradients", "var(--c2)", exact],
    ["wait", "Waiting, of the step", "var(--c6)", share],
  ];
  function draw() {
    const rows = RUNS[state.run].wire_layers;
    figure.dataset.points = rows.length;
    if (!rows.length) {
      plot.replaceChildren(el("p", { class: "none" }, "Not recorded in this run."));
      return;
    }
    const shown = columns.filter(([name]) => rows.some((r) => r[name]));
    const most = (name) => Math.max(...rows.map((r) => r[name]));
    const scale = { wait: most("wait"), weights: most("weights") };
    const sent = Math.max(most("bytes"), most("expected"));
    const cell = (row, [name, , colour, text]) => {
      const width = `${(100 * row[name]) / (scale[name] || sent || 1)}%`;
      const bar = el("div", { class: "bar", style: { width, background: colour } });
      return el("td", { class: "num" }, text(row[name]), bar);
    };
    const lines = rows.map((row) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, String(row.layer)),
        shown.map((c) => cell(row, c)),
      ),
    );
    const heads = ["Layer", ...shown.map(([, title]) => title)];
    plot.replaceChildren(tableOf(heads, lines, { class: "bars" }));
  }
  CHARTS.push({ figure, draw });
  return el("div", { class: "below" }, figure);
}
