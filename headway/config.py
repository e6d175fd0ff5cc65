"""One frozen tree of options. A recipe is a function that returns a `Config`; the command line
overrides leaves.

Every field has a docstring: meaning, unit, legal range, when to change it. `headway train RECIPE
--help` is made from these texts. `validate()` names both values and the fix, before step 0. This
file imports nothing but the standard library, so layers and kernels can read it anywhere."""

import dataclasses
from dataclasses import dataclass, field
from typing import Literal


class UsageError(ValueError):
    """A mistake of the user: the command line prints its text as one line and exits with code 2."""


class RankError(UsageError):
    """A mistake that only one rank of a mesh met: that rank prints it."""


class ToldError(UsageError):
    """A mistake that another rank of the mesh prints."""


class RunError(RuntimeError):
    """The run failed by itself, not by a mistake of the user: the command line prints its text,
    where there is one, and exits with code 1."""


Activation = Literal["swiglu", "relu2", "gelu"]
RouterGate = Literal["softmax_topk", "topk_softmax", "sigmoid"]
Precision = Literal["bfloat16", "float8"]


@dataclass(frozen=True)
class RouterConfig:
    """scores → selection → gates. One router per head; scores, gates and reductions are float32."""

    gate: RouterGate = "topk_softmax"
    """How a gate comes from a score. `topk_softmax`: softmax over the k selected scores (needs
    top-k ≥ 2, else the gate is the constant 1). `softmax_topk`: softmax over all experts, then
    select. `sigmoid`: each score alone."""
    renormalize: bool = False
    """Divide the k gates by their sum (for `softmax_topk` and `sigmoid`; `topk_softmax` sums to 1
    already)."""
    scale: float = 1.0
    """Multiplies every gate; > 0. Nemotron-3 uses 5.0 with `sigmoid` and renormalised gates."""
    reads: Literal["sub_token", "token"] = "sub_token"
    """What the router of a latent layer reads: its own sub-token of width L (as published for
    Multi-Head LatentMoE) or the whole token of width D. Plain MoE always reads the token; LatentMoE
    is published with `token`."""
    noisy: bool = False
    """Noisy top-k (Shazeer et al. 2017, eq. 4): adds N(0,1)·softplus(x·W_noise) to the scores in
    training."""
    jitter: float = 0.0
    """Multiplies the router's input by U(1−jitter, 1+jitter) in training (Switch Transformer,
    §2.2); 0 ≤ jitter < 1."""


@dataclass(frozen=True)
class BalanceConfig:
    """Keeps the load of the experts even; shown as load / fair share: 1.0 fair, 0.0 dead."""

    aux: float = 0.01
    """Coefficient of the auxiliary loss E·Σ f_e·P_e, averaged over layers and heads (1.0 when
    balanced); ≥ 0."""
    aux_scope: Literal["sequence", "global_batch"] = "global_batch"
    """Whose load f_e the auxiliary loss reads. `global_batch`: that of a whole optimiser step
    (arXiv 2501.11873), which lets experts specialise by sequence. It is the step before, so that
    all micro-batches and ranks read the same; the first step reads an even load. `sequence`: each
    sequence's own, with its own P_e (DeepSeek-V3, arXiv 2412.19437 §2.1.2); keeps the scores of all
    experts in memory, on GPUs too."""
    z: float = 0.0
    """Coefficient of the router z-loss, mean (logsumexp of the scores)² (ST-MoE, eq. 5); ≥ 0,
    typically 1e-3."""
    bias: Literal["none", "sign", "quantile"] = "none"
    """A bias on the selection, never on the gates, updated once per optimiser step. `sign`:
    auxiliary-loss-free (arXiv 2408.15664). `quantile`: quantile balancing (arXiv 2607.24653); both
    want `aux` = 0. The quantile is that of all tokens of the step, from 512 counts per expert
    that ranks add up (4 KiB per expert and step)."""
    bias_rate: float = 1e-3
    """Step of the `sign` rule; > 0."""


