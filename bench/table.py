"""Write the measured figures of docs/numbers/*.json into README.md, docs/numbers.md and
docs/serving.md.

python bench/table.py            # rewrites the blocks between the `numbers` marks
python bench/table.py --check    # exit 1 when a block differs from its files

docs/numbers.md gets every target of every bench, README.md the few of `HIGHLIGHTS` and a claim of a
study, docs/serving.md the times of the engine and its rivals and the targets of the benches of
`SERVING`.
"""

import json
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.common import NUMBERS, ROOT, place

if TYPE_CHECKING:
    from headway.lab.verdict import Judged

BEGIN, END = "<!-- numbers: written by bench/table.py -->", "<!-- end of numbers -->"


class Highlight(NamedTuple):
    """A target that README.md shows."""

    what: str
    bench: str
    target: str
    format: str


HIGHLIGHTS = (
    Highlight(
        "**Quality** per time: training time to nanoGPT's loss on tinyshakespeare, over nanoGPT's",
        "shakespeare",
        "share of the control's wall_seconds to 1.886 nats",
        "{:.2f}×",
    ),
    Highlight(
        "**Speed**: training tokens/s of a flat MoE over Hugging Face's OLMoE, bfloat16",
        "cpu_step",
        "headway moe bfloat16: tokens/s over olmoe grouped_mm bfloat16",
        "{:.2f}×",
    ),
    Highlight(
        "**Memory**: peak of the same training step over OLMoE's",
        "cpu_step",
        "headway moe bfloat16: peak memory over olmoe grouped_mm bfloat16",
        "{:.2f}×",
    ),
    Highlight(
        "**Speed** on a GPU: time of compiled `grouped_mm` over that of our experts",
        "gpu_day",
        "experts: grouped_mm / headway",
        "{:.2f}×",
    ),
    Highlight(
        "**Serving**: tokens/s of one sequence over llama.cpp's, bfloat16, one thread each",
        "serve",
        "M decode batch 1: llama.cpp / ours",
        "{:.2f}×",
    ),
    Highlight(
        "**Serving**: tokens/s of 16 sequences over vLLM's on the same machine and weights",
        "serve",
        "M decode batch 16: vllm / ours",
        "{:.2f}×",
    ),
    Highlight(
        "**Bytes**: largest change of Head Parallel's traffic between k = 1, 2, 4 and 8",
        "cluster",
        "HP: bytes on the wire vary over k by",
        "{:.1%}",
    ),
    Highlight(
        "**Bytes** as time: step of the best Expert Parallel over Head Parallel, k = 8, slow links",
        "cluster",
        "k = 8: step time of the best EP over HP, network-bound",
        "{:.2f}×",
    ),
)

CENTRE = ("latent_vs_flat", "C1-2000")
"""Study and claim of the sentence of README.md on the centre of the project."""
BYTES, STEPS = "frontiers", (2000, 250)
"""Study of the sentence on equal bytes per token, and its budgets, the longest first."""
QUALITY = ("sparse_vs_dense", "2x64-2000")
"""Study and claim of the first row of README.md, which is there once the claim is judged."""
QUALITY_WHAT = (
    "**Quality** at equal FLOPs: bits/byte of Multi-Head LatentMoE below a dense network's "
    "([study](docs/studies.md#sparse_vs_dense))"
)


SERVING = ("serve", "serve_layer", "serve_engine", "serve_http", "serve_text")
SIDES = {
    "headway": "Headway",
    "llama.cpp": "llama.cpp",
    "vllm": "vLLM",
    "transformers": "Transformers",
}


def sizes() -> dict[str, str]:
    """Name of a shape of bench/serve.py → its parameters, and heads where it has several."""
    from bench.serve import SHAPES
    from headway.config import Config
    from headway.plan.cost import model_costs, total

    named = {}
    for name, model in SHAPES.items():
        n, heads = total(model_costs(Config(model=model), 1).parameters), model.moe.n_heads
        named[name] = f"{n / 1e6:.0f}M" + (f", {heads} heads" if heads > 1 else "")
    return named


