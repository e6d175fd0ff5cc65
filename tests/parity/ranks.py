"""Worker processes that become the ranks of one small job after another: torch is imported once."""

import os
import socket
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from headway.config import MeshConfig
from headway.parallel.mesh import Mesh, build_mesh

TIMEOUT = 120.0


class Pool:
    """Up to `size` gloo ranks on this machine."""

    def __init__(self, size: int = 8) -> None:
        self.size = size
        self.remembered: dict[Any, list[Any]] = {}
        self._start()

    def _start(self) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, mesh: MeshConfig, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(mesh, *args)` on every rank; what each returned."""
        return self._run(mesh.dp * mesh.hp * mesh.ep, mesh, function, args)

    def remember(self, mesh: MeshConfig, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`run`, once for the same arguments: what several cases are compared with."""
        key = (mesh, function, args)
        if key not in self.remembered:
            self.remembered[key] = self.run(mesh, function, *args)
        return self.remembered[key]

    def launched(self, world: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(rank, world, *args)` in processes whose environment is as torchrun leaves
        it."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        return self._run(world, None, _as_torchrun, (port, function, *args))

    def _run(
        self, world: int, mesh: MeshConfig | None, function: Callable[..., Any], args: Any
    ) -> list[Any]:
        """When one fails the others may wait for it for ever, so all are started anew."""
        answers: dict[int, Any] = {}
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes[:world]:
                pipe.send((os.path.join(folder, "store"), world, mesh, function, args))
            while len(answers) < world:
                missing = [rank for rank in range(world) if rank not in answers]
                ready = wait([self.pipes[rank] for rank in missing], TIMEOUT)
                problem = "" if ready else f"ranks {missing} do not answer"
                for rank in missing:
                    if self.pipes[rank] in ready:
                        text, answers[rank] = self.pipes[rank].recv()
                        problem = problem or text
                if problem:
                    self.close()
                    self._start()
                    raise AssertionError(problem)
        return [answers[rank] for rank in range(world)]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _as_torchrun(rank: int, world: int, port: int, function: Callable[..., Any], *args: Any) -> Any:
    before = dict(os.environ)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        return function(rank, world, *args)
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(rank: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        store, world, config, function, args = pipe.recv()
        try:
            if config is None:  # the function makes its own group
                pipe.send(("", function(rank, world, *args)))
                continue
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=TIMEOUT / 2),
            )
            mesh = build_mesh(config, rank, torch.device("cpu")) if world > 1 else Mesh(config)
            pipe.send(("", function(mesh, *args)))
        except BaseException:
            pipe.send((f"rank {rank}: {traceback.format_exc()}", None))
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()
