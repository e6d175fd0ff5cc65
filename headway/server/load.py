"""From a loaded model to what a server needs of it."""

import hashlib
from pathlib import Path

from headway import __version__
from headway.hub.load import LoadedModel
from headway.model.paged import PAGE
from headway.serve.engine import Engine
from headway.serve.runner import Runner
from headway.server.bodies import Bounds
from headway.server.chat_template import ChatTemplate
from headway.server.grammar import GrammarCompiler
from headway.server.protocol import Protocol
from headway.server.service import Served

CHUNK = 4096


def load_served(
    loaded: LoadedModel,
    *,
    name: str = "",
    max_tokens: int = 0,
    max_requests: int = 64,
    max_waiting: int = 256,
    max_n: int = 64,
    max_batch_tokens: int = 512,
    cache_tokens: int = 0,
    return_routes: bool = False,
    chat_template: str = "",
    runner: Runner | None = None,
) -> Served:
    """Return an engine for a model with the protocol of its server.

    Args:
        name: of the model in requests; "" takes `loaded.info.name`.
        max_tokens: most of a reply; 0: what the context holds.
        max_waiting: most replies beyond `max_requests`, which wait.
        max_n: most replies to a prompt, and prompts of a request.
        chat_template: a file; "" takes `loaded.info.chat_template`.
        cache_tokens, runner: as for `Engine`; a cache below the context bounds a request.
    Raises: UsageError for a template that cannot be read, and as `Engine` does."""
    info, tokenizer = loaded.info, loaded.tokenizer
    engine = Engine(
        loaded.model,
        tokenizer,
        eos_ids=info.eos_ids,
        max_len=info.max_len,
        max_requests=max_requests,
        max_batch_tokens=max_batch_tokens,
        cache_tokens=cache_tokens,
        return_routes=return_routes,
        runner=runner,
    )
    max_len = min(info.max_len, PAGE * engine.scheduler.pool.n_pages)
    bounds = Bounds(
        vocab_size=tokenizer.vocab_size,
        max_len=max_len,
        max_tokens=min(max_tokens or max_len, max_len),
        max_n=max_n,
    )
    protocol = Protocol(
        name=name or info.name,
        tokenizer=tokenizer,
        template=ChatTemplate.load(info, tokenizer, chat_template),
        compiler=GrammarCompiler(tokenizer, engine.eos_ids),
        bounds=bounds,
        routes=return_routes,
    )
    dtype = str(loaded.model.dtype)
    digest = hashlib.sha256(f"{weights_digest(info.source)} {dtype} {__version__}".encode())
    return Served(engine, protocol, f"fp_{digest.hexdigest()[:16]}", max_requests + max_waiting)


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
