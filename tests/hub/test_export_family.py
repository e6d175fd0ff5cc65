"""Round trips through the table of a family, and which family a model equals."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from headway.checkpoint.tensor_reader import TensorReader
from headway.config import BalanceConfig, ModelConfig, MoEConfig, RouterConfig, UsageError
from headway.hub.export_family import export_family
from headway.hub.families import FAMILIES, choose_family
from headway.hub.family import canonical
from headway.hub.folder import HubFolder
from headway.hub.import_model import import_model
from headway.hub.load import load_model
from headway.model.transformer import Transformer
from tests.hub.test_load import write_run
from tests.hub.tiny import CONFIGS, write_model

NAMES = {family.name: family for family in FAMILIES}
FLAT = ModelConfig(
    vocab_size=320,
    n_layers=2,
    d_model=32,
    n_heads=4,
    d_ff=48,
    max_len=64,
    moe=MoEConfig(kind="moe", n_experts=4, top_k=2, d_expert=16, d_latent=0),
)
SIGMOID = RouterConfig(gate="sigmoid", renormalize=True, scale=2.0)


def flat(**moe):
    return replace(FLAT, moe=replace(FLAT.moe, **moe))


def write_out(run, family, folder, dtype=torch.float32, **changes):
    """The folder of the run's checkpoint as a family."""
    loaded = json.loads((run / "run.json").read_text())["config"]["model"]
    from headway.config import from_dict

    config = replace(from_dict(ModelConfig, loaded), **changes)
    [checkpoint] = (run / "checkpoints").iterdir()
    folder.mkdir()
    with TensorReader(checkpoint, "model") as reader:
        return export_family(config, reader, family, dtype, folder)


def tensors(folder):
    return {k: x for path in folder.glob("*.safetensors") for k, x in load_file(path).items()}


def differing(a, b):
    """Names of tensors that are not the same, element by element."""
    assert a.keys() == b.keys()
    return [k for k in a if a[k].shape != b[k].shape or not torch.equal(a[k], b[k])]


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("fused", [False, True])
def test_theirs_ours_theirs(tmp_path, family, fused):
    """Every tensor comes back, experts one by one; config.json says the same model, also to
    Transformers; one transposed expert is noticed."""
    transformers = pytest.importorskip("transformers")
    write_model(tmp_path / "v4", family)
    source = tmp_path / "v4"
    if fused:
        write_model(tmp_path / "v5", family, fused=True)
        source = tmp_path / "v5"
    import_model(source, tmp_path / "run")
    assert write_out(tmp_path / "run", NAMES[family], tmp_path / "back") == [
        name
        for name in sorted(load_model(tmp_path / "run").model.state_dict())
        if name.endswith("router.bias_HE") and not NAMES[family].router_bias
    ]
    assert differing(tensors(tmp_path / "v4"), tensors(tmp_path / "back")) == []
    with HubFolder(source) as a, HubFolder(tmp_path / "back") as b:
        assert a.config == b.config
    a, b = (
        transformers.AutoConfig.from_pretrained(p).to_dict() for p in (source, tmp_path / "back")
    )
    assert {k for k in a if k in b and a[k] != b[k]} <= {
        *("_name_or_path", "bos_token_id", "eos_token_id", "pad_token_id"),
        *("max_window_layers", "num_mtp_layers", "transformers_version"),
        *("decoder_sparse_step", "mlp_only_layers", "head_dim"),  # the same layers by another rule
    }
    written = tensors(tmp_path / "back")
    name = next(k for k in written if "experts.1" in k or ("mlp" in k and "down_proj" in k))
    written[name] = written[name].transpose(-1, -2).reshape(written[name].shape)
    assert differing(tensors(tmp_path / "v4"), written) == [name]


@pytest.mark.parametrize(
    "config, family",
    [
        (FLAT, "qwen3_moe"),
        (flat(dense_layers=(1,), router=RouterConfig(gate="softmax_topk")), "qwen3_moe"),
        (replace(FLAT, qk_norm="none", n_kv_heads=2), "mixtral"),
        (replace(FLAT, qk_norm="all"), "olmoe"),
        (replace(flat(router=SIGMOID, d_shared=32, n_dense_layers=1), d_head=8), "glm4_moe"),
        (flat(router=SIGMOID, d_shared=16, balance=BalanceConfig(bias="sign")), "glm4_moe"),
        (replace(FLAT, qk_norm="none", moe=MoEConfig(kind="dense"), tied=True), "llama"),
        (replace(FLAT, moe=MoEConfig(kind="dense")), "qwen3"),
    ],
)
def test_ours_theirs_ours(tmp_path, config, family):
    """A run of ours leaves as the family that it equals and comes back as it was; Transformers
    computes the same."""
    transformers = pytest.importorskip("transformers")
    if family == "glm4_moe":
        config = replace(config, d_head=16)
    model = write_run(tmp_path / "run", config)
    if not NAMES[family].router_bias:
        _clear_bias(tmp_path / "run")
        for layer in model.sparse_layers():
            layer.router.bias_HE.zero_()
    chosen, why = choose_family(config)
    assert chosen is not None and (chosen.name, why) == (family, "")
    write_out(tmp_path / "run", chosen, tmp_path / "theirs", vocab_size=300)
    with HubFolder(tmp_path / "theirs") as folder:
        assert folder.config == canonical(replace(config, vocab_size=300))
        state = model.state_dict()
        for name in folder.names():
            want = state[name][:300] if name in ("embed.weight", "head.weight") else state[name]
            assert torch.equal(folder.read(name), want), name
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "theirs")
    x = torch.arange(40).view(2, 20)
    with torch.no_grad():
        ours = model.eval()(x).logits_BSV[..., :300]
        difference = (theirs(x).logits - ours).abs().max()
    assert difference <= 1e-5 * max(1.0, float(ours.abs().max()))


