"""The inference engine: many requests, one pass at a time.

    engine = Engine.load("runs/demo")
    for completions in engine.generate(["Once upon", "The"], SamplingParams(max_tokens=32)):
        print(completions[0].text)

T tokens of a pass · R rows whose logits are wanted · V vocabulary."""

import itertools
import secrets
from collections.abc import Iterable
from collections.abc import Sequence as ListOf
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter

from torch import Tensor

from headway.checkpoint.runtime import Device, Dtype
from headway.config import EngineConfig, UsageError
from headway.data.detokenizer import Detokenizer
from headway.data.tokenizer import Tokenizer
from headway.hub.load import LoadedModel, load_model
from headway.model.build import page_bytes
from headway.model.paged import PAGE, slots_of
from headway.model.transformer import Transformer
from headway.serve.blocks import BlockPool, default_pages, pool_sizes
from headway.serve.params import SamplingParams
from headway.serve.request import Completion, Request, Sequence, Update, joined
from headway.serve.routes import RoutePages, Routes
from headway.serve.runner import Runner, pass_of
from headway.serve.sampling import Row, TokenLogprob, log_probabilities, sample
from headway.serve.scheduler import Chunk, Copy, Scheduler


@dataclass
class Counters:
    """What the engine did since it was made."""

    requests: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    """Tokens of prompts whose pages were in the cache."""
    generation_tokens: int = 0
    aborted: int = 0
    failed: int = 0
    """Requests that ended because a step raised."""
    steps: int = 0
    failed_steps: int = 0
    experts_touched: int = 0
    """Experts with at least one row in the last step, summed over sparse layers."""
    busiest_touched: int = 0
    """Those of the rank that had most."""
    total_touched: int = 0
    """Experts touched, over all steps; and those of the busiest rank."""
    total_busiest: int = 0
    step_seconds: float = 0.0
    """Of the last step."""
    forward_seconds: float = 0.0
    """Of its pass."""
    sampling_seconds: float = 0.0
    """Of drawing its tokens."""

    def count_experts(self, read: ListOf[int]) -> None:
        """Count the experts that each rank read in a step."""
        self.experts_touched, self.busiest_touched = sum(read), max(read)
        self.total_touched += self.experts_touched
        self.total_busiest += self.busiest_touched


