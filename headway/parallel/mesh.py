"""The ranks of a job as a mesh of named axes: dp × hp × ep.

Rank r has index r // (HP·EP) on dp, r // EP % HP on hp and r % EP on ep, so the ranks of an `ep`
axis are neighbours (on one node where possible) and replicas are farthest apart. The batch is split
over all ranks. The mesh is a frozen object that is passed to what needs it; there is no global one.

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
    """Ranks that communicate with each other, and the index of this one among them."""

    name: str
    size: int = 1
    index: int = 0
    group: dist.ProcessGroup | None = None
    """None in a single process."""


@dataclass(frozen=True)
class Mesh:
    """The mesh as one rank sees it: `Mesh()` in a single process, else from `launch` or `fake`."""

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
    """The device of this rank's tensors."""
    traffic: Traffic = field(default_factory=Traffic, compare=False)
    watchdog: Watchdog | None = field(default=None, compare=False)
    """Tells the other ranks the position of this one; None in a single process."""

    @property
    def size(self) -> int:
        """Number of ranks."""
        return self.world.size

    @property
    def sizes(self) -> dict[str, int]:
        """Sizes of dp, hp and ep."""
        return {axis.name: axis.size for axis in (self.dp, self.hp, self.ep)}

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the files and the log."""
        return self.rank == 0

    def barrier(self) -> None:
        """Wait for all ranks."""
        if self.size > 1:
            dist.barrier(group=self.world.group)

    def broadcast(self, value: float) -> float:
        """Return rank 0's value, for decisions that must be the same on all ranks."""
        if self.size == 1:
            return value
        shared = torch.tensor(value, dtype=torch.float64, device=self.device)
        dist.broadcast(shared, src=0)
        return float(shared)

    def all_gather_object(self, value: T) -> list[T]:
        """Return every rank's value, in rank order; anything that can be pickled."""
        return _all_gather_object(value, self.size)

    def object_gatherer(self) -> Callable[[Any], list[Any]]:
        """Return an `all_gather_object` that uses connections of its own, for a thread that runs
        during training. Collective."""
        if self.size == 1:
            return self.all_gather_object
        group = dist.new_group(backend="gloo", timeout=timedelta(seconds=self.config.timeout))
        return lambda value: _all_gather_object(value, self.size, cast(dist.ProcessGroup, group))

    def on_main(self, act: Callable[[], T]) -> T:
        """Call `act` on rank 0 and return its result on every rank. A UsageError is raised on every
        rank, and rank 0 prints it."""
        if self.size == 1:
            return act()
        result_and_error: list[Any] = [None, ""]
        problem: UsageError | None = None
        if self.is_main:
            try:
                result_and_error[0] = act()
            except UsageError as error:
                problem, result_and_error[1] = error, str(error)
        dist.broadcast_object_list(result_and_error, src=0)
        result, text = result_and_error
        if text:
            raise problem or PeerError(text)
        return result

    def check_equal(self, facts: dict[str, Any]) -> None:
        """Raise UsageError if a fact differs between ranks. Collective."""
        check(self.rank, self.all_gather_object(facts))

    def begin_step(self, step: int) -> None:
        """Tell the watchdog that a step begins."""
        if self.watchdog is not None:
            self.watchdog.begin_step(step)

    @contextmanager
    def one_per_host(self) -> Iterator[None]:
        """Run the body on the first rank of every host before the others, to fill caches."""
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if not first:
            self.barrier()
        yield
        if first:
            self.barrier()

    def __str__(self) -> str:
        return ", ".join(f"{name}={size}" for name, size in self.sizes.items())


def _all_gather_object(value: T, size: int, group: dist.ProcessGroup | None = None) -> list[T]:
    values: list[T] = [value] * size
    if size > 1:
        dist.all_gather_object(values, value, group=group)
    return values


