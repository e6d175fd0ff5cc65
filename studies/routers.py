"""Which router is best, and how evenly does it load its experts? One table, no claim.

Eight designs of one flat mixture of 64 experts with 4 of a token, at equal executed FLOPs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from headway.lab.experiment import Arm
from headway.lab.rows import Row, of_one_text
from headway.lab.study import Study
from headway.report.sinks import read_metrics
from studies.narrow import SEEDS, mixture, series

STEPS, EXPERTS = 1000, 64
LAST = 10
"""Records of training whose loads are averaged."""
NO_AUX: dict[str, Any] = {"model__moe__balance__aux": 0.0}


def router(name: str, **fields: Any) -> Arm:
    """Return the mixture with another router."""
    return mixture(name, EXPERTS, **fields)


def biased(name: str, bias: str, gate: str = "sigmoid", **fields: Any) -> Arm:
    """Return one that is balanced by a bias on the selection."""
    gates = {"model__moe__router__gate": gate, "model__moe__router__renormalize": True}
    return router(name, **NO_AUX, **gates, model__moe__balance__bias=bias, **fields)


ARMS = (
    router("softmax over all, auxiliary loss"),
    router("softmax over k, auxiliary loss", model__moe__router__gate="topk_softmax"),
    router("noisy top-k, auxiliary loss", model__moe__router__noisy=True),
    router("sigmoid, auxiliary loss", model__moe__router__gate="sigmoid"),
    biased("sigmoid, sign bias 0.001", "sign"),
    biased("sigmoid, sign bias 0.02", "sign", model__moe__balance__bias_rate=0.02),
    biased("sigmoid, quantile bias", "quantile"),
    router("softmax over all, nothing", **NO_AUX),
)


def loads(folder: Path) -> Mapping[str, float]:
    """Return the largest load of an expert over the fair share, at the end of training."""
    records = [r for r in read_metrics(folder / "metrics.jsonl") if "load_max" in r]
    return {"largest load / fair share": mean(r["load_max"] for r in records[-LAST:])}


def table(rows: Sequence[Row]) -> list[Row]:
    """Return loss beside load, the best router first."""
    arms: dict[str, list[Row]] = {}
    for row in of_one_text(rows):
        if row["bits_per_byte"] is not None:
            arms.setdefault(row["arm"], []).append(row)
    (name,) = {name for row in rows for name in row["scores"]} or {""}
    lines = [
        {
            "router": arm,
            "bits/byte": f"{mean(r['bits_per_byte'] for r in group):.4f}",
            name: f"{mean(r['scores'][name] for r in group):.2f}",
            "seeds": len(group),
        }
        for arm, group in arms.items()
    ]
    return sorted(lines, key=lambda line: line["bits/byte"])


STUDY = Study(
    "routers",
    "Which router is best, and how evenly does it load its experts?",
    (series(ARMS, STEPS, SEEDS[:2]),),
    scores=loads,
    notes="Models of width 32, 64 experts with 4 of a token, 1M bytes of Python. The load is "
    "the greatest of both layers, averaged over the last ten records of training.",
    tables={"routers": table},
)
