"""What `bench/cluster.py` runs on each host, and the models that it compares.

A step is `headway.train.step.gradient` and `update`: forward, backward, all-reduce of gradients,
one norm, AdamW. The sparse layers of all models have as many active parameters per token, hence
FLOPs, and as many in all, as nearly as whole sizes allow; k·F is constant, so more chosen experts
are narrower ones. Projections are paid for by the experts.
"""

import dataclasses
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.hosts import sent_and_received, serve
from headway.config import (
    BalanceConfig,
    MeshConfig,
    ModelConfig,
    MoEConfig,
    OptimConfig,
    RouterConfig,
    from_dict,
)
from headway.data.batch import Batch
from headway.kernels.precision import native_bfloat16
from headway.measure.links import measure_curves
from headway.measure.rates import measure_rates
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import Optimizers, build_optimizers
from headway.parallel.mesh import Mesh, build_mesh
from headway.parallel.parallelize import Parallelism, parallelize
from headway.parallel.traffic import Traffic
from headway.train.allocator import set_allocator
from headway.train.objective import NextToken
from headway.train.step import gradient, update

CPU = torch.device("cpu")
OPTIM = OptimConfig(lr=1e-3)


@dataclasses.dataclass(frozen=True)
class Size:
    """Of the models and of a step."""

    d_model: int = 192
    """D; 2·D/3 whole, so that the experts can pay for two projections exactly."""
    n_layers: int = 2
    active: int = 512
    """k·F of the flat mixture."""
    total: int = 8
    """E/k of the flat mixture."""
    n_heads: int = 4
    """H, and query heads of attention."""
    d_head: int = 32
    """Of attention, with one key/value head."""
    seq_len: int = 256
    batch: int = 8
    """Sequences per host and step."""
    collectives: tuple[int, ...] = (1 << 12, 1 << 18, 1 << 20, 1 << 22)
    """Bytes that leave a host in the plain collectives that are measured."""

    @property
    def tokens(self) -> int:
        """Per host and step."""
        return self.seq_len * self.batch


FULL = Size()
SMALL = Size(48, 1, 128, 4, d_head=8, seq_len=32, batch=2, collectives=(1 << 10, 1 << 16))


def share_of(model: ModelConfig, hosts: int) -> ModelConfig:
    """What one of several hosts computes, as a model for one process: as many of the heads' experts
    as a host has, so that each gets as many rows."""
    each = max(round(model.moe.n_experts / hosts), model.moe.top_k)
    return dataclasses.replace(model, moe=dataclasses.replace(model.moe, n_experts=each))


def model_of(kind: str, k: int, size: Size, multiple: int) -> ModelConfig:
    """The model whose sparse layers are flat (`moe`), `latent` (ℓ = D/2) or `multi_head_latent`.

    `multiple` divides E: the ranks that share the experts of a head.
    """
    D = size.d_model
    width = D // 2 if kind == "latent" else D
    projections = 0 if kind == "moe" else 2 * D * width
    active, total = 3 * size.active * D, 3 * size.active * D * size.total
    F = max(round((active - projections) / (3 * width * k)), 1)
    E = max(round((total - projections) / (3 * width * F) / multiple) * multiple, multiple, k)
    return ModelConfig(
        vocab_size=256,
        n_layers=size.n_layers,
        d_model=D,
        n_heads=size.n_heads,
        n_kv_heads=1,
        d_head=size.d_head,
        tied=True,
        moe=MoEConfig(
            kind=kind,  # type: ignore[arg-type]
            n_experts=E,
            top_k=k,
            d_expert=F,
            n_heads=size.n_heads if kind == "multi_head_latent" else 1,
            d_latent=width if kind == "latent" else 0,
            router=RouterConfig(
                gate="softmax_topk", reads="sub_token" if "multi" in kind else "token"
            ),
            balance=BalanceConfig(),
        ),
    )


@dataclasses.dataclass
class _Model:
    model: Transformer
    parallelism: Parallelism
    optimizers: Optimizers
    size: Size
    steps: int = 0


