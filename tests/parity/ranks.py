"""Worker processes that become the ranks of one small job after another: torch is imported once."""

import os
import tempfile
import traceback
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from headway.config import MeshConfig
from headway.parallel.mesh import Mesh, place

TIMEOUT = 120.0


class Pool:
    """Up to `size` gloo ranks on this machine."""

    def __init__(self, size: int = 8) -> None:
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, mesh: MeshConfig, function: Callable[..., Any], *args: Any) -> list[Any]:
        """`function(mesh, *args)` on every rank; what each returned."""
        world = mesh.dp * mesh.hp * mesh.ep
        with tempfile.TemporaryDirectory() as folder:
            for pipe in self.pipes[:world]:
                pipe.send((os.path.join(folder, "store"), world, mesh, function, args))
            answers = []
            for rank, pipe in enumerate(self.pipes[:world]):
                assert pipe.poll(TIMEOUT), f"rank {rank} does not answer"
                answers.append(pipe.recv())
        failed = [text for text, _ in answers if text]
        assert not failed, "\n".join(failed)
        return [value for _, value in answers]

    def close(self) -> None:
        for process in self.processes:
            process.kill()


def _serve(rank: int, pipe: Any) -> None:
    torch.set_num_threads(1)
    while True:
        store, world, config, function, args = pipe.recv()
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(store, world),
                rank=rank,
                world_size=world,
                timeout=timedelta(seconds=TIMEOUT / 2),
            )
            mesh = place(config, rank, torch.device("cpu")) if world > 1 else Mesh(config)
            pipe.send(("", function(mesh, *args)))
        except BaseException:
            pipe.send((f"rank {rank}: {traceback.format_exc()}", None))
        finally:
            dist.destroy_process_group()
