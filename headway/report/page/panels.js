// The parts of the page that are not charts: headline, samples, events, configuration, provenance, definitions.

const many = RUNS.length > 1;
const dot = (i) => el("span", { class: "swatch dot", style: { background: runColour(i) } });

function describe(run) {
  const c = run.config, kind = c["model.moe.kind"];
  const names = { dense: "dense", moe: "mixture of experts", latent: "LatentMoE", multi_head_latent: "Multi-Head LatentMoE" };
  if (!kind) return "";
  const parts = [names[kind] || kind, `${c["model.n_layers"]} layers × ${c["model.d_model"]}`];
  if (kind !== "dense") {
    parts.push(`${kind === "multi_head_latent" ? `${c["model.moe.n_heads"]} heads × ` : ""}${c["model.moe.n_experts"]} experts, top ${c["model.moe.top_k"]}`);
  }
  parts.push(c["optim.name"], `${c["data.source"]}`, `seed ${c["run.seed"]}`);
  return parts.filter((p) => p && !p.includes("undefined")).join(" · ");
}

function progress(run) {
  const h = run.headline, last = run.events.at(-1);
  if (h.step === null || h.step === undefined) return "no step recorded yet";
  const of = h.steps ? ` of ${h.steps.toLocaleString("en-US")}` : "";
  const done = h.steps && h.step >= h.steps;
  const ended = last && last.event !== "resumed" && last.event !== "skipped" && last.step >= h.step - 1;
  return `${h.step.toLocaleString("en-US")}${of} steps${done ? "" : ended ? `, ${last.event}` : h.steps ? ", not finished" : ""}`;
}

// [title, value, remark] of one run; the same list makes the tiles and the table of several runs.
function headlines(run) {
  const h = run.headline;
  const balance = h.load_max === null ? "–" : `${fixed(h.load_min, 2)} · ${fixed(h.load_p95, 2)} · ${fixed(h.load_max, 2)}`;
  const bits = h.val_last === null ? "–" : h.evaluations > 1 ? `${fixed(h.val_first, 3)} → ${fixed(h.val_last, 3)}` : fixed(h.val_last, 3);
  return [
    ["Validation bits/byte", bits, h.val_best === null ? "no evaluation yet" : h.val_best < h.val_last ? `best ${fixed(h.val_best, 3)}` : "first → last evaluation"],
    ["Parameters", brief(h.parameters_total), h.parameters_active === null ? "" : `${brief(h.parameters_active)} active per token`],
    ["Tokens", brief(h.tokens), progress(run)],
    ["Training time", duration(h.seconds), ""],
    ["Tokens/s", brief(h.tokens_per_second), `median of ${run.intervals.toLocaleString("en-US")} intervals`],
    ["Load / fair share", balance, h.load_max === null ? noExperts(run) : `min · p95 · max at the end, ${h.dead ?? "–"} dead`],
    ["Memory", h.memory_gib === null ? "–" : `${fixed(h.memory_gib, 2)} GiB`, h.skipped ? `${h.skipped} steps skipped` : "no step skipped"],
  ];
}

function headline() {
  const toggle = el("button", { type: "button", id: "theme", class: "small", onclick: switchTheme }, "Dark");
  const title = el("div", { class: "title" },
    el("h1", {}, many ? `${RUNS.length} runs` : RUNS[0].name), toggle);
  const top = document.getElementById("top");
  if (!many) {
    top.append(title, el("p", { class: "about" }, describe(RUNS[0])), el("div", { class: "tiles", id: "headline" }, headlines(RUNS[0]).map(([name, value, remark]) =>
      el("div", { class: "tile" }, el("span", {}, name), el("b", {}, value), el("small", {}, remark)))));
    return;
  }
  const lists = RUNS.map(headlines);
  top.append(title, el("div", { class: "scroll" }, el("table", { class: "compare", id: "headline" },
    el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Run"), lists[0].map(([name]) => el("th", { scope: "col" }, name)))),
    el("tbody", {}, RUNS.map((run, i) => el("tr", {}, el("th", { scope: "row" }, dot(i), run.name, el("small", {}, describe(run))),
      lists[i].map(([, value, remark]) => el("td", {}, el("b", {}, value), el("small", {}, remark)))))))));
}