@dataclass(frozen=True)
class MoEConfig:
    """The sparse feed-forward layer. `kind = dense` uses the block's dense feed-forward network
    instead."""

    kind: Literal["dense", "moe", "latent", "multi_head_latent"] = "multi_head_latent"
    """`moe`: flat mixture, experts of width D. `latent`: LatentMoE (arXiv 2601.18089), experts of
    width d_latent, the token goes down once and up once. `multi_head_latent`: Multi-Head LatentMoE
    (arXiv 2602.04870), H independent small mixtures, each on its own sub-token of width L =
    d_latent / n_heads."""
    n_experts: int = 32
    """E, experts per head; ≥ top_k."""
    top_k: int = 4
    """K, experts chosen per token and head; 1 ≤ K ≤ E, any integer."""
    d_expert: int = 192
    """F, hidden width of one expert."""
    n_heads: int = 1
    """H, heads of the layer; only `multi_head_latent` takes more than 1; divides d_latent."""
    d_latent: int = 0
    """D_L, total latent width (ℓ for `latent`, H·L for `multi_head_latent`); 0 means d_model."""
    activation: Activation = "swiglu"
    """Of the experts and of the shared expert."""
    precision: Precision = "bfloat16"
    """Of the experts' products in the forward pass. `float8`: e4m3 with float32 scales, on GPUs of
    compute capability 9.0 and later, experts up to 256 wide; off by 5e-2 (SwiGLU 6.5e-2) from
    float64, where bfloat16 is by 2.4e-3; backward stays in bfloat16. `bfloat16`: `run.dtype`."""
    d_shared: int = 0
    """Hidden width of the shared expert, which every token passes at full width D; 0 means none."""
    latent_norm: bool = True
    """Learnable RMSNorm per head after the input projection (`moe` has no projection, hence none).
    On, unlike the published layer, since it was better in each comparison made
    (docs/negative-results.md)."""
    capacity_factor: float = 0.0
    """0 is dropless. Otherwise an expert takes at most ⌈factor·S·K/E⌉ rows of each sequence of S
    tokens; later ones are dropped, in training and validation. Samples drop none."""
    n_dense_layers: int = 0
    """The first n layers keep a dense feed-forward network."""
    router: RouterConfig = field(default_factory=RouterConfig)
    """Scores, selection, gates."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Auxiliary losses and bias rules."""


@dataclass(frozen=True)
class ModelConfig:
    """A decoder-only transformer: RMSNorm, RoPE, grouped-query attention, dense or sparse
    feed-forward."""

    vocab_size: int = 0
    """V; 0 means: the tokenizer's size rounded up to a multiple of 64."""
    n_layers: int = 6
    """Blocks."""
    d_model: int = 384
    """D, width of the residual stream."""
    n_heads: int = 6
    """Query heads of attention; divides d_model unless d_head is given."""
    n_kv_heads: int = 0
    """Key/value heads; divides n_heads; 0 means n_heads."""
    d_head: int = 0
    """Width of an attention head, even; 0 means d_model / n_heads."""
    qk_norm: bool = True
    """RMSNorm on queries and keys, per head."""
    attn_gate: bool = False
    """A sigmoid gate per head on the attention output, read from the block's input (arXiv
    2505.06708)."""
    window: tuple[int, ...] = ()
    """Sliding attention window in tokens, one entry per layer, repeated over the layers; 0 is full
    attention; empty is full attention everywhere."""
    rope_theta: float = 10_000.0
    """Base of the rotary embedding."""
    d_ff: int = 1024
    """Hidden width of the dense feed-forward network (dense layers only)."""
    activation: Activation = "swiglu"
    """Of the dense feed-forward network."""
    tied: bool = False
    """Share the embedding with the output head."""
    logit_softcap: float = 0.0
    """Bounds the logits softly, cap·tanh(logits/cap); 0 is off."""
    norm_eps: float = 1e-6
    """Added to the mean square in every RMSNorm."""
    init_std: float = 0.02
    """Standard deviation of the embedding; the scale of all other weights is derived in
    model/init.py."""
    moe: MoEConfig = field(default_factory=MoEConfig)
    """The sparse layer."""


