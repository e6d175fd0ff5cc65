"""The sweeps of examples/, with a tiny recipe and few steps."""

from pathlib import Path

import pytest

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
    return sweep.run(path), [sweep._results[key]["bits_per_byte"] for key in sweep._results]


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
