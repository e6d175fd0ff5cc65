"""`optim.transfer=width`: rates, epsilon, decay and initial values of each parameter by its role.

Maximal update parameterisation (arXiv 2203.03466) with the depth rule of arXiv 2310.02244: what an
update changes in the activations does not depend on width or depth, so that a rate that was tuned
on a narrow model holds on a wide one. Written with `w` = base_width / fan-in, `D` = base_width /
model width and `l` = base_layers / layers, where a looped block counts as often as it is applied:

| parameter | AdamW's rate | Muon's rate | epsilon | initial values |
|---|---|---|---|---|
| embedding | 1 | | D | 1 |
| output head | w | | 1 | √w |
| router | w · √l | | 1 · √l | √w |
| matrix or expert in a block | w · √l | √l | D · √l | 1 |
| the last matrix of a branch | w · l | l | D | 1 |
| norm or bias in a block | √l | | D · √l | 1 |
| last norm | 1 | | D | 1 |

Experts are hidden matrices and a router is an output, since it maps a width to a number of experts
that does not grow (arXiv 2508.09752): both start too large in a wide model when drawn as a matrix.
The fan-in is that of the parameter, a head of width L and an expert of hidden width F included.

What scales without this rule is left alone. All matrices are drawn by fan-in and the last of a
branch by √(2·layers) already (`model/init.py`). Muon's update has singular values of 1 times
√max(1, rows/columns), which no width changes; with `muon_adjust=match_rms_adamw` its size is that
of AdamW's, and √w makes it 0.2·√base_width times the former. The decay per step is the rate times
`weight_decay`, so that the second is divided by what the first is multiplied with. The branches of
a looped block start equal, so that what they add grows with √layers: this rule leaves that, too."""

import math
from dataclasses import dataclass

from torch import nn

from headway.config import OptimConfig
from headway.model.build import Block
from headway.model.roles import Group, Init, Role, roles_of


@dataclass(frozen=True)
class Scale:
    """Factors of what a parameter has without the rule."""

    lr: float = 1.0
    """Of the peak rate; the weight decay is divided by it."""
    eps: float = 1.0
    """Of AdamW's epsilon."""
    init: float = 1.0
    """Of the initial values."""


_OUTPUTS = (Group.HEAD, Group.ROUTER)
_EXPERTS = {Group.EXPERT_IN, Group.EXPERT_OUT}


def muon_groups(config: OptimConfig) -> set[Group]:
    """Return the groups that Muon updates; AdamW has the others."""
    if config.name != "muon":
        return set()
    return {Group.MATRIX} | (_EXPERTS if config.muon_experts else set())


def scales(model: nn.Module, config: OptimConfig) -> dict[str, Scale]:
    """Return the scale of every parameter of a model, which may be on the meta device or sharded:
    only roles are read, and which parameters lie in a `Block`."""
    names = [name for name, _ in model.named_parameters()]
    if config.transfer != "width":
        return dict.fromkeys(names, Scale())
    roles = roles_of(model)
    # a looped block has a name for each of its places: an update acts in all of them
    places = model.named_modules(remove_duplicate=False)
    blocks = {name: m for name, m in places if isinstance(m, Block)}
    inside = {f"{b}.{name}" for b, m in blocks.items() for name, _ in m.named_parameters()}
    width = next(role.fan_in for role in roles.values() if role.group is Group.HEAD)
    narrow, shallow = config.base_width / width, config.base_layers / max(1, len(blocks))
    return {
        name: _scale(roles[name], config, narrow, shallow if name in inside else 1.0)
        for name in names
    }


def _scale(role: Role, config: OptimConfig, narrow: float, shallow: float) -> Scale:
    """Return the scale of a parameter; `narrow` is D and `shallow` l, 1 outside of blocks."""
    by_depth = shallow if role.ends_branch else math.sqrt(shallow)
    eps = (1.0 if role.group in _OUTPUTS else narrow) * (
        1.0 if role.ends_branch else math.sqrt(shallow)
    )
    if role.group in (Group.EMBEDDING, Group.VECTOR):
        return Scale(by_depth, eps)
    w = config.base_width / role.fan_in
    init = math.sqrt(w) if role.group in _OUTPUTS and role.init is not Init.ZEROS else 1.0
    if role.group not in muon_groups(config):
        return Scale(w * by_depth, eps, init)
    matched = math.sqrt(w) if config.muon_adjust == "match_rms_adamw" else 1.0
    return Scale(matched * by_depth, init=init)


def init_scales(model: nn.Module, config: OptimConfig) -> dict[str, float]:
    """Return name → factor of the initial values, for the parameters that have one."""
    return {name: s.init for name, s in scales(model, config).items() if s.init != 1.0}


def peak_rate(group: Group, config: OptimConfig) -> float:
    """Return the peak rate of a group before its parameters are scaled."""
    lr_scale = dict.fromkeys((Group.EMBEDDING, Group.HEAD), config.embed_lr_scale)
    lr_scale |= dict.fromkeys(_EXPERTS, config.expert_lr_scale)
    lr_scale[Group.ROUTER] = config.router_lr_scale
    rate = config.muon_lr if group in muon_groups(config) else config.lr
    return rate * lr_scale.get(group, 1.0)


def weight_decay(group: Group, config: OptimConfig, scale: Scale) -> float:
    """Return the decay that a rate multiplies; 0 for embedding, norms and biases."""
    decays = group not in (Group.EMBEDDING, Group.VECTOR)
    return config.weight_decay / scale.lr if decays else 0.0


def derivation(model: nn.Module, config: OptimConfig, initial: bool = True) -> dict[str, str]:
    """Return kind of parameter → the sentence that says what its rate, epsilon, decay and initial
    values are and where they come from; empty where nothing is scaled.

    Args:
        initial: whether values are drawn, and not those of a checkpoint."""
    if config.transfer != "width":
        return {}
    roles, by_muon = roles_of(model), muon_groups(config)
    lines: dict[str, str] = {}
    for name, scale in scales(model, config).items():
        role = roles[name]
        muon, has_fan_in = role.group in by_muon, role.fan_in > 1
        kind = f"{role.group.value}, fan-in {role.fan_in}" if has_fan_in else role.group.value
        if role.ends_branch:
            kind += ", ends its branch"
        peak, decay = peak_rate(role.group, config), weight_decay(role.group, config, scale)
        parts = [f"{peak * scale.lr:.4g}: {peak:.4g} × {scale.lr:.4g}"]
        if not muon:
            parts.append(f"eps {config.eps * scale.eps:.3g} = {config.eps:.3g} × {scale.eps:.4g}")
        if decay:
            parts.append(f"weight_decay {decay:.4g}")
        if initial and scale.init != 1.0:
            parts.append(f"initial values × {scale.init:.4g}")
        key = f"{'muon_lr' if muon else 'lr'} of {kind}"
        if lines.setdefault(key, "; ".join(parts)) != "; ".join(parts):
            lines[f"{key}, outside of the blocks"] = "; ".join(parts)
    base = f"base_width {config.base_width} and base_layers {config.base_layers}"
    return {"optim.transfer": f"width: rates hold as given at {base}", **lines}
