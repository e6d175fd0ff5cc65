"""Rates by width: the numbers per role, that activations move equally at every width, that a run
without the rule is what it was."""

import math
import shutil
from dataclasses import replace

import pytest
import torch

from headway.config import ModelConfig, MoEConfig, OptimConfig, RouterConfig, UsageError
from headway.config.check import validate
from headway.model.build import build_block
from headway.model.context import Context
from headway.model.init import initial_weights
from headway.model.transformer import Transformer
from headway.optim.groups import Optimizers, build_optimizers
from headway.optim.transfer import derivation, init_scales, scales
from headway.parallel.mesh import Mesh
from headway.parallel.parallelize import materialize
from headway.recipes import demo
from tests.train.tiny_run import assert_same_run, events, tiny, train

MODEL = ModelConfig(
    vocab_size=64,
    n_layers=8,
    d_model=64,
    n_heads=4,
    d_ff=128,
    moe=MoEConfig(
        n_heads=4,
        n_experts=4,
        top_k=2,
        d_expert=48,
        d_shared=96,
        n_dense_layers=1,
        router=RouterConfig(reads="token", noisy=True),
    ),
)
WIDTH = OptimConfig(lr=1e-3, eps=1e-8, transfer="width", base_width=32, base_layers=2)
# by hand for D 64, L 16, 8 layers, from base width 32 and 2 layers: parameter → rate, epsilon, decay, initial values
TABLE = {
    "embed.weight": (1e-3, 0.5e-8, 0.0, 0.02),
    "norm.weight": (1e-3, 0.5e-8, 0.0, None),
    "head.weight": (0.5e-3, 1e-8, 0.2, 0.1 / 8 * math.sqrt(0.5)),
    "layers.0.norm1.weight": (0.5e-3, 0.25e-8, 0.0, None),
    "layers.0.mixer.q.weight": (0.25e-3, 0.25e-8, 0.4, 1 / 8),
    "layers.0.mixer.o.weight": (0.125e-3, 0.5e-8, 0.8, 1 / 8 / 4),
    "layers.0.ffn.w_in.weight": (0.25e-3, 0.25e-8, 0.4, 1 / 8),
    "layers.0.ffn.w_out.weight": (1e-3 / 16, 0.5e-8, 1.6, 1 / math.sqrt(128) / 4),
    "layers.1.ffn.router.w_HEL": (0.25e-3, 0.5e-8, 0.4, 1 / 8 * math.sqrt(0.5)),
    "layers.1.ffn.router.w_noise_HEL": (0.25e-3, 0.5e-8, 0.4, 0.0),
    "layers.1.ffn.experts.w_in_HEGFL": (1e-3, 0.25e-8, 0.1, 1 / 4),
    "layers.1.ffn.experts.w_out_HEFL": (1e-3 / 3, 0.25e-8, 0.3, 1 / math.sqrt(48)),
    "layers.1.ffn.w_out.weight": (0.125e-3, 0.5e-8, 0.8, 1 / 8 / 4),
    "layers.1.ffn.shared.w_out.weight": (1e-3 / 12, 0.5e-8, 1.2, 1 / math.sqrt(96) / 4),
}


def _built(config: ModelConfig, optim: OptimConfig) -> tuple[Transformer, Optimizers]:
    with torch.device("meta"):
        model = Transformer(config)
    materialize(model, Mesh(), 0, init_scales(model, optim))
    return model, build_optimizers(model, optim)


def _group_of(optimizers: Optimizers, name: str) -> dict:
    p = optimizers.named[name]
    groups = [
        g for o in optimizers.all() for g in o.param_groups if any(p is q for q in g["params"])
    ]
    assert len(groups) == 1, name
    return groups[0]


def test_every_role_has_its_numbers():
    _, optimizers = _built(MODEL, WIDTH)
    for name, (rate, eps, decay, std) in TABLE.items():
        group = _group_of(optimizers, name)
        assert group["peak_lr"] == pytest.approx(rate), name
        assert group["eps"] == pytest.approx(eps), name
        assert group["weight_decay"] == pytest.approx(decay), name
        values = optimizers.named[name].detach()
        if std is None:
            assert (values == 1).all(), name
        else:
            assert float(values.std()) == pytest.approx(std, rel=0.1), name


