"""Decoding on a mesh whose ranks hold all tokens: the tokens of one process, and exchanges of a size
that is known in advance."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from headway.config import EngineConfig, MeshConfig, MoEConfig, RouterConfig
from headway.data.tokenizer import ByteTokenizer
from headway.hub.load import load_model
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.parallel.placement import partition
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from headway.serve.runner import MeshRunner, Runner, runner_of
from tests.serve.conftest import CONFIG
from tests.server.served import train_tiny

PROMPTS = [[1, 2, 3], [7] * 21, [4, 5] * 20]
PARAMS = SamplingParams(
    max_tokens=10, seed=4, n=2, logprobs=0, temperature=1.5, ignore_eos=True, return_routes=True
)
SIZES = EngineConfig(max_len=64, max_batch_tokens=20, max_requests=8)
LAYERS = {
    "sub_token": MoEConfig(n_heads=4, n_experts=6, top_k=2, d_expert=16),
    "token": MoEConfig(
        n_heads=4,
        n_experts=6,
        top_k=3,
        d_expert=16,
        n_zero_experts=2,
        router=RouterConfig(reads="token"),
    ),
}


def sent_by(mesh):
    """Bytes that this rank sent, by axis and purpose."""
    return {name: counts["bytes"] for name, counts in mesh.traffic.take().items()}


def write(mesh, moe, dtype):
    """What an engine on rank 0 answers; and how many bytes this rank sent in sparse layers."""
    model = Transformer(replace(CONFIG, moe=moe), Compute(dtype), seed=5).to(dtype).eval()
    if mesh.size == 1:
        runner = Runner(model)
    else:
        partition(model, mesh)
        runner = MeshRunner(model, mesh)
        if not mesh.is_main:
            runner.follow()
            return None, sent_by(mesh)
    engine = Engine(model, ByteTokenizer(), replace(SIZES, return_routes=True), runner=runner)
    answers = [
        [
            (c.tokens, [p.logprob for p in c.logprobs], [part.tolist() for part in c.routes])
            for c in choices
        ]
        for choices in engine.generate(PROMPTS, PARAMS)
    ]
    runner.close()
    touched = engine.counters.total_touched, engine.counters.total_busiest
    return (answers, touched), sent_by(mesh)


@pytest.mark.parametrize("reads", LAYERS)
@pytest.mark.parametrize(
    "mesh", [MeshConfig(hp=2), MeshConfig(hp=4), MeshConfig(ep=2), MeshConfig(hp=2, ep=2)], ids=str
)
def test_tokens_are_those_of_one_process(ranks, mesh, reads):
    moe = LAYERS[reads]
    (((alone, touched), _),) = ranks.remember(MeshConfig(), write, moe, torch.float32)
    answers = ranks.run(mesh, write, moe, torch.float32)
    (written, (total, busiest)), _ = answers[0]
    assert touched == (total, touched[0]) and total / mesh.size <= busiest < total
    for choices, expected in zip(written, alone, strict=True):
        for (tokens, logprobs, routes), (wanted, scores, chosen) in zip(
            choices, expected, strict=True
        ):
            assert tokens == wanted and routes[0] == chosen[0]
            if mesh.ep == 1:  # heads are joined, not summed
                assert logprobs == scores and routes == chosen
            assert np.allclose(routes[1], chosen[1], atol=1e-5)
            assert logprobs == pytest.approx(scores, abs=1e-5)
    assert all(n > 0 for n in answers[0][1].values())
    assert all(sent == answers[0][1] for _, sent in answers), "every rank sends as much"


def read(mesh, run):
    """What an engine of a run on disk answers, each rank having read its part of it."""
    model = load_model(run, dtype="float32", mesh=mesh).model
    runner = runner_of(model, mesh)
    n_values = sum(layer.experts.w_in_HEGFL.numel() for layer in model.sparse_layers())
    if not mesh.is_main:
        runner.follow()
        return None, n_values
    engine = Engine(model, ByteTokenizer(), SIZES, runner=runner)
    params = replace(PARAMS, return_routes=False)
    replies = engine.generate(PROMPTS, params)
    runner.close()
    return [[c.tokens for c in choices] for choices in replies], n_values


@pytest.mark.parametrize("mesh", [MeshConfig(hp=2), MeshConfig(ep=2)], ids=str)
def test_each_rank_reads_its_part_of_a_run(ranks, mesh, tmp_path_factory):
    run = train_tiny(tmp_path_factory.mktemp("decode"))
    ((alone, whole),) = ranks.run(MeshConfig(), read, run)
    answers = ranks.run(mesh, read, run)
    assert answers[0][0] == alone
    assert [n for _, n in answers] == [whole / 2] * 2
