"""From a loaded model to what a server needs of it."""

import hashlib
from pathlib import Path

from headway import __version__
from headway.config import ServerConfig, UsageError
from headway.hub.load import LoadedModel
from headway.serve.engine import Engine
from headway.serve.runner import Runner
from headway.server.bodies import Bounds
from headway.server.chat_template import ChatTemplate
from headway.server.grammar import GrammarCompiler
from headway.server.protocol import Protocol
from headway.server.service import Served

CHUNK = 4096


def load_served(
    loaded: LoadedModel, config: ServerConfig = ServerConfig(), runner: Runner | None = None
) -> Served:
    """Return an engine for a model with the protocol of its server. A cache below the context
    bounds a request.

    Args: runner: as for `Engine`.
    Raises: UsageError for a template that cannot be read, for a `max_len` above the model's
    context, and as `Engine` does."""
    info, tokenizer = loaded.info, loaded.tokenizer
    config.check()
    if config.max_len > info.max_len:
        why = f"max_len={config.max_len} is above the context of {info.name}, {info.max_len} tokens"
        raise UsageError(f"{why}; use at most {info.max_len}, or 0 for all of it")
    engine = Engine.of(loaded, config, runner)
    max_len = min(engine.max_len, engine.cache_tokens)
    bounds = Bounds(
        vocab_size=tokenizer.vocab_size,
        max_len=max_len,
        max_tokens=min(config.max_tokens or max_len, max_len),
        max_n=config.max_n,
    )
    protocol = Protocol(
        name=config.name or info.name,
        tokenizer=tokenizer,
        template=ChatTemplate.load(info, tokenizer, config.chat_template),
        compiler=GrammarCompiler(tokenizer, engine.eos_ids),
        bounds=bounds,
        routes=config.return_routes,
    )
    dtype = str(loaded.model.dtype)
    digest = hashlib.sha256(f"{weights_digest(info.source)} {dtype} {__version__}".encode())
    fingerprint = f"fp_{digest.hexdigest()[:16]}"
    return Served(engine, protocol, fingerprint, config.max_requests + config.max_waiting)


def weights_digest(folder: Path) -> str:
    """Return a digest that tells the weights of folders apart: of the manifest of a checkpoint,
    which has the SHA-256 of each file, else of sizes, headers and samples of safetensors."""
    digest = hashlib.sha256()
    if (manifest := folder / "manifest.json").is_file():
        digest.update(manifest.read_bytes())
        return digest.hexdigest()
    for path in sorted(folder.glob("*.safetensors")):
        size = path.stat().st_size
        digest.update(size.to_bytes(8, "little"))
        with path.open("rb") as file:
            digest.update(file.read(min(int.from_bytes(file.read(8), "little"), size)))
            for start in range(file.tell(), size, max((size - file.tell()) // 256, CHUNK)):
                file.seek(start)
                digest.update(file.read(CHUNK))
    return digest.hexdigest()
