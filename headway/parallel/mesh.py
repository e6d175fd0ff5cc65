"""The ranks of a job as a mesh of named axes: dp × hp × ep.

Rank r stands at dp = r // (HP·EP), hp = r // EP % HP, ep = r % EP, so the ranks of an `ep` axis are
neighbours (one machine, where it can be) and the replicas lie farthest apart. The batch is split
over all ranks. The mesh is a frozen object that is passed to what needs it; nothing reads a global.

| part of the model | split over | replicated over |
|---|---|---|
| experts | heads over hp, experts of a head over ep | dp |
| routers that read their sub-token | heads over hp | dp × ep |
| everything else | | dp × hp × ep |
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from headway.config import MeshConfig, PeerError, RankError, UsageError
from headway.parallel.agreement import check
from headway.parallel.traffic import Traffic
from headway.parallel.watchdog import Watchdog

T = TypeVar("T")


@dataclass(frozen=True)
class Axis:
    """Ranks that act together, and where this one stands among them."""

    name: str
    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    """None where there is nobody else."""


@dataclass(frozen=True)
class Mesh:
    """Where this process stands. `Mesh()` is a single process; `launch` and `fake` make the
    others."""

    config: MeshConfig = field(default_factory=MeshConfig)
    rank: int = 0
    dp: Axis = Axis("dp")
    hp: Axis = Axis("hp")
    ep: Axis = Axis("ep")
    world: Axis = Axis("world")
    """All ranks: they share the replicated parameters."""
    routers: Axis = Axis("routers")
    """dp × ep: the ranks that hold the same heads."""
    device_mesh: DeviceMesh | None = None
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    """Where this rank's tensors lie, for small reductions."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    watchdog: Watchdog | None = field(default=None, compare=False)
    """Tells the others where this rank stands; None in a single process."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.world.size

    @property
    def sizes(self) -> dict[str, int]:
        """Of the axes."""
        return {axis.name: axis.size for axis in (self.dp, self.hp, self.ep)}

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and speaks to people."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.world.group)

    def broadcast(self, value: float) -> float:
        """Rank 0's value, for decisions that all ranks must take alike."""
        if self.size == 1:
            return value
        agreed = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(agreed, src=0)
        return float(agreed)

    def all_gather_object(self, value: T) -> list[T]:
        """Every rank's value, in rank order; anything that can be pickled."""
        found: list[T] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value)
        return found

    def object_gatherer(self) -> Callable[[Any], list[Any]]:
        """`all_gather_object` over a connection of its own, for a thread beside training.
        Collective."""
        if self.size == 1:
            return self.all_gather_object
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.timeout))

        def gather(value: Any) -> list[Any]:
            found = [value] * self.size
            dist.all_gather_object(found, value, group=group)
            return found

        return gather

    def on_main(self, act: Callable[[], T]) -> T:
        """What `act` gives on rank 0, on every rank. Its UsageError is one on every rank, and rank
        0 prints it."""
        if self.size == 1:
            return act()
        found: list[Any] = [None, ""]
        problem: UsageError | None = None
        if self.is_main:
            try:
                found[0] = act()
            except UsageError as error:
                problem, found[1] = error, str(error)
        dist.broadcast_object_list(found, src=0)
        if found[1]:
            raise problem or PeerError(found[1])
        return found[0]

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raises UsageError where a fact is another one on another rank. Collective."""
        check(self.rank, self.all_gather_object(facts))

    def begin_step(self, step: int) -> None:
        """A step begins."""
        if self.watchdog is not None:
            self.watchdog.begin_step(step)

    @contextmanager
    def one_per_host(self) -> Iterator[None]:
        """The first rank of every host runs the body before the others do: it fills caches."""
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if not first:
            self.barrier()
        yield
        if first:
            self.barrier()

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


def launched() -> bool:
    """Whether torchrun (or Slurm through it) started this process as one of several."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


