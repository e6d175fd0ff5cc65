"""Text ↔ token ids: bytes, or any `tokenizer.json`, which `train_bpe` makes."""

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Protocol

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from headway.config import UsageError
from headway.data.decode_stream import ByteStream, DecodeStream, WindowStream
from headway.data.worlds.spec import parse_world

EOS_NAMES = """
<|endoftext|> <|end_of_text|> </s> <eos> <|eos|> <｜end▁of▁sentence｜> <|im_end|> [EOS]
""".split()
"""Names under which a `tokenizer.json` is searched for its end of document, in this order."""

WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How `train_bpe` cuts text into words: as Qwen2, which llama.cpp knows; each digit by itself."""


class Tokenizer(Protocol):
    """What the rest of the system needs of a tokenizer."""

    vocab_size: int
    """The ids are 0 … vocab_size − 1."""
    eos: int
    """The id that ends every document; no text encodes to it."""
    eos_ids: tuple[int, ...]
    """The ids that end a text when they are written: eos, and another one where the files of the
    tokenizer name it, as a chat model's end of a turn."""
    bos: int | None
    """The id that the tokenizer's own post-processor puts before a text; None where it puts none.
    `encode` leaves it out."""
    token_texts: Sequence[bytes]
    """The bytes of text in UTF-8 that each id stands for; none for eos and other special ids."""
    token_bytes: np.ndarray
    """int64 [vocab_size]: how many bytes those are."""
    special_tokens: Mapping[str, int]
    """Ids that no text encodes to, by their names; eos is one of them."""
    fingerprint: str
    """Equal for equal tokenizers, wherever their files lie."""

    def encode(self, text: str) -> np.ndarray:
        """Return the uint32 ids of a text, without eos; uint8 for bytes."""
        ...

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of many texts, on several threads where the library has them."""
        ...

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of a text in which special tokens stand: parts are texts, encoded as by
        `encode`, and ids. They are those of the library for the text with the tokens' names."""
        ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text. Special ids vanish or show their names, ids outside the vocabulary
        vanish, bytes that are not UTF-8 become U+FFFD."""
        ...

    def decode_stream(
        self, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> DecodeStream:
        """Return a decoder of ids that come one at a time, and continue the text of `before`: a
        space that is not shown at the start of a text is shown inside it."""
        ...

    def to_json(self) -> str:
        """Return a tokenizer.json with the same ids."""
        ...


class ByteTokenizer:
    """257 ids: 0…255 are the bytes of the text in UTF-8, 256 (`<|endoftext|>`) ends a document."""

    vocab_size, eos, fingerprint = 257, 256, "bytes-257"
    eos_ids: tuple[int, ...] = (256,)
    bos: int | None = None
    token_texts: Sequence[bytes] = (*(bytes([i]) for i in range(256)), b"")
    token_bytes = np.array([1] * 256 + [0], dtype=np.int64)
    special_tokens: Mapping[str, int] = MappingProxyType({"<|endoftext|>": 256})

    def encode(self, text: str) -> np.ndarray:
        """Return uint8 [bytes of the text]."""
        return np.frombuffer(text.encode("utf-8"), np.uint8)

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text."""
        return [self.encode(text) for text in texts]

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Return the bytes of the texts, and the ids among them."""
        return [i for part in parts for i in ([part] if isinstance(part, int) else part.encode())]

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text; ids beyond eos, which a padded vocabulary may sample, vanish."""
        return _joined(self.decode_stream(skip_special_tokens), ids)

    def decode_stream(
        self, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> DecodeStream:
        """Return a decoder of ids that come one at a time."""
        return ByteStream(self.token_texts, _shown_names(self, skip_special_tokens))

    def to_json(self) -> str:
        """Return a byte-level BPE without merges; `<|endoftext|>` is 256."""
        bpe = models.BPE(vocab=dict(_BYTE_OF_CHAR), merges=[])
        inner = tokenizers.Tokenizer(bpe)
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        inner.decoder = decoders.ByteLevel()
        inner.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
        return inner.to_str(pretty=True)


class JsonTokenizer:
    """A `tokenizer.json`. Special tokens written out in a text are encoded as ordinary text, never
    as the special id.

    For byte-level BPE `token_bytes` and `decode` are exact. Other kinds (SentencePiece, WordPiece)
    may normalise the text and add or lose spaces; there `token_bytes` counts what each token shows,
    and a data set scales it to the bytes of its text (`Tokens.count_text`)."""

    def __init__(self, path: Path, content: str = "", eos_token: str = ""):
        """Load a file, or the `content` that was read from it. `eos_token`, where given, ends a
        text too; it ends documents where none of EOS_NAMES is in the vocabulary."""
        try:
            content = content or path.read_text("utf-8")
            self._inner = tokenizers.Tokenizer.from_str(content)
            spec = json.loads(content)
        except OSError as error:
            raise UsageError(
                f"cannot read tokenizer {str(path)!r}: {error.strerror}; "
                "give bytes or the path of a tokenizer.json"
            ) from None
        except Exception as error:  # what the library raises for a file that is no tokenizer
            reason = (str(error).splitlines() or ["unknown format"])[0]
            raise UsageError(
                f"{path} is no tokenizer.json: {reason}; make one with `headway tokenize`"
            ) from None
        self._made_from = (path, content, eos_token)
        _plain(self._inner)
        # A file written with other white space is the same tokenizer.
        self.fingerprint = hashlib.sha256(json.dumps(spec, sort_keys=True).encode()).hexdigest()
        vocabulary = self._inner.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        names = (*EOS_NAMES, *filter(None, [eos_token]))
        eos = next((vocabulary[name] for name in names if name in vocabulary), None)
        if eos is None:
            names = ", ".join(EOS_NAMES[:4])
            raise UsageError(
                f"{path} has no end-of-document token ({names}, …); add <|endoftext|> to it"
            )
        self.eos = eos
        self.eos_ids = tuple(dict.fromkeys([eos, vocabulary.get(eos_token, eos)]))
        whole, plain = (self._inner.encode("a", add_special_tokens=b).ids for b in (True, False))
        self.bos: int | None = whole[0] if whole[:1] != plain[:1] else None
        added = self._inner.get_added_tokens_decoder()
        stages = json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
        byte_level = '"ByteLevel"' in stages
        # Where a token's text is the same in every neighbourhood but for spaces at the start of a
        # text: how many of them are not shown. None leaves the text to the library.
        self._spaces = 0 if byte_level else _spaces_dropped(spec.get("decoder"))
        special = {i for i in added if added[i].special} | {self.eos}
        self.special_tokens: Mapping[str, int] = {
            token: i for token, i in vocabulary.items() if i in special
        }
        self._strip_before = {i for i in special if i in added and added[i].lstrip}
        self._strip_after = {i for i in special if i in added and added[i].rstrip}
        self._inside = _without_first_space(self._inner, spec)
        texts = [b""] * self.vocab_size
        for token, i in vocabulary.items():
            if i not in special:
                as_added = i in added and (byte_level or self._spaces is None)
                texts[i] = token.encode() if as_added else _shown(token, byte_level)
        self.token_texts: Sequence[bytes] = texts
        self.token_bytes = np.array([len(text) for text in texts], dtype=np.int64)

    def __reduce__(self) -> tuple:
        """Pickle the content: the library's own pickles lose `encode_special_tokens`."""
        return JsonTokenizer, self._made_from

    def encode(self, text: str) -> np.ndarray:
        """Return uint32 [tokens], without eos or any other special token."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Return `encode` of each text, on all cores unless TOKENIZERS_PARALLELISM=false."""
        encodings = self._inner.encode_batch_fast(list(texts), add_special_tokens=False)
        return [np.array(encoding.ids, dtype=np.uint32) for encoding in encodings]

    def encode_parts(self, parts: Sequence[str | int]) -> list[int]:
        """Return the ids of texts between special tokens.

        As in the library, a special token may take the white space beside it, and SentencePiece's
        space before a word is only put at the start of the first text where the file says so."""
        ids: list[int] = []
        for k, part in enumerate(parts):
            if isinstance(part, int):
                ids.append(part)
                continue
            if k > 0 and parts[k - 1] in self._strip_after:
                part = part.lstrip()
            if k + 1 < len(parts) and parts[k + 1] in self._strip_before:
                part = part.rstrip()
            inner = self._inside if k > 0 else self._inner
            ids += inner.encode(part, add_special_tokens=False).ids if part else []
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Return the text. Special ids vanish or show their names, ids outside the vocabulary
        vanish."""
        if self._spaces is not None:
            return _joined(self.decode_stream(skip_special_tokens), ids)
        return self._decode_by_library(ids, skip_special_tokens)

    def decode_stream(
        self, skip_special_tokens: bool = True, before: Sequence[int] = ()
    ) -> DecodeStream:
        """Return a decoder of ids that come one at a time, and continue the text of `before`."""
        before = before[-8:]
        if self._spaces is None:
            return WindowStream(
                lambda ids: self._decode_by_library(ids, skip_special_tokens), before
            )
        names = _shown_names(self, skip_special_tokens)
        inside = any(i in names or (i < self.vocab_size and self.token_texts[i]) for i in before)
        return ByteStream(self.token_texts, names, 0 if inside else self._spaces)

    def _decode_by_library(self, ids: Iterable[int], skip_special_tokens: bool) -> str:
        """Return the text of ids whose decoder is the library's alone."""
        known = [i for i in map(int, ids) if i < self.vocab_size]
        return self._inner.decode(known, skip_special_tokens=skip_special_tokens)

    def to_json(self) -> str:
        """Return the file as it was read."""
        return self._made_from[1]


def _joined(stream: DecodeStream, ids: Iterable[int]) -> str:
    """Return the text of all ids."""
    return "".join([*(stream.step(int(i)) for i in ids), stream.finish()])


def _shown_names(tokenizer: Tokenizer, skip_special_tokens: bool) -> Mapping[int, bytes]:
    """Return the names of the special ids that are to be shown."""
    names = {} if skip_special_tokens else tokenizer.special_tokens
    return {i: name.encode() for name, i in names.items()}


def load_tokenizer(spec: str) -> Tokenizer:
    """Load `bytes`, a `tokenizer.json` by its path or folder, or the words of worlds, `world:TASK…`
    with blanks between several. Raise UsageError if unreadable."""
    if spec == "bytes":
        return ByteTokenizer()
    if spec.startswith("world:"):
        return word_tokenizer([word for world in spec.split() for word in parse_world(world).words])
    path = Path(spec).expanduser()
    path = path / "tokenizer.json" if path.is_dir() else path
    return JsonTokenizer(path, eos_token=eos_token(path.with_name("tokenizer_config.json")))


def word_tokenizer(words: Iterable[str]) -> JsonTokenizer:
    """Return a tokenizer of texts that are words with blanks between them. The ids are those of the
    words in their order, each once, then `<|unknown|>` and `<|endoftext|>`, which ends a text."""
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys([*words, "<|unknown|>"]))}
    inner = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<|unknown|>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True)])
    return JsonTokenizer(Path("words"), inner.to_str(pretty=True))


