"""Passes of decoding that are replayed give the bits of passes that run."""

from dataclasses import replace

import pytest
import torch

from headway.config import EngineConfig, ModelConfig, MoEConfig
from headway.data.tokenizer import ByteTokenizer
from headway.kernels.packed import batch_invariant
from headway.model.compute import Compute
from headway.model.packing import pack_
from headway.model.transformer import Transformer
from headway.serve import runner
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from headway.serve.request import Completion, joined
from tests.model.test_paged_families import MODELS

CPU = torch.device("cpu")
HEADS = MoEConfig(kind="multi_head_latent", n_heads=2, n_experts=6, top_k=2, d_expert=16)
SIZES = ModelConfig(vocab_size=257, n_layers=2, d_model=32, n_heads=4, n_kv_heads=2, moe=HEADS)
CASES = {
    "multi_head": SIZES,
    "token_router": replace(SIZES, moe=replace(HEADS, router=replace(HEADS.router, reads="token"))),
    "tied": replace(SIZES, tied=True, attn_gate=True, moe=replace(HEADS, kind="moe", n_heads=1)),
    "zero_experts": replace(SIZES, moe=replace(HEADS, n_zero_experts=2)),
    **{name: replace(config, vocab_size=257) for name, config in MODELS.items()},
}


def write(model: Transformer, monkeypatch, rows: int) -> tuple[list[Completion], int]:
    """Requests that arrive and end at different times; captures for at most `rows` sequences."""
    monkeypatch.setattr(runner, "MAX_ROWS", rows)
    sizes = EngineConfig(max_len=64, max_requests=6, cache_tokens=256, return_routes=True)
    engine = Engine(model, ByteTokenizer(), sizes)
    parts, updates = {}, []
    for i in range(9):
        params = SamplingParams(
            5 + 3 * (i % 4), seed=i, logprobs=2, ignore_eos=True, return_routes=True
        )
        request = engine.add([i, 7, *range(2 + i % 3)], params)
        parts[request] = []
        for _ in range(2):
            updates += engine.step()
    while engine.has_work:
        updates += engine.step()
    for update in updates:
        parts[update.request].append(update)
    return [joined(p) for p in parts.values()], len(engine.runner._graphs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
def test_replays_give_the_same_bits(name, dtype, monkeypatch):
    if not batch_invariant(CPU, dtype) or (
        dtype == torch.bfloat16 and name not in ("multi_head", "tied")
    ):
        pytest.skip("no packed kernels here, or float32 is enough")
    model = Transformer(CASES[name], Compute(dtype), seed=3).eval()
    pack_(model, dtype)
    plain, none = write(model, monkeypatch, 0)
    replayed, graphs = write(model, monkeypatch, 4)
    invariant = Engine(model, ByteTokenizer(), EngineConfig(max_len=64)).runner.batch_invariant
    assert none == 0 and (graphs == 4) is invariant
    for a, b in zip(plain, replayed, strict=True):
        assert a.logprobs == b.logprobs
        assert all((x == y).all() for x, y in zip(a.routes, b.routes, strict=True))


def test_other_threads_are_another_capture(monkeypatch):
    if not batch_invariant(CPU, torch.float32):
        pytest.skip("no packed kernels here")
    model = Transformer(SIZES, Compute(torch.float32), seed=3).eval()
    pack_(model, torch.float32)
    engine, threads = (
        Engine(model, ByteTokenizer(), EngineConfig(max_len=64)),
        torch.get_num_threads(),
    )
    params = SamplingParams(8, seed=0, logprobs=0, ignore_eos=True)
    try:
        written = []
        for n in (1, 2):
            torch.set_num_threads(n)
            written.append(engine.generate([[1, 2, 3]], params)[0][0].logprobs)
    finally:
        torch.set_num_threads(threads)
    assert written[0] == written[1] and len(engine.runner._graphs) == 2
