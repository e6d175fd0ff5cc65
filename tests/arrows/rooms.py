"""The rooms of the package: the idea of each, and which others it may import.

`python -m tests.arrows.rooms` writes this list into AGENTS.md (a table) and README.md (a tree).
"""

from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "headway"


class Room(NamedTuple):
    name: str
    idea: str
    imports: str = ""
    """Rooms that it may import; all of them stand before it in the list."""


ROOMS = (
    Room(
        "config",
        "options: one frozen tree, a file per section; a field's docstring is its `--help`",
    ),
    Room(
        "kernels",
        "faster, never different: operator, reference, PyTorch path; `cpu/` is C++, `gpu/` Triton",
        "config",
    ),
    Room(
        "model",
        "the mathematics: plain PyTorch, one process, any device; a mixer is a file of `mixers/`",
        "config kernels",
    ),
    Room(
        "recipes",
        "functions that return one `Config`; a diff of recipes is an experiment",
        "config model",
    ),
    Room(
        "data",
        "(seed, step, rank) → tokens, a pure function; sources, tokenizers, shards",
        "config",
    ),
    Room("report", "metric definitions, `metrics.jsonl`, the offline HTML report", "config"),
    Room(
        "parallel",
        "where tensors live: the mesh, every collective, dispatchers, sharded parameters",
        "config kernels model",
    ),
    Room(
        "plan",
        "bytes, memory and step time of a mesh from the costs of modules; ranks meshes",
        "config kernels model",
    ),
    Room(
        "measure",
        "rates of this machine and its links, for `headway plan --machine`",
        "config kernels model parallel plan report",
    ),
    Room(
        "optim",
        "optimiser groups, AdamW, Muon, learning-rate schedules",
        "config kernels model parallel",
    ),
    Room(
        "checkpoint",
        "sharded safetensors, run folders, save and load; loads trained models for inference",
        "config kernels model parallel data optim",
    ),
    Room(
        "hub",
        "Hugging Face folders in and out, GGUF out: a file per family, read in both directions",
        "config kernels model parallel data checkpoint",
    ),
    Room(
        "serve",
        "the inference engine: scheduler, paged cache, sampling",
        "config kernels model parallel data checkpoint hub",
    ),
    Room(
        "server",
        "an OpenAI-compatible server of the engine: protocol, chat, grammars, limits, its page",
        "config model data hub serve",
    ),
    Room(
        "eval",
        "bits per byte, worlds, pass@k, diversity; tasks of lm-evaluation-harness through the engine",
        "config kernels model parallel data hub serve",
    ),
    Room(
        "train",
        "a session (mesh, model, optimisers, records, saves, stops), the step, the pre-training loop",
        "config kernels model parallel data eval report plan optim checkpoint serve",
    ),
    Room(
        "lab",
        "fair comparisons of designs: experiments, matched budgets, statistics, scaling laws",
        "config model recipes data eval report plan optim checkpoint train",
    ),
    Room("cli", "a file per verb; `main.py` has the exit codes; nothing imports it", "*"),
)

ALLOWED = {
    room.name: {other.name for other in ROOMS} if room.imports == "*" else set(room.imports.split())
    for room in ROOMS
}
"""Room → rooms that it may import."""

BEGIN, END = "<!-- rooms: python -m tests.arrows.rooms -->", "<!-- end of rooms -->"


def table() -> str:
    """The rooms as a Markdown table."""
    rows = ["| room | idea | may import |", "|---|---|---|"]
    for room in ROOMS:
        imports = room.imports.replace(" ", ", ").replace("*", "all") or "nothing"
        rows.append(f"| `headway/{room.name}/` | {room.idea} | {imports} |")
    return "\n".join(rows)


def tree() -> str:
    """The repository as a tree."""
    lines = ["headway/"]
    lines += [f"  {room.name + '/':<14}{room.idea.replace('`', '')}" for room in ROOMS]
    lines += [
        "tests/          mirrors the package; parity/ (N ranks = 1), golden/ (losses), arrows/ (imports)",
        "bench/          one file per question; writes docs/numbers/",
        "studies/        one file per question: arms, seeds, registered claims; `headway study`, docs/studies.md",
        "docs/           start, concepts, distributed, plan, kernels, cluster, serving, lab, laws, numbers, negative-results",
        ".agents/skills/ add-mixer, add-router, compare-runs, import-model, register-study, serve-and-check, validate-numerics",
    ]
    return "\n".join(["```", *lines, "```"])


PAGES = {ROOT / "AGENTS.md": table, ROOT / "README.md": tree}


def rewrite(page: str, block: str) -> str:
    """Replace what stands between the marks."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, "the marks are missing"
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


if __name__ == "__main__":
    for path, block in PAGES.items():
        path.write_text(rewrite(path.read_text("utf-8"), block()), "utf-8")
