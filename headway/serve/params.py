"""What a request asks of the engine, and the check that it can be had."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from headway.config import UsageError

MAX_STOPS, MAX_LOGPROBS = 16, 20


class Matcher(Protocol):
    """The state of a grammar in one choice of a request: which tokens may come next."""

    @property
    def failed(self) -> bool:
        """Whether the text cannot be completed, because the grammar grew over its limits."""
        ...

    def mask(self) -> np.ndarray:
        """Return bool `[V]`: the tokens that may follow, never none. Once the text is complete and
        cannot go on, or has failed, they are the ends of text."""
        ...

    def accept(self, token: int) -> None:
        """Take the token that was drawn."""
        ...


class Grammar(Protocol):
    """A compiled grammar, shared by the choices of a request (`serve/grammar.py`)."""

    def matcher(self) -> Matcher:
        """Return the state at the start of a reply."""
        ...


@dataclass(frozen=True)
class SamplingParams:
    """How a request's tokens are drawn, and when its text ends. Names are vLLM's."""

    max_tokens: int = 16
    """Most tokens of each choice, ≥ 0; 0 reads the prompt alone, for its log-probabilities."""
    min_tokens: int = 0
    """No end of text and no stop token before that many tokens."""
    temperature: float = 1.0
    """Divides the logits; 0 (and below 1e-5) takes the most likely token."""
    top_k: int = 0
    """Draw from the k most likely tokens; 0 from all."""
    top_p: float = 1.0
    """Draw from the smallest set of tokens whose probability reaches p (arXiv 1904.09751 §3.1)."""
    min_p: float = 0.0
    """Draw from tokens of at least p times the highest probability (arXiv 2407.01082)."""
    seed: int | None = None
    """The same seed draws the same tokens, whatever else runs; None: another one per request."""
    n: int = 1
    """Choices per prompt; they differ by their draws."""
    repetition_penalty: float = 1.0
    """Divides positive and multiplies negative logits of tokens of prompt and reply
    (arXiv 1909.05858 §4.1)."""
    presence_penalty: float = 0.0
    """Taken once from the logit of each token of the reply, −2 … 2."""
    frequency_penalty: float = 0.0
    """Taken from the logit of a token for each time it is in the reply, −2 … 2."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs (token, bias) to add to its logit, −100 … 100."""
    allowed_token_ids: tuple[int, ...] = ()
    """The only tokens that may be drawn; () allows all."""
    stop: tuple[str, ...] = ()
    """Texts that end the reply, at most 16."""
    stop_token_ids: tuple[int, ...] = ()
    """Tokens that end the reply, beside the ends of text."""
    include_stop: bool = False
    """Show the stop text that ended the reply."""
    ignore_eos: bool = False
    """Write on after an end of text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    logprobs: int = -1
    """Log-probabilities of the reply: −1 none, 0 of its tokens, up to 20 of the likeliest too."""
    prompt_logprobs: int = -1
    """The same of the prompt."""
    prompt_logprobs_start: int = 0
    """First position of the prompt whose log-probability is wanted; the tokens before the one in
    front of it may come from the cache, while a prompt that is scored from 0 is computed."""
    grammar: Grammar | None = None
    """What the reply must match."""
    return_routes: bool = False
    """Return the chosen experts of each token."""

    def check(self, vocab_size: int, max_len: int, n_prompt: int) -> None:
        """Raise UsageError, one line, for what cannot be had of a model with `vocab_size` tokens
        and a context of `max_len`, after a prompt of `n_prompt` tokens."""
        self.check_values()
        _known("logit_bias", (token for token, _ in self.logit_bias), vocab_size)
        _known("allowed_token_ids", self.allowed_token_ids, vocab_size)
        _known("stop_token_ids", self.stop_token_ids, vocab_size)
        if n_prompt + self.max_tokens > max_len:
            raise UsageError(
                f"a prompt of {n_prompt} tokens and max_tokens={self.max_tokens} do not fit a "
                f"context of {max_len}; shorten the prompt or ask for at most "
                f"{max(max_len - n_prompt, 0)} tokens"
            )

    def check_values(self) -> None:
        """Raise UsageError, one line, for what cannot be had of any model."""
        _within("max_tokens", self.max_tokens, 0, 2**31)
        _within("min_tokens", self.min_tokens, 0, 2**31)
        _within("temperature", self.temperature, 0, 1e30)
        _within("top_k", self.top_k, 0, 2**31)
        if not 0 < self.top_p <= 1:
            raise UsageError(f"top_p={self.top_p} is outside 0 < top_p ≤ 1; 1 keeps all tokens")
        _within("min_p", self.min_p, 0, 1)
        _within("n", self.n, 1, 2**16)
        if self.seed is not None:
            _within("seed", self.seed, -(2**63), 2**63 - 1)
        _within("repetition_penalty", self.repetition_penalty, 0.01, 100)
        _within("presence_penalty", self.presence_penalty, -2, 2)
        _within("frequency_penalty", self.frequency_penalty, -2, 2)
        for token, bias in self.logit_bias:
            _within(f"logit_bias of token {token}", bias, -100, 100)
        _within("logprobs", self.logprobs, -1, MAX_LOGPROBS)
        _within("prompt_logprobs", self.prompt_logprobs, -1, MAX_LOGPROBS)
        _within("prompt_logprobs_start", self.prompt_logprobs_start, 0, 2**31)
        if len(self.stop) > MAX_STOPS:
            raise UsageError(f"stop has {len(self.stop)} texts; give at most {MAX_STOPS}")
        if "" in self.stop:
            raise UsageError("stop has an empty text, which ends every reply; leave it out")
        if self.min_tokens > self.max_tokens:
            raise UsageError(
                f"min_tokens={self.min_tokens} is above max_tokens={self.max_tokens}; raise the "
                "second or lower the first"
            )
        if self.grammar is not None and self.allowed_token_ids:
            raise UsageError(
                f"a grammar and allowed_token_ids={list(self.allowed_token_ids)[:8]} may leave no "
                "token to draw; give one of them"
            )


def _within(name: str, value: float, least: float, most: float) -> None:
    """Raise UsageError for a value that is outside least … most, or NaN."""
    if not least <= value <= most:
        raise UsageError(f"{name}={value} is outside {least} … {most}")


def _known(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    """Raise UsageError for the first token that is outside the vocabulary."""
    for token in tokens:
        if not 0 <= token < vocab_size:
            raise UsageError(
                f"{name} has token {token}, outside the vocabulary of {vocab_size} "
                f"(0 … {vocab_size - 1})"
            )
