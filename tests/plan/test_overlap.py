"""Overlap by hand: two resources, and the order of `model.moe.SparseLayer.forward`."""

from dataclasses import replace

import pytest
import torch

from headway.model.context import Context
from headway.model.dispatch import Completed
from headway.model.layers import MultiHeadLatentMoE
from headway.plan.overlap import (
    NOTHING,
    Layer,
    LayerExchange,
    Message,
    Start,
    Wait,
    Work,
    exposed,
    program,
    reverse,
)

FREE = Message("ep", 0.0)
HEADS = ("scatter", "gather")
EXPERTS = ("dispatch", "combine")


def layer(*kinds, split=0.0, router=0.0, shared=0.0, experts=0.0, merge=0.0, early=False):
    """Backward as long as forward, so that both directions are alike."""
    stages = (Work(x, x) for x in (split, router, shared, experts, merge))
    return Layer(*stages, early, dict.fromkeys(kinds, LayerExchange(FREE, FREE)))


def beyond(stages, chunks, seconds, *, counts=None, **message):
    sent = dict.fromkeys(stages.exchanges, Message("ep", seconds, **message))
    sent |= {"counts": counts} if counts else {}
    return exposed(with_messages(stages, sent), chunks)["ep"]


def with_messages(stages, sent):
    return replace(stages, exchanges={kind: LayerExchange(m, m) for kind, m in sent.items()})


def test_one_chunk_hides_nothing():
    stages = layer("dispatch", "combine", router=1.0, experts=5.0)
    assert beyond(stages, 1, 3.0) == pytest.approx(4 * 3.0)


def test_a_shared_expert_hides_a_dispatch_in_both_directions():
    stages = layer("dispatch", "combine", experts=5.0, shared=2.0)
    assert beyond(stages, 1, 3.0) == pytest.approx(4 * 3.0 - 2 * 2.0)
    stages = layer("dispatch", "combine", experts=5.0, shared=20.0)
    assert beyond(stages, 1, 3.0) == pytest.approx(2 * 3.0)


def test_two_chunks_of_an_exchange_that_takes_all_time():
    """d1 | d2 beside e1 | b1 beside e2 | b2: the network never rests, so of 4 exchanges of 10 each
    only the experts' 2 × 1 are hidden; backward too."""
    stages = layer("dispatch", "combine", experts=2.0)
    assert beyond(stages, 2, 10.0) == pytest.approx(2 * (4 * 10.0 - 2.0))


def test_two_chunks_beside_much_work():
    """The first dispatch and the last combine stay: nothing is there to compute."""
    stages = layer("dispatch", "combine", experts=20.0)
    assert beyond(stages, 2, 3.0) == pytest.approx(2 * (3.0 + 3.0))


def test_counts_wait_behind_what_travels():
    """In forward the second counts (1) cannot leave before the first dispatch (10) is there; the
    first are waited for as well."""
    stages = layer("dispatch", "combine", experts=2.0)
    without = beyond(stages, 2, 10.0)
    waited = beyond(stages, 2, 10.0, counts=Message("ep", 1.0))
    # c | d1 | c | d2 beside e1 | b1 beside e2 | b2
    assert waited == pytest.approx(without + 2 * 1.0)


def test_two_at_once_share_the_network():
    """At 0.6 each, two exchanges of 3 take 5 in place of 6."""
    stages = layer("dispatch", "combine")
    assert beyond(stages, 2, 3.0, concurrent_speed=0.6) == pytest.approx(2 * 2 * 5.0)
    assert beyond(stages, 2, 3.0) == pytest.approx(2 * 2 * 6.0)


def test_who_moves_bytes_computes_less():
    """While a dispatch of 4 is under way, half of the processor is left: of 4 · ½ hidden, the same
    is lost."""
    stages = layer("dispatch", "combine", shared=2.0)
    assert beyond(stages, 1, 4.0) == pytest.approx(4 * 4.0 - 2 * 2.0)
    assert beyond(stages, 1, 4.0, share=0.5) == pytest.approx(4 * 4.0 - 2 * 2.0)
    stages = layer("dispatch", "combine", shared=20.0)
    assert beyond(stages, 1, 4.0) == pytest.approx(2 * 4.0)
    assert beyond(stages, 1, 4.0, share=0.5) == pytest.approx(2 * (4.0 + 2.0))
    assert beyond(stages, 1, 4.0, share=1.0) == pytest.approx(2 * (4.0 + 4.0))


