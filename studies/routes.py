"""Two small trained models, and the routes of their tokens on texts of one topic and of many.

`runs/studies/ARM` is trained by `headway train` where it is not there yet, in one and two CPU
minutes, which the results do not count. All texts are Python, byte by byte: one topic is a module,
many are 64 modules."""

import importlib.util
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from headway.config import EngineConfig
from headway.model.moe import SparseLayer
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams

ROOT = Path(__file__).resolve().parents[1]

STEPS = 300
ARMS = {
    "flat": ["moe"],
    "multi-head": [
        *"multi_head_latent --model.moe.n-heads 8 --model.moe.d-latent 256".split(),
        *"--model.moe.n-experts 32 --model.moe.top-k 4 --model.moe.d-expert 32".split(),
    ],
}
"""Model → words of `headway train`: 32 experts with 8 per token; 8 heads of 32 with 4 each."""
TOPICS = ("_pydecimal", "typing", "tarfile", "turtle")
"""Modules of the standard library that are long enough for 64 windows; each is a topic."""
MIXED = """
abc argparse ast asyncio.base_events bdb bisect calendar cmd codecs collections configparser
contextlib copy csv dataclasses datetime difflib dis doctest email.message enum fileinput fractions
ftplib functools gettext glob gzip hashlib heapq html.parser http.client imaplib inspect ipaddress
json.decoder locale logging mailbox mimetypes nntplib ntpath numbers optparse os pathlib pdb pickle
platform plistlib pprint pydoc queue random re.__init__ sched selectors shelve shlex shutil smtplib
socket sqlite3.dbapi2 ssl statistics string subprocess tempfile textwrap threading timeit tokenize
trace traceback unittest.case urllib.parse uuid warnings weakref xml.dom.minidom zipfile
""".split()
WINDOW, SKIP = 96, 32
"""Bytes of a sequence, and how many of them only are context."""


class Routes(NamedTuple):
    layers: list[SparseLayer]
    one_topic: list[np.ndarray]
    """For each topic the experts of 64 sequences, `[64, positions, layers, H, K]`."""
    mixed: np.ndarray
    """The same of 64 texts of different modules."""


def trained(arm: str) -> Path:
    """The run folder of an arm, trained where it is not yet."""
    folder = ROOT / "runs" / "studies" / arm
    if not (folder / "checkpoints" / f"step-{STEPS:06d}").is_dir():
        words = [*ARMS[arm], "--run", str(folder), "--steps", str(STEPS), "--run.threads", "1"]
        subprocess.run([sys.executable, "-m", "headway", "train", *words], check=True, cwd=ROOT)
    return folder


@cache
def routes(arm: str) -> Routes:
    """The recorded routes of an arm."""
    engine = Engine.load(trained(arm), EngineConfig(max_len=WINDOW + 1, return_routes=True))
    layers = engine.model.sparse_layers()
    topics = [record(engine, windows(_source(name), 64)) for name in TOPICS]
    texts = [text for name in MIXED if (text := _source(name)) is not None and len(text) > 2000]
    mixed = record(engine, [window for text in texts[:64] for window in windows(text, 1)])
    return Routes(layers, topics, mixed)


def record(engine: Engine, prompts: Sequence[list[int]]) -> np.ndarray:
    """The experts of the tokens of each prompt after its first `SKIP`."""
    moe = engine.model.sparse_layers()[0].config
    params = SamplingParams(max_tokens=1, return_routes=True)
    choices = [completions[0].routes for completions in engine.generate(prompts, params)]
    whole = np.stack([c.experts[SKIP:] for c in choices if c is not None])
    return whole.reshape(*whole.shape[:3], moe.n_heads, moe.top_k)


def windows(text: bytes | None, n: int) -> list[list[int]]:
    """`n` evenly spread windows of a text that has room for them."""
    assert text is not None and len(text) >= n * WINDOW
    starts = np.linspace(0, len(text) - WINDOW, n + 2, dtype=int)[1:-1]
    return [list(text[start : start + WINDOW]) for start in starts]


def _source(name: str) -> bytes | None:
    """The source of a module of the standard library, None where this Python has none."""
    try:
        spec = importlib.util.find_spec(name)
    except ModuleNotFoundError:
        return None
    is_file = spec is not None and spec.origin is not None and spec.origin.endswith(".py")
    return Path(spec.origin).read_bytes() if is_file else None  # type: ignore[union-attr]
