"""Pre-training: the loop over the batches of a text."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.config import Config
from headway.data.batch import micro_batches
from headway.data.tokenizer import load_tokenizer
from headway.model.build import BlockBuilder, build_block
from headway.train.interrupt import Interrupt
from headway.train.objective import NextToken
from headway.train.open_session import Edit, open_session
from headway.train.records import Log
from headway.train.resolve import resolve
from headway.train.session import Session
from headway.train.step import gradient, update
from headway.train.text_data import TextData, load_text


def train(
    config: Config,
    *,
    resume: Path | None = None,
    overwrite: bool = False,
    recipe_source: str = "",
    log: Log = print,
    interrupt: Interrupt | None = None,
    blocks: BlockBuilder = build_block,
    edit: Edit | None = None,
    forks: Sequence[int] = (),
    first_evaluation: bool = True,
) -> dict[str, Any]:
    """Train the model of `config` and return the result.

    Args:
        resume: the folder of a run to resume, bit for bit; `run_folder.read_config` gives its
            config. A run that was killed before its first checkpoint starts over. Or a checkpoint
            folder inside a run, from which another run, in `run.dir`, continues.
        overwrite: clear a run that `run.dir` already holds, instead of refusing.
        recipe_source: text of the recipe, kept in run.json.
        log: gets every line for people.
        interrupt: of a caller that is in its context; without one, signals are caught here.
        blocks: builds the blocks of the model, for modules of your own (`model.build`).
        edit: changes the model once it has its initial values, for what is no option.
        forks: steps after which the run is kept, for runs of other lengths (`Session.fork`).
        first_evaluation: evaluate the untrained model too.
    Returns: `val_bits_per_byte`, `val_loss`, `first_val_bits_per_byte`, `best_val_bits_per_byte`,
        `loss` (training, nats/token), `tokens_per_second`, `steps`, `tokens`, `seconds`,
        `cpu_seconds`, `skipped`, `parameters_total`, `parameters_active`, `sample`, `checkpoint`
        and `report` (paths or None), `stopped` (why it ended early), `interrupted` (then exit 130),
        `error` (what could not be saved; then exit 1).
    Raises: `UsageError` before step 0; `RunError` after `optim.max_skipped` skipped steps in a row.
    """
    tokenizer = load_tokenizer(config.data.vocabulary)
    resolved = resolve(config, tokenizer.vocab_size)
    with open_session(
        resolved,
        tokenizer,
        load_text,
        resume=resume,
        overwrite=overwrite,
        recipe_source=recipe_source,
        log=log,
        interrupt=interrupt,
        blocks=blocks,
        edit=edit,
    ) as session:
        return _loop(session, forks, first_evaluation)


def _loop(
    session: Session[TextData], forks: Sequence[int], first_evaluation: bool
) -> dict[str, Any]:
    config, progress, parallelism = session.config, session.progress, session.parallelism
    model, optimizers, mesh = session.model, session.optimizers, parallelism.mesh
    balance = config.model.moe.balance
    objective = NextToken(balance)
    if first_evaluation and progress.step == 0:
        session.evaluate()
    while session.begin_step():
        rows = session.rows
        size = min(config.data.micro_batch_size, rows // mesh.size)
        batch = session.data.stream.batch(progress.step, mesh.rank, mesh.size, size, rows)
        result = gradient(
            model,
            micro_batches(batch, size, mesh.device),
            objective,
            parallelism,
            load=progress.load,
            signal=bool(session.interrupt.requested),
        )
        reason = session.reason_to_skip(result)
        if not reason:
            lr = session.lr_factor
            update(model, optimizers, result, lr, config.optim, balance, parallelism)
        session.end_step(result, reason)
        if progress.step in forks:
            session.fork()
    return session.finish()
