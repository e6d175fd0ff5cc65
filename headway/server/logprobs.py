"""Log-probabilities in the two dialects of OpenAI: lists beside each other for completions, an
object per token for chat. A token and its alternatives carry the same float32 numbers that the
engine took from one log-softmax, so that `==` finds the greedy token."""

from collections.abc import Sequence

from headway.data.tokenizer import Tokenizer
from headway.serve.sampling import TokenLogprob
from headway.server.fields import Json

LOWEST = -9999.0
"""What JSON gets for −∞, as vLLM writes it."""


class TokenTexts:
    """How tokens are written in replies: their text, the name of a special one, and `bytes:\\xe2`
    for bytes that are no text alone."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self._names = {i: name for name, i in tokenizer.special_tokens.items()}

    def bytes(self, token: int) -> bytes:
        """Return the bytes of text that a token stands for."""
        return self.tokenizer.token_texts[token]

    def text(self, token: int) -> str:
        """Return a token as it is written."""
        raw = self.bytes(token)
        if not raw:
            return self._names.get(token, "")
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in raw)


class TextOffsets:
    """Where the tokens of a text start, in characters, as they come. A token that is part of a
    character starts where that character does."""

    def __init__(self, texts: TokenTexts, skip_special_tokens: bool) -> None:
        self._decoder, self._end = texts.tokenizer.decode_stream(skip_special_tokens), 0

    def add(self, token: int) -> int:
        """Return where the next token starts."""
        start = self._end
        self._end += len(self._decoder.step(token))
        return start


def completion_logprobs(
    scored: Sequence[TokenLogprob | int], texts: TokenTexts, offsets: TextOffsets
) -> Json:
    """Return the `logprobs` of a completion. The first token of a prompt, which nothing predicts,
    comes as its id."""
    tokens = [entry if isinstance(entry, int) else entry.token for entry in scored]
    known = [None if isinstance(entry, int) else entry for entry in scored]
    return {
        "tokens": [texts.text(token) for token in tokens],
        "token_logprobs": [entry and _number(entry.logprob) for entry in known],
        "top_logprobs": [entry and _top(entry, texts) for entry in known],
        "text_offset": [offsets.add(token) for token in tokens],
    }


def chat_logprobs(scored: Sequence[TokenLogprob], texts: TokenTexts) -> Json:
    """Return the `logprobs` of a chat reply."""

    def one(token: int, logprob: float) -> dict[str, Json]:
        raw = list(texts.bytes(token))
        return {"token": texts.text(token), "logprob": _number(logprob), "bytes": raw}

    return {
        "content": [
            {**one(s.token, s.logprob), "top_logprobs": [one(*pair) for pair in s.top]}
            for s in scored
        ],
        "refusal": None,
    }


def _top(entry: TokenLogprob, texts: TokenTexts) -> dict[str, float]:
    """Return the likeliest tokens and the one that is there, by their texts; by their id where
    another token has that text."""
    table: dict[str, float] = {}
    written: set[int] = set()
    for token, logprob in (*entry.top, (entry.token, entry.logprob)):
        if token not in written:
            text = texts.text(token)
            table[f"token_id:{token}" if text in table else text] = _number(logprob)
            written.add(token)
    return table


def _number(logprob: float) -> float:
    return max(logprob, LOWEST)
