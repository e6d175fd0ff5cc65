"""A whole training step on a GPU: Headway beside Transformers' OLMoE of the same size."""

from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bench.gpu_stages import Record


def rivals(dry: bool) -> dict[str, Callable[[], object]]:
    return {}


def row(name: str, build: Callable[[], object], record: "Record") -> dict:
    return {}
