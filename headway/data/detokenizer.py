"""Text of a reply as its tokens come: complete characters, ended by stop texts."""

from collections.abc import Sequence

from headway.data.tokenizer import Tokenizer


class Detokenizer:
    """The text of one choice. What `add` and `finish` return joins to the whole text, however the
    tokens divide it; the time of a token does not grow with the text.

    Held back are an unfinished character, and the end of the text as long as it may become a stop
    text. The stop text that ends first wins, the longest of those that end together."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompt: Sequence[int] = (),
        *,
        stop: Sequence[str] = (),
        include_stop: bool = False,
        min_tokens: int = 0,
        skip_special_tokens: bool = True,
    ) -> None:
        """Args: prompt: the ids that the reply continues. The others are those of
        `serve.params.SamplingParams`."""
        self._stream = tokenizer.decode_stream(skip_special_tokens, prompt)
        self._stops = [_Stop(text) for text in stop]
        self._include_stop, self._n_unsearched = include_stop, min_tokens
        self._held = ""
        self.stop_text: str | None = None
        """The stop text that ended the reply."""

    @property
    def stopped(self) -> bool:
        """Whether a stop text ended the reply."""
        return self.stop_text is not None

    def add(self, token: int) -> str:
        """Return the text that a token adds, so far as it is final. Text of the first `min_tokens`
        tokens is no part of a stop text."""
        if self.stopped:
            return ""
        text = self._stream.step(token)
        if self._n_unsearched > 0:
            self._n_unsearched -= 1
            return text
        return self._search(text)

    def finish(self) -> str:
        """Return the text that was held back, at the end of the reply."""
        if self.stopped:
            return ""
        text = self._search(self._stream.finish())
        rest, self._held = ("" if self.stopped else self._held), ""
        return text + rest

    def _search(self, text: str) -> str:
        """Return the text before the first stop text, without what may become one."""
        text, n_before = self._held + text, len(self._held)
        end, n_held = len(text), 0
        if self._stops:
            for i in range(n_before, len(text)):
                ended = [stop for stop in self._stops if stop.ends(text[i])]
                if ended:
                    stop = max(ended, key=lambda stop: len(stop.text))
                    self.stop_text = stop.text
                    end = i + 1 - (0 if self._include_stop else len(stop.text))
                    break
            else:
                n_held = max(stop.n_matched for stop in self._stops)
        self._held = text[end - n_held : end] if n_held else ""
        return text[: end - n_held]


class _Stop:
    """A search for one text, a character at a time (Knuth, Morris, Pratt 1977)."""

    def __init__(self, text: str) -> None:
        self.text, self.n_matched = text, 0
        # Of each beginning of the text, the longest shorter beginning that it ends with.
        self._shorter = [0] * len(text)
        for i in range(1, len(text)):
            n = self._shorter[i - 1]
            while n and text[i] != text[n]:
                n = self._shorter[n - 1]
            self._shorter[i] = n + (text[i] == text[n])

    def ends(self, char: str) -> bool:
        """Take the next character; say whether the text ends with it."""
        n = self.n_matched
        while n and self.text[n] != char:
            n = self._shorter[n - 1]
        self.n_matched = n + (self.text[n] == char)
        return self.n_matched == len(self.text)
