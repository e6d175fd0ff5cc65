"""A tokenizer in the keys of a GGUF file: byte-level BPE, as llama.cpp reads it."""

import json
from typing import Any, NamedTuple

from headway.config import UsageError
from headway.data.tokenizer import WORDS, ByteTokenizer, Tokenizer
from headway.hub.export_tokenizer import token_names

_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5
_NEVER = "À À"
"""Two bytes (C0 C0) that no UTF-8 holds: llama.cpp wants one merge at least."""

_PATTERNS = {WORDS.replace(r"\p{N}|", r"\p{N}{1,3}|"): "llama-bpe", WORDS: "qwen2"}
"""Regular expression that cuts text into words → llama.cpp's name of it."""


class GgufTokenizer(NamedTuple):
    """What llama.cpp needs to know."""

    tokens: list[str]
    types: list[int]
    merges: list[str]
    pre: str
    """Name of the pattern that cuts text into words."""
    exact: bool
    """Whether llama.cpp has that pattern; else `pre` is the nearest, and some words are cut
    elsewhere."""


def gguf_tokenizer(tokenizer: Tokenizer) -> GgufTokenizer:
    """Return the tokens, merges and pattern of a tokenizer. Raises UsageError for one that is no
    byte-level BPE."""
    text = tokenizer.to_json()
    spec = json.loads(text)
    stages = json.dumps([spec.get("decoder"), spec.get("pre_tokenizer")])
    if spec["model"].get("type") != "BPE" or '"ByteLevel"' not in stages:
        raise UsageError(
            "a GGUF file is written with byte-level BPE, and this tokenizer is "
            f"{spec['model'].get('type')}; use --format hf and llama.cpp's convert_hf_to_gguf.py"
        )
    names, added = token_names(text), {entry["id"]: entry for entry in spec["added_tokens"]}
    ids = range(tokenizer.vocab_size)
    types = [_UNUSED if i not in names else _NORMAL for i in ids]
    for i, entry in added.items():
        types[i] = _CONTROL if entry["special"] else _USER_DEFINED
    merges = [m if isinstance(m, str) else " ".join(m) for m in spec["model"]["merges"]]
    pre, exact = _pattern(spec["pre_tokenizer"])
    if isinstance(tokenizer, ByteTokenizer):
        merges, exact = [_NEVER], True  # however words are cut, each byte is a token
    return GgufTokenizer([names.get(i, f"[PAD{i}]") for i in ids], types, merges, pre, exact)


def _pattern(pre_tokenizer: dict[str, Any]) -> tuple[str, bool]:
    """Return llama.cpp's name of how text is cut, or the nearest, and whether it is the same."""
    stages = pre_tokenizer.get("pretokenizers", [pre_tokenizer])
    kinds = [stage["type"] for stage in stages]
    if kinds == ["ByteLevel"] and stages[0]["use_regex"]:
        return "gpt-2", True
    if kinds == ["Digits", "ByteLevel"] and stages[0]["individual_digits"]:
        return "smollm", True
    for stage in stages:
        regex = stage.get("pattern", {}).get("Regex", "") if stage["type"] == "Split" else ""
        if regex in _PATTERNS:
            return _PATTERNS[regex], True
    return "llama-bpe", False