@dataclass(frozen=True)
class MeshConfig:
    """Sizes of the mesh axes; their product is the number of processes."""

    dp: int = 1
    """Data parallel replicas."""
    hp: int = 1
    """Head Parallel: ranks that share the heads of a Multi-Head LatentMoE; divides moe.n_heads."""
    ep: int = 1
    """Expert Parallel: ranks that share the experts of a head; divides moe.n_experts."""
    ep_scheme: Literal["auto", "all_to_all", "all_gather"] = "auto"
    """How sub-tokens travel on the ep axis. `all_to_all`: to the ranks of their experts, sizes
    follow the router. `all_gather`: to all ranks, sizes known in advance. `auto`: fewer bytes."""
    dedup: bool = True
    """With `all_to_all`: a sub-token goes once to a rank that holds several of its experts (off:
    once per expert, as simple Expert Parallel does; for comparisons)."""
    shard: Literal["replicate", "fsdp", "hsdp"] = "replicate"
    """Where the parameters that several ranks need lie between their uses, with their gradients and
    optimiser state. `replicate`: whole on each of those ranks; least traffic. `fsdp`: in equal
    pieces over all ranks (experts: over dp), gathered block by block; take it when memory runs out,
    for about half as many bytes again. `hsdp`: in pieces over the hp × ep ranks, the dp replicas
    being whole; take it when gathers should stay within a machine."""
    chunks: int = 0
    """Pieces in which a micro-batch passes a sparse layer, 0 to 4: one travels while another is
    computed, same result. 0 chooses: 2 where an all-to-all of the ep axis spans nodes, else 1. With
    `capacity_factor` or `aux_scope=sequence` a piece holds whole sequences."""
    payload: Literal["matmul", "float8"] = "matmul"
    """How sub-tokens and their gradients travel on hp and ep. `matmul`: in the dtype of the
    matmuls, exact. `float8`: e4m3 with one float32 scale per sub-token, half the bytes of bfloat16
    and about 2.6% of rounding in each of the four exchanges; for slow networks."""
    timeout: float = 600.0
    """Seconds after which a collective that does not finish ends the run; > 0."""


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. `(seed, step, rank) → samples` is a pure function of this."""

    source: tuple[str, ...] = ("stdlib",)
    """`stdlib` (the running interpreter's standard library), a file, a folder, a glob (text, JSON
    lines with a `text` field, .csv, .tsv or .parquet with a `text` column; .gz, .bz2, .xz and .zst
    are unpacked), or `hf:NAME[:SPLIT]` for a Hugging Face data set. Parquet, .zst and hf need the
    extra `[data]`."""
    weights: tuple[float, ...] = ()
    """Mixing weights, one per source, > 0; empty means in proportion to their tokens."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a `tokenizer.json` (make one with `headway tokenize`)."""
    val_fraction: float = 0.05
    """Share of the files (documents; for a single text its tail) that is kept for validation; 0 < f
    < 1."""
    seq_len: int = 256
    """S, positions per sample, in tokens."""
    batch_size: int = 8
    """Sequences per optimiser step, over all ranks."""
    micro_batch_size: int = 0
    """Sequences per forward pass; divides batch_size; 0 means batch_size. Lower it to save memory:
    same step, but for the random numbers of `router.noisy` and `router.jitter`."""
    doc_mask: bool = False
    """Keep documents apart: no attention across a document boundary."""
    skip_bad: bool = False
    """Leave out documents that cannot be read (not UTF-8, not JSON, without `text`, …), count them
    and name the first five, instead of refusing the source."""
    workers: int = 0
    """Processes that tokenise on this machine, ≥ 1; the shards are the same for any number. 0 means
    one per core, fewer for little text."""
    dedup: Literal["none", "exact"] = "none"
    """`exact`: leave out training documents that are also in validation, or that training has
    already; validation stays as it is. `none`: only count those that are in both."""
    cache_dir: str = ""
    """Folder of tokenised shards; empty means $HEADWAY_CACHE or ~/.cache/headway. Never the user's
    data folder."""


@dataclass(frozen=True)
class OptimConfig:
    """Optimiser, schedule, clipping."""

    name: Literal["adamw", "muon"] = "adamw"
    """`muon` orthogonalises every matrix of the blocks (stacked experts too) and leaves the rest to
    AdamW."""
    steps: int = 1000
    """Optimiser steps of the run; ≥ 1."""
    lr: float = 1e-3
    """Peak learning rate of AdamW."""
    muon_experts: bool = True
    """Whether `muon` takes the stacked experts too. Without, AdamW does: a step costs less, since
    Newton–Schulz orthogonalises every expert whatever the number of tokens."""
    muon_lr: float = 0.02
    """Peak learning rate of Muon."""
    muon_adjust: Literal["original", "match_rms_adamw"] = "original"
    """How Muon's rate follows the shape of a matrix, as in torch.optim.Muon: `original` √max(1,
    rows/columns); `match_rms_adamw` 0.2·√max(rows, columns), so that AdamW's rates fit (then set
    muon_lr to lr)."""
    embed_lr_scale: float = 1.0
    """Multiplies the learning rate of the embedding and the output head."""
    router_lr_scale: float = 1.0
    """Multiplies the learning rate of the routers."""
    expert_lr_scale: float = 1.0
    """Multiplies the learning rate of the experts."""
    schedule: Literal["wsd", "cosine", "trapezoid"] = "wsd"
    """After warm-up. `wsd`: constant, then down by 1−√x to min_lr_ratio. `cosine`: half a cosine.
    `trapezoid`:
    constant, then linearly to min_lr_ratio."""
    warmup: float = 0.02
    """Share of the steps in which the rate rises linearly from 0; 0 ≤ warmup < 1."""
    decay: float = 0.3
    """Share of the steps in which `wsd` and `trapezoid` fall; 0 < decay ≤ 1 − warmup."""
    min_lr_ratio: float = 0.0
    """The rate at the last step over the peak rate; 0 ≤ ratio ≤ 1."""
    beta1: float = 0.9
    """AdamW's first decay."""
    beta2: float = 0.95
    """AdamW's second decay."""
    eps: float = 1e-8
    """AdamW's epsilon."""
    momentum: float = 0.95
    """Muon's Nesterov momentum."""
    weight_decay: float = 0.1
    """Decoupled; on matrices only, never on norms, biases or the embedding."""
    clip: float = 1.0
    """Largest global gradient norm; 0 is off."""
    state_dtype: Literal["float32", "bfloat16"] = "float32"
    """Storage of AdamW's moments. `bfloat16` saves 4 bytes per parameter and needs beta2 ≤ 0.99,
    since a slower average would be lost in rounding (DeepSeek-V3, arXiv 2412.19437 §3.3.3, keeps
    them so)."""
    spike: float = 0.0
    """A step whose loss exceeds the running mean by this many running standard deviations is
    skipped and counted; 0 is off. A non-finite step is always skipped and counted."""
    max_skipped: int = 20
    """The run fails after this many skipped steps in a row."""


