"""Grammars: replies that match a JSON schema or a regular expression, through llguidance.

A grammar is compiled before its request is admitted, outside the engine's thread, and each choice
of the request takes a copy of its start. JSON is compact, with no white space between tokens, so
that a model which has learnt nothing ends too."""

import json
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from headway.config import UsageError
from headway.data.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

MAX_DEPTH = 64
"""Deepest nesting of a schema."""
MAX_SIZE = 1 << 17
"""Most characters of a schema or a regular expression."""

LIMITS = {
    "max_items_in_row": 2000,
    "initial_lexer_fuel": 1_000_000,  # 20 ms
    "step_lexer_fuel": 200_000,  # 14 ms
    "step_max_items": 50_000,  # 3 ms
    "max_lexer_states": 50_000,  # 100 MB
    "max_grammar_size": 500_000,
    "verbose_errors": False,
}
"""llguidance's bounds on work and memory, with its estimates."""

OPTIONS = {"whitespace_flexible": False, "lenient": False, "coerce_one_of": False}
"""Compact JSON; a keyword that is not supported is an error. They win over a schema's own."""

_PROBE = '{"a b":[1.5,"ü"]}'


class GrammarMatcher:
    """The state of a grammar in one choice: which tokens may come next."""

    def __init__(self, inner: "LLMatcher", n_vocab: int, eos_ids: tuple[int, ...]) -> None:
        self._inner, self._n_vocab = inner, n_vocab
        self._ends_V = np.zeros(n_vocab, bool)
        self._ends_V[list(eos_ids)] = True

    @property
    def failed(self) -> bool:
        """Whether the text cannot be completed: the grammar grew over its limits, or no token of
        the vocabulary leads on."""
        return self._inner.is_error() or (self._inner.is_stopped() and not self._accepts)

    @property
    def _accepts(self) -> bool:
        """Whether the text may end here."""
        return self._inner.is_accepting()

    def mask(self) -> np.ndarray:
        """Return bool `[V]`: the tokens that may follow; the ends of text alone once the text is
        complete and cannot go on, and where it has failed."""
        if not self._inner.is_stopped():
            bits = np.frombuffer(self._inner.compute_bitmask(), np.uint8)
            allowed_V = np.unpackbits(bits, count=self._n_vocab, bitorder="little").view(bool)
            if not self._inner.is_error() and allowed_V.any():
                return allowed_V
        return self._ends_V

    def accept(self, token: int) -> None:
        """Take the token that was drawn."""
        if not self._inner.is_stopped():
            self._inner.consume_token(token)


class CompiledGrammar:
    """A grammar at its start, for all choices of a request."""

    def __init__(self, inner: "LLMatcher", n_vocab: int, eos_ids: tuple[int, ...]) -> None:
        self._inner, self._n_vocab, self._eos_ids = inner, n_vocab, eos_ids

    def matcher(self) -> GrammarMatcher:
        """Return the state at the start of a reply."""
        return GrammarMatcher(self._inner.deep_copy(), self._n_vocab, self._eos_ids)


