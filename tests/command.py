"""The command line in this process, since torch is slow to import; and a recipe of a tiny run."""

import contextlib
import io
import json
from pathlib import Path
from typing import NamedTuple

from headway.cli import main as cli

RECIPE = """
from headway.config import Config, DataConfig, MoEConfig, ModelConfig, OptimConfig, RunConfig

def tiny():
    return Config(
        recipe="tiny",
        model=ModelConfig(n_layers=1, d_model=16, n_heads=2,
                          moe=MoEConfig(n_experts=4, top_k=2, d_expert=8, n_heads=2)),
        data=DataConfig(source=(SOURCE,), seq_len=16, batch_size=4),
        optim=OptimConfig(steps=6),
        run=RunConfig(log_every=2, eval_tokens=128, sample_tokens=8),
    )

NOT_A_CONFIG = 3
"""


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict:
        return json.loads(self.out.strip().splitlines()[-1])


def call(*args: object) -> Done:
    """`headway ARGS` in this process."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = cli.main([str(a) for a in args])
    return Done(code, out.getvalue(), err.getvalue())


def mistake(*args: object) -> str:
    """The one line that a wrong call costs."""
    done = call(*args)
    assert done.code == 2, done
    lines = done.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("headway: "), done.err
    return lines[0]


def write_recipe(folder: Path) -> None:
    """A text, and `tiny.py:tiny` that trains on it."""
    text = "".join(f"def f{i}(x):\n    return x * {i} + {i * i % 7}\n\n" for i in range(900))
    (folder / "text.txt").write_text(text)
    (folder / "tiny.py").write_text(RECIPE.replace("SOURCE", repr(str(folder / "text.txt"))))
