"""Decoding passes that are captured once and replayed: the same kernels on the same weights,
without the modules' Python between them (`kernels/capture.py`)."""

from collections.abc import Sequence

import torch

from headway.kernels.capture import Capture
from headway.model.context import Context
from headway.model.paged import PagedPositions, Segment
from headway.model.transformer import Output, Transformer

MAX_ROWS = 16
"""Sequences of a pass that is worth a capture: beside the work of more, Python takes no time."""


class DecodeGraph:
    """One token of each of T sequences.

    Args:
        tokens: T of them.
        positions: theirs, with room for the pages of any sequence; `ctx` has the rest.
    Raises: CannotCapture where the model reads values."""

    def __init__(
        self, model: Transformer, tokens: Sequence[int], positions: PagedPositions, ctx: Context
    ):
        self._tokens, self._positions = torch.tensor([tokens]), positions
        with Capture() as self._capture:
            self.output: Output = model(self._tokens, ctx=ctx)

    def run(self, tokens: Sequence[int], segments: Sequence[Segment]) -> Output:
        """Run the pass for other tokens; its output holds until the next."""
        self._tokens.numpy()[0] = tokens
        self._positions.rewrite(segments)
        self._capture.replay()
        return self.output
