"""Sources and tokenizers at the edge of what is allowed, with their counts: very many tiny files, no merges at all."""

import numpy as np
import pytest

from headway.config import DataConfig
from headway.data.shards import prepare
from headway.data.tokenizer import load_tokenizer, train_bpe
from tests.data.cached import BYTES, all_ids, quiet


@pytest.mark.parametrize("n", [2_000, pytest.param(200_000, marks=pytest.mark.slow)])
def test_a_folder_of_one_byte_files(tmp_path, n):
    """Every file is a document: its byte and the end of the document."""
    source = tmp_path / "many"
    for i in range(n):
        if i % 1000 == 0:
            (source / f"{i // 1000:03}").mkdir(parents=True)
        (source / f"{i // 1000:03}" / f"{i:06}.txt").write_bytes(b"abcdefgh"[i % 8 : i % 8 + 1])
    config = DataConfig(source=(str(source),), cache_dir=str(tmp_path / "cache"), val_fraction=0.1)
    (source,) = prepare(config, BYTES, quiet).sources
    train, val = source.train, source.val
    for tokens, n_documents in ((train, n * 9 // 10), (val, n // 10)):
        ids = all_ids(tokens)
        assert len(ids) == 2 * n_documents and (ids[1::2] == BYTES.eos).all()
    both = np.concatenate([all_ids(train)[::2], all_ids(val)[::2]])
    assert np.bincount(both, minlength=257)[97:105].tolist() == [n // 8] * 8


def test_a_vocabulary_of_exactly_257_has_no_merges(tmp_path):
    """256 bytes and the end of a document: every byte is a token, as with `bytes`."""
    text = "ab ab ab ✓ abab\n" * 40
    train_bpe([text], 257, tmp_path / "t.json")
    bpe = load_tokenizer(str(tmp_path / "t.json"))
    size = len(text.encode())
    assert bpe.vocab_size == 257 and len(set(bpe.encode(text))) == len(set(text.encode()))
    assert len(bpe.encode(text)) == size == int(bpe.token_bytes[bpe.encode(text)].sum())
    (tmp_path / "x.txt").write_text(text)
    config = DataConfig(source=(str(tmp_path / "x.txt"),), cache_dir=str(tmp_path / "cache"))
    (source,) = prepare(config, bpe, quiet).sources
    train, val = source.train, source.val
    ids = np.concatenate([all_ids(train), all_ids(val)])
    assert len(ids) == size + 2 and (ids == bpe.eos).sum() == 2  # a lone text is cut in two
    assert bpe.decode(ids[ids != bpe.eos].tolist()) == text
