"""Options of the inference engine; no part of the tree that a run is trained with."""

from dataclasses import dataclass

from headway.config.bounds import at_least
from headway.config.errors import UsageError


@dataclass(frozen=True)
class EngineConfig:
    """What an engine may run at once, and what it keeps."""

    max_len: int = 0
    """Most tokens of a request, prompt and reply; 0: the model's context."""
    max_requests: int = 64
    """Most replies that are written at once; further ones wait."""
    max_batch_tokens: int = 512
    """Most tokens of one step: those of running replies, then chunks of prompts. Above
    max_requests."""
    cache_tokens: int = 0
    """Tokens whose keys and values are kept, and most of one request; 0: for all requests, in at
    most 1 GiB."""
    return_routes: bool = False
    """Keep the chosen experts of each token and their gates, for requests that ask for them."""

    def check(self) -> None:
        """Raise UsageError for a number out of its range."""
        at_least(0, "", vars(self), "max_len cache_tokens")
        at_least(1, "", vars(self), "max_requests")
        if self.max_batch_tokens <= self.max_requests:
            raise UsageError(
                f"max_batch_tokens={self.max_batch_tokens} must be above "
                f"max_requests={self.max_requests}, one token for each; "
                f"use {self.max_requests + 256}"
            )
