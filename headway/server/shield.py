"""Special names in the text of a request stay text: they are broken before a template sees them."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from headway.config import UsageError

MARK = "\ufdd0"
"""A noncharacter of Unicode, for internal use: no text has it."""

RESERVED = re.compile("[\ufdd0-\ufdef]")
"""Noncharacters that only this package puts into a text."""


class Shield:
    """Keeps names of special tokens in strings of a request from becoming special tokens.

    A name inside a string gets marks between its characters; a string that ends with the
    beginning of a name gets one at its end, since the template may put another string after it. So
    whatever a template joins, a name that is whole in its text is one that the template wrote (or
    began to write: a role in `<|` + role + `|>` is the template's word)."""

    def __init__(self, special_tokens: Mapping[str, int]) -> None:
        self._ids = dict(special_tokens)
        self._names = re.compile(_pattern(self._ids) if self._ids else "(?!)")
        self._beginnings = {name[:n] for name in self._ids for n in range(1, len(name))}
        self._longest = max(map(len, self._beginnings), default=0)
        # A name of one character has no place for a mark: another noncharacter stands for it.
        short = [name for name in self._ids if len(name) == 1]
        stand_ins = {ord(name): chr(0xFDD2 + k) for k, name in enumerate(short)}
        self._broken = {name: MARK.join(name).translate(stand_ins) for name in self._ids}
        self._restore = {ord(MARK): ""} | {ord(char): chr(c) for c, char in stand_ins.items()}

    def cover(self, value: Any) -> Any:
        """Return a copy of JSON with its strings marked. Keys of objects are only marked where they
        hold a whole name, since templates look them up. Raises UsageError for reserved
        noncharacters."""
        match value:
            case str():
                return self._at_the_end(self._inside(value))
            case list() | tuple():
                return [self.cover(item) for item in value]
            case Mapping():
                return {self._inside(key): self.cover(item) for key, item in value.items()}
            case _:
                return value

    def parts(self, text: str) -> list[str | int]:
        """Divide a rendered text into the ids of its special names and the text between, without
        marks."""
        parts, end = [], 0
        for match in self._names.finditer(text):
            parts += [text[end : match.start()], self._ids[match[0]]]
            end = match.end()
        parts.append(text[end:])
        plain = (p.translate(self._restore) if isinstance(p, str) else p for p in parts)
        return [part for part in plain if part != ""]

    def _inside(self, text: str) -> str:
        """Break the names in a string."""
        if match := RESERVED.search(text):
            raise UsageError(
                f"a message has U+{ord(match[0]):04X}, which is no character of Unicode; remove it"
            )
        return self._names.sub(lambda name: self._broken[name[0]], text)

    def _at_the_end(self, text: str) -> str:
        """Mark the end of a string, and where its last white space begins, if the text up to there
        ends with the beginning of a name: templates trim."""
        bare = text.rstrip()
        for end in dict.fromkeys((len(text), len(bare))):
            if any(
                text[n:end] in self._beginnings for n in range(max(0, end - self._longest), end)
            ):
                text = text[:end] + MARK + text[end:]
        return text


def _pattern(names: Iterable[str]) -> str:
    """Return a pattern that matches the longest of some names, as a tree of their characters, which
    takes no longer for a thousand names than for one."""
    by_first: dict[str, list[str]] = {}
    for name in names:
        by_first.setdefault(name[:1], []).append(name[1:])
    complete = bool(by_first.pop("", None))
    branches = [re.escape(first) + _pattern(rest) for first, rest in by_first.items()]
    if not branches:
        return ""
    tree = branches[0] if len(branches) == 1 and not complete else f"(?:{'|'.join(branches)})"
    return tree + ("?" if complete else "")
