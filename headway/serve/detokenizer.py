"""Text from tokens as they are written."""

from headway.data.tokenizer import Tokenizer
from headway.serve.params import SamplingParams


class Detokenizer:
    """The text of one choice; stop strings are not searched yet."""

    def __init__(self, tokenizer: Tokenizer, params: SamplingParams):
        self._stream, self._tokenizer = tokenizer.decode_stream(), tokenizer
        self._tokens: list[int] = []
        self._shown = 0
        self.stopped = ""

    def add(self, token: int) -> str:
        """Return the text that a token completes."""
        self._tokens.append(token)
        text = self._stream.step(token)
        self._shown += len(text)
        return text

    def finish(self) -> str:
        """Return the text of an unfinished character."""
        return self._tokenizer.decode(self._tokens)[self._shown :]