def serving(folder: Path = NUMBERS) -> str:
    """The times of the engine and its rivals, and what of its targets is met."""
    paths = [folder / f"{bench}.json" for bench in SERVING]
    benches = [json.loads(path.read_text()) for path in paths if path.is_file()]
    parts = [_times(bench["rows"]) for bench in benches if bench["bench"] == "serve"]
    targets = [target for bench in benches for target in bench["targets"]]
    missed = [target for target in targets if not target["pass"]]
    n_met = len(targets) - len(missed)
    parts.append(f"{n_met} of {len(targets)} targets are met ([all](numbers.md)).")
    if missed:
        table = ["| missed | value | target | met |", "|---|---|---|---|", *map(_row, missed)]
        parts.append("\n".join(table))
    return "\n\n".join(parts)


def _times(rows: list[dict]) -> str:
    """A row per model and task: milliseconds of each side, its best variant, and of the floor."""
    times: dict[tuple[str, str], dict[str, float]] = {}
    parameters = sizes()
    for row in rows:
        side, best = row["side"].split()[0], times.setdefault((row["shape"], row["task"]), {})
        best[side] = min(row["median"], best.get(side, math.inf))
        best["floor"] = row["floor"] or math.nan
    lines = [f"| ms | {' | '.join(SIDES.values())} | least time |", "|---" * (len(SIDES) + 2) + "|"]
    for (shape, task), best in times.items():
        cells = [f"{1e3 * best[side]:,.2f}" if side in best else "–" for side in SIDES]
        floor = "–" if math.isnan(best["floor"]) else f"{1e3 * best['floor']:,.2f}"
        lines.append(f"| {parameters[shape]}, {task} | {' | '.join(cells)} | {floor} |")
    return "\n".join(lines)


def highlights(folder: Path = NUMBERS) -> str:
    """The table of README.md and the sentences on what is not reached."""
    benches = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
    values = {(b, t["name"]): t["value"] for b, data in benches.items() for t in data["targets"]}
    quality, rows = judged(*QUALITY, folder), []
    if quality.estimate is not None and quality.ci is not None:
        low, high = -quality.ci.high, -quality.ci.low
        level = f"{1 - quality.alpha_adjusted:.1%}"
        value = f"{-quality.estimate:.3f} ({low:.3f} … {high:.3f}, {level})"
        rows.append(f"| {QUALITY_WHAT} | {value} | 1 CPU core |")
    rows += [
        f"| {h.what} | {h.format.format(values[h.bench, h.target])} | "
        f"{_short_machine(benches[h.bench]['machine'])} |"
        for h in HIGHLIGHTS
    ]
    rates = {r["name"]: r["tokens_per_second"] for r in benches["cpu_step"]["rows"]}
    slower = rates["headway moe bfloat16"] / rates["headway multi_head_latent bfloat16"]
    error = values["cluster", "headway plan: largest error of a step"]
    limits = (
        f"Limits: on a CPU a training step with Multi-Head layers takes {slower:.2f}× that of a "
        "flat MoE of the same experts (two projections more), and `headway plan` misses a step by "
        f"up to {error:.0%}. GPU kernels were measured on {benches['gpu_day']['machine']['gpu']}"
        " and Head Parallel between CPU processes with limited links; NCCL and several GPUs have "
        "not been run yet, and no large model has been trained."
    )
    table = ["| measured | value | on |", "|---|---|---|", *rows]
    read = "Below 1 is better for training time and memory, above 1 for the other ratios."
    return "\n".join(
        [
            *table,
            "",
            read,
            "",
            *filter(None, (against_flat(folder), at_equal_bytes(folder), limits)),
        ]
    )