@contextmanager
def launch(
    config: MeshConfig,
    device: torch.device = torch.device("cpu"),
    facts: Callable[[], dict[str, Any]] = dict,
) -> Iterator[Mesh]:
    """The mesh of this job: of one process when none was launched, else over NCCL or gloo.

    `facts` gives what must be alike on all ranks, such as the options; they are compared first.
    Raises: UsageError where facts differ, the sizes and the processes do not fit, or the rendezvous
    fails; RunError, which names a rank, where a collective fails inside the context.
    """
    world = _world_size()
    if world == 1:
        _check_product(config, 1, 0)
        yield Mesh(config, device=device)
        return
    rank = _number("RANK")
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", _number("LOCAL_RANK"))
        torch.cuda.set_device(device)
    # NCCL ends the process from a thread of its own: the heartbeat has time to say why before
    timeout = timedelta(seconds=config.timeout + (30 if cuda else 0))
    try:
        # importing torch takes its time on a busy host
        wait = timedelta(seconds=max(config.timeout, 60.0))
        served, _, _ = next(rendezvous("env://", timeout=wait))
        attempt = f"headway {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
        store = dist.PrefixStore(attempt, served)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise RankError(
            f"rank {rank} found no rendezvous at {where} ({text}); "
            "use a free port (torchrun --master-port) and an address that all hosts reach"
        ) from None
    traffic = Traffic()
    # a connection of its own: a thread that waits for a key blocks the one that it uses
    where = os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    beats = dist.PrefixStore(attempt, dist.TCPStore(*where, timeout=wait, wait_for_workers=False))
    try:
        with Watchdog(beats, rank, world, config.timeout, traffic) as watchdog:
            found: list[Any] = [None] * world
            dist.all_gather_object(found, facts())
            check(rank, found)
            _check_product(config, world, rank)
            yield replace(place(config, rank, device), traffic=traffic, watchdog=watchdog)
    finally:
        dist.destroy_process_group()


def _check_product(config: MeshConfig, world: int, rank: int) -> None:
    """As many ranks in the mesh as there are processes."""
    wanted = config.size
    if wanted != world:
        raise (PeerError if rank else UsageError)(
            f"mesh dp={config.dp}, hp={config.hp}, ep={config.ep} needs {wanted} processes and "
            f"there {'is 1' if world == 1 else f'are {world}'}; "
            + (
                f"start it with: torchrun --nproc-per-node {wanted} -m -- headway train …"
                if world == 1
                else f"use --mesh with a product of {world}"
            )
        )


@contextmanager
def fake(config: MeshConfig, rank: int = 0) -> Iterator[Mesh]:
    """The mesh as `rank` would see it, with collectives that move nothing: a dry run of any size
    in one process, on the meta device or with small tensors."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = config.size
    assert 0 <= rank < world
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield place(config, rank, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _world_size() -> int:
    """Of the launcher's environment, which must be whole."""
    if not launched():
        return 1
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing and os.environ.get("WORLD_SIZE") != "1":
        raise UsageError(
            f"{missing[0]} is not set, and RANK or WORLD_SIZE is; start with torchrun, "
            f"which sets {', '.join(needed)}"
        )
    world, rank, port = _number("WORLD_SIZE"), _number("RANK"), _number("MASTER_PORT")
    if world > 1 and not (0 <= rank < world and 0 < port < 2**16):
        raise UsageError(
            f"RANK={rank}, WORLD_SIZE={world}, MASTER_PORT={port} cannot be; use ranks from 0 to "
            f"{world - 1} and a port below 65536, or start with torchrun"
        )
    return world


def _number(name: str) -> int:
    """A variable of the launcher; 0 where it is not set, 1 for WORLD_SIZE."""
    text = os.environ.get(name, "1" if name == "WORLD_SIZE" else "0")
    if not text.isdecimal():
        raise UsageError(f"{name}={text!r} is no number; start with torchrun, which sets it")
    return int(text)


def place(config: MeshConfig, rank: int, device: torch.device) -> Mesh:
    """The mesh of a process group that is there already, as `rank` sees it."""
    names = ("dp", "hp", "ep")
    sizes = (config.dp, config.hp, config.ep)
    whole = init_device_mesh(device.type, sizes, mesh_dim_names=names)
    heads = rank // config.ep % config.hp

    def axis(name: str) -> Axis:
        part = whole[name]
        return Axis(name, part.size(), part.get_local_rank(), part.get_group())

    # new_group is collective: every rank makes every group, in the same order
    table = whole.mesh
    mine = dist.group.WORLD
    for h in range(config.hp if config.hp > 1 else 0):
        group = dist.new_group(table[:, h].flatten().tolist())
        mine = group if h == heads else mine
    place = rank // (config.hp * config.ep) * config.ep + rank % config.ep
    return Mesh(
        config,
        rank,
        dp=axis("dp"),
        hp=axis("hp"),
        ep=axis("ep"),
        world=Axis("world", table.numel(), rank, dist.group.WORLD),
        routers=Axis("routers", config.dp * config.ep, place, cast(dist.ProcessGroup, mine)),
        device_mesh=whole,
        device=device,
    )
