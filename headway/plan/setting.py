"""The inputs of a prediction other than the mesh."""

from dataclasses import dataclass

from headway.config import Config
from headway.model.build import BlockBuilder, build_block
from headway.plan.cost import ModelCosts, model_costs
from headway.plan.layout import AxisName, MeshLayout, auto_chunks
from headway.plan.link import Link, Rates
from headway.plan.machine import Machine
from headway.plan.traffic import payload_bytes


@dataclass(frozen=True)
class Setting:
    """A config, a machine, and how steps run on it."""

    config: Config
    machine: Machine
    per_node: int = 8
    bytes_per_value: int = 2
    chunks: int = 0
    """0: `layout.auto_chunks` chooses for each mesh."""
    imbalance: float = 1.0
    """Permuted tokens of the most loaded rank of an ep axis over the mean."""
    blocks: BlockBuilder = build_block
    """Builds blocks with modules of your own, as in `Transformer`."""

    def costs(self, micro: int) -> ModelCosts:
        """Return the costs of the model with `micro` sequences in a forward pass."""
        dense_masks = not self.machine.cpu_driven
        return model_costs(self.config, micro, self.bytes_per_value, self.blocks, dense_masks)

    @property
    def payload(self) -> int:
        """Return the bytes of a value of the sub-tokens that are sent."""
        return payload_bytes(self.config.mesh, self.bytes_per_value)

    def chunks_on(self, layout: MeshLayout) -> int:
        """Return the chunks of a micro-batch on a mesh."""
        return self.chunks or auto_chunks(layout, self.per_node)[0]

    def imbalance_on(self, layout: MeshLayout) -> float:
        """Return the imbalance on a mesh: 1 without an ep axis."""
        return self.imbalance if layout.ep > 1 else 1.0

    def link(self, layout: MeshLayout, axis: AxisName) -> Link:
        """Return how the ranks of an axis are connected."""
        machine, inside = self.machine, layout.in_one_node(axis, self.per_node)
        within = Rates(machine.intra_node, machine.latency)
        rates = within if inside else Rates(machine.inter_node, machine.latency)
        size, curves = layout.size(axis), machine.curves
        return Link(size, inside, rates, within, curves, machine.cpu_driven)
