"""Rates of one rank of a cluster: public numbers of vendors, assumptions, or measurements.

Rates are per rank and in one direction. A number is `vendor` (a data sheet), `assumed` (nobody
measured it) or `measured` (`headway doctor --measure FILE` on the machine itself)."""

import json
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Literal

from headway.config import UsageError
from headway.plan.link import Curve, parse_curve

Origin = Literal["vendor", "assumed", "measured", "given"]
Kind = Literal["matmul", "experts", "attention"]
"""The kind of a computation."""


@dataclass(frozen=True)
class Machine:
    """One rank: its FLOP/s, its memory, and its share of the network."""

    name: str
    peak: float
    """FLOP/s of dense bfloat16 matmuls."""
    peak_float32: float
    """FLOP/s of float32 matmuls, without TF32, as PyTorch runs them."""
    memory: float
    """Bytes that a rank may fill."""
    memory_bandwidth: float
    """Bytes/s, read and written bytes together."""
    intra_node: float
    """Bytes/s that a rank sends to others of its node."""
    inter_node: float
    """Bytes/s that a rank sends to other nodes."""
    latency: float
    """Seconds per message of a collective, whatever its size."""
    efficiency: float = 0.6
    """Share of the peak that matmuls of a model of D ≥ 1024 reach."""
    narrow_efficiency: float = 0.3
    """Share of the peak that matmuls reach where D < 1024."""
    experts_efficiency: float = 0.4
    """Share of the peak that the experts reach, forward and backward."""
    attention_efficiency: float = 0.4
    """Share of the peak that attention reaches, forward and backward, on causal pairs."""
    rows_efficiency: float = 0.5
    """Share of the memory's bandwidth at which permuted tokens are gathered, weighted and summed
    around an exchange, forward and backward."""
    origin: dict[str, Origin] = field(default_factory=dict)
    """Field → where its number comes from; see `origin_of`."""
    dtype: Literal["", "float32", "bfloat16"] = ""
    """Dtype of the measured matmuls; empty where nothing was measured."""
    curves: tuple[Curve, ...] = ()
    """Measured collectives; they take precedence over bandwidth and latency."""
    cpu_driven: bool = False
    """Whether the processor that computes also moves the bytes of an exchange: gloo on CPUs. On
    GPUs copy engines and network cards do."""
    oversubscription: float = 1.0
    """Ranks per core where ranks share cores, as emulated hosts do; else 1."""

    def origin_of(self, name: str) -> Origin:
        """Return where a number comes from."""
        return self.origin.get(name, "assumed" if name in _ASSUMED else "vendor")

    def rate(self, kind: Kind, bytes_per_value: int, d_model: int) -> float:
        """Return the achieved FLOP/s: the peak of the dtype times the share of it."""
        share = {
            "matmul": self.efficiency if d_model >= WIDE else self.narrow_efficiency,
            "experts": self.experts_efficiency,
            "attention": self.attention_efficiency,
        }[kind]
        return share * self.peak_of(bytes_per_value)

    def uneven(self, imbalance: float) -> float:
        """Return the slowdown of the most loaded rank's experts; with oversubscribed cores idle
        ranks free theirs."""
        return max(imbalance / self.oversubscription, 1.0)

    def peak_of(self, bytes_per_value: int) -> float:
        """Return the peak FLOP/s of matmuls in bfloat16 (2 bytes per value) or float32 (4)."""
        return self.peak if bytes_per_value == 2 else self.peak_float32


WIDE = 1024
"""Width D from which matmuls count as large."""
NUMBERS = tuple(f.name for f in fields(Machine) if f.type is float and f.name != "oversubscription")
"""The fields that a machine file may hold."""
_ASSUMED = ("latency", *(name for name in NUMBERS if name.endswith("efficiency")))

_NDR = 50e9  # 400 Gbit/s InfiniBand NDR, one port per GPU as in DGX H100, in bytes/s

