// What a run was and said: headline, samples, events.

const many = RUNS.length > 1;
const dot = (i) => el("span", { class: "swatch dot", style: { background: runColour(i) } });

function describe(run) {
  const c = run.config,
    kind = c["model.moe.kind"];
  const names = {
    dense: "dense",
    moe: "mixture of experts",
    latent: "LatentMoE",
    multi_head_latent: "Multi-Head LatentMoE",
  };
  if (!kind) return "";
  const parts = [
    names[kind] || kind,
    `${plural(Number(c["model.n_layers"]), "layer")} × ${c["model.d_model"]}`,
  ];
  if (kind !== "dense") {
    const heads = kind === "multi_head_latent" ? Number(c["model.moe.n_heads"]) : 0;
    const experts = `${c["model.moe.n_experts"]} experts, top ${c["model.moe.top_k"]}`;
    parts.push(heads ? `${plural(heads, "head")} × ${experts}` : experts);
  }
  const sources = [c["data.source"] ?? []].flat().map((s) => s.replace(/.*\/(?=.)/, ""));
  parts.push(c["optim.name"], sources.join(" + "), `seed ${c["run.seed"]}`);
  return parts.filter((p) => p && !p.includes("undefined")).join(" · ");
}

function progress(run) {
  const h = run.headline,
    last = run.events.at(-1);
  if (h.step === null || h.step === undefined) return "no step recorded yet";
  const of = h.steps ? ` of ${count(h.steps)}` : "";
  const done = h.steps && h.step >= h.steps;
  const ended =
    last && last.event !== "resumed" && last.event !== "skipped" && last.step >= h.step - 1;
  const how = done ? "" : ended ? `, ${last.event}` : h.steps ? ", not finished" : "";
  return `${count(h.step)}${of} steps${how}`;
}

// [title, value, remark] of one run; the same list makes the tiles and the table of several runs.
function headlines(run) {
  const h = run.headline;
  const range = `${fixed(h.load_min, 2)} – ${fixed(h.load_max, 2)}`;
  const balance = h.load_max === null ? "–" : range;
  const bits =
    h.val_last === null
      ? "–"
      : h.evaluations > 1
        ? `${fixed(h.val_first, 3)} → ${fixed(h.val_last, 3)}`
        : fixed(h.val_last, 3);
  return [
    [
      "Validation bits/byte",
      bits,
      h.val_best === null
        ? "no evaluation yet"
        : run.leak.short
          ? run.leak.short
        : h.val_best < h.val_last
          ? `best ${fixed(h.val_best, 3)}`
          : "first → last evaluation",
    ],
    [
      "Parameters",
      brief(h.parameters_total),
      h.parameters_active === null ? "" : `${brief(h.parameters_active)} active per token`,
    ],
    ["Tokens", brief(h.tokens), progress(run)],
    ["Training time", duration(h.seconds), ""],
    ["Tokens/s", brief(h.tokens_per_second), `median of ${plural(run.intervals, "interval")}`],
    [
      "Load / fair share",
      balance,
      h.load_max === null
        ? noExperts(run)
        : `least – greatest at the end; p95 ${fixed(h.load_p95, 2)}, ${h.dead ?? "–"} dead`,
    ],
    [
      "Memory",
      h.memory_gib === null ? "–" : `${fixed(h.memory_gib, 2)} GiB`,
      h.skipped ? `${plural(h.skipped, "step")} skipped` : "no step skipped",
    ],
  ];
}

function headline() {
  const toggle = el(
    "button",
    { type: "button", id: "theme", class: "small", onclick: switchTheme },
    "Dark",
  );
  const title = el(
    "div",
    { class: "title" },
    el("h1", {}, many ? `${RUNS.length} runs` : RUNS[0].name),
    toggle,
  );
  const top = document.getElementById("top");
  if (!many) {
    top.append(
      title,
      el("p", { class: "about" }, describe(RUNS[0])),
      el(
        "div",
        { class: "tiles", id: "headline" },
        headlines(RUNS[0]).map(([name, value, remark]) =>
          el(
            "div",
            { class: "tile" },
            el("span", {}, name),
            el("b", {}, value),
            el("small", {}, remark),
          ),
        ),
      ),
    );
    return;
  }
  const lists = RUNS.map(headlines);
  top.append(
    title,
    el("p", { class: "about", id: "ranking" }, DATA.ranking),
    el(
      "div",
      { class: "scroll" },
      el(
        "table",
        { class: "compare", id: "headline" },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            el("th", { scope: "col" }, "Run"),
            lists[0].map(([name]) => el("th", { scope: "col" }, name)),
          ),
        ),
        el(
          "tbody",
          {},
          RUNS.map((run, i) =>
            el(
              "tr",
              {},
              el("th", { scope: "row" }, dot(i), run.name, el("small", {}, describe(run))),
              lists[i].map(([, value, remark]) =>
                el("td", {}, el("b", {}, value), el("small", {}, remark)),
              ),
            ),
          ),
        ),
      ),
    ),
  );
}