@dataclass(frozen=True)
class RunConfig:
    """Everything around the mathematics: folders, intervals, devices."""

    dir: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Of initialisation, data order, noise and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matmuls; parameters stay float32. `auto`: bfloat16 where the hardware multiplies it
    natively (CUDA, CPUs with AVX512-BF16 or AMX), else float32."""
    compile: bool = False
    """torch.compile the blocks: a minute of warm-up (needs a C++ compiler on CPUs)."""
    recompute: bool = False
    """Constant-memory form: keep nothing of size rows×F or T×E for backward, recompute it."""
    allocator: Literal["system", "keep", "return"] = "keep"
    """Freed memory on CPUs with glibc. `keep` holds it for the next step: faster. `return` gives
    blocks of a MiB back at once: the lowest peak, together with `recompute`; slower."""
    threads: int = 0
    """CPU threads; 0 means torch's choice."""
    log_every: int = 10
    """Steps per progress line and per object in metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 means a tenth of the run. The last step is always evaluated."""
    eval_tokens: int = 32_768
    """Validation tokens of an evaluation, in whole windows of seq_len: the same ones for every
    batch size, mesh and seed. 0 means the whole split, which is the same text for every seq_len and
    tokenizer too."""
    sample_every: int = 0
    """Steps between text samples; 0 means together with every other evaluation."""
    sample_prompt: str = "def "
    """Prompt of the text samples."""
    sample_tokens: int = 200
    """Length of a text sample, in tokens."""
    checkpoint_every: int = 0
    """Steps between checkpoints; 0 means with each evaluation. The last step is always saved."""
    async_checkpoint: bool = False
    """Write checkpoints in a thread while training goes on: costs a copy of weights and optimiser
    state in host memory. The end of the run waits for the last one."""
    keep_checkpoints: int = 2
    """Older checkpoints are deleted, but not the last one before `wsd` or `trapezoid` falls; ≥
    1."""
    stop_bits_per_byte: float = 0.0
    """Stop early when an evaluation reaches this; 0 is off."""
    max_seconds: float = 0.0
    """Stop early after this much training time in seconds; 0 is off."""
    strict: bool = False
    """A slow or skipped path is an error, not a remark at step 0."""


@dataclass(frozen=True)
class Config:
    """A whole run. Recipes return one; `dataclasses.replace` or the command line change it."""

    recipe: str = ""
    """Name of the recipe that made this configuration."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The network."""
    mesh: MeshConfig = field(default_factory=MeshConfig)
    """Where it runs."""
    data: DataConfig = field(default_factory=DataConfig)
    """What it learns."""
    optim: OptimConfig = field(default_factory=OptimConfig)
    """How it learns."""
    run: RunConfig = field(default_factory=RunConfig)
    """What is written where."""

    def to_dict(self) -> dict:
        """Plain, JSON-ready nested dict; `from_dict` inverts it."""
        return dataclasses.asdict(self)


def from_dict(cls: type, values: dict):
    """Rebuild a config dataclass from `to_dict`'s output. An unknown key is an error, a missing one
    its default."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    unknown = sorted(set(values) - set(fields))
    if unknown:
        raise UsageError(
            f"{cls.__name__} has no field {unknown[0]!r}; it was written by another version"
        )
    made = {}
    for name, value in values.items():
        kind = fields[name].type
        if dataclasses.is_dataclass(kind):
            made[name] = from_dict(kind, value)  # type: ignore[arg-type]
        else:
            made[name] = tuple(value) if isinstance(value, list) else value
    return cls(**made)