MACHINES: dict[str, Machine] = {
    # name, peak, peak_float32, memory, memory_bandwidth, intra_node, inter_node, latency
    # NVIDIA H100 data sheet, SXM: 989 TFLOP/s bfloat16 without sparsity, 67 float32, 80 GB HBM3 at
    # 3.35 TB/s, NVLink 900 GB/s both ways.
    "h100": Machine("H100 SXM", 989e12, 67e12, 80e9, 3.35e12, 450e9, _NDR, 5e-6),
    # NVIDIA H200 data sheet, SXM: arithmetic and NVLink of the H100, 141 GB HBM3e at 4.8 TB/s.
    "h200": Machine("H200 SXM", 989e12, 67e12, 141e9, 4.8e12, 450e9, _NDR, 5e-6),
    # NVIDIA HGX B200 data sheet, an eighth of it: 2.25 PFLOP/s bfloat16 without sparsity, 75
    # TFLOP/s float32, 180 GB (of 192) at 8 TB/s, NVLink 5 with 1.8 TB/s both ways.
    "b200": Machine("B200", 2.25e15, 75e12, 180e9, 8e12, 900e9, _NDR, 5e-6),
    # NVIDIA A100 data sheet, SXM 80 GB: 312 TFLOP/s bfloat16, 19.5 float32, 2.0 TB/s, NVLink 600
    # GB/s both ways. (A DGX A100 has 200 Gbit/s per GPU: --network hdr.)
    "a100": Machine("A100 SXM 80 GB", 312e12, 19.5e12, 80e9, 2.0e12, 300e9, _NDR, 5e-6),
    # Assumed: a process with a few cores, gloo within a machine, 10 Gbit/s between machines;
    # efficiency, narrow_efficiency, experts_efficiency, attention_efficiency.
    "cpu": replace(
        Machine("a CPU process", 1e11, 1e11, 16e9, 2e10, 2e9, 1.25e9, 5e-5, 1.0, 0.8, 0.5, 0.3),
        origin=dict.fromkeys(NUMBERS, "assumed"),
        cpu_driven=True,
    ),
}
"""`--gpu` → the machine. Memory in decimal bytes, some 6 % less than the device reports: room for
CUDA's context and the buffers of NCCL."""

NETWORKS = {"10gbe": 10, "25gbe": 25, "100gbe": 100, "edr": 100, "hdr": 200, "ndr": 400, "xdr": 800}
"""Preset of `--network` → Gbit/s per rank and direction: Ethernet, and InfiniBand by generation."""


def machine_named(name: str) -> Machine:
    """Return the machine of `--gpu`. Raises UsageError for an unknown name."""
    machine = MACHINES.get(name.lower())
    if machine is None:
        raise UsageError(f"--gpu {name} is unknown; use {', '.join(MACHINES)}, or --machine FILE")
    return machine


def with_network(machine: Machine, network: str) -> Machine:
    """Return the machine with another network between nodes: Gbit/s per rank, or a preset."""
    try:
        gbit = float(NETWORKS.get(network.lower(), network))
    except ValueError:
        gbit = 0.0
    if not 0 < gbit < float("inf"):
        raise UsageError(
            f"--network {network} is neither Gbit/s above 0 nor one of {', '.join(NETWORKS)}; "
            "use 400 or ndr"
        )
    origin: dict[str, Origin] = {**machine.origin, "inter_node": "given"}
    inside = tuple(c for c in machine.curves if c.inside)
    return replace(machine, inter_node=gbit * 1e9 / 8, origin=origin, curves=inside)


def read_machine(path: str, gpu: str = "") -> Machine:
    """Return the machine of a file that `headway doctor --measure` wrote: its measured numbers, and
    the others from the table's entry that `gpu` or the file names.

    Raises UsageError for a file of another kind, or numbers that are not above 0."""
    again = f"make one with `headway doctor --measure {path}`"
    try:
        content = json.loads(Path(path).read_text("utf-8"))
    except OSError:
        raise UsageError(f"--machine {path}: there is no such file; {again}") from None
    except ValueError:
        raise UsageError(f"--machine {path} is no JSON; {again}") from None
    measured = content.get("measured") if isinstance(content, dict) else None
    if not isinstance(measured, dict):
        raise UsageError(f"--machine {path} has no `measured`; {again}")
    for name, value in measured.items():
        if name not in NUMBERS:
            raise UsageError(f"--machine {path} measures {name!r}; use {', '.join(NUMBERS)}")
        if type(value) not in (int, float) or not 0 < value < float("inf"):
            raise UsageError(f"--machine {path}: {name}={value!r} is not above 0; {again}")
    dtype = content.get("dtype", "")
    if dtype not in ("", "float32", "bfloat16"):
        raise UsageError(f"--machine {path}: dtype={dtype!r} is neither float32 nor bfloat16")
    try:
        curves = tuple(parse_curve(c) for c in content.get("curves", []))
    except (KeyError, TypeError, ValueError) as error:
        raise UsageError(f"--machine {path}: its curves are damaged ({error}); {again}") from None
    base = machine_named(gpu or str(content.get("based_on", "cpu")))
    numbers = {name: float(value) for name, value in measured.items()}
    return replace(
        base,
        **numbers,
        name=str(content.get("name") or base.name),
        origin={**base.origin, **dict.fromkeys(measured, "measured")},
        dtype=dtype,
        curves=curves,
    )
