"""A trained model as the verbs read it: dtypes by role, memory, what its folder says."""

import json
import subprocess
import sys
from dataclasses import asdict, replace

import pytest
import torch

from headway.checkpoint.save import plan_save, write_checkpoint
from headway.config import Config, ModelConfig, MoEConfig, UsageError
from headway.hub.load import load_model
from headway.model.compute import Compute
from headway.model.packing import pack_
from headway.model.roles import Group, matrix_dtype, roles_of
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from tests.compare import assert_close
from tests.hub import small_runs
from tests.kernels.cpp_paths import needs_native

SMALL = ModelConfig(
    vocab_size=320,
    n_layers=2,
    d_model=32,
    n_heads=4,
    n_kv_heads=2,
    attn_gate=True,
    d_ff=48,
    moe=MoEConfig(n_heads=2, n_experts=4, top_k=2, d_expert=16, d_shared=24, n_dense_layers=1),
)


def write_run(folder, model_config=SMALL):
    """A run folder with one checkpoint, as training writes them; return its model."""
    config = Config(recipe="x", model=model_config)
    model = Transformer(model_config, seed=0)
    with torch.no_grad():
        for block in model.sparse_layers():
            block.router.bias_HE.normal_(generator=torch.Generator().manual_seed(1))
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps({"config": asdict(config)}))
    optimizers = build_optimizers(model, config.optim)
    write_checkpoint(plan_save(folder, 3, model, optimizers, model_config, {}))
    return model


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_stored_in_the_dtype_of_the_matmuls(tmp_path, dtype):
    """Router, norms and bias in float32, and the same bits as weights that were float32 until they
    were packed."""
    trained = write_run(tmp_path / "run")
    loaded = load_model(tmp_path / "run", "cpu", dtype)
    wanted = getattr(torch, dtype)
    stored = {name: x.dtype for name, x in loaded.model.state_dict().items()}
    for name, role in roles_of(loaded.model).items():
        wide = role.group in (Group.VECTOR, Group.ROUTER)
        assert stored[name] == (torch.float32 if wide else wanted), name
    assert not loaded.model.training
    reference = Transformer(SMALL, Compute(wanted))
    reference.load_state_dict(trained.state_dict())
    pack_(reference.eval(), wanted)
    x = torch.arange(24).view(2, 12)
    with torch.no_grad():
        want, got = (m(x).logits_BSV for m in (reference, loaded.model))
    assert torch.equal(want, got)
    routed_alike = 1e-6 if dtype == "float32" else 0.2  # rounding moves a token to another expert
    assert_close(got, trained(x).logits_BSV.detach(), routed_alike)
    said = any("float16" in line for line in loaded.info.lines)
    assert said == (dtype == "float16")


@needs_native
@pytest.mark.parametrize("name", ["multi_head_token", "latent", "slices", "biased"])
def test_bfloat16_weights_stay_narrow_for_products_in_float32(tmp_path, name):
    """The same bits as widened ones, in half of the memory; what a folder has in float32 is as
    wide as it was."""
    if name == "biased":
        moe = replace(SMALL.moe, kind="moe", n_heads=1, expert_bias=True)
        model_config = replace(SMALL, moe=moe)
    else:
        model_config = small_runs.MODELS[name]
    small_runs.write_run(tmp_path / "run", replace(model_config, vocab_size=257))
    small_runs.export(tmp_path / "run", tmp_path / "hf", dtype="bfloat16")
    loaded = load_model(tmp_path / "hf", "cpu", "float32").model
    widened = load_model(tmp_path / "hf", "cpu", "float32", packed=False).model
    assert {x.dtype for x in widened.state_dict().values()} == {torch.float32}
    pack_(widened, torch.float32)
    x = torch.arange(24).view(2, 12)
    with torch.no_grad():
        want, got = (m(x).logits_BSV for m in (widened, loaded))
    assert got.dtype is torch.float32 and torch.equal(want, got)
    assert (matrix_dtype(loaded), matrix_dtype(widened)) == (torch.bfloat16, torch.float32)
    narrow, wide = (_packed_bytes(m) for m in (loaded, widened))
    assert narrow.keys() == wide.keys() and len(narrow) > 3
    for part, n_bytes in narrow.items():
        assert n_bytes == (wide[part] if "router" in part else wide[part] / 2), part


def _packed_bytes(model):
    """Return the bytes of the packed weights of each module that has any."""
    return {
        name: sum(w.data.nbytes for w in (packed if isinstance(packed, tuple) else (packed,)))
        for name, module in model.named_modules()
        if (packed := vars(module).get("packed")) is not None
    }


def test_a_folder_says_what_ends_a_text(tmp_path):
    write_run(tmp_path / "run")
    info = load_model(tmp_path / "run").info
    assert (info.name, info.eos_ids, info.bos_id, info.chat_template) == ("run", (256,), None, None)
    assert info.max_len == Config().data.seq_len and info.source.name == "step-000003"
    (tmp_path / "run" / "generation_config.json").write_text('{"eos_token_id": [300, 256, 301]}')
    templates = [{"name": "tools", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "run" / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": templates})
    )
    info = load_model(tmp_path / "run").info
    assert (info.eos_ids, info.chat_template) == ((256, 300, 301), "d")
    (tmp_path / "run" / "chat_template.jinja").write_text("{{ messages }}")
    assert load_model(tmp_path / "run").info.chat_template == "{{ messages }}"
    (tmp_path / "run" / "generation_config.json").write_text("{")
    with pytest.raises(UsageError, match="generation_config.json cannot be read"):
        load_model(tmp_path / "run")


def test_threads(tmp_path):
    before = torch.get_num_threads()
    write_run(tmp_path / "run")
    try:
        load_model(tmp_path / "run", threads=before + 1)
        assert torch.get_num_threads() == before + 1
    finally:
        torch.set_num_threads(before)


MEASURE = """
import json, sys
import torch
from headway.hub.load import load_model
from headway.hub.memory import peak_memory

torch.set_num_threads(1)
state = torch.get_rng_state()
with peak_memory() as memory:
    model = load_model(sys.argv[1], "cpu", "bfloat16").model
assert torch.equal(state, torch.get_rng_state()), "a weight was drawn"
print(memory.bytes, sum(x.nbytes for x in model.state_dict().values()))
"""


def test_memory_is_that_of_the_weights_in_their_dtype_and_one_tensor(tmp_path):
    """No float32 copy of the whole: 210 MB of float32 weights become 105 MB."""
    moe = MoEConfig(n_heads=1, kind="moe", n_experts=8, top_k=2, d_expert=512)
    config = replace(SMALL, vocab_size=8192, d_model=512, n_layers=8, moe=moe)
    model = write_run(tmp_path / "run", config)
    largest = max(x.nbytes for x in model.state_dict().values())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path / "run")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    used, stored = map(int, done.stdout.split())
    whole = sum(x.nbytes for x in model.state_dict().values())
    assert stored == pytest.approx(whole / 2, rel=0.01)
    assert used < stored + 2 * largest + 20e6 < whole
