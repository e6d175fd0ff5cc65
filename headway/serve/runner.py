"""Runs passes of a model over its pages, in one process or on a mesh.

On a mesh every rank holds all running tokens. Rank 0 schedules and samples; it sends each pass to
the others, who run the same model on the same tokens (`parallel/replicated.py`):

    rank 0      schedule ─ broadcast pass ─ forward ─ sample        schedule ─ broadcast …
    others                          receive ─ forward ─ wait …                    receive …"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from headway.kernels.capture import CannotCapture
from headway.kernels.packed import batch_invariant
from headway.model.build import paged_mixers
from headway.model.context import Context
from headway.model.dispatch import LOCAL, TokenDispatcher
from headway.model.graphs import MAX_ROWS, DecodeGraph
from headway.model.paged import PagedCache, PagedPositions, Segment
from headway.model.transformer import Output, Transformer
from headway.parallel.mesh import Mesh
from headway.parallel.replicated import ReplicatedDispatcher, experts_read
from headway.serve.scheduler import Chunk, Copy


class Pass(NamedTuple):
    """The tokens of one pass, sequence by sequence."""

    tokens: list[int]
    segments: list[Segment]
    rows: list[int]
    """Of which tokens the logits are wanted."""
    copies: list[Copy]
    """Pages to copy before it."""
    routes: bool
    """Whether the chosen experts are wanted."""

    @property
    def decodes(self) -> bool:
        """Whether each sequence has one token, whose logits are wanted in that order."""
        n = len(self.tokens)
        return len(self.segments) == n and self.rows == list(range(n))


class Runner:
    """A model and its pages, in one process; or on every rank of a mesh that runs the same passes
    by itself, with the mesh's `dispatcher`."""

    def __init__(
        self, model: Transformer, dispatcher: TokenDispatcher = LOCAL, mesh: Mesh = Mesh()
    ):
        self.model, self.dispatcher, self.mesh = model, dispatcher, mesh
        self.experts_read: list[int] = [0]
        """How many experts each rank read in the last pass, summed over the sparse layers."""
        self.mixers = paged_mixers(model.blocks())
        self.states: list[Any] = []
        self._longest, self._captures = 0, False
        self._graphs: dict[tuple[int, int, bool], DecodeGraph] = {}

    def allocate(self, n_pages: Mapping[int, int], longest: int) -> None:
        """Make the pages: their number by the window of the layers, and most of a sequence."""
        dtype, device = self.model.dtype, self.model.device
        self.states = [m.init_pages(n_pages[m.window], dtype, device) for m in self.mixers]
        self._longest, self._graphs = longest, {}
        self._captures = self.batch_invariant and self.dispatcher is LOCAL

    @property
    def batch_invariant(self) -> bool:
        """Whether the logits of a token are the same bits whatever shares its pass and however its
        sequence was cut: a packed model on kernels that promise it, and pages that do."""
        model = self.model
        promised = model.is_packed and batch_invariant(model.device, model.dtype)
        return promised and all(state.batch_invariant for state in self.states)

    @torch.no_grad()
    def run(self, work: Pass) -> Output:
        """Run a pass; the logits `[1, R, V]` are equal on all ranks."""
        output = self._run(work)
        self.experts_read = experts_read(self.mesh, self.model.sparse_layers(), output.stats)
        return output

    def _run(self, work: Pass) -> Output:
        for window, source, target in work.copies:
            for mixer, state in zip(self.mixers, self.states, strict=True):
                if mixer.window == window:
                    state.copy_page(source, target)
        ctx = Context(
            cache=PagedCache(self.states, work.segments),
            dispatcher=self.dispatcher,
            report=frozenset({"routes"} if work.routes else ()),
        )
        if self._captures and work.decodes and len(work.tokens) <= MAX_ROWS:
            try:
                return self._replayed(work, ctx)
            except CannotCapture:
                self._captures = False
        device = self.model.device
        ctx = replace(ctx, rows_R=torch.tensor(work.rows, dtype=torch.int64, device=device))
        output = self.model(torch.tensor([work.tokens], device=device), ctx=ctx)
        assert output.logits_BSV is not None
        return output._replace(logits_BSV=self.dispatcher.broadcast(output.logits_BSV))

    def _replayed(self, work: Pass, ctx: Context) -> Output:
        """Run a pass of decoding from its graph, which the first of its shape captures."""
        key = len(work.tokens), torch.get_num_threads(), work.routes
        if graph := self._graphs.get(key):
            return graph.run(work.tokens, work.segments)
        positions = PagedPositions(work.segments, self.model.device, self._longest)
        ctx = replace(ctx, positions=positions)
        graph = self._graphs[key] = DecodeGraph(self.model, work.tokens, positions, ctx)
        return graph.output

    recovers = True
    """Whether further passes can follow one that failed; on a mesh the ranks may differ."""
    idle_after: float | None = None
    """Seconds without a pass after which `idle` is due; None: never."""

    def idle(self) -> None:
        """Tell other processes that this one still is there."""

    def close(self) -> None:
        """End the loops of other processes. Raises RuntimeError where one is gone."""


class MeshRunner(Runner):
    """Rank 0's side is `run`, that of the others `follow`. Every rank has loaded its part of the
    model."""

    recovers = False

    def __init__(self, model: Transformer, mesh: Mesh):
        super().__init__(model, ReplicatedDispatcher(mesh), mesh)
        # a collective that waits for longer than the mesh's timeout fails
        self.idle_after = mesh.config.timeout / 4

    def allocate(self, n_pages: Mapping[int, int], longest: int) -> None:
        super().allocate(*self._send((n_pages, longest)))

    def run(self, work: Pass) -> Output:
        return super().run(self._send(work))

    def idle(self) -> None:
        self._send("idle")

    def close(self) -> None:
        self._send("close")

    def follow(self) -> None:
        """Do what rank 0 does until it closes."""
        while (message := self._send(None)) != "close":
            match message:
                case Pass():
                    super().run(message)
                case n_pages, longest:
                    super().allocate(n_pages, longest)

    def _send(self, message: Any) -> Any:
        """Return rank 0's message, on all ranks."""
        box = [message]
        dist.broadcast_object_list(box, src=0)
        return box[0]


def runner_of(model: Transformer, mesh: Mesh) -> Runner:
    """Return what runs the passes of a model whose part this rank has loaded."""
    return Runner(model) if mesh.size == 1 else MeshRunner(model, mesh)


def pass_of(chunks: Sequence[Chunk], rows: list[int], copies: list[Copy], routes: bool) -> Pass:
    """Return the pass over some chunks."""
    segments = [
        Segment(s.n_computed, n, {window: t.pages for window, t in s.tables.items()})
        for s, n in chunks
    ]
    tokens = [t for s, n in chunks for t in s.tokens[s.n_computed : s.n_computed + n]]
    return Pass(tokens, segments, rows, copies, routes)
