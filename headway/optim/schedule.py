"""Learning rate schedules: pure functions of the step, without state to resume."""

import math

from headway.config import OptimConfig


def lr_factor(step: int, config: OptimConfig) -> float:
    """Return the learning rate of optimiser step `step` (from 0) over the peak rate, in [0, 1].

    Warm-up takes W = ⌊warmup·steps⌋ (or `warmup_steps`) steps, (step+1)/W each, so the first step
    already moves and step W−1 is at the peak. The last step is at `min_lr_ratio`. A run too short
    to have a falling part stays at the peak. `wsd` falls by 1−√x (arXiv 2405.18392, §3),
    `trapezoid` linearly, `cosine` by half a cosine from the peak on."""
    last = config.steps - 1
    assert 0 <= step <= last, f"step {step} of {config.steps}"
    warm, peak_end = _warm_up(config), steps_before_fall(config) - 1
    if step < warm:
        return (step + 1) / warm
    if step <= peak_end:
        return 1.0
    x = (step - peak_end) / (last - peak_end)  # in (0, 1], 1 at the last step
    match config.schedule:
        case "wsd":
            fall = 1 - math.sqrt(x)
        case "trapezoid":
            fall = 1 - x
        case "cosine":
            fall = 0.5 * (1 + math.cos(math.pi * x))
    return config.min_lr_ratio + (1 - config.min_lr_ratio) * fall


def steps_before_fall(config: OptimConfig) -> int:
    """Return the number of steps up to the last one at the peak rate; the next one may fall."""
    steps = max(_warm_up(config), 1)
    if config.schedule != "cosine":
        steps = max(steps, config.steps - max(1, round(config.decay * config.steps)))
    return steps


def change(step: int, old: OptimConfig, new: OptimConfig) -> str:
    """Return a sentence on the learning rate of a run that has done `step` steps of the schedule
    `old` and resumes with `new`; "" where both are the same. Rates are those of AdamW; Muon's jump
    with them."""
    plans = [f"{c.schedule} over {c.steps} steps" for c in (old, new)]
    if _shape(old) == _shape(new) or not 0 < step < new.steps:
        return ""
    before, after = old.lr * lr_factor(step - 1, old), new.lr * lr_factor(step, new)
    ordinary = old.lr * lr_factor(min(step, old.steps - 1), old)
    jump = "no jump"
    if not math.isclose(after, ordinary, rel_tol=1e-9, abs_tol=1e-12):
        jump = f"a jump by {after / before:.3g} times" if before else "a jump from zero"
    return (
        f"the schedule was {plans[0]} and is {plans[1]}; the learning rate of step {step} was "
        f"{before:.3g}, that of step {step + 1} is {after:.3g}: {jump}"
    )


def begin_alike(a: OptimConfig, b: OptimConfig, step: int) -> bool:
    """Return whether the first `step` steps of two runs have the same rates."""
    if step > min(a.steps, b.steps):
        return False
    return all(lr_factor(i, a) == lr_factor(i, b) for i in range(step))


def _shape(config: OptimConfig) -> tuple:
    c = config
    return c.schedule, c.steps, c.warmup, c.warmup_steps, c.decay, c.min_lr_ratio, c.lr


def _warm_up(config: OptimConfig) -> int:
    """Return the number of steps of the warm-up."""
    return min(config.warmup_steps or int(config.warmup * config.steps), config.steps - 1)