function section(id, title, ...children) {
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), ...children);
}
const grid = (...children) => el("div", { class: "grid" }, children);

function samples() {
  const list = el("div", { class: "samples", id: "samples-list" });
  const more = el("button", { type: "button", class: "small", onclick: () => { draw(true); } }, "");
  function draw(whole) {
    const cards = [];
    let hidden = 0;
    RUNS.forEach((run, i) => {
      if (state.hidden.has(i)) return;
      const few = many ? 3 : 6, n = run.samples.length;
      const shown = whole || n <= few ? run.samples : Array.from({ length: few }, (_, k) => run.samples[Math.round((k * (n - 1)) / (few - 1))]);
      hidden += n - shown.length;
      cards.push(...shown.map((s) => card(run, i, s)));
      if (!n && many) cards.push(el("p", { class: "none" }, `${run.name} has no samples.`));
    });
    list.replaceChildren(...cards);
    list.dataset.points = list.querySelectorAll("article").length;
    if (!cards.length) list.append(el("p", { class: "none" }, RUNS.some((r) => r.samples.length) ? "Every run is switched off." : "No text was sampled yet."));
    more.hidden = !hidden;
    more.textContent = `Show ${hidden} more`;
  }
  function card(run, i, s) {
    const v = run.series.val_bits_per_byte;
    const k = v ? nearest(v.step, s.step) : -1;
    const from = s.prompt && s.sample.startsWith(s.prompt) ? s.sample.slice(s.prompt.length) : s.sample;
    return el("article", { class: "card sample" },
      el("h3", {}, many ? dot(i) : null, many ? `${run.name} · ` : "", `step ${exact(s.step)}`, k >= 0 && v.y[k] !== null ? el("span", { class: "unit" }, `${fixed(v.y[k], 3)} bits/byte`) : null),
      el("pre", { tabindex: "0", "aria-label": `Sample at step ${s.step}` }, el("span", { class: "prompt" }, s.prompt), visible(from)));
  }
  CHARTS.push({ figure: list, draw: () => draw(false), kind: "runs" });
  return section("samples", "Samples", el("p", { class: "lead" }, "The same prompt, continued by the model as it learned. Control characters are shown as symbols."), list, more);
}
// Early samples hold control characters; their Unicode pictures keep the layout.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f]/g, (c) => String.fromCharCode(0x2400 + c.charCodeAt(0))).replace(/\u007f/g, "\u2421");
}

function events() {
  const rows = RUNS.flatMap((run, i) => run.events.map((e) => ({ ...e, i })));
  if (!rows.length) return section("events", "Events", el("p", { class: "none", id: "events-list", "data-points": "0" }, "Nothing was skipped, interrupted or resumed."));
  return section("events", "Events", el("div", { class: "scroll card" }, el("table", { id: "events-list", "data-points": rows.length },
    el("thead", {}, el("tr", {}, many ? el("th", { scope: "col" }, "Run") : null, ["Step", "Event", "Detail"].map((t) => el("th", { scope: "col" }, t)))),
    el("tbody", {}, rows.map((e) => el("tr", {}, many ? el("td", {}, dot(e.i), RUNS[e.i].name) : null, el("td", { class: "num" }, exact(e.step)),
      el("td", {}, el("span", { class: `tag ${["skipped", "interrupted", "resumed"].includes(e.event) ? e.event : ""}` }, e.event)), el("td", {}, e.detail)))))));
}

function plain(v) {
  if (v === undefined) return "–";
  return Array.isArray(v) ? (v.length ? v.join(", ") : "(empty)") : v === "" ? "(empty)" : String(v);
}

