"""A Hugging Face folder where a run is taken."""

import pytest
import torch

from headway.config import UsageError
from headway.hub.folder import HubFolder
from headway.hub.gguf import export_gguf
from headway.hub.import_model import import_model
from headway.hub.trained import open_trained
from tests.hub.small_runs import export
from tests.hub.tiny import write_model

FORMS = [
    ("llama", {}),
    ("olmoe", {}),
    ("qwen3_moe", {"fused": True}),
    ("mixtral", {"dtype": torch.bfloat16, "max_shard_size": "20KB"}),
    ("gpt_oss", {}),
    ("deepseek_v3", {}),
]


@pytest.mark.parametrize("family, how", FORMS, ids=[family for family, _ in FORMS])
def test_a_folder_is_exported_as_its_import_is(tmp_path, family, how):
    """As its own family, element by element, with the same config and tokenizer."""
    write_model(tmp_path / "theirs", family, **how)
    import_model(tmp_path / "theirs", tmp_path / "run")
    dtype = "bfloat16" if "dtype" in how else "float32"
    for name in ("theirs", "run"):
        done = export(tmp_path / name, tmp_path / f"from_{name}", dtype, "auto")
        assert done.model_type == family and done.left_out == []
    a, b = tmp_path / "from_theirs", tmp_path / "from_run"
    assert sorted(p.name for p in a.iterdir()) == sorted(p.name for p in b.iterdir())
    for path in a.iterdir():
        if path.name not in ("README.md", "tokenizer_config.json"):  # import adds the end of a text
            assert path.read_bytes() == (b / path.name).read_bytes(), path.name
    assert f"came as a `{family}` model" in (a / "README.md").read_text()
    with HubFolder(tmp_path / "theirs") as theirs, HubFolder(a) as back:
        for name in theirs.names():  # rows that pad the vocabulary are cut
            whole = theirs.read(name)[: back.shape(name)[0]]
            assert torch.equal(whole, back.read(name)), name


def test_a_folder_as_gguf(tmp_path):
    pytest.importorskip("gguf")
    write_model(tmp_path / "theirs", "mixtral")
    import_model(tmp_path / "theirs", tmp_path / "run")
    for name in ("theirs", "run"):
        with open_trained(tmp_path / name) as trained:
            (tmp_path / f"to_{name}").mkdir()
            export_gguf(trained, tmp_path / f"to_{name}" / "m.gguf", "float32")
    sizes = [(tmp_path / f"to_{name}" / "m.gguf").stat().st_size for name in ("theirs", "run")]
    assert abs(sizes[0] - sizes[1]) < 100  # the name


@pytest.mark.parametrize("fused", [False, True])
def test_parts_of_a_tensor_are_read_alone(tmp_path, fused):
    """One expert of a stack costs the reading of one expert."""
    write_model(tmp_path / "theirs", "mixtral", fused=fused)
    with HubFolder(tmp_path / "theirs") as folder:
        name = "layers.1.ffn.experts.w_in_HEGFL"
        whole = folder.read(name)
        one = (slice(0, 1), slice(2, 3), slice(0, 1), slice(4, 9))
        assert torch.equal(folder.read(name, one), whole[one])
        regions = [region for region, _ in folder.parts(name, None, one)]
        assert all(region[1] == slice(2, 3) for region in regions)
        assert len(regions) < len(list(folder.parts(name)))


def test_a_tokenizer_that_is_too_large(tmp_path):
    write_model(tmp_path / "theirs", "llama", vocab_size=280)
    wanted = "vocab_size=280 and a tokenizer of 289 ids"
    with pytest.raises(UsageError, match=wanted), open_trained(tmp_path / "theirs"):
        pass
