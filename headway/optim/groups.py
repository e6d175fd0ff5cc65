"""Parameter groups and their optimisers; the clip factor of their gradients."""

import torch
from torch import Tensor, nn

from headway.config import OptimConfig, UsageError
from headway.model.roles import Group, roles_of
from headway.optim.adamw import AdamW
from headway.optim.muon import Muon
from headway.optim.transfer import Scale, muon_groups, peak_rate, scales, weight_decay
from headway.parallel.parallelize import SINGLE_PROCESS
from headway.parallel.placement import Sharding, to_local


def clip_factor(norm: float, limit: float) -> float:
    """Return the factor that limits the norm of the gradients to `limit`, as
    torch.nn.utils.clip_grad_norm_ does; 1.0 where `limit` is 0."""
    return min(1.0, limit / (norm + 1e-6)) if limit > 0 else 1.0


class Optimizers:
    """AdamW and, with `optim.name=muon`, Muon beside it, over named parameter groups. Use:
    `set_lr(factor)`, `step(grad_scale)`, `zero_grad()`. State goes in and out under the names of
    the parameters (`layers.0.attn.q.weight.exp_avg`), never under indices."""

    def __init__(
        self,
        named: dict[str, nn.Parameter],
        groups: dict[Group, list[str]],
        adamw: AdamW,
        muon: Muon | None,
    ) -> None:
        self.named, self.groups, self.adamw, self.muon = named, groups, adamw, muon

    def all(self) -> list[AdamW | Muon]:
        """Return the optimisers in use."""
        return [self.adamw] if self.muon is None else [self.adamw, self.muon]

    def set_lr(self, factor: float) -> None:
        """Set the rate of every group to `factor` times its peak."""
        for optimizer in self.all():
            for group in optimizer.param_groups:
                group["lr"] = factor * group["peak_lr"]

    def step(self, grad_scale: float = 1.0) -> None:
        """Update with the gradients times `grad_scale`, which may change them; zero them next."""
        for optimizer in self.all():
            optimizer.step(grad_scale)

    def zero_grad(self) -> None:
        """Free all gradients."""
        for p in self.named.values():
            p.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Return all state, `<parameter>.<moment>` → tensor shaped as on this rank; no copies."""
        return {
            f"{name}.{key}": value
            for optimizer in self.all()
            for name, p in self.named.items()
            if p in optimizer.state
            for key, value in optimizer.state[p].items()
        }

    def without_state(self) -> list[str]:
        """Return the parameters that were never updated, since no gradient has reached them."""
        updated = {p for optimizer in self.all() for p, state in optimizer.state.items() if state}
        return [name for name, p in self.named.items() if p not in updated]

    def add_state(self, names: set[str]) -> None:
        """Add the state of before the first update where there is none; changes no update."""
        without = {self.named[name] for name in names}
        for optimizer in self.all():
            for group in optimizer.param_groups:
                for p in without.intersection(group["params"]):
                    optimizer.init_state(p)

    def load_tensors(self, tensors: dict[str, Tensor], updates: int) -> None:
        """Restore what `tensors` returned after `updates` steps. Raises `UsageError` when the
        tensors belong to another optimiser or another model."""
        muon_groups = self.muon.param_groups if self.muon else []
        for_muon = {p for group in muon_groups for p in group["params"]}
        for optimizer in self.all():
            optimizer.state.clear()
        for key, value in tensors.items():
            name, _, moment = key.rpartition(".")
            p = self.named.get(name)
            if p is None or to_local(p).shape != value.shape:
                raise UsageError(
                    f"resume: the checkpoint's optimiser state {key} fits no parameter; "
                    "resume with the run's own recipe"
                )
            expected = ("momentum",) if p in for_muon else ("exp_avg", "exp_avg_sq")
            if moment not in expected:
                raise UsageError(
                    f"resume: the checkpoint has {key} where this recipe keeps {expected[0]}; "
                    "resume with the same optim.name"
                )
            owner, dtype = self.adamw, self.adamw.state_dtype or p.dtype
            if self.muon is not None and p in for_muon:
                owner, dtype = self.muon, p.dtype
            owner.state[p][moment] = value.to(device=p.device, dtype=dtype, copy=True)
        self.adamw.updates = updates


def build_optimizers(
    model: nn.Module,
    config: OptimConfig,
    newton_schulz_dtype: torch.dtype = torch.float32,
    sharding: Sharding = SINGLE_PROCESS.sharding,
) -> Optimizers:
    """Put every parameter of `model` into exactly one group of one optimiser. `newton_schulz_dtype`
    is the run's matmul dtype: bfloat16 where the hardware multiplies it natively. `sharding` says
    which parameters are sharded."""
    named = dict(model.named_parameters())  # a tied head appears once, as the embedding
    roles, scale_of = roles_of(model), scales(model, config)
    groups: dict[Group, list[str]] = {}
    alike: dict[tuple[Group, Scale], list[str]] = {}
    for name in named:
        group = roles[name].group
        groups.setdefault(group, []).append(name)
        alike.setdefault((group, scale_of[name]), []).append(name)
    for_muon, adam_params, muon_params = muon_groups(config), [], []
    for (group, scale), names in alike.items():
        peak = peak_rate(group, config) * scale.lr
        options = {
            "name": group.value,
            "params": [named[name] for name in names],
            "lr": peak,
            "peak_lr": peak,
            "weight_decay": weight_decay(group, config, scale),
        }
        if group in for_muon:
            muon_params.append({**options, "transposed": group is Group.EXPERT_OUT})
        else:
            adam_params.append({**options, "eps": config.eps * scale.eps})
    adamw = AdamW(
        adam_params,
        betas=(config.beta1, config.beta2),
        state_dtype=torch.bfloat16 if config.state_dtype == "bfloat16" else None,
    )
    muon = None
    if muon_params:
        muon = Muon(
            muon_params,
            momentum=config.momentum,
            adjust=config.muon_adjust,
            dtype=newton_schulz_dtype,
            shards={
                named[name]: placement.shard
                for name, placement in sharding.placements.items()
                if placement.shard and placement.shard.dim >= named[name].ndim - 2
            },
            traffic=sharding.mesh.traffic,
        )
    return Optimizers(named, groups, adamw, muon)