def _clear_bias(run):
    """Set the biases of the routers to 0."""
    [path] = run.glob("checkpoints/*/model.safetensors")
    values = load_file(path)
    save_file({k: x * 0 if k.endswith("bias_HE") else x for k, x in values.items()}, path)


@pytest.mark.parametrize(
    "config, why",
    [
        (ModelConfig(vocab_size=320, max_len=8), "model.moe.kind=multi_head_latent"),
        (flat(activation="relu2"), "model.moe.activation=relu2, and in qwen3_moe it is swiglu"),
        (replace(FLAT, attn_gate=True), "model.attn_gate=True, and in qwen3_moe it is False"),
        (replace(FLAT, window=(8, 0)), "model.window=8 0"),
        (replace(FLAT, logit_softcap=30.0), "model.logit_softcap=30.0"),
        (flat(n_zero_experts=2), "model.moe.n_zero_experts=2"),
        (flat(router=SIGMOID, d_shared=24), "model.moe.d_shared=24, and in glm4_moe it is 16"),
        (flat(balance=BalanceConfig(bias="sign")), "model.moe.balance.bias=sign"),
    ],
)
def test_why_a_model_is_of_no_family(config, why):
    family, reason = choose_family(config)
    assert family is None and reason.startswith(why)


def test_an_imported_model_goes_back_where_it_came_from():
    windowed = replace(FLAT, qk_norm="none", window=(8,))
    assert choose_family(windowed)[0] is None
    family, _ = choose_family(windowed, "mixtral")
    assert family is not None and family.name == "mixtral"


def test_a_tensor_without_a_place_is_refused(tmp_path):
    write_run(tmp_path / "run", FLAT)  # its biases are not 0
    with pytest.raises(UsageError, match="router.bias_HE is not 0, and qwen3_moe has no tensor"):
        write_out(tmp_path / "run", NAMES["qwen3_moe"], tmp_path / "theirs")
    shutil.rmtree(tmp_path / "theirs")
    with pytest.raises(UsageError, match="no mixtral computes this model: model.qk_norm=head"):
        _clear_bias(tmp_path / "run")
        write_out(tmp_path / "run", NAMES["mixtral"], tmp_path / "theirs")


def test_dtypes(tmp_path):
    """Weights in the dtype asked for; the bias of the selection stays float32."""
    config = replace(flat(router=SIGMOID, d_shared=16), d_head=16)
    write_run(tmp_path / "run", config)
    write_out(tmp_path / "run", NAMES["glm4_moe"], tmp_path / "theirs", torch.bfloat16)
    for name, x in tensors(tmp_path / "theirs").items():
        wide = name.endswith("e_score_correction_bias")
        assert x.dtype == (torch.float32 if wide else torch.bfloat16), name
    values = json.loads((tmp_path / "theirs" / "config.json").read_text())
    assert values["dtype"] == values["torch_dtype"] == "bfloat16"
    assert values["n_routed_experts"] == values["num_experts"] == 4


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_tensor_of_a_model_has_one_place(family):
    """Parameters are covered once, element by element; only buffers may be left out."""
    changes = {k: v for k, v in CONFIGS[family.name].items() if k != "max_shard_size"}
    from tests.hub.tiny import BASE

    config = family.read({**BASE, **changes})
    with torch.device("meta"):
        model = Transformer(config)
    shapes = {name: tuple(x.shape) for name, x in model.state_dict().items()}
    for fused in (False, True):
        covered = {name: torch.zeros(shape, dtype=torch.int8) for name, shape in shapes.items()}
        for row in family.rows(config, fused):
            covered[row.ours][row.region(shapes[row.ours])] += 1
        parameters = {name for name, _ in model.named_parameters()}
        for name, times in covered.items():
            assert (times == 1).all() or (name not in parameters and (times == 0).all()), name
