"""`headway eval --samples`: pass@k and Cover@τ of samples that are there already."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from headway.cli.options import parse, print_json
from headway.config import UsageError


@dataclass(frozen=True)
class Samples:
    """Unbiased pass@k and Cover@τ of a file of samples, with 95% intervals over problems."""

    samples: str
    """JSON lines: problem; correct, a list with 0 or 1 for each sample; and, where near-copies are
    to be counted, texts, the samples themselves."""
    k: str = "1"
    """Numbers of samples, as in 1,64; each problem needs as many."""
    tau: str = ""
    """Shares, as in 0.1,0.5: how many problems have at least that share of right samples."""
    seed: int = 0
    """Of the bootstrap over problems."""
    json: bool = False
    """End with one JSON object."""


def samples(args: Sequence[str]) -> int:
    """Run `headway eval --samples FILE` and return its exit code."""
    options = parse(Samples, args, "headway eval --samples FILE")
    ks, taus = _numbers("--k", options.k, int), _numbers("--tau", options.tau, float)

    from headway.eval.pass_at_k import covered, near_repeats, over_problems, pass_at_k, read_samples

    read = read_samples(Path(options.samples))
    names = [*(f"pass@{k}" for k in ks), *(f"cover@{tau:g}" for tau in taus)]
    if not names:
        raise UsageError("--samples needs --k or --tau, as in --k 1,64 --tau 0.1,0.5")
    values = [*(pass_at_k(read, k) for k in ks), *(covered(read, tau) for tau in taus)]
    if read.texts:
        names, values = [*names, "near-repeats"], [*values, near_repeats(read)]
    scores = dict(zip(names, over_problems(values, options.seed), strict=True))
    fewest, most = int(read.tries_P.min()), int(read.tries_P.max())
    tries = f"{fewest}" if fewest == most else f"{fewest} to {most}"
    print(f"{options.samples}: {len(read.tries_P):,} problems, {tries} samples of each")
    for name, (value, (low, high)) in scores.items():
        print(f"{name:<12} {value:.4f}  95% {low:.4f} … {high:.4f}")
    print_json(
        options.json,
        {
            "problems": len(read.tries_P),
            "pass_at_k": {str(k): scores[f"pass@{k}"].value for k in ks},
            "cover": {f"{tau:g}": scores[f"cover@{tau:g}"].value for tau in taus},
            "near_repeats": scores["near-repeats"].value if read.texts else None,
            "ci95": {name: list(score.ci95) for name, score in scores.items()},
        },
    )
    return 0


def _numbers(flag: str, text: str, kind: type) -> list:
    """Return a list with commas as numbers, without repeats."""
    try:
        return list(dict.fromkeys(kind(word) for word in text.split(",") if word))
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UsageError(f"{flag} {text} is no list of {what}") from None
