"""A family of published models: a table of config keys and a table of tensors, both read in both
directions, so that import and export cannot disagree."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

from headway.config import BalanceConfig, ModelConfig, MoEConfig, UsageError, from_dict, leaves
from headway.hub.layout import Row

Values = Mapping[str, Any]
"""config.json, or fields of `ModelConfig` by dotted name."""

_KINDS = {name: type(value) for name, value in leaves(asdict(ModelConfig())).items()}
"""Our field → its type."""
REQUIRED = object()
"""Default of a key that config.json must have."""


class Key(NamedTuple):
    """One value of config.json that is one field of ours."""

    theirs: str
    """Its spellings of Transformers 4 and 5, separated by spaces; all are written."""
    ours: str
    """A field of `ModelConfig`, dotted."""
    default: Any = REQUIRED
    """What Transformers takes where config.json has none."""
    zero_is_null: bool = False
    """Whether our 0 is written as null."""
    values: tuple[tuple[Any, Any], ...] = ()
    """Pairs (theirs, ours) of values that are written differently; empty: values are equal. A
    value in no pair is refused."""

    def read(self, values: Values) -> Values:
        value = lookup(values, self.theirs, self.default)
        if not self.values:
            kind = _KINDS[self.ours]
            if type(value) is not kind and not (kind is float and type(value) is int):
                name = self.theirs.split()[0]
                raise UsageError(f"config.json has {name}={value!r}, which is no {kind.__name__}")
            return {self.ours: value}
        for theirs, ours in self.values:
            if value == theirs and isinstance(value, bool) == isinstance(theirs, bool):
                return {self.ours: ours}
        known = ", ".join(str(theirs) for theirs, _ in self.values)
        raise UsageError(
            f"config.json has {self.theirs.split()[0]}={value}, and only {known} is known"
        )

    def write(self, ours: Values) -> Values:
        value = ours[self.ours]
        if self.values:
            # a value without a pair comes back as another one, which `Family.difference` sees
            value = next((a for a, b in self.values if b == value), self.values[0][0])
        value = None if self.zero_is_null and not value else value
        return dict.fromkeys(self.theirs.split(), value)


class Keys(NamedTuple):
    """Several values of config.json that together are several fields of ours."""

    theirs: str
    """All keys that are read, separated by spaces."""
    read: Callable[[Values], Values]
    """config.json → our fields."""
    write: Callable[[Values], Values]
    """Our fields → keys and values of config.json."""


def lookup(values: Values, spellings: str, default: Any = REQUIRED) -> Any:
    """Return the value of a key by any of its spellings; null is absent. Raises UsageError where
    they contradict each other, or where there is none and no default."""
    present = {name: values[name] for name in spellings.split() if values.get(name) is not None}
    if len({repr(value) for value in present.values()}) > 1:
        pairs = " and ".join(f"{name}={value}" for name, value in present.items())
        raise UsageError(f"config.json has {pairs}, which are the same setting; remove one")
    if present:
        return next(iter(present.values()))
    if default is REQUIRED:
        raise UsageError(f"config.json has no {' or '.join(spellings.split())}; add it")
    return default


_NEUTRAL = frozenset(
    """
    architectures model_type transformers_version torch_dtype dtype use_cache bos_token_id
    eos_token_id pad_token_id initializer_range output_router_logits router_aux_loss_coef
    aux_loss_alpha seq_aux router_jitter_noise attention_dropout pretraining_tp _name_or_path
    _model_name_or_path unk_token_id
    auto_map quantization_config return_dict output_attentions output_hidden_states
    chunk_size_feed_forward is_encoder_decoder id2label label2id problem_type
    num_nextn_predict_layers num_mtp_layers initial_context_length ep_size
    """.split()
)
"""Keys that change no number of inference; what reads quantised weights reads theirs."""


@dataclass(frozen=True)
class Family:
    """How models of one `model_type` are written."""

    name: str
    """Its `model_type`."""
    architecture: str
    """Its class in Transformers."""
    keys: Sequence[Key | Keys]
    rows: Callable[[ModelConfig, bool], Iterator[Row]]
    """The tensors of a config; with True in the fused form of Transformers 5, if it has one."""
    fixed: Values = field(default_factory=dict)
    """Our fields that all its models share, for which config.json has no key."""
    router_bias: bool = False
    """Whether its router has a bias on the selection."""
    float32: str = r"router\.bias_HE$"
    """Pattern of our tensors that are float32 in folders of any dtype."""

    def read(self, values: Values) -> ModelConfig:
        """Return the model of a config.json. Raises UsageError for a key that is missing, unknown
        or has a value that we have no equal of."""
        known = {name for key in self.keys for name in key.theirs.split()} | _NEUTRAL
        for name, value in values.items():
            if name not in known and value not in (None, False, [], {}, ""):
                raise UsageError(
                    f"config.json has {name}={value!r}, which is not known of {self.name}; "
                    "remove it if it changes no number"
                )
        fields = dict(self.fixed)
        try:
            for key in self.keys:
                fields |= key.read(values)
        except (TypeError, ValueError, ZeroDivisionError, AttributeError) as error:
            if isinstance(error, UsageError):
                raise
            raise UsageError(f"config.json has a value of another type ({error})") from None
        return canonical(from_dict(ModelConfig, _nested(fields)))

    def write(self, config: ModelConfig) -> dict[str, Any]:
        """Return the keys of a config.json, in the spellings of Transformers 4 and 5."""
        fields = leaves(asdict(canonical(config)))
        values: dict[str, Any] = {"architectures": [self.architecture], "model_type": self.name}
        for key in self.keys:
            values |= key.write(fields)
        return values

    def differences(self, config: ModelConfig) -> list[str]:
        """Return why no model of this family computes what `config` does: each option that does
        not survive being written and read; [] where all do."""
        wanted = leaves(asdict(canonical(config)))
        try:
            written = leaves(asdict(self.read(self.write(config))))
        except UsageError as error:
            return [str(error)]
        differing = [
            f"model.{name}={value}, and in {self.name} it is {written[name]}"
            for name, value in wanted.items()
            if written[name] != value
        ]
        moe = config.moe
        if moe.kind != "dense" and moe.balance.bias != "none" and not self.router_bias:
            differing.append(
                f"model.moe.balance.bias={moe.balance.bias}, and {self.name} has no bias"
            )
        return differing


def canonical(config: ModelConfig) -> ModelConfig:
    """Return a config that computes the same, with derived values written out and what changes no
    number of inference at its default: equal for equal models."""
    moe, plain, layers = config.moe, ModelConfig(), range(config.n_layers)
    n_dense = next((i for i in layers if config.is_sparse(i)), config.n_layers)
    windows = [config.window_of(layer) for layer in layers]
    if moe.kind == "dense":
        moe = MoEConfig(kind="dense")
    else:
        router = replace(moe.router, noisy=False, jitter=0.0)
        if router.n_groups == 1:
            router = replace(router, top_k_groups=1, group_best=1)
        if router.gate == "topk_softmax":
            router = replace(router, gate="softmax_topk", renormalize=True)
        reads = "token" if moe.reads_token else "sub_token"
        router = replace(router, reads=reads if moe.is_latent else "auto")
        if moe.kind == "moe":
            moe = replace(moe, latent_norm=True)
        moe = replace(
            moe,
            router=router,
            balance=BalanceConfig(),
            capacity_factor=0.0,
            precision="bfloat16",
            n_dense_layers=n_dense,
            dense_layers=tuple(i for i in layers if i > n_dense and not config.is_sparse(i)),
            sparse_step=1,
            d_latent=moe.latent_width(config.d_model) if moe.is_latent else 0,
        )
    if config.n_sparse == config.n_layers:
        config = replace(config, d_ff=plain.d_ff, activation=plain.activation)
    return replace(
        config,
        n_kv_heads=config.kv_heads,
        d_head=config.head_width,
        window=(windows[0],) * bool(windows[0]) if len(set(windows)) == 1 else tuple(windows),
        init_std=plain.init_std,
        moe=moe,
    )


def _nested(fields: Values) -> dict[str, Any]:
    """Turn `{"moe.top_k": 2}` into `{"moe": {"top_k": 2}}`."""
    tree: dict[str, Any] = {}
    for name, value in fields.items():
        *path, leaf = name.split(".")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[leaf] = value
    return tree