def against_flat(folder: Path) -> str:
    """A sentence on the claim of `CENTRE`, whatever its verdict is; "" while it is open."""
    one = judged(*CENTRE, folder)
    if one.estimate is None or one.ci is None:
        return ""
    answers = {
        "holds": f"is not worse by {one.claim.margin:g}",
        "refuted": f"is worse by more than {one.claim.margin:g}",
        "cannot_tell": f"the data cannot tell whether it is worse by {one.claim.margin:g}",
    }
    contrast = one.claim.contrasts[0]
    return (
        f"Against a flat MoE of equal FLOPs and parameters Multi-Head LatentMoE is at "
        f"{one.estimate:+.4f} bits/byte ({one.ci.low:+.4f} … {one.ci.high:+.4f}, "
        f"{1 - one.alpha_adjusted:.1%} by Holm's rule; {len(one.seeds)} seeds, width 128, two "
        f"heads, {contrast.steps:,} steps): {answers[one.answer]} "
        f"([study, registered](docs/studies.md#{CENTRE[0]}))."
    )


def at_equal_bytes(folder: Path) -> str:
    """A sentence on designs that send as many bytes, at the longest budget that is judged."""
    for steps in STEPS:
        latent, flat = (judged(BYTES, f"{id}-{steps}", folder) for id in ("C13-half", "C12-shared"))
        if latent.ci is None or flat.ci is None:
            continue
        return (
            f"At as many bytes per token on the wire and as many FLOPs it is at "
            f"{latent.estimate:+.3f} ({latent.ci.low:+.3f} … {latent.ci.high:+.3f}) beside "
            f"LatentMoE of half the width, and at {flat.estimate:+.3f} ({flat.ci.low:+.3f} … "
            f"{flat.ci.high:+.3f}) beside a flat MoE of one routed and one shared expert "
            f"({len(latent.seeds)} seeds, {steps:,} steps; [study, registered]"
            f"(docs/studies.md#{BYTES}))."
        )
    return ""


def judged(study: str, claim: str, folder: Path = NUMBERS) -> "Judged":
    """What the confirming runs say of a study's claim."""
    from headway.lab.registered import ids, read
    from headway.lab.rows import read_rows
    from headway.lab.study import Study, load
    from headway.lab.verdict import judge

    chosen = load(study, ROOT / "studies")
    assert isinstance(chosen, Study)
    rows = read_rows(folder / "studies" / f"{study}.json")
    claims = judge(chosen, rows, ids(read(chosen, ROOT / "studies")))
    return next(one for one in claims if one.claim.id == claim)


def _short_machine(machine: dict) -> str:
    return machine["gpu"] or f"{machine['cores']} CPU cores"


def block(folder: Path = NUMBERS) -> str:
    """A table of targets for each bench that has any, in the order of their names."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        bench = json.loads(path.read_text())
        if not bench["targets"]:
            continue
        here = place(bench["machine"], bench["versions"])
        others = sorted({row["on"] for row in bench["rows"] if "on" in row} - {here})
        parts.append(
            f"`bench/{bench['bench']}.py` on {here}, "
            f"commit {bench['commit'][:10]}{' with changes' if bench['dirty'] else ''}"
            f"{''.join(f'; some rows on {other}' for other in others)}:\n\n"
            "| measured | value | target | met |\n|---|---|---|---|\n"
            + "\n".join(_row(t) for t in bench["targets"])
        )
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


PAGES = {
    ROOT / "README.md": highlights,
    ROOT / "docs" / "numbers.md": block,
    ROOT / "docs" / "serving.md": serving,
}


def _row(target: dict) -> str:
    value = "never reached" if target["value"] is None else f"{target['value']:.4g}"
    sign = "≥" if target["at_least"] else "≤"
    met = "yes" if target["pass"] else "**no**"
    return f"| {target['name']} | {value} | {sign} {target['bound']:g} | {met} |"


def rewrite(page: str, numbers: str) -> str:
    """The page with the block between its marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{numbers}\n{END}{after}"


def main() -> int:
    stale = []
    for path, numbers in PAGES.items():
        old = path.read_text()
        new = rewrite(old, numbers())
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    for name in stale:
        print(f"{name} differs from docs/numbers" if "--check" in sys.argv else f"wrote {name}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
