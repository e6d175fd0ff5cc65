"""How a sparse layer exchanges tokens with other processes, and how its chunks take turns.

T tokens · D model width · H heads · L width of one head.

A chunk's way through the layer is a generator that yields a `Future` at each exchange. With two
chunks on a Head Parallel mesh the exchange of one overlaps the computation of the other:

    chunk 0   split │scatter│ route, experts │gather │ merge
    chunk 1         │ split │scatter         │ route, experts │gather│ merge"""

from collections.abc import Generator, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from torch import Tensor

from headway.model.router import Route

Result = TypeVar("Result", covariant=True)
T = TypeVar("T")


class Future(Protocol[Result]):
    """The result of an exchange that has been issued."""

    def wait(self) -> Result:
        """Block until the exchange is complete and return its result."""
        ...


class Completed(Generic[T]):
    """A future whose result is here, for exchanges with nobody."""

    def __init__(self, value: T) -> None:
        self.value = value

    def wait(self) -> T:
        return self.value


class Finished(Completed[T]):
    """The last thing that `Steps` yield: their result. (PyTorch does not compile the value of a
    generator's `return`.)"""


Steps: TypeAlias = Generator[Future[Any], Any, None]
"""A computation that yields a future at each exchange, is sent its result, and ends with
`Finished`."""


class ChunkTask:
    """The computation of one chunk, advanced from exchange to exchange.

    `start` runs it up to the first exchange that is not complete, `resume` to the next."""

    def __init__(self, steps: Steps) -> None:
        self.steps, self.done = steps, False

    def start(self) -> "ChunkTask":
        self._send(None)
        return self

    def resume(self) -> None:
        """Wait for the pending exchange, and compute until another one is pending."""
        self._send(self.pending.wait())

    def _send(self, received: Any) -> None:
        self.pending = self.steps.send(received)
        while type(self.pending) is Completed:
            self.pending = self.steps.send(self.pending.value)
        self.done = isinstance(self.pending, Finished)


def run_interleaved(tasks: Sequence[ChunkTask]) -> list[Any]:
    """Resume the started tasks in turn until all are done, and return their results: while one
    waits for its exchange the others compute. All have equally many exchanges."""
    while not tasks[0].done:
        for task in tasks:
            task.resume()
    return [task.pending.wait() for task in tasks]


class TokenDispatcher:
    """Exchanges the tokens of sparse layers with other processes. This one is of a single process:
    every exchange is complete, nothing moves. `parallel.dispatcher.MeshDispatcher` is of a mesh."""

    def at(self, layer: int) -> "TokenDispatcher":
        """The same for one layer of a model, under whose number its traffic is counted."""
        return self

    def chunks(self, x_TD: Tensor, unit: int) -> Sequence[Tensor]:
        """Return the chunks that pass through the layer one after another, of whole units of `unit`
        tokens."""
        return (x_TD,)

    def scatter(self, z_THL: Tensor, route: Route | None) -> Future[tuple[Tensor, Route | None]]:
        """Send sub-tokens, and the route that is there already, to the processes of their heads."""
        return Completed((z_THL, route))

    def dispatch(
        self, z_THL: Tensor, route: Route, n_experts: int
    ) -> Future[tuple[Tensor, Route, Any]]:
        """Send sub-tokens to the processes of their experts; the result ends with what `combine`
        needs."""
        return Completed((z_THL, route, None))

    def combine(self, y_THL: Tensor, metadata: Any) -> Future[Tensor]:
        """Invert `dispatch`: return the experts' outputs, summed."""
        return Completed(y_THL)

    def gather(self, y_THL: Tensor, exact: bool = False) -> Future[Tensor]:
        """Invert `scatter`; `exact` for values that no payload dtype may round."""
        return Completed(y_THL)

    def broadcast(self, x: Tensor) -> Tensor:
        """Return the values of one process, on all."""
        return x


LOCAL = TokenDispatcher()
"""Stateless, so that one is enough."""