def test_muon_has_no_factor_of_its_own_width_and_matched_rates_get_one():
    muon = replace(WIDTH, name="muon", muon_lr=0.02)
    _, optimizers = _built(MODEL, muon)
    _, matched = _built(MODEL, replace(muon, muon_adjust="match_rms_adamw"))
    for name, fan_in, depth in (
        ("layers.0.mixer.q.weight", 64, 0.5),
        ("layers.0.ffn.w_out.weight", 128, 0.25),
        ("layers.1.ffn.experts.w_in_HEGFL", 16, 0.5),
        ("layers.1.ffn.experts.w_out_HEFL", 48, 0.5),
    ):
        group, other = _group_of(optimizers, name), _group_of(matched, name)
        assert group["peak_lr"] == pytest.approx(0.02 * depth), name
        assert group["weight_decay"] * group["peak_lr"] == pytest.approx(0.1 * 0.02)
        assert other["peak_lr"] == pytest.approx(0.02 * depth * math.sqrt(32 / fan_in)), name
        # so that both move a matrix alike, but for one constant
        assert matched.muon is not None and optimizers.muon is not None
        p = optimizers.named[name]
        ratio = matched.muon._rate(p, other) / optimizers.muon._rate(p, group)
        assert ratio == pytest.approx(0.2 * math.sqrt(32)), name
    assert _group_of(optimizers, "head.weight")["peak_lr"] == pytest.approx(0.5e-3)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("kind", ["dense", "moe"])
