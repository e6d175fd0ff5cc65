// A table whose numbers have bars, for rows that were recorded as columns.
// spec: id, first (title of the row heads), head(row), rows(), columns (those of one `scale` share
//   the length of their bars; a scale of 1 is a whole one).

const column = (key, title, colour, text, scale) => ({ key, title, colour, text, scale });

function barTable(spec) {
  const m = DATA.metrics[spec.id];
  const plot = el("div", { class: "scroll tall" });
  const figure = el(
    "figure",
    { class: "chart card", id: `chart-${spec.id}` },
    el(
      "figcaption",
      {},
      el("h3", { title: m.formula }, m.title, el("span", { class: "unit" }, m.unit)),
    ),
    el("p", { class: "meaning" }, m.meaning),
    plot,
  );
  function draw() {
    const rows = spec.rows();
    figure.dataset.points = rows.length;
    if (!rows.length) {
      plot.replaceChildren(el("p", { class: "none" }, "Not recorded in this run."));
      return;
    }
    const shown = spec.columns.filter(({ key }) => rows.some((r) => r[key]));
    const sharing = (scale) => shown.filter((c) => c.scale === scale).map((c) => c.key);
    const most = (scale) =>
      scale === 1 ? 1 : Math.max(...sharing(scale).flatMap((key) => rows.map((r) => r[key])));
    const cell = (row, { key, colour, text, scale }) => {
      const width = `${(100 * row[key]) / (most(scale) || 1)}%`;
      const bar = el("div", { class: "bar", style: { width, background: colour } });
      return el("td", { class: "num" }, text(row[key]), bar);
    };
    const lines = rows.map((row) =>
      el(
        "tr",
        {},
        el("th", { scope: "row" }, spec.head(row)),
        shown.map((c) => cell(row, c)),
      ),
    );
    const heads = [spec.first, ...shown.map(({ title }) => title)];
    plot.replaceChildren(tableOf(heads, lines, { class: "bars" }));
  }
  CHARTS.push({ figure, draw });
  return figure;
}

const percent = (v) => `${fixed(100 * v, 2)} %`;

// Of the last evaluation: how often predictions of each probability were right.
function reliability() {
  return barTable({
    id: "reliability",
    first: "Bin",
    head: (row) => {
      const low = 10 * Math.min(9, Math.floor(10 * row.confidence));
      return `${low}–${low + 10} %`;
    },
    rows: () => RUNS[state.run].reliability,
    columns: [
      column("n", "Predictions", "var(--c2)", exact, "n"),
      column("confidence", "Mean probability", "var(--c0)", percent, 1),
      column("right", "Right", "var(--c1)", percent, 1),
    ],
  });
}
