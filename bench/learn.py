"""Train a configuration on a fixed text against a budget of steps or of CPU seconds, and keep its
learning curve.

The clock is the CPU time of the process with one thread, which depends little on the load of the
machine. Evaluation does not count. The schedule follows the share of the budget that is used, so a
fast model does more steps in the same time and still ends with its rate fully decayed.
"""

import copy
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from headway.config import Config, ModelConfig, OptimConfig
from headway.kernels.precision import native_bfloat16
from headway.model import balance
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers, clip_factor
from headway.optim.schedule import lr_factor
from headway.parallel.reduce import total_norm
from headway.train.allocator import set_allocator

TICKS = 100_000
"""Resolution of the schedule over the budget."""


class Text(Protocol):
    """Batches of a text, a pure function of their number."""

    def train(self, step: int) -> tuple[Tensor, Tensor]:
        """Return int64 tokens and targets `[B, S]` of a step."""
        ...

    def val(self) -> list[tuple[Tensor, Tensor]]:
        """Return the validation batches, always the same."""
        ...

    def units(self, targets_BS: Tensor) -> float:
        """Return the characters (bytes) of the targets: what the loss is divided by."""
        ...


Loss = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, Tensor]]
"""Model, tokens, targets → (what is minimised, sum of nats over the targets)."""


@dataclass(frozen=True)
class Budget:
    """When a run ends: after `steps` optimiser steps, or after `cpu_seconds` of training; exactly
    one is set.
    """

    steps: int = 0
    cpu_seconds: float = 0.0

    def one_step(self, step: int, cpu: float) -> float:
        """Return the share of one step; 0 until one was measured."""
        return 1 / self.steps if self.steps else (cpu / step / self.cpu_seconds if step else 0.0)

    def used(self, step: int, cpu: float) -> float:
        """Return the share that is used before step `step`, in [0, 1]."""
        return min(1.0, step / self.steps if self.steps else cpu / self.cpu_seconds)


@dataclass(frozen=True)
class Point:
    """One evaluation."""

    step: int
    cpu_seconds: float
    wall_seconds: float
    nats: float
    """Validation loss per character (byte)."""


class Trainer:
    """A model in training: its optimisers, and the steps and seconds that it has used.

    Args:
        loss: model, tokens, targets → (what is minimised, sum of nats over the targets).
        optim: its `steps` is not read: a run's rate follows its budget.
        after_step: called after every optimiser step, inside the clock.
    """

    def __init__(
        self,
        model: nn.Module,
        loss: Loss,
        optim: OptimConfig,
        text: Text,
        after_step: Callable[[nn.Module], None] | None = None,
    ):
        self.model, self.loss, self.optim, self.text, self.after_step = (
            model,
            loss,
            optim,
            text,
            after_step,
        )
        dtype = model.dtype if isinstance(model, Transformer) else torch.float32
        self.optimizers = build_optimizers(model, optim, newton_schulz_dtype=dtype)
        self.step, self.cpu, self.wall = 0, 0.0, 0.0
        self.curve: list[Point] = []

    def fork(self) -> "Trainer":
        """Return a copy that continues independently; both have used the same time."""
        loss, after_step = copy.deepcopy((self.loss, self.after_step))  # their state is copied too
        other = Trainer(copy.deepcopy(self.model), loss, self.optim, self.text, after_step)
        state = {name: t.clone() for name, t in self.optimizers.tensors().items()}
        other.optimizers.load_tensors(state, self.optimizers.adamw.updates)
        other.step, other.cpu, other.wall, other.curve = (
            self.step,
            self.cpu,
            self.wall,
            list(self.curve),
        )
        return other

    def hold(self, warmup: int, until: Callable[[], bool]) -> None:
        """Warm up over `warmup` steps, then train at the peak rate: the trunk from which budgets
        branch off.
        """
        while not until():
            self._step(min(1.0, (self.step + 1) / warmup))

    def advance(self, budget: Budget, evaluations: int = 1) -> list[Point]:
        """Train until the budget is used up, and return all evaluations so far.

        The rate follows the share of the budget that is used. `evaluations`: how many a whole
        budget has.
        """
        ticks = replace(self.optim, steps=TICKS)
        done = int(budget.used(self.step, self.cpu) * evaluations)
        while (used := budget.used(self.step, self.cpu)) < 1.0:
            middle = used + budget.one_step(self.step, self.cpu) / 2
            self._step(lr_factor(min(int(middle * TICKS), TICKS - 1), ticks))
            due = int(budget.used(self.step, self.cpu) * evaluations + 1e-9)
            if due > done:
                done, nats = due, evaluate(self.model, self.loss, self.text)
                self.curve.append(Point(self.step, self.cpu, self.wall, nats))
                if not math.isfinite(nats):
                    break
        return self.curve

    def _step(self, rate: float) -> None:
        tokens_BS, targets_BS = self.text.train(self.step)
        c0, w0 = time.process_time(), time.perf_counter()
        self.optimizers.set_lr(rate)
        total, _ = self.loss(self.model, tokens_BS, targets_BS)
        total.backward()
        norm = total_norm(p.grad for p in self.model.parameters() if p.grad is not None)
        self.optimizers.step(clip_factor(float(norm), self.optim.clip))
        self.optimizers.zero_grad()
        if self.after_step is not None:
            self.after_step(self.model)
        self.cpu += time.process_time() - c0
        self.wall += time.perf_counter() - w0
        self.step += 1


