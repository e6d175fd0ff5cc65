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
  const table = barTable({
    id: "wire_layers",
    first: "Layer",
    head: (row) => String(row.layer),
    rows: () => RUNS[state.run].wire_layers,
    columns: [
      column("bytes", "Sub-tokens, counted", "var(--c0)", exact, "sent"),
      column("expected", "by formula", "var(--c1)", exact, "sent"),
      column("weights", "Weights and their gradients", "var(--c2)", exact, "weights"),
      column("wait", "Waiting, of the step", "var(--c6)", percent, "wait"),
    ],
  });
  return el("div", { class: "below" }, table);
}
