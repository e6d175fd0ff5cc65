"""`headway doctor`; `--measure` is in test_plan.py."""

import tomllib
from pathlib import Path

from tests.command import call

ROOT = Path(__file__).resolve().parents[2]


def test_doctor():
    done = call("doctor", "--json")
    facts = done.json
    assert done.code == 0 and facts["matmul_gflops"]["float32"] > 0
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert set(facts["extras"]) == set(project["optional-dependencies"])
    assert (facts["dtype"] == "bfloat16") == facts["native_bfloat16"]
    for name, extra in facts["extras"].items():
        assert not extra["missing"] or f"pip install 'headway[{name}]'" in done.out


def test_doctor_says_what_second_derivatives_and_torch_func_take():
    """That it is true, `tests/test_drop_in_func.py` shows."""
    done = call("doctor", "--json")
    said = (
        "it, forward mode and second derivatives take each operator's reference in PyTorch, where every expert sees "
        "every token (kernels/differentiate.py)"
    )
    assert done.json["paths"]["torch.func"] == said
    assert any(line.split(maxsplit=1) == ["torch.func", said] for line in done.out.splitlines())