function section(id, title, ...children) {
  return el(
    "section",
    { id, "aria-labelledby": `${id}-title` },
    el("h2", { id: `${id}-title` }, title),
    ...children,
  );
}
const grid = (...children) => el("div", { class: "grid" }, children);

function samples() {
  const list = el("div", { class: "samples", id: "samples-list" });
  const more = el(
    "button",
    {
      type: "button",
      class: "small",
      onclick: () => {
        draw(true);
      },
    },
    "",
  );
  function draw(whole) {
    const cards = [];
    let hidden = 0;
    RUNS.forEach((run, i) => {
      if (state.hidden.has(i)) return;
      const few = many ? 3 : 6,
        n = run.samples.length;
      const shown =
        whole || n <= few
          ? run.samples
          : Array.from(
              { length: few },
              (_, k) => run.samples[Math.round((k * (n - 1)) / (few - 1))],
            );
      hidden += n - shown.length;
      cards.push(...shown.map((s) => card(run, i, s)));
      if (!n && many) cards.push(el("p", { class: "none" }, `${run.name} has no samples.`));
    });
    list.replaceChildren(...cards);
    list.dataset.points = list.querySelectorAll("article").length;
    if (!cards.length)
      list.append(
        el(
          "p",
          { class: "none" },
          RUNS.some((r) => r.samples.length)
            ? "Every run is switched off."
            : "No text was sampled yet.",
        ),
      );
    more.hidden = !hidden;
    more.textContent = `Show ${hidden} more`;
  }
  function card(run, i, s) {
    const v = run.series.val_bits_per_byte;
    const k = v ? nearest(v.step, s.step) : -1;
    const from =
      s.prompt && s.sample.startsWith(s.prompt) ? s.sample.slice(s.prompt.length) : s.sample;
    return el(
      "article",
      { class: "card sample" },
      el(
        "h3",
        {},
        many ? dot(i) : null,
        many ? `${run.name} · ` : "",
        `step ${exact(s.step)}`,
        k >= 0 && v.y[k] !== null
          ? el("span", { class: "unit" }, `${fixed(v.y[k], 3)} bits/byte`)
          : null,
      ),
      el(
        "pre",
        { tabindex: "0", "aria-label": `Sample at step ${s.step}` },
        el("span", { class: "prompt" }, s.prompt),
        visible(from),
      ),
    );
  }
  CHARTS.push({ figure: list, draw: () => draw(false), kind: "runs" });
  return section(
    "samples",
    "Samples",
    el(
      "p",
      { class: "lead" },
      "The same prompt, continued by the model as it learned. Control characters are shown as ·",
    ),
    list,
    more,
  );
}
// Early samples hold control characters, which would show as nothing or as boxes.
function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f]/g, "·");
}

function events() {
  const rows = RUNS.flatMap((run, i) => run.events.map((e) => ({ ...e, i })));
  if (!rows.length)
    return section(
      "events",
      "Events",
      el(
        "p",
        { class: "none", id: "events-list", "data-points": "0" },
        "Nothing was skipped, interrupted or resumed.",
      ),
    );
  return section(
    "events",
    "Events",
    el(
      "div",
      { class: "scroll card" },
      el(
        "table",
        { id: "events-list", "data-points": rows.length },
        el(
          "thead",
          {},
          el(
            "tr",
            {},
            many ? el("th", { scope: "col" }, "Run") : null,
            ["Step", "Event", "Detail"].map((t) => el("th", { scope: "col" }, t)),
          ),
        ),
        el(
          "tbody",
          {},
          rows.map((e) =>
            el(
              "tr",
              {},
              many ? el("td", {}, dot(e.i), RUNS[e.i].name) : null,
              el("td", { class: "num" }, exact(e.step)),
              el(
                "td",
                {},
                el(
                  "span",
                  {
                    class: "tag",
                    "data-kind": e.event,
                  },
                  e.event,
                ),
              ),
              el("td", {}, e.detail),
            ),
          ),
        ),
      ),
    ),
  );
}
