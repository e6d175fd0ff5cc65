"""The forms in which packages hold text, turned into files that a source reads."""

import json
import re
import shutil
from collections.abc import Callable, Mapping
from html.parser import HTMLParser
from pathlib import Path

DOCUMENT_BYTES = 4096
"""A long text is cut into documents of about this size, so that both splits get all of it."""

Unpack = Callable[[Path, Path], None]
"""Writes the text of an unpacked package (first) to a folder (second)."""


def restructured_text(package: Path, to: Path) -> None:
    """Keep the reStructuredText of a documentation package, which is there once more as HTML."""
    root = next(package.glob("usr/share/doc/*/Documentation"), package)
    for path in sorted(root.rglob("*.rst*")):
        if path.name.endswith((".rst", ".rst.gz")) and path.is_file():
            target = to / path.relative_to(root)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def languages(files: Mapping[str, str]) -> Unpack:
    """Return what writes one file of documents per language; `files`: language → name."""

    def unpack(package: Path, to: Path) -> None:
        for label, name in files.items():
            path = package / "usr/share/dasher" / f"training_{name}.txt"
            text = path.read_bytes().decode("utf-8", "replace").lstrip("\ufeff")
            _write_rows(to / label / f"{label}.jsonl", ({"text": x} for x in documents(text)))

    return unpack


def pages(label: str) -> Unpack:
    """Return what writes the text of each HTML page under the page's own name."""

    def unpack(package: Path, to: Path) -> None:
        root = package / "usr/share/libreoffice/help" / _folder_of(label) / "text"
        for path in sorted(root.rglob("*.html")):
            if text := page_text(path.read_text("utf-8", "replace")):
                target = (to / label / path.relative_to(root)).with_suffix(".txt")
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text(text + "\n", "utf-8")

    return unpack


def summaries(files: Mapping[str, str]) -> Unpack:
    """Return what writes title and summary of each article; `files`: language → part of a name."""

    def unpack(package: Path, to: Path) -> None:
        for label, name in files.items():
            path = next(package.rglob(f"summaries_{name}.json"))
            articles = json.loads(path.read_text("utf-8")).values()
            texts = (f"{article['title']}\n\n{article['extract']}\n" for article in articles)
            _write_rows(to / label / f"{label}.jsonl", ({"text": text} for text in texts))

    return unpack


def documents(text: str, size: int = DOCUMENT_BYTES) -> list[str]:
    """Cut a text after the first end of a line, or of a sentence in a long line, past `size` bytes
    of each part."""
    parts, part, held = [], [], 0
    for piece in re.split(r"(?<=\n)|(?<=[.!?।。] )|(?<=。)", text):
        part.append(piece)
        held += len(piece.encode())
        if held >= size:
            parts.append("".join(part))
            part, held = [], 0
    return [*parts, *(["".join(part)] if held else [])]


def page_text(html: str) -> str:
    """Return what a page of LibreOffice's help says: paragraphs, an empty line between them,
    without navigation."""
    page = _Page()
    page.feed(html)
    page.close()
    paragraphs = (" ".join(text.split()) for text in "".join(page.parts).split("\n"))
    return "\n\n".join(text for text in paragraphs if text)


class _Page(HTMLParser):
    """Collects the text below `<div id="DisplayArea">`."""

    SILENT = ("script", "style", "noscript", "nav", "header", "footer", "aside")
    BLOCKS = "p div br h1 h2 h3 h4 h5 h6 li tr td th pre table ul ol dt dd".split()
    VOID = ("br", "img", "input", "meta", "link", "hr", "base", "source", "col", "wbr")

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._depth = self._silent = 0
        """Open elements from the display area on; of them those that say nothing."""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if not self._depth and ("id", "DisplayArea") not in attrs:
            return
        if tag in self.BLOCKS:
            self.parts.append("\n")
        if tag not in self.VOID:
            self._depth += 1
            if self._silent or tag in self.SILENT:
                self._silent += 1

    def handle_endtag(self, tag: str) -> None:
        if not self._depth or tag in self.VOID:
            return
        self._depth -= 1
        self._silent = max(self._silent - 1, 0)
        if tag in self.BLOCKS:
            self.parts.append("\n")

    def handle_data(self, data: str) -> None:
        if self._depth and not self._silent:
            self.parts.append(data.replace("\n", " "))


def _folder_of(label: str) -> str:
    """Return LibreOffice's name of a language: `pt-br` is `pt-BR`."""
    language, _, country = label.partition("-")
    return f"{language}-{country.upper()}" if country else language


def _write_rows(path: Path, rows) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
