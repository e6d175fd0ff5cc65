"""Values that a config leaves open and that follow from its other values alone."""

import dataclasses

from headway.config.errors import UsageError
from headway.config.power import powered
from headway.config.tree import Config

VOCAB_UNIT = 64
"""A vocabulary is rounded up to a multiple of this."""


def filled(config: Config, vocab_size: int) -> tuple[Config, dict[str, str]]:
    """Return the config with vocabulary, micro-batch and intervals filled in, and with what
    `optim.transfer=power` gives; and field → the sentence that explains its value. `vocab_size` is
    that of the tokenizer. Raises UsageError for a vocabulary that does not hold it."""
    given = config.data
    config, derived = powered(config)
    model, data, run = config.model, config.data, config.run
    if not model.vocab_size:
        rounded = -(-vocab_size // VOCAB_UNIT) * VOCAB_UNIT
        model = dataclasses.replace(model, vocab_size=rounded)
        why = f"the tokenizer's {vocab_size}, up to a multiple of {VOCAB_UNIT}"
        derived["model.vocab_size"] = f"{rounded}: {why}"
    elif model.vocab_size < vocab_size:
        raise UsageError(
            f"model.vocab_size={model.vocab_size} is below the tokenizer's {vocab_size}; "
            f"use {vocab_size} or more, or 0"
        )
    world, rows = config.mesh.size, data.micro_batch_size
    if not rows:
        data = dataclasses.replace(data, micro_batch_size=data.batch_size // world)
        why = "the whole batch in one pass" if world == 1 else f"one pass on each of {world} ranks"
        if data.batch_size > given.batch_size:  # by optim.transfer=power, and so is the memory
            before = given.batch_size // world
            why += f", of {before} before; data.micro_batch_size={before} would accumulate instead"
        derived["data.micro_batch_size"] = f"{data.micro_batch_size}: {why}"
    elif data.batch_size != given.batch_size:
        passes, before = (d.batch_size // (rows * world) for d in (data, given))
        derived["data.micro_batch_size"] = f"{rows}: as given; {passes} per step, {before} before"
    if not run.eval_every:
        every = max(1, config.optim.steps // 10)
        run = dataclasses.replace(run, eval_every=every)
        derived["run.eval_every"] = f"{every}: a tenth of {config.optim.steps} steps"
    if not run.sample_every:
        run = dataclasses.replace(run, sample_every=2 * run.eval_every)
        derived["run.sample_every"] = f"{run.sample_every}: every other evaluation"
    if not run.checkpoint_every:
        run = dataclasses.replace(run, checkpoint_every=run.eval_every)
        derived["run.checkpoint_every"] = f"{run.checkpoint_every}: with each evaluation"
    return dataclasses.replace(config, model=model, data=data, run=run), derived