def eos_token(path: Path) -> str:
    """Return the name of the end of a text in a tokenizer_config.json; "" where there is none."""
    try:
        token = json.loads(path.read_text("utf-8")).get("eos_token") or ""
        return token if isinstance(token, str) else token["content"]
    except OSError:
        return ""
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{path} cannot be read ({error}); restore it or remove it") from None


def train_bpe(texts: Iterable[str], vocab_size: int, path: Path | str) -> Tokenizer:
    """Train byte-level BPE (Sennrich et al. 2016, on bytes as in GPT-2) and write it to `path` as
    `tokenizer.json`.

    Any text can be encoded, since all 256 bytes are tokens; `<|endoftext|>` is id 0. A small corpus
    may have fewer pairs to merge than asked for, so read the size from the result. UsageError for
    fewer than 257 ids or no text."""
    if vocab_size < 257:
        raise UsageError(
            f"vocab_size {vocab_size} is too small for byte-level BPE; use 257 (bytes, eos) or more"
        )
    target = Path(path)
    if not target.parent.is_dir():
        raise UsageError(f"cannot write {str(path)!r}: its folder does not exist")
    inner = tokenizers.Tokenizer(models.BPE())
    words = pre_tokenizers.Split(tokenizers.Regex(WORDS), behavior="isolated")
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.pre_tokenizer = pre_tokenizers.Sequence([words, as_bytes])
    inner.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|endoftext|>"],
        show_progress=False,
    )
    seen = 0

    def counted() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen += len(text)
            yield text

    inner.train_from_iterator(counted(), trainer)
    if not seen:
        raise UsageError("there is no text to train a tokenizer on; give another data source")
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        temporary.write_text(inner.to_str(pretty=True), "utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot write {str(path)!r}: {error.strerror}") from None
    return JsonTokenizer(target)


