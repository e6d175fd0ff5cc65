"""Opening a session: the order in which a run takes mesh, folder, data, model and checkpoint."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from headway.checkpoint import run_folder
from headway.checkpoint.load import check_architecture, read_model_config
from headway.checkpoint.lock import Lock
from headway.checkpoint.run_folder import RunStart
from headway.config import PeerError, RankError, UsageError, leaves
from headway.data.tokenizer import Tokenizer
from headway.model.build import BlockBuilder, build_block
from headway.model.compute import Compute
from headway.model.transformer import Transformer
from headway.optim.groups import build_optimizers
from headway.optim.transfer import derivation, init_scales
from headway.parallel.mesh import launch
from headway.parallel.parallelize import materialize
from headway.report.provenance import commit, versions
from headway.report.sinks import NoSink
from headway.report.track import open_sink
from headway.train.allocator import set_allocator
from headway.train.announce import announce, run_info
from headway.train.checkpoints import Checkpoints
from headway.train.interrupt import Interrupt
from headway.train.interval import SpikeDetector
from headway.train.progress import Progress
from headway.train.records import Log, Records
from headway.train.resolve import Resolved, Sizes
from headway.train.session import D, LoadData, Session

Edit = Callable[[Transformer], None]
"""Changes a built model in place: its values, or its modules, to which it then gives values."""


@contextmanager
def open_session(
    resolved: Resolved,
    tokenizer: Tokenizer,
    load_data: LoadData[D],
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    recipe_source: str = "",
    log: Log = print,
    interrupt: Interrupt | None = None,
    blocks: BlockBuilder = build_block,
    edit: Edit | None = None,
) -> Iterator[Session[D]]:
    """Return a context with a session on this rank: a new run at step 0, or a resumed one at its
    checkpoint.

    Args:
        load_data: loads the trainer's data on the mesh.
        resume, overwrite, recipe_source, log, interrupt, blocks, edit: as for `loop.train`.
    Raises: `UsageError` before step 0; on a mesh it names the rank that met it."""

    def facts() -> dict[str, Any]:
        return {**leaves(resolved.config.to_dict()), **versions(), "commit": commit()[0]}

    def start_checkpoint() -> run_folder.LatestCheckpoint:
        checkpoint = run_folder.find_start(start, lock, log)
        if start.resume:
            run_folder.check_dtype(run_dir, resolved.derived)
        return checkpoint

    start = RunStart.of(resolved.config, resume, overwrite)
    run_dir = start.run_dir
    with (
        nullcontext(interrupt) if interrupt else Interrupt() as interrupt,
        launch(resolved.config.mesh, resolved.device, facts) as mesh,
        Lock(run_dir) as lock,
        _rank_in_errors(mesh.rank),
    ):
        log = log if mesh.is_main else lambda _: None
        config, run = resolved.config, resolved.config.run
        checkpoint, problems = mesh.on_main(start_checkpoint)
        if checkpoint is not None:
            check_architecture(read_model_config(checkpoint), config.model)
        if run.threads:
            torch.set_num_threads(run.threads)
        if mesh.device.type == "cpu":
            set_allocator(run.allocator)
        # before the run folder is touched: a wrong --data must not clear a run
        data = load_data(config, tokenizer, mesh, log)
        compute = Compute(resolved.dtype, run.recompute)
        with torch.device("meta"):
            model = Transformer(config.model, compute, blocks=blocks)
        sizes = Sizes.of(model, config.data.seq_len)  # of the full model, before it is sharded
        by_width = derivation(model, config.optim, initial=checkpoint is None)
        resolved = replace(resolved, derived={**resolved.derived, **by_width})
        init = init_scales(model, config.optim)
        parallelism = materialize(model, mesh, run.seed, init)
        if edit is not None:
            if mesh.size > 1:
                raise UsageError(f"a model on a mesh of {mesh.size} ranks is not edited; use one")
            with torch.no_grad():
                edit(model)
            sizes = Sizes.of(model, config.data.seq_len)
        if not start.resume:
            info = run_info(resolved, sizes, data.info, recipe_source)
            checkpoint = mesh.on_main(lambda: run_folder.create_run(start, info, lock, log))
        announce(resolved, mesh, sizes, run_dir, log)
        for line in data.notes:
            log(line)
        dtype = resolved.newton_schulz_dtype
        optimizers = build_optimizers(model, config.optim, dtype, parallelism.sharding)
        # of router noise and jitter, other ones on every rank; weights and samples have their own
        torch.manual_seed(run.seed + (mesh.rank << 32))
        progress = Progress(SpikeDetector(config.optim.spike))
        identity = {"seed": run.seed, "tokenizer": tokenizer.fingerprint, **data.identity}
        with open_sink(run_dir, config, log) if mesh.is_main else NoSink() as sink:
            records = Records(config, run_dir, model, sizes, parallelism, progress, sink, log)
            checkpoints = Checkpoints(records, optimizers, identity)
            if start.resume or start.fork_from is not None:
                checkpoints.restore(checkpoint, problems)
            interrupt.defer(mesh.all_gather_object)
            if run.compile:
                for block in model.layers:
                    block.compile()
            yield Session(data, tokenizer, records, checkpoints, lock, interrupt)


@contextmanager
def _rank_in_errors(rank: int) -> Iterator[None]:
    """Name the rank in a `UsageError` that only a rank other than 0 met."""
    try:
        yield
    except PeerError:
        raise
    except UsageError as error:
        raise RankError(f"rank {rank}: {error}") if rank else error from None
