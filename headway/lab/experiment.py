"""An experiment: arms, seeds and one budget. Its plan has a config per arm, of equal cost.

The seed fixes the order of the data for all arms, and the initial values of what they share
(`model.init`), so that runs of one seed are a pair. A clock ends no run: CPU seconds are steps
times a calibrated time of a step."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from headway.config import Config, UsageError, leaves
from headway.data.tokenizer import load_tokenizer
from headway.lab.calibrate import calibrate
from headway.lab.match import Place, Quantity, bytes_per_token, match, measure
from headway.lab.runs import Run
from headway.train.budget import Budget
from headway.train.open_session import Edit
from headway.train.records import Log
from headway.train.resolve import resolve

FLOPS_TOLERANCE = 0.003
"""Largest relative difference of the executed training FLOPs of two arms."""
EVERY = 50
"""Fewest steps between evaluations."""
SAVED_EVERY = 250
"""Most steps between checkpoints, which are what a killed run loses."""


@dataclass(frozen=True)
class Arm:
    """One design. `edit` changes the built model, for what is no option yet."""

    name: str
    config: Config
    edit: Edit | None = None


@dataclass(frozen=True)
class PlannedArm:
    """An arm with its solved sizes, and its part of the budget."""

    name: str
    config: Config
    """Resolved, but for its seed and folder."""
    edit: Edit | None
    solved: dict[str, int]
    """Field → value that was solved."""
    mismatch: dict[str, float]
    """Quantity → value over the baseline's, minus 1; `train_flops` too."""
    costs: dict[str, float]
    """`flops_per_token` of training, `active_parameters`, `total_parameters`, `bytes_per_token`,
    `memory_bytes`; `step_seconds` where calibrated."""

    @property
    def tokens(self) -> int:
        """The training tokens of a run."""
        data, optim = self.config.data, self.config.optim
        last = data.last_batch_size or data.batch_size
        return ((optim.steps - 1) * data.batch_size + last) * data.seq_len

    @property
    def train_flops(self) -> float:
        """The FLOPs of training of a run, executed."""
        return self.tokens * self.costs["flops_per_token"]

    def run(self, seed: int) -> Run:
        """Return the run of a seed."""
        run = dataclasses.replace(self.config.run, seed=seed)
        return Run(dataclasses.replace(self.config, run=run), self.edit)


