"""Options of the data: sources, tokenizer, batches."""

import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from headway.config.bounds import alternatives, at_least, divisors
from headway.config.errors import UsageError


def cache_root(named: str = "") -> Path:
    """Return the folder of shards, built kernels and measured tiles: `named`, else $HEADWAY_CACHE,
    else ~/.cache/headway."""
    return Path(named or os.environ.get("HEADWAY_CACHE") or "~/.cache/headway").expanduser()


@dataclass(frozen=True)
class DataConfig:
    """Where tokens come from. `(seed, step, rank) → samples` is a pure function of this."""

    source: tuple[str, ...] = ("stdlib",)
    """`stdlib` (the running interpreter's standard library), a file, a folder, a glob (text, JSON
    lines with a `text` field, .csv, .tsv or .parquet with a `text` column; .gz, .bz2, .xz and .zst
    are unpacked), `hf:NAME[:SPLIT]` for a Hugging Face data set (parquet, .zst and hf need the
    extra `[data]`), `set:NAME[:LABEL]` for text out of packages: python, kernel-docs, languages,
    help, wiki; or worlds alone, `world:TASK[,OPTION=VALUE…]`: mqar, s5, a5, s3, parity, copy,
    facts, multiplication, sums (docs/worlds.md)."""
    weights: tuple[float, ...] = ()
    """Mixing weights, one per source, > 0; empty means in proportion to their tokens;
    worlds, which have no end, share evenly."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a `tokenizer.json` (make one with `headway tokenize`). Worlds have
    words of their own and take no other."""
    val_fraction: float = 0.05
    """Share of the files (documents; for a single text its tail) that is held out for validation;
    0 < f < 1."""
    seq_len: int = 256
    """S, positions per sample, in tokens."""
    batch_size: int = 8
    """Sequences per optimiser step, over all ranks."""
    last_batch_size: int = 0
    """Sequences of the last optimiser step; 0 means batch_size. A budget of tokens or FLOPs is met
    with it to less than a step."""
    micro_batch_size: int = 0
    """Sequences per forward pass; divides batch_size; 0 means batch_size. Lower it to save memory:
    same step, but for the random numbers of `router.noisy` and `router.jitter`."""
    doc_mask: bool = False
    """Keep documents apart: no attention across a document boundary."""
    skip_bad: bool = False
    """Skip documents that cannot be read (not UTF-8, not JSON, without `text`, …), count them and
    name the first five, instead of refusing the source."""
    workers: int = 0
    """Processes that tokenise on this machine, ≥ 1; the shards do not depend on the number. 0 means
    one per core, fewer for little text."""
    dedup: Literal["none", "exact"] = "none"
    """`exact`: leave out training documents that are also in validation, or that training has
    already; validation is not changed. `none`: only count those that are in both."""
    near_duplicates: Literal["keep", "cluster"] = "keep"
    """`cluster`: documents of a source that are nearly the same (five-word runs, Jaccard similarity
    0.8) are all in training or all in validation (extra `[data]`). `keep`: nobody looks."""
    cache_dir: str = ""
    """Folder of tokenised shards; empty means $HEADWAY_CACHE or ~/.cache/headway. Never the user's
    data folder."""

    @property
    def worlds(self) -> tuple[str, ...]:
        """Return the sources that are worlds: all of them or none."""
        return tuple(spec for spec in self.source if spec.startswith("world:"))

    @property
    def vocabulary(self) -> str:
        """Return what `load_tokenizer` takes: the worlds, whose words are the tokens, or
        `tokenizer`."""
        return " ".join(self.worlds) or self.tokenizer

    def check(self) -> None:
        """Raise UsageError for values that no data could satisfy."""
        sources, weights = self.source, self.weights
        if not sources:
            fix = "give stdlib, a file, a folder, a glob, hf:NAME or set:NAME"
            raise UsageError(f"data.source is empty; {fix}")
        if not 0 < self.val_fraction < 1:
            raise UsageError(f"val_fraction {self.val_fraction} must lie between 0 and 1; try 0.05")
        self._check_worlds()
        at_least(1, "data", vars(self), "seq_len batch_size")
        if not 0 <= self.last_batch_size <= self.batch_size:
            raise UsageError(
                f"data.last_batch_size={self.last_batch_size} is outside 0…"
                f"data.batch_size={self.batch_size}; use 0 for a whole batch"
            )
        if self.workers < 0:
            raise UsageError(f"data.workers is {self.workers}; give 1 or more, or 0 for all cores")
        if weights and len(weights) != len(sources):
            raise UsageError(
                f"{len(weights)} weights for {len(sources)} sources; give one per source, or none"
            )
        for spec, weight in zip(sources, weights, strict=False):
            if not 0 < weight < float("inf"):  # also false for NaN
                where = f"weight {weight} of source {spec!r}"
                raise UsageError(f"{where} must be a finite number above 0")
        batch, micro = self.batch_size, self.micro_batch_size
        if micro < 0 or (micro and batch % micro):
            raise UsageError(
                f"data.micro_batch_size={micro} must divide data.batch_size={batch}; "
                f"use {alternatives(divisors(batch))}"
            )

    def _check_worlds(self) -> None:
        """Raise UsageError for a world beside text, and for options that would do nothing."""
        if not self.worlds:
            return
        world = self.worlds[0]
        for spec in self.source:
            if spec not in self.worlds:
                fix = "train on worlds alone, or on text alone"
                raise UsageError(f"{world} has words of its own, and {spec!r} is text; {fix}")
        for field in fields(self):
            value = vars(self)[field.name]
            if field.name in _OF_TEXT and value != field.default:
                what = f"data.{field.name}={value} is for text, and {world} is none"
                raise UsageError(f"{what}; use its default, {field.default}")


_OF_TEXT = ("tokenizer", "val_fraction", "skip_bad", "dedup", "near_duplicates")
"""Fields that a world could not obey."""