def test_heads_around_experts():
    """Head Parallel and Expert Parallel: each axis has its own part."""
    stages = layer("scatter", "dispatch", "combine", "gather", experts=1.0)
    sent = {kind: Message("ep", 3.0) for kind in ("dispatch", "combine")}
    sent |= {kind: Message("hp", 2.0) for kind in ("scatter", "gather")}
    waited = exposed(with_messages(stages, sent), 1)
    assert dict(waited) == {"hp": pytest.approx(8.0), "ep": pytest.approx(12.0)}


def test_the_program_of_heads():
    stages = layer("scatter", "gather", split=2.0, experts=8.0, router=4.0)
    ops = [op for op in program(stages, 2) if op != NOTHING]
    assert ops == [
        Work(1.0, 1.0),
        Start("scatter", 0),
        Work(1.0, 1.0),
        Start("scatter", 1),
        Wait("scatter", 0),
        Work(2.0, 2.0),
        Work(4.0, 4.0),
        Start("gather", 0),
        Wait("scatter", 1),
        Work(2.0, 2.0),
        Work(4.0, 4.0),
        Start("gather", 1),
        Wait("gather", 0),
        Wait("gather", 1),
    ]
    back = [op for op in reverse(ops) if isinstance(op, Start | Wait)]
    assert back[:3] == [Start("gather", 1), Start("gather", 0), Wait("gather", 1)]
    ops = program(layer("counts", "dispatch", "combine"), 1)
    assert ops.index(Start("counts", 0)) + 1 == ops.index(Wait("counts", 0))
    assert not any(op.kind == "counts" for op in reverse(ops) if isinstance(op, Start | Wait))


class Away(torch.autograd.Function):
    """Writes down that a chunk leaves; in backward, that its gradient is waited for."""

    @staticmethod
    def forward(ctx, x, log, *which):
        ctx.log, ctx.which = log, which
        log.append(Start(*which))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.log.append(Wait(*ctx.which))
        return grad, None, None, None


class Home(torch.autograd.Function):
    """The other end."""

    @staticmethod
    def forward(ctx, x, log, *which):
        ctx.log, ctx.which = log, which
        log.append(Wait(*which))
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.log.append(Start(*ctx.which))
        return grad, None, None, None


class Under:
    def __init__(self, x, log, kind, chunk, *rest):
        self.which, self.log, self.rest = (kind, chunk), log, rest
        self.x = Away.apply(x, log, *self.which)

    def wait(self):
        x = Home.apply(self.x, self.log, *self.which)
        return (x, *self.rest) if self.rest else x


class Recorder:
    """Ranks of one process, where what would travel is written down."""

    def __init__(self, kinds, n_chunks):
        self.kinds, self.n_chunks, self.log = kinds, n_chunks, []

    def chunks(self, x_TD, unit):
        return x_TD.chunk(self.n_chunks)

    def _travel(self, x, kind, *rest):
        if kind not in self.kinds:
            return Completed((x, *rest) if rest else x)
        return Under(
            x, self.log, kind, sum(op.kind == kind for op in self.log if starts(op)), *rest
        )

    def scatter(self, z_THL, route):
        return self._travel(z_THL, "scatter", route)

    def dispatch(self, z_THL, route, n_experts):
        return self._travel(z_THL, "dispatch", route, None)

    def combine(self, y_THL, trip):
        return self._travel(y_THL, "combine")

    def gather(self, y_THL):
        return self._travel(y_THL, "gather")


def starts(op):
    return isinstance(op, Start)


@pytest.mark.parametrize("chunks", [1, 2, 3])
@pytest.mark.parametrize("kinds", [HEADS, EXPERTS, HEADS + EXPERTS], ids=str)
def test_the_program_is_that_of_the_layer(kinds, chunks):
    """In the order in which the layer itself starts and waits, forward and backward."""
    torch.manual_seed(0)
    moe = MultiHeadLatentMoE(8, 2, 4, 2, 8, d_shared=8)
    ranks = Recorder(kinds, chunks)
    y_TD, _ = moe(torch.randn(6, 8, requires_grad=True), Context(dispatcher=ranks))
    ops = program(layer(*kinds), chunks)
    assert ranks.log == [op for op in ops if isinstance(op, Start | Wait)]
    ranks.log.clear()
    y_TD.sum().backward()
    assert ranks.log == [op for op in reverse(ops) if isinstance(op, Start | Wait)]
