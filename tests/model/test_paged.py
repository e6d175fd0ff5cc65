"""Tokens of many sequences in one pass over pages: the logits of each sequence by itself."""

import torch

from headway.config import ModelConfig, MoEConfig
from headway.model.compute import Compute
from headway.model.context import Context
from headway.model.paged import PAGE, PagedCache, Segment
from headway.model.transformer import Transformer

MOE = MoEConfig(kind="multi_head_latent", n_heads=2, n_experts=4, top_k=2, d_expert=16)
CONFIG = ModelConfig(
    vocab_size=61, n_layers=3, d_model=32, n_heads=4, n_kv_heads=2, window=(0, 11), moe=MOE
)
CPU = torch.device("cpu")


def build() -> Transformer:
    return Transformer(CONFIG, Compute(torch.float64), seed=3).double().eval()


def states(model: Transformer, n_pages: int):
    return [block.mixer.init_pages(n_pages, torch.float64, CPU) for block in model.blocks()]


@torch.no_grad()
def test_passes_of_many_sequences_equal_whole_texts():
    model = build()
    texts = {name: torch.randint(61, (n,)) for name, n in {"a": 40, "b": 21, "c": 3}.items()}
    whole = {name: model(text[None]).logits_BSV[0] for name, text in texts.items()}
    pages = {"a": [7, 2, 5], "b": [1, 6], "c": [3]}
    paged = states(model, 8)
    # (sequence, first position, tokens) of each pass: chunks, decoding, and both
    passes = [
        [("a", 0, 17)],
        [("a", 17, 1), ("b", 0, 16)],
        [("b", 16, 5), ("a", 18, 20), ("c", 0, 2)],
        [("c", 2, 1), ("a", 38, 1)],
        [("a", 39, 1)],
    ]
    for parts in passes:
        segments = [
            Segment(start, n, dict.fromkeys((0, 11), pages[name])) for name, start, n in parts
        ]
        tokens = torch.cat([texts[name][start : start + n] for name, start, n in parts])
        ctx = Context(cache=PagedCache(paged, segments))
        logits = model(tokens[None], ctx=ctx).logits_BSV[0]
        expected = torch.cat([whole[name][start : start + n] for name, start, n in parts])
        torch.testing.assert_close(logits, expected, rtol=0, atol=1e-12)


@torch.no_grad()
def test_rows_select_logits():
    model, tokens = build(), torch.randint(61, (1, 9))
    every = model(tokens).logits_BSV
    rows = torch.tensor([8, 0, 3])
    some = model(tokens, ctx=Context(rows_R=rows)).logits_BSV
    torch.testing.assert_close(some, every[:, rows], rtol=0, atol=1e-12)


@torch.no_grad()
def test_a_copied_page_continues_on_its_own():
    model, tokens = build(), torch.randint(61, (20,))
    paged = states(model, 5)

    def run(tokens, start: int, pages: list[int]):
        where = Segment(start, len(tokens), dict.fromkeys((0, 11), pages))
        return model(tokens[None], ctx=Context(cache=PagedCache(paged, [where]))).logits_BSV

    run(tokens[:18], 0, [0, 1])
    for state in paged:
        state.copy_page(1, 4)
    run(torch.randint(61, (2,)), 18, [0, 4])
    logits = run(tokens[18:], 18, [0, 1])
    whole = model(tokens[None]).logits_BSV[:, 18:]
    torch.testing.assert_close(logits, whole, rtol=0, atol=1e-12)


def test_bytes_of_the_pages():
    model = build()
    M, d = 2, 8
    assert [state.bytes for state in states(model, 5)] == [5 * PAGE * M * d * 2 * 8] * 3