def test_activations_move_equally_at_every_width(kind, optimizer):
    """The coordinate check: RMS of what five steps change in the stream and in the logits."""

    def moved(width: int, rule: str) -> tuple[float, float]:
        moe = MoEConfig(kind=kind, n_experts=4, top_k=2, d_expert=width // 2)
        config = ModelConfig(
            vocab_size=64, n_layers=2, d_model=width, n_heads=width // 16, d_ff=2 * width, moe=moe
        )
        base = OptimConfig(
            name=optimizer, lr=1e-2, muon_lr=1e-2, muon_adjust="match_rms_adamw", weight_decay=0.0
        )
        rules = {
            "none": base,
            "width": replace(base, transfer="width", base_width=32, base_layers=2),
        }
        model, optimizers = _built(config, rules[rule])
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(0, 64, (8, 33), generator=generator)

        @torch.no_grad()
        def measure() -> tuple[torch.Tensor, torch.Tensor]:
            x = model.embed(tokens[:, :-1])
            for block in model.blocks():
                x, _ = block(x, Context())
            logits = model(tokens[:, :-1]).logits_BSV
            assert logits is not None
            return x, logits

        before = measure()
        for _ in range(5):
            nats = model(tokens[:, :-1], tokens[:, 1:]).nats
            assert nats is not None
            (nats / 256).backward()
            optimizers.step()
            optimizers.zero_grad()
        stream, logits = (b - a for a, b in zip(before, measure(), strict=True))
        return float(stream.square().mean().sqrt()), float(logits.square().mean().sqrt())

    widths = (32, 64, 128, 256)
    with_rule = [moved(width, "width") for width in widths]
    without = [moved(width, "none") for width in widths]
    for i in range(2):
        sizes = [row[i] for row in with_rule]
        assert max(sizes) < 1.6 * min(sizes), sizes
    assert without[-1][1] > 3 * without[0][1]
    if optimizer == "adamw":
        assert without[-1][0] > 1.4 * without[0][0]


def test_without_the_rule_nothing_is_scaled_and_values_are_those_of_before():
    with torch.device("meta"):
        model = Transformer(MODEL)
    assert init_scales(model, OptimConfig()) == {} and derivation(model, OptimConfig()) == {}
    built, optimizers = _built(MODEL, OptimConfig())
    for name, value in initial_weights(built, n_layers=8, embed_std=0.02, seed=0):
        if name in optimizers.named:
            assert torch.equal(optimizers.named[name].detach(), value), name
    names = [g["name"] for g in optimizers.adamw.param_groups]
    assert len(names) == len(set(names)) == 7
    assert {g["eps"] for g in optimizers.adamw.param_groups} == {1e-8}


def test_at_the_base_only_fan_ins_that_differ_are_scaled():
    model, optim = Transformer(MODEL, seed=0), replace(WIDTH, base_width=64, base_layers=8)
    by_name = scales(model, optim)
    for name in ("head.weight", "layers.1.ffn.router.w_HEL", "layers.3.mixer.q.weight"):
        assert by_name[name].lr == by_name[name].eps == by_name[name].init == 1.0
    assert by_name["layers.1.ffn.experts.w_in_HEGFL"].lr == 4


def test_a_looped_block_counts_as_often_as_it_is_applied():
    config = replace(MODEL, moe=replace(MODEL.moe, n_dense_layers=0))
    plain = scales(Transformer(config), WIDTH)
    block = build_block(config, 0)
    looped = Transformer(config, blocks=lambda *_: block)
    by_name = scales(looped, WIDTH)
    assert len(by_name) < len(plain) and by_name["layers.0.mixer.o.weight"].lr == 0.5 * 2 / 8
    assert by_name == {name: plain[name] for name in by_name}
    lines = derivation(looped, WIDTH)
    assert lines == derivation(Transformer(config), WIDTH)


def test_the_derivation_names_every_number():
    model = Transformer(MODEL, seed=0)
    lines = derivation(model, WIDTH)
    assert (
        lines["optim.transfer"] == "width: rates hold as given at base_width 32 and base_layers 2"
    )
    assert lines["lr of matrices, fan-in 64"] == (
        "0.00025: 0.001 × 0.25; eps 2.5e-09 = 1e-08 × 0.25; weight_decay 0.4"
    )
    assert lines["lr of routers, fan-in 64"].endswith("initial values × 0.7071")
    assert lines["lr of vectors"].startswith("0.0005: ")
    assert lines["lr of vectors, outside of the blocks"].startswith("0.001: ")
    muon = derivation(model, replace(WIDTH, name="muon"))
    assert muon["muon_lr of matrices, fan-in 64"] == "0.01: 0.02 × 0.5; weight_decay 0.2"


def test_a_run_says_its_rates_and_resumes_bit_for_bit(tmp_path):
    wide = {"transfer": "width", "base_width": 16, "base_layers": 1}
    root, again = tmp_path / "a", tmp_path / "b"
    lines = []
    whole = train(tiny(root, optim=wide), log=lines.append)
    assert any(line.startswith("lr of matrices, fan-in 32 = ") for line in lines)
    assert '"lr of matrices, fan-in 32"' in (root / "run" / "run.json").read_text()
    config = tiny(again, optim=wide)
    train(config, forks=[8])
    for folder in sorted((again / "run" / "checkpoints").iterdir()):
        if folder.name > "step-000008":
            shutil.rmtree(folder)
    later = []
    resumed = train(config, resume=again / "run", log=later.append)
    assert (8, "resumed") in events(again)
    assert any("initial values × 0.7071" in line for line in lines)
    assert any(line.startswith("lr of matrices, fan-in 32 = ") for line in later)
    assert not any("initial values" in line for line in later)  # they are the checkpoint's
    assert_same_run(root, again, whole, resumed)
    plain = train(tiny(tmp_path / "c"))
    assert plain["val_loss"] != whole["val_loss"]


def test_mistakes_are_one_line():
    tied = replace(
        demo(), model=replace(demo().model, tied=True), optim=OptimConfig(transfer="width")
    )
    with pytest.raises(UsageError, match="optim.transfer=width gives .* use model.tied=False"):
        validate(tied)
    for optim, said in (
        (
            replace(OptimConfig(), transfer="depth"),
            "optim.transfer=depth is not known; use none, width, power",
        ),
        (
            OptimConfig(base_width=64),
            "optim.base_width=64 is of optim.transfer=width, and optim.tr",
        ),
        (
            OptimConfig(transfer="power", base_layers=1),
            "optim.base_layers=1 is of optim.transfer=w",
        ),
        (OptimConfig(transfer="width", base_width=0), "optim.base_width=0 is below 1"),
        (OptimConfig(transfer="power", base_tokens=0), "optim.base_tokens=0 is below 1"),
    ):
        with pytest.raises(UsageError) as error:
            optim.check()
        assert str(error.value).startswith(said) and "\n" not in str(error.value)
