"""What tests of the cached shards share."""

from pathlib import Path

import numpy as np
import pytest

from headway.config import UsageError
from headway.data.shards import prepare
from headway.data.tokenizer import load_tokenizer

BYTES = load_tokenizer("bytes")


def quiet(_line):
    pass


def all_ids(tokens):
    out = np.empty(len(tokens), dtype=np.int64)
    tokens.read(0, out)
    return out


def folder_of(config):
    (found,) = (path for path in Path(config.cache_dir).iterdir() if path.is_dir())
    assert found.name[0] != "."
    return found


def mistake(config, tokenizer=BYTES, **options):
    with pytest.raises(UsageError) as caught:
        prepare(config, tokenizer, quiet, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)
