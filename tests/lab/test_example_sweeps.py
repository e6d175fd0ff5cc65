"""The sweeps of examples/, with a tiny recipe and few steps."""

import re
from pathlib import Path

import pytest

from headway.config import Config, from_dict
from headway.lab.folder import read_result
from headway.lab.runs import Run, execute
from headway.lab.sweep import Sweep, load, resolved
from tests.lab.test_sweep import place as place  # a folder with tiny.py, without worker processes

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def shrink(place, name: str, constants: str, tiny: str) -> Path:
    """A copy of an example with other values of its constants, which are on one line."""
    text = (EXAMPLES / f"{name}.py").read_text()
    assert text.count(f"{constants}\n") == 1
    (place / f"{name}.py").write_text(text.replace(constants, tiny))
    return place / f"{name}.py"


def run(place, path: Path) -> tuple[dict, list[float]]:
    """What a sweep says, and what it asked in which order."""
    sweep = Sweep(place / "s", log=lambda _: None)
    said = sweep.run(path)
    assert said["invalid"] == []
    return said, [sweep._results[key]["bits_per_byte"] for key in sweep._results]


def test_the_designs_of_the_grid_have_equal_active_experts():
    configs = [resolved(item) for item in load(EXAMPLES / "sweep_grid.py")]
    assert len({c.model.moe.top_k * c.model.moe.d_expert for c in configs}) == 1
    assert len({c.model.moe.n_experts * c.model.moe.d_expert for c in configs}) == 1
    assert len(configs) == 18 == len({str(config) for config in configs})


def test_grid(place):
    path = shrink(
        place, "sweep_grid", 'RECIPE, STEPS = "demo", 400', 'RECIPE, STEPS = "tiny.py:tiny", 2'
    )
    path.write_text(path.read_text().replace("(1e-3, 2e-3, 4e-3)", "(1e-3,)"))
    said, _ = run(place, path)
    assert (said["runs"], said["done"], said["failed"]) == (6, 6, 0)


def test_optuna_asks_the_same_questions_again(place):
    pytest.importorskip("optuna")
    before = 'RECIPE, STEPS, ROUNDS = "demo", 400, 8'
    path = shrink(place, "sweep_optuna", before, 'RECIPE, STEPS, ROUNDS = "tiny.py:tiny", 2, 2')
    said, bits = run(place, path)
    assert said["done"] == said["started"] == said["runs"] > 4
    # killed in its second round: the last run is missing
    last = list((place / "s" / "runs").iterdir())[-1] / "result.json"
    last.unlink()
    again, same = run(place, path)
    assert (again["runs"], again["started"]) == (said["runs"], 1) and same == bits
    longer = shrink(place, "sweep_optuna", before, 'RECIPE, STEPS, ROUNDS = "tiny.py:tiny", 2, 3')
    assert run(place, longer)[1][: len(bits)] == bits


def test_halving_goes_on_from_the_checkpoints_of_shorter_runs(place):
    before = 'RECIPE, STEPS = "demo", 400'
    path = shrink(place, "sweep_halving", before, 'RECIPE, STEPS = "tiny.py:tiny", 10')
    path.write_text(path.read_text().replace('"optim.warmup_steps": 20', '"optim.warmup_steps": 2'))
    said, _ = run(place, path)
    assert (said["runs"], said["done"]) == (8 + 4 + 2 + 1, 15)
    results = [read_result(f.parent) for f in (place / "s" / "runs").glob("*/result.json")]
    by_steps = {steps: [r for r in results if r["steps"] == steps] for steps in (10, 20, 40, 80)}
    assert [len(rows) for rows in by_steps.values()] == [8, 4, 2, 1]
    # each went on from where the rate of the shorter one fell: 70% of its steps
    want = {10: 0, 20: 7, 40: 14, 80: 28}
    assert {s: {r["continued"] for r in rows} for s, rows in by_steps.items()} == {
        s: {step} for s, step in want.items()
    }
    best = {s: {r["config"]["optim"]["lr"] for r in rows} for s, rows in by_steps.items()}
    assert best[80] <= best[40] <= best[20] and 0 <= said["overhead"] < 1
    assert not list((place / "s" / "runs").glob("*/checkpoints"))
    # the bits are those of runs alone, and a sweep that lost its last runs asks the same again
    [longest] = by_steps[80]
    alone = execute(Run(from_dict(Config, longest["config"])), place / "alone")
    assert alone["continued"] == 0 and alone["bits_per_byte"] == longest["bits_per_byte"]
    (place / "s" / "runs" / longest["config_hash"] / "result.json").unlink()
    again, _ = run(place, path)
    assert (again["runs"], again["started"]) == (15, 1)
    assert (
        read_result(place / "s" / "runs" / longest["config_hash"])["bits_per_byte"]
        == alone["bits_per_byte"]
    )


def test_the_sweep_of_the_docs(place):
    [text] = re.findall(
        r"```python\n(.*?def configs.*?)```",
        (EXAMPLES.parent / "docs" / "lab.md").read_text(),
        re.S,
    )
    (place / "file.py").write_text(text.replace('"demo"', '"tiny.py:tiny"').replace("4000", "8"))
    said, _ = run(place, place / "file.py")
    assert said["done"] == 7
