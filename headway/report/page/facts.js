// How a run was made: configuration, recipe, provenance; and what the numbers mean.

function plain(v) {
  if (v === undefined) return "–";
  return Array.isArray(v)
    ? v.length
      ? v.join(", ")
      : "(empty)"
    : v === ""
      ? "(empty)"
      : String(v);
}

function configuration() {
  const keys = [...new Set(RUNS.flatMap((r) => Object.keys(r.config)))];
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  const rows = keys.map((key) => {
    const values = RUNS.map((r) => r.config[key]),
      usual = DATA.defaults[key];
    const differs = values.some((v) => !same(v, values[0])),
      changed = values.some((v) => !same(v, usual));
    const row = el(
      "tr",
      { class: differs ? "differs" : changed ? "changed" : "", "data-key": key },
      el("th", { scope: "row" }, key),
      values.map((v) => el("td", { class: same(v, usual) ? "" : "set" }, plain(v))),
      el("td", { class: "faint" }, plain(usual)),
    );
    return { row, differs, changed, text: `${key} ${values.map(plain).join(" ")}`.toLowerCase() };
  });
  const count = el("span", { class: "note", "aria-live": "polite" });
  const search = el("input", {
    type: "search",
    id: "config-search",
    placeholder: "search, such as top_k",
    "aria-label": "Search the configuration",
    oninput: filter,
  });
  const choice = el(
    "select",
    { id: "config-filter", "aria-label": "Which options", onchange: filter },
    el("option", { value: "all" }, "all options"),
    el("option", { value: "changed" }, "not the default"),
    many ? el("option", { value: "differs" }, "different between runs") : null,
  );
  if (many) choice.value = "differs";
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const r of rows) {
      r.row.hidden =
        !words.every((w) => r.text.includes(w)) || (choice.value !== "all" && !r[choice.value]);
      n += !r.row.hidden;
    }
    count.textContent = `${n} of ${rows.length} options`;
  }
  filter();
  const derived = [
    ...new Set(
      RUNS.flatMap((r) =>
        Object.values(r.derived).length
          ? Object.entries(r.derived).map(([k, v]) => `${k}: ${v}`)
          : [],
      ),
    ),
  ];
  return section(
    "config",
    "Configuration",
    el(
      "details",
      { class: "card", open: true },
      el("summary", {}, "Resolved configuration"),
      el("div", { class: "heat-bar" }, search, choice, count),
      el(
        "div",
        { class: "scroll tall" },
        el(
          "table",
          { id: "config-table" },
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              el("th", { scope: "col" }, "Option"),
              RUNS.map((r, i) =>
                el("th", { scope: "col" }, many ? dot(i) : null, many ? r.name : "Value"),
              ),
              el("th", { scope: "col" }, "Default"),
            ),
          ),
          el(
            "tbody",
            {},
            rows.map((r) => r.row),
          ),
        ),
      ),
    ),
    derived.length
      ? el(
          "details",
          { class: "card" },
          el("summary", {}, "Derived values"),
          el(
            "ul",
            {},
            derived.map((d) => el("li", {}, d)),
          ),
        )
      : null,
    RUNS.filter((r) => r.recipe_source).map((r) =>
      el(
        "details",
        { class: "card recipe" },
        el("summary", {}, many ? `Recipe of ${r.name}` : "Recipe"),
        el("pre", { tabindex: "0" }, r.recipe_source),
      ),
    ),
  );
}

function provenance() {
  const pairs = RUNS.map((r) => ({
    commit: r.commit + (r.dirty ? " with uncommitted changes" : ""),
    validated_on: r.validation.sentence || null,
    leaks: r.leak.sentence || null,
    "bits/byte": r.approximate.join(" ") || null,
    ...r.versions,
    ...r.machine,
  }));
  const keys = [...new Set(pairs.flatMap(Object.keys))];
  return section(
    "provenance",
    "Provenance",
    el(
      "div",
      { class: "scroll card" },
      el(
        "table",
        { id: "provenance-table" },
        many
          ? el(
              "thead",
              {},
              el(
                "tr",
                {},
                el("th", {}),
                RUNS.map((r, i) => el("th", { scope: "col" }, dot(i), r.name)),
              ),
            )
          : null,
        el(
          "tbody",
          {},
          keys.map((k) =>
            el(
              "tr",
              { class: pairs.some((p) => p[k] !== pairs[0][k]) ? "differs" : "" },
              el("th", { scope: "row" }, k.replace("_gib", " (GiB)").replaceAll("_", " ")),
              pairs.map((p) => el("td", {}, p[k] ?? "–")),
            ),
          ),
        ),
      ),
    ),
  );
}

function definitions() {
  return section(
    "definitions",
    "What the numbers mean",
    el(
      "details",
      { class: "card" },
      el("summary", {}, "Every metric, its unit and formula"),
      el(
        "div",
        { class: "scroll" },
        el(
          "table",
          {},
          el(
            "thead",
            {},
            el(
              "tr",
              {},
              ["Name in metrics.jsonl", "Unit", "Formula", "Meaning"].map((t) =>
                el("th", { scope: "col" }, t),
              ),
            ),
          ),
          el(
            "tbody",
            {},
            Object.values(DATA.metrics).map((m) =>
              el(
                "tr",
                {},
                el("th", { scope: "row" }, m.name),
                el("td", {}, m.unit || "–"),
                el("td", {}, m.formula),
                el("td", {}, m.meaning),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}