@contextmanager
def launch(
    config: MeshConfig,
    device: torch.device = torch.device("cpu"),
    facts: Callable[[], dict[str, Any]] = dict,
) -> Iterator[Mesh]:
    """Return a context with the mesh of this job: a single process unless launched, else over NCCL
    or gloo.

    `facts` returns what must be the same on all ranks, such as the options; it is compared first.
    Raises: UsageError where facts differ, the mesh does not fit the processes, or the rendezvous
    fails; RunError, which names a rank, where a collective fails inside the context."""
    world = _world_size()
    if world == 1:
        _check_product(config, 1, 0)
        yield Mesh(config, device=device)
        return
    rank, address, port = _number("RANK"), os.environ["MASTER_ADDR"], _number("MASTER_PORT")
    cuda = device.type == "cuda"
    if cuda:
        device = torch.device("cuda", _number("LOCAL_RANK"))
        torch.cuda.set_device(device)
    # NCCL aborts the process from its own thread: the watchdog gets time to report before that
    timeout = timedelta(seconds=config.timeout + (30 if cuda else 0))
    wait = timedelta(seconds=max(config.timeout, 60.0))  # importing torch takes long on a busy host
    attempt = f"headway {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    try:
        job_store, _, _ = next(rendezvous("env://", timeout=wait))
        store = dist.PrefixStore(attempt, job_store)
        dist.init_process_group(
            "nccl" if cuda else "gloo", store=store, rank=rank, world_size=world, timeout=timeout
        )
    except (RuntimeError, ValueError) as error:
        text = str(error).splitlines()[0]
        raise RankError(
            f"rank {rank} found no rendezvous at {address}:{port} ({text}); "
            "use a free port (torchrun --master-port) and an address that all hosts reach"
        ) from None
    traffic = Traffic()
    # a second connection, since a thread that waits for a key blocks its connection
    second = dist.TCPStore(address, port, timeout=wait, wait_for_workers=False)
    watchdog_store = dist.PrefixStore(attempt, second)
    try:
        with Watchdog(watchdog_store, rank, world, config.timeout, traffic) as watchdog:
            check(rank, _all_gather_object(facts(), world))
            _check_product(config, world, rank)
            yield replace(build_mesh(config, rank, device), traffic=traffic, watchdog=watchdog)
    finally:
        dist.destroy_process_group()


def _check_product(config: MeshConfig, world: int, rank: int) -> None:
    """Raise unless the mesh has as many ranks as there are processes."""
    if config.size != world:
        there, fix = f"are {world}", f"use --mesh with a product of {world}"
        if world == 1:
            there = "is 1"
            fix = f"start it with: torchrun --nproc-per-node {config.size} -m -- headway …"
        raise (PeerError if rank else UsageError)(
            f"mesh dp={config.dp}, hp={config.hp}, ep={config.ep} needs {config.size} processes "
            f"and there {there}; {fix}"
        )


@contextmanager
def fake(config: MeshConfig, rank: int = 0) -> Iterator[Mesh]:
    """Return a context with the mesh as `rank` would see it and collectives that send nothing: a
    dry run of any size in one process, on the meta device or with small tensors."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    world = config.size
    assert 0 <= rank < world
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield build_mesh(config, rank, torch.device("cpu"))
    finally:
        dist.destroy_process_group()


def _world_size() -> int:
    """Return the number of processes from the launcher's environment (torchrun, or Slurm through
    it). Raise UsageError where that is incomplete."""
    if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
        return 1
    needed = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing and os.environ.get("WORLD_SIZE") != "1":
        raise UsageError(
            f"{missing[0]} is not set, and RANK or WORLD_SIZE is; start with torchrun, "
            f"which sets {', '.join(needed)}"
        )
    world, rank, port = map(_number, ("WORLD_SIZE", "RANK", "MASTER_PORT"))
    if world > 1 and not (0 <= rank < world and 0 < port < 2**16):
        raise UsageError(
            f"RANK={rank}, WORLD_SIZE={world}, MASTER_PORT={port} cannot be; use ranks from 0 to "
            f"{world - 1} and a port below 65536, or start with torchrun"
        )
    return world


def _number(name: str) -> int:
    """Return a variable of the launcher; 0 where it is not set, 1 for WORLD_SIZE."""
    text = os.environ.get(name, "1" if name == "WORLD_SIZE" else "0")
    if not text.isdecimal():
        raise UsageError(f"{name}={text!r} is no number; start with torchrun, which sets it")
    return int(text)


def build_mesh(config: MeshConfig, rank: int, device: torch.device) -> Mesh:
    """Return the mesh of an initialised process group, as `rank` sees it. Collective."""
    sizes = (config.dp, config.hp, config.ep)
    device_mesh = init_device_mesh(device.type, sizes, mesh_dim_names=("dp", "hp", "ep"))
    hp_index = rank // config.ep % config.hp

    def axis(name: str) -> Axis:
        axis_mesh = device_mesh[name]
        return Axis(name, axis_mesh.size(), axis_mesh.get_local_rank(), axis_mesh.get_group())

    # new_group is collective: every rank creates every group, in the same order
    ranks = device_mesh.mesh
    routers = dist.group.WORLD
    for h in range(config.hp if config.hp > 1 else 0):
        group = dist.new_group(ranks[:, h].flatten().tolist())
        routers = group if h == hp_index else routers
    index = rank // (config.hp * config.ep) * config.ep + rank % config.ep
    return Mesh(
        config,
        rank,
        *map(axis, ("dp", "hp", "ep")),
        world=Axis("world", ranks.numel(), rank, dist.group.WORLD),
        routers=Axis("routers", config.dp * config.ep, index, cast(dist.ProcessGroup, routers)),
        device_mesh=device_mesh,
        device=device,
    )
