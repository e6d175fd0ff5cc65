"""Sampling: text from a model, one token at a time, with a cache and its own random generator."""

from collections.abc import Callable

import torch
from torch import Tensor

from headway.config import UsageError
from headway.data.tokenizer import Tokenizer
from headway.model.context import Context
from headway.model.dispatch import LOCAL, TokenDispatcher
from headway.model.transformer import Transformer
from headway.parallel.fsdp import reshard


def check_sampling(temperature: float, top_k: int, top_p: float) -> None:
    """Raise `UsageError` for settings that leave no token to draw."""
    if not 0 <= temperature < float("inf"):
        raise UsageError(f"temperature={temperature} must be 0 (greedy) or more; try 0.8")
    if top_k < 0:
        raise UsageError(f"top_k={top_k} is below 0; 0 keeps all tokens")
    if not 0 < top_p <= 1:
        raise UsageError(f"top_p={top_p} is outside 0 < top_p ≤ 1; 1 keeps all tokens")


def probabilities(logits_V: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Return the distribution that a token is drawn from, float32 `[V]`: softmax(logits /
    temperature) of the candidates, renormalised, and 0 for the other tokens.

    `top_k` selects the k most likely tokens (0: all). `top_p` then selects the smallest set whose
    probability reaches p (nucleus sampling, arXiv 1904.09751 §3.1), at least one token. At
    temperature 0 the most likely token has probability 1. Ties go to the lowest index."""
    check_sampling(temperature, top_k, top_p)
    if temperature == 0:
        return torch.nn.functional.one_hot(logits_V.argmax(), logits_V.numel()).float()
    scaled = logits_V.float() / temperature
    values, order = scaled.sort(descending=True, stable=True)
    p_V = torch.softmax(values, dim=-1)
    if 0 < top_k < p_V.numel():
        p_V[top_k:] = 0
        p_V /= p_V.sum()
    if top_p < 1:
        before = p_V.cumsum(-1) - p_V
        p_V[1:][before[1:] >= top_p] = 0
        p_V /= p_V.sum()
    return torch.zeros_like(p_V).scatter_(0, order, p_V)


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    max_tokens: int,
    temperature: float = 0.8,
    top_k: int = 0,
    top_p: float = 1.0,
    seed: int = 0,
    on_token: Callable[[str], None] | None = None,
    dispatcher: TokenDispatcher = LOCAL,
) -> str:
    """Return the continuation of `prompt`, without it: at most `max_tokens` tokens, fewer when the
    document ends. An empty prompt starts a document.

    The same seed gives the same text; the global random number generator is not used. `on_token`
    gets each part of the text once its characters are complete, for which it may take several
    tokens. Collective on a mesh: all ranks return the same text."""
    check_sampling(temperature, top_k, top_p)
    device = model.device
    ids = [int(i) for i in tokenizer.encode(prompt)] or [tokenizer.eos]
    generator = torch.Generator().manual_seed(seed)
    was_training = model.training
    model.eval()
    try:
        cache = model.init_cache(1, len(ids) + max_tokens)
        ctx = Context(cache=cache, dispatcher=dispatcher, last_only=True)
        new: list[int] = []
        stream, shown = tokenizer.decode_stream(), 0
        following = torch.tensor([ids], device=device)
        for _ in range(max_tokens):
            with torch.no_grad():
                logits_V = model(following, ctx=ctx).logits_BSV[0, 0]
            # no padded ids
            logits_V = dispatcher.broadcast(logits_V)[: tokenizer.vocab_size].cpu()
            drawn = probabilities(logits_V, temperature, top_k, top_p)
            token = int(torch.multinomial(drawn, 1, generator=generator))
            if token == tokenizer.eos:
                break
            new.append(token)
            following = torch.tensor([[token]], device=device)
            if on_token is not None and (piece := stream.step(token)):
                on_token(piece)
                shown += len(piece)
        text = tokenizer.decode(new)
        if on_token is not None and len(text) > shown:
            on_token(text[shown:])  # an incomplete character
        return text
    finally:
        reshard(model)
        model.train(was_training)
