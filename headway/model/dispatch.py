"""What a sparse layer asks of the processes it is spread over, and how its chunks take turns.

T tokens · D model width · H heads · L width of one head.
"""

from collections.abc import Generator, Sequence
from typing import Any, Generic, Protocol, TypeAlias, TypeVar

from torch import Tensor

from headway.model.router import Route

Arrived = TypeVar("Arrived", covariant=True)
Result = TypeVar("Result")
T = TypeVar("T")


class Future(Protocol[Arrived]):
    """Something on its way."""

    def wait(self) -> Arrived:
        """It, once it is here."""
        ...


class Completed(Generic[T]):
    """Something that is here already, for the places where nothing has to travel."""

    def __init__(self, value: T) -> None:
        self.value = value

    def wait(self) -> T:
        """The value."""
        return self.value


Steps: TypeAlias = Generator[Future[Any], Any, Result]
"""A computation that yields what it starts and is sent what has arrived."""


class ChunkTask(Generic[Result]):
    """Steps that pause where something travels, so that other chunks compute meanwhile.

    They begin at once, up to the first departure; every `go_on` is one leg further.
    """

    def __init__(self, steps: Steps[Result]) -> None:
        self.steps, self.over = steps, False
        self._send(None)

    def go_on(self) -> None:
        """Takes in what is on its way, and goes on until something else is."""
        self._send(self.arriving.wait())

    def _send(self, arrived: Any) -> None:
        try:
            self.arriving = self.steps.send(arrived)
            while isinstance(self.arriving, Completed):
                self.arriving = self.steps.send(self.arriving.wait())
        except StopIteration as end:
            self.over, self.result = True, end.value


def run_interleaved(journeys: Sequence[ChunkTask[Result]]) -> list[Result]:
    """Leg after leg, each journey in its turn: what one has sent travels while the others compute.

    All of them have equally many legs.
    """
    while not journeys[0].over:
        for journey in journeys:
            journey.go_on()
    return [journey.result for journey in journeys]


class TokenDispatcher(Protocol):
    """Exchanges the tokens of a sparse layer with other processes;
    `parallel.dispatcher.MeshDispatcher` implements it."""

    def at(self, layer: int) -> "TokenDispatcher":
        """The same for one layer of a model, under whose number its traffic is counted."""
        ...

    def chunks(self, x_TD: Tensor, unit: int) -> Sequence[Tensor]:
        """The pieces that follow one another through the layer, of whole units of `unit` tokens."""
        ...

    def scatter(self, z_THL: Tensor, route: Route | None) -> Future[tuple[Tensor, Route | None]]:
        """Sub-tokens to the processes of their heads."""
        ...

    def dispatch(
        self, z_THL: Tensor, route: Route, n_experts: int
    ) -> Future[tuple[Tensor, Route, Any]]:
        """Sub-tokens to the processes of their experts; with them the way back."""
        ...

    def combine(self, y_THL: Tensor, trip: Any) -> Future[Tensor]:
        """The inverse of `dispatch`, summed over experts."""
        ...

    def gather(self, y_THL: Tensor) -> Future[Tensor]:
        """The inverse of `scatter`."""
        ...

    def broadcast(self, x: Tensor) -> Tensor:
        """One process's values for all."""
        ...
