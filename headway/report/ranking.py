"""The order of several runs by quality, where their validation numbers can be compared."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple


class Ranking(NamedTuple):
    """The order of the runs of a report, or why there is none."""

    order: list[str] | None
    """Names of the runs, lowest last validation bits/byte first; None where there is no order."""
    sentence: str
    """The order with its numbers, or why there is none. Empty for a single run."""


def ranking(runs: Sequence[Mapping]) -> Ranking:
    """Rank runs that `load_run` returned; no order where they were validated on different text."""
    if len(runs) < 2:
        return Ranking(None, "")
    texts: dict[str, list[Mapping]] = {}
    for run in runs:
        texts.setdefault(run["validation"]["fingerprint"], []).append(run)
    if "" in texts:
        return _none(f"run.json of {_names(texts[''])} does not say on which text it was validated")
    if len(texts) > 1:
        each = "; ".join(
            f"{_names(group)} on {group[0]['validation']['sentence']} (text {text})"
            for text, group in texts.items()
        )
        return _none(
            f"they were validated on different text: {each}. Give them one data.source, "
            "data.val_fraction, seq_len, tokenizer and run.eval_tokens, or run.eval_tokens=0 for "
            "the whole split"
        )
    if silent := [run for run in runs if run["headline"]["val_last"] is None]:
        return _none(f"{_names(silent)} has no evaluation yet")
    best_first = sorted(runs, key=lambda run: run["headline"]["val_last"])
    numbers = ", ".join(f"{r['name']} {r['headline']['val_last']:.4f}" for r in best_first)
    sentence = f"Ranked by validation bits/byte on {runs[0]['validation']['sentence']}: {numbers}"
    for run in best_first:
        if run["leak"]["short"]:
            sentence += f"; of {run['name']}, {run['leak']['short']}"
    return Ranking([run["name"] for run in best_first], sentence)


def _none(why: str) -> Ranking:
    return Ranking(None, f"Not ranked: {why}")


def _names(runs: Sequence[Mapping]) -> str:
    return ", ".join(run["name"] for run in runs)