class GrammarCompiler:
    """Compiles grammars for a tokenizer, bytes included. Its methods may run on any thread.

    They raise UsageError, one line, for a grammar that llguidance does not support, that matches
    no text or is over the limits, and where llguidance is not installed."""

    def __init__(
        self,
        tokenizer: Tokenizer,
        eos_ids: tuple[int, ...] = (),
        limits: dict[str, Any] | None = None,
    ) -> None:
        """Args: eos_ids: the ends of text; () takes the tokenizer's. limits: instead of some of
        `LIMITS`."""
        self._tokenizer, self._eos_ids = tokenizer, eos_ids or tokenizer.eos_ids
        self._limits = {**LIMITS, **(limits or {})}

    def json_object(self) -> CompiledGrammar:
        """Return the grammar of any JSON object."""
        return self.json_schema({"type": "object"})

    def json_schema(self, schema: Any) -> CompiledGrammar:
        """Return the grammar of a JSON schema."""
        if not isinstance(schema, dict):
            raise UsageError(f"the schema is {type(schema).__name__}; give a JSON object")
        if _deeper_than(schema, MAX_DEPTH):
            raise UsageError(f"the schema is nested deeper than {MAX_DEPTH} levels; flatten it")
        _check_size("schema", len(json.dumps(schema)))
        grammar_from = self._library.LLMatcher.grammar_from_json_schema
        return self._compile("schema", lambda: grammar_from(schema, overrides=OPTIONS))

    def regex(self, pattern: Any) -> CompiledGrammar:
        """Return the grammar of a regular expression, which the whole reply matches (Rust's
        dialect: no look-around, no references)."""
        if not isinstance(pattern, str):
            raise UsageError(f"the regex is {type(pattern).__name__}; give a text")
        _check_size("regex", len(pattern))
        grammar_from = self._library.LLMatcher.grammar_from_regex
        return self._compile("regex", lambda: grammar_from(pattern))

    def _compile(self, kind: str, grammar_text: Callable[[], str]) -> CompiledGrammar:
        """Compile a grammar in llguidance's form, and compute its first mask."""
        library, vocabulary = self._library, self._vocabulary
        limits = library.LLParserLimits(**self._limits)
        try:
            grammar = grammar_text()
            check = library.LLMatcher.validate_grammar_with_warnings
            _, remarks = check(grammar, vocabulary, limits=limits)
            if not remarks:
                inner = library.LLMatcher(vocabulary, grammar, log_level=0, limits=limits)
                compiled = CompiledGrammar(inner, self._tokenizer.vocab_size, self._eos_ids)
                first = compiled.matcher()
                first.mask()
                if not first.failed:
                    return compiled
                remarks = [inner.get_error() or "it matches no text"]
        except (KeyboardInterrupt, SystemExit):
            raise
        except BaseException as error:  # a panic of the library is no Exception
            remarks = [str(error)]
        raise UsageError(f"the {kind} cannot be used: {_one_line(remarks[0])}")

    @cached_property
    def _library(self) -> Any:
        """Return llguidance."""
        try:
            import llguidance
        except ImportError:
            raise UsageError(
                "grammars need llguidance, which is not installed; pip install 'headway[serve]'"
            ) from None
        return llguidance

    @cached_property
    def _vocabulary(self) -> "LLTokenizer":
        """Return the tokens as llguidance reads them: bytes, special ones behind 0xFF, which is in
        no text."""
        tokenizer = self._tokenizer
        ids = tokenizer.encode(_PROBE).tolist()
        if b"".join(tokenizer.token_texts[i] for i in ids).strip() != _PROBE.encode():
            raise UsageError("the texts of the tokenizer's tokens do not join; grammars need that")
        texts = [text or b"\xff<%d>" % i for i, text in enumerate(tokenizer.token_texts)]
        special = [i for i, text in enumerate(texts) if text[:1] == b"\xff" and len(text) > 1]
        wrapper = self._library.TokenizerWrapper(
            _Vocabulary(tokenizer, texts, special, self._eos_ids[0])
        )
        return self._library.LLTokenizer(
            wrapper,
            n_vocab=tokenizer.vocab_size,
            eos_token=list(self._eos_ids),
            slices=self._library.LLTokenizer.json_slices(),
        )


class _Vocabulary:
    """A tokenizer in the form that llguidance reads."""

    bos_token_id = unk_token_id = None

    def __init__(
        self, tokenizer: Tokenizer, texts: list[bytes], special: list[int], eos: int
    ) -> None:
        self._tokenizer, self.tokens = tokenizer, texts
        self.special_token_ids, self.eos_token_id = special, eos

    def __call__(self, text: bytes | str) -> list[int]:
        text = text if isinstance(text, str) else text.decode("utf-8", "replace")
        return self._tokenizer.encode(text).tolist()


def _deeper_than(value: Any, depth: int) -> bool:
    """Say whether JSON is nested deeper than some levels; without recursion."""
    level = [value]
    for _ in range(depth + 1):
        inner = [v for v in level if isinstance(v, dict | list)]
        level = [x for v in inner for x in (v.values() if isinstance(v, dict) else v)]
        if not level:
            return False
    return True


def _check_size(kind: str, n: int) -> None:
    """Raise UsageError for a grammar of too many characters."""
    if n > MAX_SIZE:
        raise UsageError(f"the {kind} has {n:,} characters; give at most {MAX_SIZE:,}")


def _one_line(text: str) -> str:
    """Return a message of the library in one line of at most 300 characters."""
    return " ".join(text.split())[:300]