def _plain(inner: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """Let a tokenizer of the library encode all of a text, and special names in it as text."""
    inner.encode_special_tokens = True
    inner.no_truncation()
    inner.no_padding()
    return inner


def _without_first_space(inner: tokenizers.Tokenizer, spec: dict) -> tokenizers.Tokenizer:
    """Return the tokenizer for a text that does not start the whole: `inner` itself, unless its
    file puts a space before the first word of the whole alone."""
    stages = json.dumps([spec.get("normalizer"), spec.get("pre_tokenizer")], ensure_ascii=False)
    if '"prepend_scheme": "first"' not in stages:
        return inner
    normalizer, pre_tokenizer = json.loads(stages.replace('"first"', '"never"'))
    changed = {**spec, "normalizer": normalizer, "pre_tokenizer": pre_tokenizer}
    return _plain(tokenizers.Tokenizer.from_str(json.dumps(changed)))


def _spaces_dropped(decoder: dict | None) -> int | None:
    """Return how many spaces the first token of a text loses when it is shown by a SentencePiece
    decoder of a tokenizer.json; None for a decoder of another kind."""
    n, stages = 0, (decoder or {}).get("decoders", [decoder])
    for stage in stages:
        match stage:
            case {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}:
                pass
            case {"type": "ByteFallback"} | {"type": "Fuse"}:
                pass
            case {"type": "Strip", "content": " ", "start": 0 | 1 as start, "stop": 0}:
                n = max(n, start)
            case {"type": "Metaspace", "replacement": "▁"}:
                n = 0 if stage.get("prepend_scheme") == "never" else sys.maxsize
            case _:
                return None
    return n


def _byte_of_char() -> dict[str, int]:
    """Return GPT-2's table, a printable character per byte; unprintable ones start at U+0100."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = [*map(chr, printable), *(chr(256 + i) for i in range(len(others)))]
    return dict(zip(chars, [*printable, *others], strict=True))


_BYTE_OF_CHAR = _byte_of_char()


def _shown(token: str, byte_level: bool) -> bytes:
    """Return the bytes of text that a token of the vocabulary stands for."""
    if byte_level and all(char in _BYTE_OF_CHAR for char in token):
        return bytes(_BYTE_OF_CHAR[char] for char in token)
    if match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", token):  # SentencePiece's single byte
        return bytes([int(match[1], 16)])
    return token.removeprefix("##").replace("▁", " ").encode()
