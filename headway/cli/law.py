"""`headway law`: scaling laws from a table of runs, forecasts, and forecasts that are kept."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from headway.cli.options import parse, print_json
from headway.config import UsageError

if TYPE_CHECKING:
    from headway.lab import forecast

PARTS = {
    "fit": "a law of the runs in a CSV file, with intervals, a back-test and a page",
    "predict": "the loss of a run that was not made yet",
    "register": "a forecast in a new file, before the run",
    "score": "a registered forecast against the run",
    "gain": "how much compute a change saves, rung by rung",
}
File = Annotated[str, tyro.conf.Positional]


@dataclass(frozen=True)
class Fit:
    """A scaling law of the runs in a CSV file with a header.

    Columns: flops,loss for a power law; budget,tokens,loss for isoflop; params,tokens,loss for
    chinchilla, and granularity or experts beside for the forms of that name (experts: joint)."""

    file: File
    """CSV file."""
    form: Literal["power", "isoflop", "chinchilla", "granularity", "joint"] = "power"
    """The law; their equations are in docs/laws.md."""
    irreducible: str = "free"
    """The loss that no compute removes: free (fitted), X (pinned), or X±Y (known to ± one standard
    deviation)."""
    level: float = 0.9
    """Probability of the intervals."""
    seed_noise: float = -1.0
    """Standard deviation of one run over seeds, in nats, where the file has means or minima of
    several; below 0: what isoflop curves show, else none beside the residuals."""
    bootstraps: int = 1000
    """Replicates."""
    huber: float = 1e-3
    """Where squares turn into absolute values, in log loss (Hoffmann et al. 2022: 1e-3)."""
    seed: int = 0
    """Of the replicates."""
    page: str = ""
    """HTML file with the plots; empty: the CSV file's name with .html."""
    json: bool = False
    """End with one JSON object, which predict, register and gain take as FIT."""


@dataclass(frozen=True)
class At:
    """Where a law is read."""

    fit: File
    """What `headway law fit … --json` wrote."""
    flops: float = 0.0
    """Training FLOPs; of a law in parameters and tokens the best of both with 6·N·D."""
    params: float = 0.0
    """Active parameters."""
    tokens: float = 0.0
    """Training tokens."""
    granularity: float = 0.0
    """d_ff over the width of one expert."""
    experts: float = 0.0
    """Number of experts; 1 is dense."""
    json: bool = False
    """End with one JSON object."""

    def values(self) -> dict[str, float]:
        """Return what was given."""
        values = {
            "flops": self.flops,
            "params": self.params,
            "tokens": self.tokens,
            "granularity": self.granularity,
            "experts": self.experts,
        }
        for name, value in values.items():
            if not 0 <= value < math.inf:
                raise UsageError(f"--{name} {value:g} is no number above 0")
        return {name: value for name, value in values.items() if value}


@dataclass(frozen=True)
class Predict(At):
    """The loss that a law predicts, with its interval."""

    level: float = 0.0
    """Probability of the interval; 0: that of the fit."""


@dataclass(frozen=True)
class Register(At):
    """Write a forecast to a new file, which is never overwritten; commit it before the run."""

    out: str = ""
    """File to write."""
    metric: str = ""
    """What the loss is, and on which text; empty: the loss of the fitted file. val_bits_per_byte
    is read from a run as such, everything else as its val_loss."""
    stop_rule: str = "the last step of the schedule"
    """When the run ends."""


@dataclass(frozen=True)
class Score:
    """A registered forecast against what was measured."""

    file: File
    """What `headway law register` wrote."""
    loss: float = 0.0
    """The measured loss."""
    run: str = ""
    """Or the run folder, whose validation loss at the end it is."""
    json: bool = False
    """End with one JSON object."""


@dataclass(frozen=True)
class Gain:
    """How much more compute the baseline needs for the losses of a change, at each rung."""

    fit: File
    """The fit of the baseline's runs (power or isoflop)."""
    change: File
    """CSV file of the change: flops,loss and, where measured, baseline (its loss at these FLOPs),
    tokens_per_second, baseline_tokens_per_second. Rows of equal FLOPs are seeds."""
    level: float = 0.0
    """Probability of the intervals; 0: that of the fit."""
    json: bool = False
    """End with one JSON object."""