class Engine:
    """Runs requests on one model.

    Args:
        model: in evaluation mode, its mixers with pages.
        tokenizer: of its vocabulary.
        config: its `max_len` may be 0 where that of the model is not.
        eos_ids: tokens that end a text; () takes the tokenizer's.
        runner: runs the passes; None: in this process.
    Raises: UsageError where a size does not fit or a mixer has no pages."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        config: EngineConfig = EngineConfig(),
        *,
        eos_ids: ListOf[int] = (),
        runner: Runner | None = None,
    ):
        config.check()
        self.model, self.tokenizer = model, tokenizer
        self.runner = Runner(model) if runner is None else runner
        self.eos_ids = tuple(eos_ids) or tokenizer.eos_ids
        self.max_len = config.max_len or model.config.max_len
        if not self.max_len:
            raise UsageError("max_len=0 and the model's config has none; give the engine one")
        n_bytes = page_bytes(self.runner.mixers, model.dtype)
        if config.return_routes:  # those of a whole text are read when it ends
            n_bytes = {0: 0, **n_bytes}
        n_pages = -(-config.cache_tokens // PAGE)
        n_pages = n_pages or default_pages(n_bytes, self.max_len, config)
        self.cache_tokens, sizes = PAGE * n_pages, pool_sizes(n_bytes, n_pages, config)
        self.runner.allocate(sizes, longest=min(n_pages, -(-self.max_len // PAGE)))
        self._routes = RoutePages(n_pages, model.sparse_layers()) if config.return_routes else None
        self._copies: list[Copy] = []
        pools = {window: BlockPool(n, window) for window, n in sizes.items()}
        self.scheduler = Scheduler(pools, config.max_requests, config.max_batch_tokens)
        self.counters = Counters()
        self.sequences: list[Sequence] = []
        self._numbers = itertools.count()

    @classmethod
    def load(
        cls,
        path: str | Path,
        config: EngineConfig = EngineConfig(),
        device: Device = "auto",
        dtype: Dtype = "auto",
        threads: int = 0,
    ) -> "Engine":
        """Return an engine for the model of a run, a checkpoint or a Hugging Face folder."""
        return cls.of(load_model(path, device, dtype, threads), config)

    @classmethod
    def of(
        cls,
        loaded: LoadedModel,
        config: EngineConfig = EngineConfig(),
        runner: Runner | None = None,
    ) -> "Engine":
        """Return an engine for a model that `load_model` read; `max_len` 0 is its context."""
        config = replace(config, max_len=config.max_len or loaded.info.max_len)
        ends = loaded.info.eos_ids
        return cls(loaded.model, loaded.tokenizer, config, eos_ids=ends, runner=runner)

    # ---- requests -----------------------------------------------------------------------------

    def encode(self, text: str) -> list[int]:
        """Return the ids of a prompt, after the beginning of text where the tokenizer's own
        post-processor puts one; an empty prompt starts a document."""
        ids = [int(i) for i in self.tokenizer.encode(text)]
        if self.tokenizer.bos is not None:
            ids.insert(0, self.tokenizer.bos)
        return ids or [self.tokenizer.eos]

    def add(
        self, prompt: ListOf[int], params: SamplingParams, *, salt: str = "", id: str = ""
    ) -> Request:
        """Queue a request. Texts with different salts share no pages. Raises UsageError where it
        can never run."""
        prompt, n_vocab = list(prompt) or [self.tokenizer.eos], self.tokenizer.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < n_vocab:
            wrong = next(token for token in prompt if not 0 <= token < n_vocab)
            raise UsageError(f"the prompt has token {wrong}; ids are 0 … {n_vocab - 1}")
        params.check(n_vocab, self.max_len, len(prompt))
        most = len(prompt) + params.max_tokens
        if most > self.cache_tokens:
            raise UsageError(
                f"a request of {most} tokens exceeds the cache of {self.cache_tokens}; raise "
                "cache_tokens or lower max_tokens"
            )
        if params.return_routes and self._routes is None:
            raise UsageError("this engine keeps no routes; start it with return_routes")
        seed = secrets.randbits(63) if params.seed is None else params.seed
        request = Request(id or str(next(self._numbers)), prompt, params, seed, salt)
        if params.prompt_logprobs >= 0:
            request.prompt_logprobs = [None] * len(prompt)
        self.sequences.append(self._sequence(request, choice=0))
        self.scheduler.waiting.append(self.sequences[-1])
        self.counters.requests += 1
        self.counters.prompt_tokens += len(prompt)
        return request

    def abort(self, id: str) -> None:
        """Drop a request, if it still runs; its full pages stay reusable."""
        for sequence in [s for s in self.sequences if s.request.id == id]:
            self._end(sequence)
            self.counters.aborted += sequence.row.choice == 0

    @property
    def has_work(self) -> bool:
        """Return whether a request waits or runs."""
        return bool(self.sequences)

    # ---- steps --------------------------------------------------------------------------------

    def step(self) -> list[Update]:
        """Run one pass; return what it adds to each choice. What the pass raises ends the requests
        that were in it; those that were not can go on, in this process but not on a mesh."""
        begin = perf_counter()
        wanted = _Wanted(self.scheduler.schedule())
        try:
            updates = self._advance(wanted, self._forward(wanted))
        except Exception:
            self._drop(wanted)
            raise
        self.counters.steps += 1
        self.counters.count_experts(self.runner.experts_read)
        self.counters.step_seconds = perf_counter() - begin
        return updates

    def generate(
        self, prompts: Iterable[str | ListOf[int]], params: SamplingParams = SamplingParams()
    ) -> list[list[Completion]]:
        """Return the choices of each prompt, a text or token ids, in their order."""
        ids = [self.encode(p) if isinstance(p, str) else p for p in prompts]
        requests: list[Request] = []
        parts: dict[tuple[Request, int], list[Update]] = {}
        try:
            for prompt in ids:
                requests.append(self.add(prompt, params))
            while self.has_work:
                for update in self.step():
                    parts.setdefault((update.request, update.choice), []).append(update)
        finally:  # where one is refused or fails, the others go too
            for request in requests:
                self.abort(request.id)
        return [[joined(parts[r, i]) for i in range(params.n)] for r in requests]

    def _forward(self, wanted: "_Wanted") -> Tensor:
        """Return the wanted logits of a pass, over the tokenizer's vocabulary."""
        rows = [*wanted.scored, *wanted.sampled]
        work = pass_of(wanted.chunks, rows, self._copies, self._routes is not None)
        self._copies = []
        begin = perf_counter()
        output = self.runner.run(work)
        self.counters.forward_seconds = perf_counter() - begin
        if self._routes is not None:
            self._routes.write(slots_of(work.segments), output.routes)
        assert output.logits_BSV is not None
        return output.logits_BSV[0, :, : self.tokenizer.vocab_size]

    def _advance(self, wanted: "_Wanted", logits_RV: Tensor) -> list[Update]:
        """Take the results of a pass: score prompts, draw tokens, end what is complete."""
        drawn = self._draw(wanted, logits_RV)  # raises before anything is known of the pass
        for chunk in wanted.chunks:
            self.scheduler.advance(chunk)
        updates: list[Update] = []
        for sequence in wanted.sequences:
            if not sequence.row.output and sequence.row.choice == 0:
                self.counters.cached_tokens += sequence.request.n_cached
            if sequence.request.params.max_tokens == 0:
                last = self._end(sequence, "length")
                updates += [last._replace(choice=n) for n in range(last.request.params.n)]
        for sequence, choice, _ in drawn:
            if choice is not sequence:
                self._fork(sequence, choice)
        return updates + [self._take(choice, token) for _, choice, token in drawn]

    def _draw(
        self, wanted: "_Wanted", logits_RV: Tensor
    ) -> list[tuple[Sequence, Sequence, TokenLogprob]]:
        """Score prompts, and draw a token of every choice: (sequence that was computed, choice that
        has the same tokens, its next)."""
        n_scored = len(wanted.scored)
        self._score(wanted.prompts, logits_RV[:n_scored])
        rows, pairs = [], []
        for i, sequence in enumerate(wanted.sequences, start=n_scored):
            choices = self._choices(sequence)
            pairs += [(sequence, choice) for choice in choices]
            rows += [i] * len(choices)
        if rows != list(range(len(logits_RV))):  # a copy of all logits
            logits_RV = logits_RV[rows]
        begin = perf_counter()
        tokens = sample(logits_RV, [choice.row for _, choice in pairs])
        self.counters.sampling_seconds = perf_counter() - begin
        return [(*pair, token) for pair, token in zip(pairs, tokens, strict=True)]

    def _choices(self, sequence: Sequence) -> list[Sequence]:
        """Return the choices that draw from the logits of a sequence: where its prompt is complete,
        further ones that the request asks for."""
        request, row = sequence.request, sequence.row
        if request.params.max_tokens == 0:
            return []
        n = request.params.n if row.choice == 0 and not row.output else 1
        return [sequence, *(self._sequence(request, choice) for choice in range(1, n))]

    def _drop(self, wanted: "_Wanted") -> None:
        """End the requests of a pass that failed; nothing that it wrote stays known."""
        requests = {chunk.sequence.request for chunk in wanted.chunks}
        for sequence in [s for s in self.sequences if s.request in requests]:
            self._remove(sequence)
        self._copies = []
        self.counters.failed += len(requests)
        self.counters.failed_steps += 1

    def _score(self, prompts: ListOf[tuple[Sequence, int, int]], logits_RV: Tensor) -> None:
        """Set log-probabilities of prompt tokens from the logits before each."""
        done = 0
        for sequence, start, n in prompts:
            request = sequence.request
            tokens = request.prompt[start + 1 : start + 1 + n]
            n_top = request.params.prompt_logprobs
            scores = log_probabilities(logits_RV[done : done + n], tokens, n_top)
            request.prompt_logprobs[start + 1 : start + 1 + n] = scores
            done += n

    def _fork(self, sequence: Sequence, twin: Sequence) -> None:
        """Start a further choice of a request whose prompt is computed."""
        self.sequences.append(twin)
        copies = self.scheduler.fork(sequence, twin)
        self._copies += copies
        for window, source, target in copies:
            if self._routes is not None and not window:
                self._routes.copy_page(source, target)

    def _take(self, sequence: Sequence, drawn: TokenLogprob) -> Update:
        """Add a token to a choice."""
        request, token = sequence.request, drawn.token
        params = request.params
        sequence.append(token)
        self.counters.generation_tokens += 1
        reason = stop_reason = None
        if sequence.row.matcher is not None and sequence.row.matcher.failed:
            reason = "length"
        elif token in self.eos_ids and not params.ignore_eos:
            reason = "stop"
        elif token in params.stop_token_ids:
            reason, stop_reason = "stop", token
        text = ""
        if reason is None or params.include_stop:
            text = sequence.detokenizer.add(token)
        if reason is None and sequence.detokenizer.stopped:
            reason, stop_reason = "stop", sequence.detokenizer.stop_text
        if reason is None and len(sequence.row.output) >= params.max_tokens:
            reason = "length"
        logprobs = (drawn,) if params.logprobs >= 0 else ()
        if reason is None:
            routes = self._new_routes(sequence)
            return Update(request, sequence.row.choice, (token,), text, logprobs, routes=routes)
        last = self._end(sequence, reason)
        text += last.text
        return last._replace(tokens=(token,), text=text, logprobs=logprobs, stop_reason=stop_reason)

    def _sequence(self, request: Request, choice: int) -> Sequence:
        params, grammar = request.params, request.params.grammar
        matcher = None if grammar is None else grammar.matcher()
        row = Row(params, request.seed, choice, request.prompt, [], self.eos_ids, matcher)
        detokenizer = Detokenizer(
            self.tokenizer,
            request.prompt,
            stop=params.stop,
            include_stop=params.include_stop,
            min_tokens=params.min_tokens,
            skip_special_tokens=params.skip_special_tokens,
        )
        return Sequence(request, row, detokenizer)

    def _end(self, sequence: Sequence, reason: str = "abort") -> Update:
        """Remove a choice; return its last update, with the text that was held back."""
        routes = self._new_routes(sequence)
        self._remove(sequence)
        text = sequence.detokenizer.finish()
        choice = sequence.row.choice
        return Update(sequence.request, choice, (), text, (), reason, routes=routes)

    def _new_routes(self, sequence: Sequence) -> Routes | None:
        """Return the routes of the tokens that were read since the last update."""
        if self._routes is None or not sequence.request.params.return_routes:
            return None
        start, sequence.n_told = sequence.n_told, sequence.n_computed
        pages = sequence.tables[0].pages if sequence.tables else []
        return self._routes.read(pages, start, sequence.n_computed)

    def _remove(self, sequence: Sequence) -> None:
        self.scheduler.remove(sequence)
        self.sequences.remove(sequence)


class _Wanted:
    """The chunks of a pass, and which of its rows give logits: first those that score a prompt,
    then the last one of each sequence that is computed to its end."""

    def __init__(self, chunks: ListOf[Chunk]):
        self.chunks, first = chunks, 0
        self.scored: list[int] = []
        self.prompts: list[tuple[Sequence, int, int]] = []
        """Sequence, position of the first of its rows in `scored`, number of them."""
        self.sampled: list[int] = []
        self.sequences: list[Sequence] = []
        """One per row in `sampled`."""
        for sequence, n_new in chunks:
            start = sequence.n_computed
            if sequence.scores_prompt:
                request = sequence.request
                begin = max(start, request.params.prompt_logprobs_start - 1)
                end = min(start + n_new, len(request.prompt) - 1)
                if begin < end:
                    self.prompts.append((sequence, begin, end - begin))
                    self.scored += range(first + begin - start, first + end - start)
            if n_new == sequence.n_new:
                self.sampled.append(first + n_new - 1)
                self.sequences.append(sequence)
            first += n_new
