"""A model on the engine as lm-evaluation-harness takes one (extra `eval`; its release 0.4).

    lm_eval.simple_evaluate(HeadwayLM("runs/demo"), tasks=["my_task"], task_manager=…)

Texts are cut into context and continuation by the harness's own `TemplateLM`, so scores compare
with those of its other models. Requests run longest first, and a prefix that several share is
computed by one of them."""

from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from headway.config import EngineConfig, UsageError
from headway.hub.load import load_model
from headway.serve.blocks import page_keys
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from headway.serve.request import Completion, Request, Update, joined

Pair = tuple[tuple[str, str], list[int], list[int]]
"""Context and continuation as texts, then the tokens of each."""
GENERATION = {"do_sample", "until", "max_gen_toks", "temperature", "top_p", "top_k", "min_p"}
"""What a task may ask of a generation."""


class HeadwayLM(TemplateLM):
    """Scores and continues texts.

    Args:
        engine: a run, a checkpoint or a Hugging Face folder; or an engine with one token more than
            the contexts that the harness may use: it reads the last token too, whose score alone is
            needed.
        max_gen_toks: tokens to write where a task names no number."""

    def __init__(self, engine: Engine | str | Path, max_gen_toks: int = 256):
        super().__init__()
        if not isinstance(engine, Engine):
            loaded = load_model(engine)
            engine = Engine.of(loaded, EngineConfig(max_len=loaded.info.max_len + 1))
        self.engine, self.max_gen_toks = engine, max_gen_toks
        self.max_length = engine.max_len - 1

    @property
    def eot_token_id(self) -> int:
        return self.engine.tokenizer.eos

    @property
    def prefix_token_id(self) -> int:
        """Return what stands before a text without context."""
        bos = self.engine.tokenizer.bos
        return self.eot_token_id if bos is None else bos

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Return the ids of a text, after the beginning of text where the tokenizer's own
        post-processor puts one and `add_special_tokens` is not False."""
        ids = [int(i) for i in self.engine.tokenizer.encode(string)]
        bos = self.engine.tokenizer.bos
        return ids if bos is None or add_special_tokens is False else [bos, *ids]

    def loglikelihood_rolling(
        self, requests: Sequence[Any], disable_tqdm: bool = False
    ) -> list[float]:
        """Return Σ log p of each whole text, in windows of the context length where it is
        longer."""
        pairs: list[Pair] = []
        counts = []
        for (text,) in (request.args for request in requests):
            tokens, prefix = self.tok_encode(text), self.prefix_token_id
            windows = get_rolling_token_windows(tokens, prefix, self.max_length, context_len=1)
            parts = [make_disjoint_window(window) for window in windows]
            pairs += [(("", text), context, part) for context, part in parts]
            counts.append(len(parts))
        scores = iter([score for score, _ in self._scores(pairs)])
        sums = [sum(next(scores) for _ in range(n)) for n in counts]
        for request, total in zip(requests, sums, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return sums

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the continuation of each context, up to a stop text, the end of the text or the
        number of tokens that the task names."""
        prompts, params = [], []
        for i, (context, asked) in enumerate(request.args for request in requests):
            p = self._sampling_params(dict(asked), seed=i)
            room = self.max_length - p.max_tokens
            if room < 1:
                raise UsageError(
                    f"a task writes max_gen_toks={p.max_tokens} tokens, which leaves a context of "
                    f"{self.max_length} no room for the prompt; lower max_gen_toks"
                )
            prompts.append(self.tok_encode(context)[-room:])
            params.append(p)
        texts = [completion.text for _, completion in run_all(self.engine, prompts, params)]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _loglikelihood_tokens(self, requests: Sequence[Pair], **kwargs: Any) -> list:
        scores = self._scores(requests)
        for (texts, _, _), score in zip(requests, scores, strict=True):
            self.cache_hook.add_partial("loglikelihood", texts, score)
        return scores

    def _scores(self, pairs: Sequence[Pair]) -> list[tuple[float, bool]]:
        """Return for each continuation Σ log p and whether it is the most likely one, token by
        token. A context that is too long loses its beginning."""
        prompts, params = [], []
        for _, context, continuation in pairs:
            if not 0 < len(continuation) <= self.max_length:
                raise UsageError(
                    f"a continuation of {len(continuation)} tokens cannot be scored in a context "
                    f"of {self.max_length}; use 1 … {self.max_length}"
                )
            prompts.append([*context, *continuation][-self.max_length - 1 :])
            start = len(prompts[-1]) - len(continuation)
            params.append(
                SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=start)
            )
        scores = []
        for (request, _), p in zip(run_all(self.engine, prompts, params), params, strict=True):
            tokens = [t for t in request.prompt_logprobs[p.prompt_logprobs_start :] if t]
            likeliest = all(t.top[0][0] == t.token for t in tokens)
            scores.append((sum(t.logprob for t in tokens), likeliest))
        return scores

    def _sampling_params(self, asked: dict[str, Any], seed: int) -> SamplingParams:
        """Return the parameters of a generation; without `do_sample` the likeliest tokens."""
        values: dict[str, Any] = dict(normalize_gen_kwargs(asked, self.max_gen_toks))
        if unknown := sorted(set(values) - GENERATION):
            raise UsageError(
                f"a task asks for {unknown[0]}={values[unknown[0]]!r} in generation_kwargs; use "
                f"{', '.join(sorted(GENERATION))}"
            )
        return SamplingParams(
            max_tokens=values["max_gen_toks"],
            temperature=values.get("temperature", 1.0) if values["do_sample"] else 0.0,
            top_p=values.get("top_p", 1.0),
            top_k=values.get("top_k", 0),
            min_p=values.get("min_p", 0.0),
            seed=seed,
            stop=tuple(text for text in values["until"] if text),
        )


def run_all(
    engine: Engine, prompts: Sequence[list[int]], params: Sequence[SamplingParams]
) -> list[tuple[Request, Completion]]:
    """Return the request and its answer for each prompt, with one choice each.

    Longest first. A request whose next page another one is computing waits for that one, and then
    finds the page in the cache; so a prefix is computed once, whoever shares it."""
    waiting = deque(sorted(range(len(prompts)), key=lambda i: -len(prompts[i])))
    known: set[bytes] = set()
    behind: dict[bytes, list[int]] = {}
    """Key of the first page that a running request computes → those that wait for it."""
    running: dict[Request, tuple[int, bytes | None, list[Update]]] = {}
    answers: dict[int, tuple[Request, Completion]] = {}
    while waiting or running:
        while waiting and len(running) < engine.scheduler.max_requests:
            i = waiting.popleft()
            new = next((key for key in page_keys(prompts[i]) if key not in known), None)
            if new in behind:
                behind[new].append(i)
                continue
            if new is not None:
                behind[new] = []
            running[engine.add(prompts[i], params[i])] = i, new, []
        for update in engine.step():
            i, new, parts = running[update.request]
            parts.append(update)
            if update.finish_reason is not None:
                del running[update.request]
                answers[i] = update.request, joined(parts)
                known.update(page_keys(prompts[i]))
                waiting.extendleft(reversed(behind.pop(new, ()) if new is not None else ()))
    return [answers[i] for i in range(len(prompts))]
