"""Which settings help a flat mixture, and Multi-Head LatentMoE, at small size?

One setting is changed at a time, at equal executed FLOPs and total parameters, for 250 steps: so
early, paired differences spread by 0.003 bits per byte (`noise_floor`). What is no setting, but
another layer, is in `levers`."""

from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any

from headway.lab.experiment import Arm
from headway.lab.rows import Row
from headway.lab.study import Contrast, Study
from studies.arms import WHERE, differences, flat, heads, series

CORPUS, SEEDS, STEPS = "python", (0, 1), 250
FLAT, HEADS = "flat", "2x64"


def changed(base: str, what: str, n: int = 2, **fields: Any) -> Arm:
    """Return one of the two designs with fields of its config changed."""
    name = f"{base}, {what}"
    return flat(CORPUS, name, **fields) if base == FLAT else heads(CORPUS, n, name, **fields)


SIGN: dict[str, Any] = {
    "model__moe__balance__aux": 0.0,
    "model__moe__balance__bias": "sign",
    "model__moe__balance__bias_rate": 0.02,
}
QUANTILE: dict[str, Any] = {
    "model__moe__balance__aux": 0.0,
    "model__moe__balance__bias": "quantile",
}
SIGMOID: dict[str, Any] = {
    "model__moe__router__gate": "sigmoid",
    "model__moe__router__renormalize": True,
}
CHANGES = (
    changed(HEADS, "no norm of latents", model__moe__latent_norm=False),
    changed(HEADS, "k 4", model__moe__top_k=4),
    changed(HEADS, "k 16", model__moe__top_k=16),
    changed(HEADS, "router reads its sub-token", model__moe__router__reads="latent"),
    changed(HEADS, "a shared expert of 64", model__moe__d_shared=64),
    changed(HEADS, "one head of 128", n=1),
    changed(HEADS, "four heads of 32", n=4),
    changed(HEADS, "four heads of 64, k 4", n=4, model__moe__d_latent=256, model__moe__top_k=4),
    changed(HEADS, "quantile bias", **QUANTILE),
    changed(FLAT, "k 4", model__moe__top_k=4),
    changed(FLAT, "k 16", model__moe__top_k=16),
    changed(FLAT, "a shared expert of 64", model__moe__d_shared=64),
    changed(FLAT, "auxiliary loss 0.001", model__moe__balance__aux=0.001),
    changed(FLAT, "sign bias", **SIGN),
    changed(FLAT, "quantile bias", **QUANTILE),
    changed(FLAT, "router's rate × 3", optim__router_lr_scale=3.0),
    changed(FLAT, "experts by AdamW", optim__muon_experts=False),
    changed(FLAT, "all by AdamW", optim__name="adamw"),
    changed(FLAT, "sigmoid gates", **SIGMOID),
    changed(FLAT, "ReLU²", model__moe__activation="relu2"),
)


def changes(rows: Sequence[Row]) -> list[Row]:
    """Return the paired difference of each changed design to the same without the change."""
    table: list[Row] = []
    for arm in CHANGES:
        design, _, change = arm.name.partition(", ")
        x = differences(rows, "screen", Contrast(arm.name, design, STEPS))
        if x:
            table.append(
                {
                    "design": design,
                    "change": change,
                    "difference": mean(x),
                    "sd of a pair": stdev(x) if len(x) > 1 else None,
                    "seeds": len(x),
                }
            )
    return table


STUDY = Study(
    "settings",
    "Which settings help a flat mixture, and Multi-Head LatentMoE, at small size?",
    (series("screen", CORPUS, (flat(CORPUS), heads(CORPUS, 2), *CHANGES), SEEDS, (STEPS,)),),
    notes=f"{WHERE} {STEPS} steps. Two seeds screen, and prove nothing.",
    tables={"settings": changes},
)
