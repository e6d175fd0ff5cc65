"""One text from a model that is loaded already, also in the middle of its training."""

from collections.abc import Callable, Sequence

from headway.config import EngineConfig
from headway.data.tokenizer import Tokenizer
from headway.model.dispatch import LOCAL, TokenDispatcher
from headway.model.transformer import Transformer
from headway.parallel.fsdp import reshard
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from headway.serve.request import Completion, joined
from headway.serve.runner import Runner


def generate(
    model: Transformer,
    tokenizer: Tokenizer,
    prompt: str,
    params: SamplingParams,
    on_text: Callable[[str], None] = lambda text: None,
    eos_ids: Sequence[int] = (),
    dispatcher: TokenDispatcher = LOCAL,
) -> Completion:
    """Return the continuation of `prompt`, without it; an empty prompt starts a document.

    The model runs in evaluation mode and returns to the mode it was in. `on_text` gets each part of
    the text once it is final; `eos_ids` are as for `Engine`. Collective on a mesh: all ranks return
    the same, for which `params` need a seed. Raises UsageError for parameters that cannot be, or a
    mixer without pages."""
    was_training = model.training
    model.eval()
    try:
        max_len = len(tokenizer.encode(prompt)) + 1 + params.max_tokens
        config = EngineConfig(max_len=max_len, max_requests=1)
        runner = Runner(model, dispatcher)
        engine = Engine(model, tokenizer, config, eos_ids=eos_ids, runner=runner)
        engine.add(engine.encode(prompt), params)
        updates = []
        while engine.has_work:
            updates += engine.step()
            on_text(updates[-1].text)
        return joined(updates)
    finally:
        reshard(model)
        model.train(was_training)
