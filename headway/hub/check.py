"""Compare an imported model with Transformers' reading of the same folder, in float32."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from headway.config import UsageError
from headway.hub.folder import read_json
from headway.hub.load import load_model
from headway.model.context import Context
from headway.model.transformer import Transformer

PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):\n    ",
    "1, 1, 2, 3, 5, 8,",
    "Der Mond ist aufgegangen, die goldnen Sternlein prangen",
    "人工知能とは、",
    "In the beginning God created the heaven and the earth. And the earth was without form,",
    '{"name": "Ada", "born": 1815, "languages": [',
    "x",
)
TOLERANCE = 1e-5
"""Of the difference of logits, relative to the largest where that is above 1."""
N_GREEDY = 32
"""Tokens of greedy decoding."""


@dataclass(frozen=True)
class Comparison:
    """How far two models are apart."""

    max_logit_difference: float
    """Largest absolute difference of two logits at any position of the prompts."""
    greedy_equal: bool
    """Whether greedy decoding of the first prompt chooses the same tokens."""
    largest_logit: float
    """Largest absolute logit, by which rounding grows."""

    @property
    def passed(self) -> bool:
        """Whether they are the same model up to the rounding of float32."""
        bound = TOLERANCE * max(1.0, self.largest_logit)
        return self.greedy_equal and self.max_logit_difference <= bound

    @property
    def sentence(self) -> str:
        """The comparison in words."""
        return (
            f"against Transformers: logits differ by {self.max_logit_difference:.1e} at most, "
            f"greedy tokens are {'equal' if self.greedy_equal else 'not equal'}"
        )


def compare(folder: Path, run: Path, own_code: bool = False) -> Comparison:
    """Compare what the run computes with what Transformers computes from the folder, over the
    tokenizer's vocabulary. No code of the folder is run, unless `own_code` says that we wrote it.
    Raises UsageError without Transformers."""
    ours = load_model(run, "cpu", "float32")
    tokenizer, room = ours.tokenizer, ours.info.max_len
    encoded = [tokenizer.encode(text).tolist()[:room] or [tokenizer.eos] for text in PROMPTS]
    theirs = _transformers_model(folder, own_code)

    vocab_size = ours.tokenizer.vocab_size

    def their_logits(ids: Sequence[int]) -> Tensor:
        return theirs(torch.tensor([ids])).logits[0, :, :vocab_size]

    difference = largest = 0.0
    with torch.no_grad():
        for ids in encoded:
            logits_SV = ours.model(torch.tensor([ids])).logits_BSV[0, :, :vocab_size]
            wanted_SV = their_logits(ids)
            difference = max(difference, float((logits_SV - wanted_SV).abs().max()))
            largest = max(largest, float(wanted_SV.abs().max()))
        n = min(N_GREEDY, ours.info.max_len - len(encoded[0]))
        whole = list(encoded[0])
        for _ in range(n):
            whole.append(int(their_logits(whole)[-1].argmax()))
        equal = _greedy(ours.model, encoded[0], n, vocab_size) == whole[len(encoded[0]) :]
    return Comparison(difference, equal, largest)


def _transformers_model(folder: Path, own_code: bool) -> Any:
    """Return Transformers' model in float32; quantised weights become bfloat16 first, as ours."""
    try:
        import transformers
        from transformers.utils import quantization_config
    except ImportError:
        raise UsageError("--check needs Transformers; pip install 'headway[hf]'") from None
    options: dict[str, Any] = {"dtype": torch.float32}
    match (read_json(folder / "config.json").get("quantization_config") or {}).get("quant_method"):
        case "fp8":
            narrow = quantization_config.FineGrainedFP8Config(dequantize=True)
            options = {"dtype": torch.bfloat16, "quantization_config": narrow}
        case "mxfp4":
            narrow = quantization_config.Mxfp4Config(dequantize=True)
            options = {"dtype": torch.bfloat16, "quantization_config": narrow}
    loader = transformers.AutoModelForCausalLM
    try:
        model = loader.from_pretrained(
            folder, local_files_only=True, trust_remote_code=own_code, **options
        )
    except ValueError as error:  # such as code of the folder, which is not run
        why = str(error).strip().partition("\n")[0]
        raise UsageError(f"--check: Transformers refuses {folder} ({why}); leave it out") from None
    return model.float().eval()


def _greedy(model: Transformer, ids: Sequence[int], n: int, vocab_size: int) -> list[int]:
    """Return the n most likely tokens after `ids`, each fed back, with a cache."""
    ctx = Context(cache=model.init_cache(1, len(ids) + n), last_only=True)
    tokens, following = [], torch.tensor([ids])
    for _ in range(n):
        logits_V = model(following, ctx=ctx).logits_BSV[0, 0, :vocab_size]
        tokens.append(int(logits_V.argmax()))
        following = torch.tensor([[tokens[-1]]])
    return tokens