def law(args: Sequence[str]) -> int:
    """Run `headway law fit|predict|register|score|gain` and return its exit code."""
    part, rest = (args[0], args[1:]) if args else ("--help", [])
    match part:
        case "fit":
            return _fit(parse(Fit, rest, "headway law fit"))
        case "predict":
            return _predict(parse(Predict, rest, "headway law predict"))
        case "register":
            return _register(parse(Register, rest, "headway law register"))
        case "score":
            return _score(parse(Score, rest, "headway law score"))
        case "gain":
            return _gain(parse(Gain, rest, "headway law gain"))
        case "--help" | "-h":
            print("usage: headway law PART …\n")
            print("\n".join(f"  {name:<10} {line}" for name, line in PARTS.items()))
            print("\n`headway law PART --help` lists its options.")
            return 0
        case _:
            raise UsageError(f"unknown part {part!r} of headway law; use {', '.join(PARTS)}")


def _fit(options: Fit) -> int:
    if options.bootstraps < 100:
        raise UsageError(f"--bootstraps {options.bootstraps} gives no intervals; use 100 or more")
    if not options.huber > 0:
        raise UsageError(f"--huber {options.huber:g} is not above 0; use 1e-3")
    if not options.seed_noise < math.inf:
        raise UsageError(f"--seed-noise {options.seed_noise:g} is no number of nats; use 0.003")
    from headway.lab.forecast import fit_runs
    from headway.lab.law_page import write_law
    from headway.lab.laws import Irreducible
    from headway.lab.rungs import read_runs
    from headway.lab.sealed import sealed

    path = Path(options.file)
    irreducible = Irreducible.parse(options.irreducible)
    runs = read_runs(path, options.form)
    fit = fit_runs(
        runs,
        irreducible,
        level=_level(options.level),
        seed_noise=options.seed_noise if options.seed_noise >= 0 else None,
        bootstraps=options.bootstraps,
        delta=options.huber,
        seed=options.seed,
    )
    page = write_law(fit, runs, Path(options.page) if options.page else path.with_suffix(".html"))
    print("\n".join([*fit.sentences(), f"plots: {page}"]))
    print_json(options.json, sealed(fit.to_dict()))
    return 0


def _predict(options: Predict) -> int:
    fit = _read_fit(options.fit)
    forecast = fit.predict(options.values(), _level(options.level) if options.level else None)
    print("\n".join(forecast.sentences(fit.law.irreducible)))
    print_json(options.json, forecast._asdict())
    return 0


def _register(options: Register) -> int:
    if not options.out:
        raise UsageError("register needs --out FILE, a new file for the forecast")
    from headway.lab.forecast_file import register

    value = register(
        Path(options.out),
        Path(options.fit),
        _read_fit(options.fit),
        options.values(),
        metric=options.metric,
        stop_rule=options.stop_rule,
    )
    low, high = value["interval"]
    print(
        f"{options.out}: loss {value['prediction']:.4f} ({value['level']:.0%}: {low:.4f} … "
        f"{high:.4f}), sha256 {value['sha256'][:16]}; commit it before the run starts"
    )
    print_json(options.json, value)
    return 0


def _score(options: Score) -> int:
    if bool(options.loss) == bool(options.run):
        raise UsageError("score needs --loss L or --run DIR, one of them")
    from headway.lab.forecast_file import loss_of_run, score

    path = Path(options.file)
    loss = loss_of_run(Path(options.run), path) if options.run else options.loss
    result = score(path, loss)
    print(result.sentence())
    print_json(options.json, result._asdict())
    return 0


def _gain(options: Gain) -> int:
    from headway.lab.gain import gain

    level = _level(options.level) if options.level else None
    result = gain(_read_fit(options.fit), Path(options.change), level)
    print("\n".join(result.sentences()))
    print_json(options.json, asdict(result))
    return 0


def _level(level: float) -> float:
    if not 0 < level < 1:
        raise UsageError(f"--level {level:g} is no probability; use 0.9 or 0.95")
    return level


def _read_fit(path: str) -> "forecast.Fit":
    from headway.lab import forecast
    from headway.lab.sealed import read_sealed

    return forecast.Fit.from_dict(read_sealed(Path(path), forecast.KIND))