def evaluate(model: nn.Module, loss: Loss, text: Text) -> float:
    """Return the nats per character (byte) of the validation batches."""
    model.eval()
    nats = units = 0.0
    with torch.no_grad():
        for tokens_BS, targets_BS in text.val():
            nats += float(loss(model, tokens_BS, targets_BS)[1])
            units += text.units(targets_BS)
    model.train()
    return nats / units


class Sparse:
    """The loss of a Headway model with its balance loss, and its bias rule after each step.

    As in `headway.train` the auxiliary loss reads the load of the step before; that of the first
    step reads the load of that step.
    """

    def __init__(self, config: ModelConfig):
        self.balance = config.moe.balance
        self.stats: tuple[balance.RouteStats, ...] = ()
        self.load: list[Tensor] | None = None

    def __call__(
        self, model: nn.Module, tokens_BS: Tensor, targets_BS: Tensor
    ) -> tuple[Tensor, Tensor]:
        out = model(tokens_BS, targets_BS)
        self.stats = tuple(s.detach() for s in out.stats)
        aux = balance.balance_loss(out.stats, self.balance, self.load)
        return out.nats / targets_BS.numel() + aux, out.nats.detach()

    def after_step(self, model: nn.Module) -> None:
        """Keep the load of the step, and move the selection biases where the balance rule has
        any."""
        self.load = [s.counts_HE for s in self.stats]
        if self.balance.bias == "none":
            return
        assert isinstance(model, Transformer)
        with torch.no_grad():
            for layer, s in zip(model.sparse_layers(), self.stats, strict=True):
                layer.router.bias_HE.copy_(balance.new_bias(layer.router.bias_HE, s, self.balance))


def trainer(
    config: Config,
    text: Text,
    *,
    seed: int = 0,
    rescale: Callable[[Transformer], None] | None = None,
) -> Trainer:
    """Build the model of a config, ready to train in this CPU's best dtype; `rescale` may change
    its initial weights.
    """
    set_allocator(config.run.allocator)
    dtype = torch.bfloat16 if native_bfloat16(torch.device("cpu")) else torch.float32
    model = Transformer(config.model, Compute(dtype=dtype), seed=seed)
    if rescale is not None:
        with torch.no_grad():
            rescale(model)
    torch.manual_seed(seed)
    sparse = Sparse(config.model)
    return Trainer(model, sparse, config.optim, text, after_step=sparse.after_step)
