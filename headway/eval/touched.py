"""How many experts the steps of a batch touch: what a decoding step must read of a sparse model."""

from headway.config import UsageError
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams


def experts_touched(engine: Engine, batch: int, n_tokens: int = 32, seed: int = 0) -> float:
    """Return the mean number of experts, over all sparse layers, that a step touches while `batch`
    documents are written beside each other, at temperature 1. Raises UsageError where the engine
    runs fewer at once."""
    if batch > engine.scheduler.max_requests:
        limit = engine.scheduler.max_requests
        raise UsageError(f"batch={batch} exceeds max_requests={limit} of the engine")
    for i in range(batch):
        params = SamplingParams(n_tokens, seed=seed + i, ignore_eos=True)
        engine.add([engine.tokenizer.eos], params)
    counts = []
    while engine.has_work:
        engine.step()
        counts.append(engine.counters.experts_touched)
    return sum(counts) / len(counts)