class Host:
    """One rank: answers `join`, `build`, `step`, `rates` and `curves`."""

    def __init__(self) -> None:
        torch.set_num_threads(1)
        set_allocator("keep")
        self.rank, self.world = 0, 1
        self.pair: dist.ProcessGroup | None = None
        self.models: dict[str, _Model] = {}
        self.meshes: dict[tuple[int, int, int], Mesh] = {}
        self.dtype = torch.bfloat16 if native_bfloat16(CPU) else torch.float32
        sources = sorted(Path(dataclasses.__file__).parent.glob("*.py"))
        text = b"".join(path.read_bytes() for path in sources)
        self.text = torch.frombuffer(bytearray(text), dtype=torch.uint8)

    def answer(self, command: dict) -> dict:
        """One command."""
        match command.pop("do"):
            case "join":
                return self.join(**command)
            case "build":
                return self.build(**command)
            case "step":
                return self.step(**command)
            case "rates":
                return measure_rates(CPU, **command)
            case "curves":
                return self.curves(**command)
            case other:
                raise ValueError(f"no command {other}")

    def join(self, rank: int, world: int, address: str, port: int) -> dict:
        """Become a rank of a job, out of another one."""
        if dist.is_initialized():
            dist.destroy_process_group()
        self.rank, self.world = rank, world
        self.models.clear()
        self.meshes.clear()
        self.pair = None
        if world > 1:
            dist.init_process_group(
                "gloo",
                init_method=f"tcp://{address}:{port}",
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=120),
            )
        if world > 2:  # the neighbours of HP×EP
            for first in range(0, world, 2):
                group = dist.new_group([first, first + 1])
                if isinstance(group, dist.ProcessGroup) and first // 2 == rank // 2:
                    self.pair = group
        return {"dtype": str(self.dtype).removeprefix("torch.")}

    def build(self, key: str, model: dict, mesh: dict, size: dict) -> dict:
        """A model on a mesh."""
        config = from_dict(ModelConfig, model)
        built = Transformer(config, Compute(dtype=self.dtype), seed=0)
        parallelism = parallelize(built, self._mesh(from_dict(MeshConfig, mesh)))
        optimizers = build_optimizers(built, OPTIM)
        self.models[key] = _Model(built, parallelism, optimizers, Size(**size))
        return {}

    def _mesh(self, config: MeshConfig) -> Mesh:
        """Processes are grouped once per shape; each model has its own ledger. A mesh of one is a
        process that works alone beside the others."""
        sizes = config.dp, config.hp, config.ep
        if sizes == (1, 1, 1):
            return Mesh(config)
        if sizes not in self.meshes:
            self.meshes[sizes] = build_mesh(config, self.rank, CPU)
        return dataclasses.replace(self.meshes[sizes], config=config, traffic=Traffic())

    def step(self, key: str) -> dict:
        """One training step, timed from a barrier; bytes are read around it."""
        at = self.models[key]
        mesh, balance = at.parallelism.mesh, at.model.config.moe.balance
        batch = self._batch(at.steps, at.size)
        mesh.barrier()
        mesh.traffic.take()
        sent, received = sent_and_received()
        cpu, started = time.process_time(), time.perf_counter()
        result = gradient(at.model, [batch], NextToken(balance), at.parallelism)
        update(at.model, at.optimizers, result, 1.0, OPTIM, balance, at.parallelism)
        at.optimizers.zero_grad()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        after = sent_and_received()
        at.steps += 1
        return {
            "seconds": seconds,
            "cpu": cpu,
            "sent": after[0] - sent,
            "received": after[1] - received,
            "ledger": _by_layer(mesh.traffic),
            "loss": result.loss,
        }

    def curves(self, sizes: list[int], repeats: int, overlap_cost: bool) -> dict:
        """Plain collectives and nothing else, among all hosts and among pairs of them."""
        measured = measure_curves(CPU, self.world, False, sizes, repeats, overlap_cost=overlap_cost)
        if self.pair is not None:
            measured += measure_curves(
                CPU, 2, False, sizes, repeats, self.pair, overlap_cost=overlap_cost
            )
        return {"curves": [dataclasses.asdict(curve) for curve in measured]}

    def _batch(self, step: int, size: Size) -> Batch:
        """Windows of the standard library's text: other ones on every host and in every step."""
        n = size.seq_len + 1
        first = (step * self.world + self.rank) * size.batch
        rows = [(first + i) * n % (len(self.text) - n) for i in range(size.batch)]
        tokens = torch.stack([self.text[at : at + n] for at in rows]).long()
        return Batch(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous(), None)


def _by_layer(traffic: Traffic) -> dict[str, dict[str, float]]:
    """`{"ep dispatch, layer 0": {"bytes": …, …}, "world norm": …}` of a step: the busiest host of a
    layer need not be that of another."""
    by_layer = {}
    for (axis, purpose, layer), count in traffic.counts.items():
        name = f"{axis} {purpose}" + ("" if layer is None else f", layer {layer}")
        by_layer[name] = dict(vars(count))
    traffic.take()
    return by_layer


if __name__ == "__main__":
    serve(Host().answer)
