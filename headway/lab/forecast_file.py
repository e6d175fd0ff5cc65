"""A forecast that is written down before the run, and what the run says of it."""

import datetime
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from headway.checkpoint.run_folder import read_config
from headway.config import Config, UsageError
from headway.lab.forecast import Fit, pinned_warning
from headway.lab.laws import Irreducible, inputs
from headway.lab.match import measure
from headway.lab.sealed import Kind, file_sha256, read_sealed, sealed
from headway.report.provenance import commit
from headway.report.sinks import read_metrics

KIND = Kind("headway law registration", "headway law register FIT --out FILE")
METRICS = ("val_loss", "val_bits_per_byte")
"""What a run records that can be scored."""
OFF = 0.01
"""Relative difference of FLOPs, parameters or tokens above which a run is not the registered one.
"""


class Score(NamedTuple):
    """How a run compares with its forecast."""

    loss: float
    """Measured."""
    predicted: float
    low: float
    high: float
    level: float
    error: float
    """Measured / predicted − 1."""
    inside: bool
    """Whether the measured loss lies in low … high."""
    note: str
    """What the interval does not hold."""

    def sentence(self) -> str:
        """Return it as text."""
        where = "inside" if self.inside else "outside"
        text = (
            f"measured {self.loss:.4f}, registered {self.predicted:.4f}: {self.error:+.2%}, "
            f"{where} the {self.level:.0%} interval {self.low:.4f} … {self.high:.4f}"
        )
        return f"{text}; {self.note}" if self.note else text


def register(
    path: Path, fit_path: Path, fit: Fit, at: dict[str, float], *, metric: str, stop_rule: str
) -> dict[str, Any]:
    """Write the forecast of a run to a new file and return it. Raises UsageError where the file
    exists or cannot be written.

    Args:
        at: what `Fit.predict` takes; `tokens`, also of a law that does not read them, is what the
            run will train on.
        metric: what the loss is, and on which text.
        stop_rule: when the run ends."""
    read = inputs(fit.law.form)
    forecast = fit.predict({k: v for k, v in at.items() if k != "tokens" or k in read})
    head, dirty = commit(Path.cwd())  # of who studies; else of this package
    if head == "unknown":
        head, dirty = commit()
    tokens = at.get("tokens") or forecast.at.get("tokens")
    if tokens is None and forecast.tokens:
        tokens = forecast.tokens["best"]
    value = sealed(
        {
            "kind": KIND.name,
            "prediction": forecast.loss,
            "interval": [forecast.low, forecast.high],
            "level": forecast.level,
            "at": forecast.at,
            "metric": metric or f"the loss of {fit.facts.source}",
            "tokens": tokens,
            "stop_rule": stop_rule,
            "form": fit.law.form,
            "irreducible": str(fit.law.irreducible),
            "if_irreducible": forecast.if_irreducible,
            "fit_sha256": file_sha256(fit_path),
            "source_sha256": fit.facts.source_sha256,
            "commit": head,
            "dirty": dirty,
            "registered": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        }
    )
    created = False
    try:
        with path.open("x", encoding="utf-8") as file:
            created = True
            file.write(json.dumps(value, indent=1, ensure_ascii=False) + "\n")
    except FileExistsError:
        raise UsageError(
            f"{path} exists; a registration is never overwritten, use another --out"
        ) from None
    except OSError as error:
        if created:  # a part of a forecast is none, and would be in the way of the whole one
            path.unlink()
        raise UsageError(f"cannot write {path}: {error.strerror}; use another --out") from None
    return value


def score(path: Path, loss: float) -> Score:
    """Return how a measured loss compares with a registration. Raises UsageError for a file that is
    none or was edited, and for a loss that is not above 0."""
    value = read_sealed(path, KIND)
    if not 0 < loss < math.inf:
        raise UsageError(f"--loss {loss:g} is not above 0")
    predicted, (low, high) = value["prediction"], value["interval"]
    inside = low <= loss <= high
    others = ", ".join(f"{v:.4f} with {name}" for name, v in value["if_irreducible"].items())
    note = "; ".join(pinned_warning(Irreducible.parse(value["irreducible"]), others))
    return Score(loss, predicted, low, high, value["level"], loss / predicted - 1, inside, note)


def loss_of_run(folder: Path, path: Path) -> float:
    """Return the validation loss at the end of a run, in bits per byte where that is the registered
    metric, else in nats per token. Raises UsageError for a run that is not finished, or is not the
    registered one (`check_run`)."""
    value, config = read_sealed(path, KIND), read_config(folder)
    metrics = folder / "metrics.jsonl"
    metric = value["metric"] if value["metric"] in METRICS else METRICS[0]
    records = [r for r in read_metrics(metrics) if r.get(metric) is not None]
    last = records[-1] if records else {"step": 0}
    if last["step"] < config.optim.steps:
        raise UsageError(
            f"{folder} has its last {metric} at step {last['step']} of {config.optim.steps}; "
            "a forecast is scored at the end of the run"
        )
    check_run(path, str(folder), _quantities(config, last["tokens"]))
    return float(last[metric])


def check_run(path: Path, name: str, run: Mapping[str, float]) -> None:
    """Raise UsageError where a run is not the registered one: where what the law read, or the
    number of tokens, is off by more than 1%.

    Args:
        name: of the run.
        run: its `flops` (training, executed), `params`, `tokens`, …; what is not there is not
            compared."""
    value = read_sealed(path, KIND)
    registered = {**value["at"], "tokens": value["tokens"]}
    for quantity in dict.fromkeys((*inputs(value["form"]), "tokens")):
        wanted, measured = registered[quantity], run.get(quantity)
        if wanted and measured is not None and abs(measured / wanted - 1) > OFF:
            raise UsageError(
                f"{name} has {measured:,.6g} {quantity} and {path} registers {wanted:,.6g}: it is "
                "another run; one whose quantities were counted otherwise is scored with --loss"
            )


def _quantities(config: Config, tokens: int) -> dict[str, float]:
    """Return what laws read of a run, as Headway counts it: executed FLOPs of training, active
    parameters, experts of a layer (1 if dense), and as granularity those of a token, which are as
    wide together as one dense network."""
    moe, dense = config.model.moe, config.model.moe.kind == "dense"
    return {
        "flops": tokens * measure(config, "active-flops"),
        "params": measure(config, "active-parameters"),
        "tokens": tokens,
        "experts": 1 if dense else moe.n_experts,
        "granularity": 1 if dense else moe.top_k,
    }
