"""`headway serve`: an OpenAI-compatible server of a trained model."""

import json
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from headway.cli import trained
from headway.cli.options import mesh_axes, parse
from headway.config import MeshConfig, ServerConfig, UsageError

if TYPE_CHECKING:
    from headway.parallel.mesh import Mesh
    from headway.server.service import Served

KEY_VARIABLE = "HEADWAY_API_KEY"


@dataclass(frozen=True)
class Serve(ServerConfig, trained.TrainedOptions):
    """Serve a trained model over HTTP, in OpenAI's form: /v1/completions, /v1/chat/completions."""

    api_key_file: str = ""
    """File with one API key per line; without it HEADWAY_API_KEY, or none is needed."""
    mesh: str = ""
    """Ranks that share heads and experts, as in hp=2,ep=2, started by torchrun --nproc-per-node
    P -m -- headway serve …; every rank holds all running tokens."""


def serve(args: Sequence[str]) -> int:
    """Run `headway serve RUN|DIR` until a signal, and return its exit code."""
    options = parse(Serve, args, "headway serve")
    keys = _keys(options.api_key_file)
    options.check()
    try:
        import fastapi  # noqa: F401
        import jinja2  # noqa: F401
        import llguidance  # noqa: F401
        import prometheus_client  # noqa: F401
        import uvicorn  # noqa: F401
    except ImportError as error:
        why = f"headway serve needs {error.name}, which is not installed"
        raise UsageError(f"{why}; pip install 'headway[serve]'") from None

    from headway.parallel.mesh import launch

    with launch(_mesh(options.mesh)) as mesh:
        return _serve(options, keys, mesh) if mesh.is_main else _follow(options, mesh)


def _follow(options: Serve, mesh: "Mesh") -> int:
    """Run the passes of rank 0 until it ends, whatever signals come."""
    from headway.serve.runner import MeshRunner

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    MeshRunner(trained.load(options, mesh).model, mesh).follow()
    return 0


def _serve(options: Serve, keys: tuple[str, ...], mesh: "Mesh") -> int:
    """Serve in this process, with the other ranks of a mesh."""
    from headway.kernels.packed import explain
    from headway.serve.runner import runner_of
    from headway.server.load import load_served
    from headway.server.run import serve as run

    def load() -> "Served":
        loaded = trained.load(options, mesh)
        return load_served(loaded, options, runner_of(loaded.model, mesh))

    def on_ready(url: str, served: "Served") -> None:
        engine, model = served.engine, served.engine.model
        answer = {
            "event": "ready",
            "url": url,
            "model": served.protocol.name,
            "dtype": str(model.dtype).removeprefix("torch."),
            "cache_tokens": engine.cache_tokens,
            # partial sums of experts are added across ranks in an order of their own
            "batch_invariant": engine.runner.batch_invariant and mesh.ep.size == 1,
        }
        if not options.json:
            print(
                f"serving {answer['model']} at {url} in {answer['dtype']}, a cache of "
                f"{answer['cache_tokens']} tokens; Ctrl-C ends\n"
                f"products: {explain(model.device, model.dtype)}",
                flush=True,
            )
        _print(options.json, answer)

    nothing = {"requests": 0, "generated_tokens": 0, "blocks_used": 0}
    counts = run(options, keys, load, on_ready) or nothing
    _print(options.json, {"event": "stopped", **counts})
    return 0


def _mesh(text: str) -> MeshConfig:
    """Return the mesh of `hp=2,ep=2`; "" is a single process."""
    axes = mesh_axes(text) if text else {}
    mesh = MeshConfig(dp=axes.get("dp", 1), hp=axes.get("hp", 1), ep=axes.get("ep", 1))
    if mesh.dp > 1:
        why = "replicas answer different requests"
        raise UsageError(f"--mesh {text}: {why}; start {mesh.dp} servers instead of dp={mesh.dp}")
    mesh.check()
    return mesh


def _print(wanted: bool, event: dict[str, object]) -> None:
    """Print an event as a line that a reader gets at once."""
    if wanted:
        print(json.dumps(event, ensure_ascii=False), flush=True)


def _keys(file: str) -> tuple[str, ...]:
    """Return the API keys of a file, or of the environment."""
    if not file:
        key = os.environ.get(KEY_VARIABLE, "")
        return (key,) if key else ()
    try:
        lines = Path(file).read_text("utf-8").split()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no UTF-8"
        raise UsageError(f"--api-key-file {file} cannot be read: {why}; give a text file") from None
    if not lines:
        raise UsageError(f"--api-key-file {file} has no key; write one per line")
    return tuple(lines)
