"""Options of a run: folders, intervals, devices."""

from dataclasses import dataclass
from typing import Literal, get_args

from headway.config.bounds import at_least
from headway.config.errors import UsageError

TrackerName = Literal["tensorboard", "wandb", "trackio"]


@dataclass(frozen=True)
class RunConfig:
    """Everything around the mathematics: folders, intervals, devices."""

    dir: str = ""
    """Run folder; empty means runs/RECIPE."""
    seed: int = 0
    """Seed of initialisation, data order, noise and samples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto`: CUDA when there is one."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the matmuls; parameters stay float32. `auto`: bfloat16 where the hardware multiplies
    it natively (CUDA, CPUs with AVX512-BF16 or AMX), else float32."""
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
    track: tuple[TrackerName, ...] = ()
    """Trackers that get the records of metrics.jsonl too: `tensorboard`, `wandb` (offline, unless
    WANDB_MODE says otherwise), `trackio` (extra `[track]`)."""
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
    """Write checkpoints in a thread while training continues: costs a copy of weights and optimiser
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

    def check(self) -> None:
        """Raise UsageError for a value out of range."""
        for name in self.track:
            if name not in get_args(TrackerName) or self.track.count(name) > 1:
                names = " ".join(self.track)
                raise UsageError(f"run.track={names}: use tensorboard, wandb, trackio, each once")
        at_least(0, "run", vars(self), "seed threads eval_every eval_tokens sample_every")
        at_least(0, "run", vars(self), "sample_tokens checkpoint_every")
        at_least(0, "run", vars(self), "stop_bits_per_byte max_seconds")
        at_least(1, "run", vars(self), "log_every keep_checkpoints")
