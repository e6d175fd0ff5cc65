"""The text that a run is validated on. Only losses on the same text can be compared."""

import hashlib
import json
from dataclasses import dataclass

from headway.data.stream import Stream


@dataclass(frozen=True)
class ValidationText:
    """The validation windows of a run."""

    windows: int
    """Their number, from the start of the fixed order of `Stream.val_windows`."""
    fingerprint: str
    """Equal for equal text."""
    sentence: str
    """Description for people."""


def validation_text(stream: Stream, tokens: int) -> ValidationText:
    """Return the windows that hold `tokens` tokens, rounded up to full windows; 0: all windows."""
    config, dataset, total = stream.config, stream.dataset, stream.n_val_windows
    windows = min(-(-tokens // config.seq_len) or total, total)
    if windows == total:
        chosen = sorted(source.val_text for source in dataset.sources)
    else:
        chosen = [*(source.digests[1] for source in dataset.sources), config.seq_len, windows]
    how_many = "all" if windows == total else f"{windows:,} of"
    sentence = (
        f"{how_many} {total:,} windows of {config.seq_len} tokens ({config.vocabulary}) of "
        f"{' '.join(config.source)}"
    )
    fingerprint = hashlib.sha256(json.dumps(chosen).encode()).hexdigest()[:16]
    return ValidationText(windows, fingerprint, sentence)