@dataclass(frozen=True)
class Experiment:
    """Arms that are trained with the same seeds on the same tokens."""

    arms: tuple[Arm, ...]
    seeds: tuple[int, ...]
    budget: Budget
    """Of the baseline. The others get as many executed FLOPs; with a budget of CPU seconds, or
    `equal_cpu_time`, as many CPU seconds."""
    baseline: str = ""
    """Name of an arm; "" is the first."""
    match: tuple[Quantity, ...] = ()
    """What the other arms have as much of as the baseline; empty changes no sizes."""
    free: tuple[str, ...] = ()
    """Fields that are solved for it; empty: the defaults of `match`."""
    equal_cpu_time: bool = False
    place: Place = field(default_factory=Place)
    margin: float = 0.0
    """Bits per byte below which a difference does not matter; 0: none is stated."""
    eval_tokens: int = 0
    """Validation tokens, in whole windows, the same for every batch; 0 is the whole split."""
    evaluations: int = 4
    """Of a run, evenly spread, the last at its end; those of a short run are `EVERY` steps
    apart."""

    def plan(self, log: Log = print) -> tuple[PlannedArm, ...]:
        """Solve the arms. Raises UsageError where they cannot be compared."""
        self._check()
        resolved = [dataclasses.replace(a, config=self._resolve(a.config)) for a in self.arms]
        base = next(a for a in resolved if a.name == (self.baseline or self.arms[0].name))
        targets: dict[Quantity, float] = {
            q: measure(base.config, q, base.edit, self.place) for q in self.match
        }
        sized = [_Sized(a, {}, {}) if a is base else self._sized(a, targets) for a in resolved]
        seconds = {s.arm.name: 0.0 for s in sized}
        if self.budget.cpu_seconds or self.equal_cpu_time:
            seconds = calibrate({s.arm.name: (s.arm.config, s.arm.edit) for s in sized}, log)
        planned = tuple(self._budgeted(sized, base, seconds))
        hashes: dict[str, str] = {}
        for arm in planned:
            other = hashes.setdefault(arm.run(0).key, arm.name)
            if other != arm.name:
                raise UsageError(
                    f"arms {other} and {arm.name} resolve to the same config; leave one out, or "
                    "change a field of it"
                )
        return planned

    def _check(self) -> None:
        if not 0 <= self.margin < float("inf"):
            raise UsageError(f"margin {self.margin} is below 0; use bits per byte, as 0.005")
        names = [arm.name for arm in self.arms]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UsageError(f"two arms are called {twice}; give one a label, as in other={twice}")
        if self.baseline and self.baseline not in names:
            raise UsageError(f"--baseline {self.baseline} is no arm; use {', '.join(names)}")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise UsageError(f"seeds {list(self.seeds)} are not different ones; use 0,1,2")
        first = self.arms[0]
        for arm in self.arms[1:]:
            mine, theirs = (leaves({"data": vars(a.config.data)}) for a in (first, arm))
            for name, value in theirs.items():
                if value != mine[name]:
                    raise UsageError(
                        f"{name} is {mine[name]} in arm {first.name} and {value} in {arm.name}, so "
                        f"that they would read other tokens; give both one with --{name}"
                    )

    def _resolve(self, config: Config) -> Config:
        """Fill in what a config leaves open; drop what would make runs unequal."""
        if config.mesh.size > 1:
            raise UsageError(f"arms run in one process, and {config.recipe} has {config.mesh}")
        if config.optim.transfer == "power":
            raise UsageError(
                f"optim.transfer=power of {config.recipe} follows the tokens of a run, which the "
                "budget sets only after its batch; use transfer=none, with batch and rates for "
                f"{self.budget}"
            )
        run = dataclasses.replace(
            config.run,
            dir="",
            seed=0,
            threads=config.run.threads or 1,
            eval_tokens=self.eval_tokens,
            sample_tokens=0,
            max_seconds=0.0,
            stop_bits_per_byte=0.0,
        )
        config = dataclasses.replace(config, run=run)
        vocab_size = load_tokenizer(config.data.vocabulary).vocab_size
        return resolve(config, vocab_size).config

    def _sized(self, arm: Arm, targets: dict[Quantity, float]) -> "_Sized":
        if not targets:
            return _Sized(arm, {}, {})
        try:
            matched = match(arm.config, targets, self.free, arm.edit, self.place)
        except UsageError as error:
            raise UsageError(f"arm {arm.name}: {error}") from None
        solved = dataclasses.replace(arm, config=matched.config)
        return _Sized(solved, matched.solved, dict(matched.mismatch.items()))

    def _budgeted(
        self, sized: Sequence["_Sized"], base: Arm, seconds: Mapping[str, float]
    ) -> Iterator[PlannedArm]:
        """Yield the arms with their steps: as many FLOPs as the baseline, or CPU seconds."""
        costs = self._costs(base, seconds)
        fitted = self.budget.fit(base.config, costs["flops_per_token"], seconds[base.name])
        reference = PlannedArm(base.name, fitted, base.edit, {}, {}, costs)
        if self.budget.cpu_seconds:
            budget = self.budget
        elif self.equal_cpu_time:
            budget = Budget(cpu_seconds=fitted.optim.steps * seconds[base.name])
        else:
            budget = Budget(flops=reference.train_flops)
        for part in sized:
            arm, costs = part.arm, self._costs(part.arm, seconds)
            config = fitted
            if arm.name != base.name:
                config = budget.fit(arm.config, costs["flops_per_token"], seconds[arm.name])
            config = _evaluated(config, self.evaluations)
            planned = PlannedArm(arm.name, config, arm.edit, part.solved, part.mismatch, costs)
            off = planned.train_flops / reference.train_flops - 1
            equal_flops = not (self.budget.cpu_seconds or self.equal_cpu_time)
            if equal_flops and abs(off) > FLOPS_TOLERANCE:
                raise UsageError(
                    f"arm {arm.name}: {planned.tokens:,} tokens are {off:+.2%} FLOPs beside "
                    f"{base.name}; raise the budget, of which a sequence is too large a part"
                )
            yield dataclasses.replace(planned, mismatch={**part.mismatch, "train_flops": off})

    def _costs(self, arm: Arm, seconds: Mapping[str, float]) -> dict[str, float]:
        config, edit = arm.config, arm.edit
        costs = {
            "flops_per_token": measure(config, "active-flops", edit),
            "active_parameters": measure(config, "active-parameters", edit),
            "total_parameters": measure(config, "total-parameters", edit),
            "bytes_per_token": bytes_per_token(config, self.place.ranks),
            "memory_bytes": measure(config, "memory", edit),
        }
        return costs | ({"step_seconds": seconds[arm.name]} if seconds[arm.name] else {})


@dataclass(frozen=True)
class _Sized:
    arm: Arm
    solved: dict[str, int]
    mismatch: dict[str, float]


def _evaluated(config: Config, n: int) -> Config:
    """Return the config with n evaluations, at most one per `EVERY` steps: the whole split costs as
    much as some tens of steps."""
    every = max(EVERY, -(-config.optim.steps // n))
    saves = min(every, SAVED_EVERY)
    run = dataclasses.replace(config.run, eval_every=every, checkpoint_every=saves)
    return dataclasses.replace(config, run=run)
