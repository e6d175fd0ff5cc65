"""The residual stream: how branches read it and write to it. A slot of every block."""

from collections.abc import Sequence

from torch import Tensor, nn

from headway.model.costs import Cost, Workload


class Residual(nn.Module):
    """The plain residual connection r + branch(r).

    A subclass may keep several lanes, `r [B, S, lanes, D]`, and parameters of its own (with
    `roles`): the model calls `expand` once after the embedding and `reduce` once before the last
    norm; every branch of a block has an instance of its own for `read` and `write`."""

    def expand(self, x_BSD: Tensor) -> Tensor:
        """Make the stream of the embeddings. Reads no matrix: FSDP gathers those per block."""
        return x_BSD

    def read(self, r: Tensor) -> Tensor:
        """Return the input of a branch, `[B, S, D]`."""
        return r

    def write(self, r: Tensor, y_BSD: Tensor) -> Tensor:
        """Return the stream after a branch that gave `y_BSD`."""
        return r + y_BSD

    def reduce(self, r: Tensor) -> Tensor:
        """Reduce the stream to `[B, S, D]`, without a matrix as `expand`."""
        return r

    def costs(self, work: Workload) -> Sequence[Cost]:
        """Name the parameters of a subclass that has some; the plain connection has none."""
        return ()