function configuration() {
  const keys = [...new Set(RUNS.flatMap((r) => Object.keys(r.config)))];
  const same = (a, b) => JSON.stringify(a) === JSON.stringify(b);
  const rows = keys.map((key) => {
    const values = RUNS.map((r) => r.config[key]), usual = DATA.defaults[key];
    const differs = values.some((v) => !same(v, values[0])), changed = values.some((v) => !same(v, usual));
    const row = el("tr", { class: differs ? "differs" : changed ? "changed" : "", "data-key": key },
      el("th", { scope: "row" }, key), values.map((v) => el("td", { class: same(v, usual) ? "" : "set" }, plain(v))), el("td", { class: "faint" }, plain(usual)));
    return { row, differs, changed, text: `${key} ${values.map(plain).join(" ")}`.toLowerCase() };
  });
  const count = el("span", { class: "note", "aria-live": "polite" });
  const search = el("input", { type: "search", id: "config-search", placeholder: "search, such as top_k", "aria-label": "Search the configuration", oninput: filter });
  const choice = el("select", { id: "config-filter", "aria-label": "Which options", onchange: filter },
    el("option", { value: "all" }, "all options"), el("option", { value: "changed" }, "not the default"), many ? el("option", { value: "differs" }, "different between runs") : null);
  if (many) choice.value = "differs";
  function filter() {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const r of rows) {
      r.row.hidden = !words.every((w) => r.text.includes(w)) || (choice.value !== "all" && !r[choice.value]);
      n += !r.row.hidden;
    }
    count.textContent = `${n} of ${rows.length} options`;
  }
  filter();
  const derived = [...new Set(RUNS.flatMap((r) => Object.values(r.derived).length ? Object.entries(r.derived).map(([k, v]) => `${k}: ${v}`) : []))];
  return section("config", "Configuration", el("details", { class: "card", open: true }, el("summary", {}, "Resolved configuration"),
    el("div", { class: "heat-bar" }, search, choice, count),
    el("div", { class: "scroll tall" }, el("table", { id: "config-table" }, el("thead", {}, el("tr", {}, el("th", { scope: "col" }, "Option"), RUNS.map((r, i) => el("th", { scope: "col" }, many ? dot(i) : null, many ? r.name : "Value")), el("th", { scope: "col" }, "Default"))), el("tbody", {}, rows.map((r) => r.row))))),
    derived.length ? el("details", { class: "card" }, el("summary", {}, "Derived values"), el("ul", {}, derived.map((d) => el("li", {}, d)))) : null,
    RUNS.filter((r) => r.recipe_source).map((r) => el("details", { class: "card recipe" }, el("summary", {}, many ? `Recipe of ${r.name}` : "Recipe"), el("pre", { tabindex: "0" }, r.recipe_source))));
}

function provenance() {
  const pairs = RUNS.map((r) => ({ commit: r.commit + (r.dirty ? " with uncommitted changes" : ""), ...r.versions, ...r.machine }));
  const keys = [...new Set(pairs.flatMap(Object.keys))];
  return section("provenance", "Provenance", el("div", { class: "scroll card" }, el("table", { id: "provenance-table" },
    many ? el("thead", {}, el("tr", {}, el("th", {}), RUNS.map((r, i) => el("th", { scope: "col" }, dot(i), r.name)))) : null,
    el("tbody", {}, keys.map((k) => el("tr", { class: pairs.some((p) => p[k] !== pairs[0][k]) ? "differs" : "" }, el("th", { scope: "row" }, k.replaceAll("_", " ")), pairs.map((p) => el("td", {}, p[k] ?? "–"))))))));
}

function definitions() {
  return section("definitions", "What the numbers mean", el("details", { class: "card" }, el("summary", {}, "Every metric, its unit and formula"), el("div", { class: "scroll" }, el("table", {},
    el("thead", {}, el("tr", {}, ["Name in metrics.jsonl", "Unit", "Formula", "Meaning"].map((t) => el("th", { scope: "col" }, t)))),
    el("tbody", {}, Object.values(DATA.metrics).map((m) => el("tr", {}, el("th", { scope: "row" }, m.name), el("td", {}, m.unit || "–"), el("td", {}, m.formula), el("td", {}, m.meaning))))))));
}
