"""Which text a run is validated on. Losses on different text are not to be compared."""

import hashlib
import json
from dataclasses import dataclass

from headway.data.stream import Stream


@dataclass(frozen=True)
class ValidationText:
    """The validation windows of a run."""

    windows: int
    """How many, of the fixed order of `Stream.val_windows`."""
    fingerprint: str
    """Equal where the text is equal."""
    sentence: str
    """What they are, for people."""


def validation_text(stream: Stream, tokens: int) -> ValidationText:
    """The windows that hold `tokens` tokens, rounded up to a whole window; 0: the whole split."""
    config, dataset, whole = stream.config, stream.dataset, stream.n_val_windows
    windows = min(-(-tokens // config.seq_len) or whole, whole)
    if windows == whole:
        chosen = sorted(source.index.val.text for source in dataset.sources)
    else:
        chosen = [*(source.val.digest for source in dataset.sources), config.seq_len, windows]
    how_many = "all" if windows == whole else f"{windows:,} of"
    sentence = (
        f"{how_many} {whole:,} windows of {config.seq_len} tokens ({config.tokenizer}) of "
        f"{' '.join(config.source)}"
    )
    fingerprint = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]
    return ValidationText(windows, fingerprint, sentence)
