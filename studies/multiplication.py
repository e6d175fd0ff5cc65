"""Can a tiny model multiply: digits at once, the last one first, with a scratch-pad, or looped?

Two layers of width 64, factors of two and three digits; `looped`: one layer, applied twice."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from headway.data.worlds.source import WorldSource
from headway.eval.worlds import score
from headway.hub.load import load_model
from headway.lab.experiment import Arm
from headway.lab.measurement import Verdict
from headway.lab.rows import Row
from headway.lab.study import Rule, Study
from headway.model.build import build_block
from headway.model.transformer import Transformer
from studies.world_arms import ITEMS, LoopedBlocks, arm, mean_wrong, series, tensor_names

WORLDS = {
    "2x2": "multiplication,length=2",
    "2x2, last first": "multiplication,length=2,order=lsb",
    "2x2, scratch-pad": "multiplication,length=2,order=lsb,form=scratch",
    "3x3": "multiplication,length=3",
}
SEEDS, STEPS = (101, 102), 1000
MARGIN = 0.1  # share of items: a smaller difference is none


def looped(model: Transformer) -> None:
    """Apply the first layer again in place of each further one."""
    for i in range(1, len(model.layers)):
        model.layers[i] = model.layers[0]


def scores(folder: Path) -> dict[str, float]:
    """Return the share of items wrong, and of the first, middle and last digits of the products, of
    all products with m + n digits, as if what is before each were right."""
    shared = not any("layers.1." in name for name in tensor_names(folder))
    blocks = LoopedBlocks() if shared else build_block
    loaded = load_model(folder, dtype="float32", threads=1, blocks=blocks, packed=False)
    (spec,) = loaded.config.data.source
    source, model = WorldSource.open(spec, loaded.tokenizer), loaded.model
    result = score(model, loaded.tokenizer.vocab_size, source, ITEMS)
    rows = source.rows("test", np.arange(ITEMS, dtype=np.uint64), source.world.n_tokens)
    with torch.no_grad():
        logits_BSV = model(torch.from_numpy(rows.tokens_BS)).logits_BSV
    assert logits_BSV is not None
    best_BS = logits_BSV[..., : loaded.tokenizer.vocab_size].argmax(-1).numpy()
    n_digits = sum(source.world.digits)  # type: ignore[attr-defined]
    # the last target of a row is the full stop; a product without leading zero fills the window
    full_B = rows.targets_BS[:, -1] >= 0
    wrong_BD = (best_BS != rows.targets_BS)[full_B, -1 - n_digits : -1]
    if "order=lsb" in spec:
        wrong_BD = wrong_BD[:, ::-1]
    wrong_D = wrong_BD.mean(0)
    return {
        "items wrong": 1 - result.exact,
        "targets wrong": 1 - result.accuracy,
        "first digit wrong": wrong_D[0],
        "worst middle digit wrong": wrong_D[1:-1].max(),
        "last digit wrong": wrong_D[-1],
    }


def direct_fails(rows: Sequence[Row]) -> Verdict:
    wrong = [row["scores"]["items wrong"] for row in rows]
    answer = "holds" if min(wrong) > 0.9 else "refuted" if max(wrong) < 0.5 else "cannot_tell"
    return Verdict(answer, f"{min(wrong):.0%} to {max(wrong):.0%} of the items are wrong.")


def middle_first(rows: Sequence[Row]) -> Verdict:
    names = ("first digit wrong", "worst middle digit wrong", "last digit wrong")
    triples = [[row["scores"][name] for name in names] for row in rows if row["arm"] == "dense"]
    worst = [middle > max(first, last) for first, middle, last in triples]
    answer = "holds" if all(worst) else "cannot_tell" if any(worst) else "refuted"
    first, middle, last = np.mean(triples, axis=0)
    return Verdict(answer, f"First {first:.0%} wrong, middle {middle:.0%}, last {last:.0%}.")


def steps_help(rows: Sequence[Row]) -> Verdict:
    direct, last, pad = (mean_wrong(rows, name, "dense") for name in WORLDS if name != "3x3")
    gains = direct - last, direct - pad
    answer = "holds" if min(gains) > MARGIN else "refuted" if max(gains) < MARGIN else "cannot_tell"
    said = f"Items wrong: direct {direct:.0%}, last digit first {last:.0%}, scratch-pad {pad:.0%}."
    return Verdict(answer, said)


def sizes_help(rows: Sequence[Row]) -> Verdict:
    wrong = {row["arm"]: mean_wrong(rows, "2x2", row["arm"]) for row in rows}
    gains = {name: wrong["dense"] - value for name, value in wrong.items() if name != "dense"}
    answer = "holds" if max(gains.values()) < MARGIN else "refuted"
    said = ", ".join(f"{name} {value:.0%}" for name, value in wrong.items())
    return Verdict(answer, f"Items wrong: {said}.")


def _series(name: str):
    arms = [arm("dense", WORLDS[name])]
    if name == "2x2":
        arms += [arm("flat", WORLDS[name]), arm("flat, E 32", WORLDS[name])]
        arms.append(Arm("looped", arms[0].config, looped))
    return series(name, tuple(arms), SEEDS, STEPS)


SOURCE = "the laboratory's plan: what small models are said to fail at"
STUDY = Study(
    "multiplication",
    "Can a tiny model multiply, and what helps it?",
    tuple(map(_series, WORLDS)),
    rules=(
        Rule(
            "direct",
            "Written at once, products of three digits by three are not learned.",
            SOURCE,
            "Holds if more than 90% of new items are wrong for each seed, refuted if under 50%.",
            direct_fails,
            ("3x3",),
        ),
        Rule(
            "middle",
            "Middle digits of direct products fail first.",
            SOURCE,
            "Holds if for each seed, at 2 × 2 and 3 × 3, a middle digit is wrong more often than "
            "the first and the last one, refuted if for none.",
            middle_first,
            ("2x2", "3x3"),
        ),
        Rule(
            "steps",
            "The last digit first, and a scratch-pad, each help at 2 × 2.",
            SOURCE,
            "Holds if each has 10% of the items fewer wrong than direct, refuted if neither.",
            steps_help,
            ("2x2", "2x2, last first", "2x2, scratch-pad"),
        ),
        Rule(
            "sparsity",
            "Neither 8 nor 32 experts, 2 per token, nor a layer applied twice helps at 2 × 2.",
            SOURCE,
            "Holds if none has 10% of the items fewer wrong than dense at its FLOPs, else refuted.",
            sizes_help,
            ("2x2",),
        ),
    ),
    scores=scores,
    notes="Two layers of width 64, two seeds, 1,000 steps of 64 items: longer training may look "
    "different. `looped` is one layer in both places, by an edit: it is no option of the model.",
)
