"""`headway tokenize`: train a tokenizer, or write the token shards that training would write."""

from collections.abc import Sequence
from dataclasses import dataclass

from headway.cli.options import parse, print_json
from headway.config import DataConfig, UsageError


@dataclass(frozen=True)
class Tokenize:
    """Train a byte-level BPE tokenizer on training text and write it as `tokenizer.json`; or with
    `--shards` tokenise text, as training does before its first step."""

    data: tuple[str, ...] = ("stdlib",)
    """Text, as for `train --data`."""
    val_fraction: float = 0.05
    """Share of the documents that is held out for validation, as in training."""
    skip_bad: bool = False
    """Skip documents that cannot be read, as data.skip_bad in training."""
    vocab_size: int = 4096
    """Ids, the 256 bytes and the end of document included; ≥ 257."""
    out: str = "tokenizer.json"
    """File to write; then `headway train RECIPE --data.tokenizer FILE`."""
    shards: bool = False
    """Tokenise the text into the cache. Machines that share the cache and start this at the same
    time, such as the tasks of an array job, share the work."""
    tokenizer: str = "bytes"
    """With --shards: `bytes`, or the path of a `tokenizer.json`."""
    cache_dir: str = ""
    """With --shards: the cache; empty means $HEADWAY_CACHE or ~/.cache/headway."""
    workers: int = 0
    """With --shards: processes on this machine; 0 means one per core."""
    json: bool = False
    """End with one JSON object."""


def tokenize(args: Sequence[str]) -> int:
    """Run `headway tokenize` and return its exit code."""
    options, default = parse(Tokenize, args, "headway tokenize"), Tokenize()
    others = ("vocab_size", "out") if options.shards else ("tokenizer", "cache_dir", "workers")
    for name in others:
        if vars(options)[name] != vars(default)[name]:
            flag = f"--{name.replace('_', '-')} {vars(options)[name]}"
            if options.shards:
                raise UsageError(f"--shards trains no tokenizer; leave out {flag} or --shards")
            raise UsageError(f"{flag} is for tokenising; add --shards or leave it out")
    data = DataConfig(
        source=options.data,
        tokenizer=options.tokenizer,
        val_fraction=options.val_fraction,
        skip_bad=options.skip_bad,
        cache_dir=options.cache_dir,
        workers=options.workers,
    )
    data.check()
    if data.worlds:
        raise UsageError(f"{data.worlds[0]} is drawn, not tokenised; give text")
    return _shards(data, options.json) if options.shards else _train(data, options)


def _train(data: DataConfig, options: Tokenize) -> int:
    from headway.data.tokenizer import train_bpe
    from headway.data.units import train_texts

    def texts():
        return train_texts(data.source, data.val_fraction, data.skip_bad)

    tokenizer = train_bpe(texts(), options.vocab_size, options.out)
    text = next(texts())[: 1 << 18]
    ratio = len(text.encode("utf-8")) / max(len(tokenizer.encode(text)), 1)
    print(f"{options.out}: {tokenizer.vocab_size:,} ids, {ratio:.2f} bytes per token")
    print(f"train with it: headway train RECIPE --data.tokenizer {options.out}")
    answer = {
        "tokenizer": options.out,
        "vocab_size": tokenizer.vocab_size,
        "bytes_per_token": ratio,
        "fingerprint": tokenizer.fingerprint,
    }
    print_json(options.json, answer)
    return 0


def _shards(data: DataConfig, json: bool) -> int:
    from headway.data.shards import Source, prepare
    from headway.data.tokenizer import load_tokenizer

    dataset = prepare(data, load_tokenizer(data.vocabulary), lambda line: print(line, flush=True))
    answer = {
        "shards": [str(source.folder) for source in dataset.sources if isinstance(source, Source)],
        "train_tokens": dataset.train_tokens,
        "val_tokens": dataset.val_tokens,
        "fingerprint": dataset.fingerprint,
    }
    print_json(json, answer)
    return 0
