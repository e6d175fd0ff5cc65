"""A request, and the sequences that answer it."""

from dataclasses import dataclass, field
from typing import NamedTuple

from headway.data.detokenizer import Detokenizer
from headway.model.paged import PAGE
from headway.serve.blocks import Table, page_keys
from headway.serve.params import SamplingParams
from headway.serve.routes import Routes, joined_routes
from headway.serve.sampling import Row, TokenLogprob


class Update(NamedTuple):
    """What one step adds to one choice of a request."""

    request: "Request"
    choice: int
    tokens: tuple[int, ...]
    text: str
    """Text that is final: what may still become part of a stop string is held back."""
    logprobs: tuple[TokenLogprob, ...]
    """One per token, where the request asks for them."""
    finish_reason: str | None = None
    """`stop`, `length` or `abort` with the last update of a choice."""
    stop_reason: int | str | None = None
    """The stop string or stop token that ended it; None at an end of text."""
    routes: Routes | None = None
    """Where the request asks for them: those of the tokens that were read since the update before,
    with the first those of the prompt. The last token of a reply is never read."""


class Completion(NamedTuple):
    """One choice of a request, complete."""

    text: str
    tokens: list[int]
    """The end of text included, where the model wrote it."""
    logprobs: list[TokenLogprob]
    finish_reason: str
    stop_reason: int | str | None
    routes: Routes | None
    """Of every token of prompt and reply but the last, where they were asked for."""


def joined(parts: list[Update]) -> Completion:
    """Join the updates of a choice that has ended."""
    last = parts[-1]
    assert last.finish_reason is not None
    tokens = [token for part in parts for token in part.tokens]
    logprobs = [logprob for part in parts for logprob in part.logprobs]
    text = "".join(part.text for part in parts)
    routes = [part.routes for part in parts if part.routes is not None]
    return Completion(
        text,
        tokens,
        logprobs,
        last.finish_reason,
        last.stop_reason,
        joined_routes(routes) if routes else None,
    )


@dataclass(eq=False)
class Request:
    """A prompt with its parameters. `eq=False`: a request equals only itself."""

    id: str
    prompt: list[int]
    params: SamplingParams
    seed: int
    """`params.seed`, or a random one."""
    salt: str
    n_cached: int = -1
    """Tokens of the prompt whose pages were in the cache when it was first admitted; −1 before."""
    prompt_logprobs: list[TokenLogprob | None] = field(default_factory=list)
    """One per token of the prompt where `params.prompt_logprobs` asks; None for the first, and
    before `params.prompt_logprobs_start`."""


@dataclass(eq=False)
class Sequence:
    """One choice of a request: its tokens, and the pages that hold their keys and values."""

    request: Request
    row: Row
    """What sampling reads: choice, seed, the reply so far."""
    detokenizer: Detokenizer
    tables: dict[int, Table] = field(default_factory=dict)
    """Its pages by the window of the layers, while it runs."""
    n_computed: int = 0
    """Tokens whose keys and values are in the pages."""
    n_told: int = 0
    """Tokens whose routes were returned."""

    def __post_init__(self) -> None:
        self.tokens = [*self.request.prompt, *self.row.output]
        """Prompt and reply."""
        self._keys: list[bytes] = []

    def append(self, token: int) -> None:
        """Add a token to the reply."""
        self.tokens.append(token)
        self.row.output.append(token)
        if self.row.matcher is not None:
            self.row.matcher.accept(token)

    @property
    def n_new(self) -> int:
        """Return how many tokens are yet to be computed; 1 in decoding."""
        return len(self.tokens) - self.n_computed

    @property
    def scores_prompt(self) -> bool:
        """Return whether log-probabilities of the prompt are wanted and not all there yet."""
        return self.request.params.prompt_logprobs >= 0 and not self.row.output

    @property
    def n_without_logits(self) -> int:
        """Return how many of its first tokens may come from the cache: those whose logits nobody
        asks for."""
        n = len(self.tokens) - 1
        if self.scores_prompt:
            n = min(n, max(self.request.params.prompt_logprobs_start - 1, 0))
        return n

    def keys(self, n_tokens: int) -> list[bytes]:
        """Return the keys of the full pages of the first `n_tokens`; each is computed once."""
        if len(self._keys) < n_tokens // PAGE:
            self._keys = page_keys(self.tokens, self.request.salt, self._keys)
        return self._keys[: n_tokens // PAGE]
