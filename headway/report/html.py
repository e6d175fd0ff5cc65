"""The report: one offline HTML file that draws itself from the numbers inside it."""

import base64
import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import suppress
from html import escape
from importlib import resources
from pathlib import Path

from headway.config import Config, UsageError, leaves
from headway.report.metrics import METRICS
from headway.report.ranking import ranking
from headway.report.runs import load_run

SCRIPTS = "format.js plot.js chart.js heat.js panels.js facts.js bars.js wire.js page.js".split()
"""Scripts of the page, in the order in which it runs them."""


def _asset(name: str) -> str:
    return (resources.files("headway.report") / "page" / name).read_text(encoding="utf-8")


def _embed(data: object) -> str:
    """Return JSON without <, > and &: no text of a model can end the script that holds it."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"


def _unique_names(runs: list[dict], folders: Sequence[Path]) -> None:
    """Rename two runs called `demo` to `a/demo` and `b/demo`, or to `demo (2)` where their folders
    have equal names too."""
    names = [r["name"] for r in runs]
    for run, folder in zip(runs, folders, strict=True):
        if names.count(run["name"]) > 1:
            full = folder.resolve()
            run["name"] = f"{full.parent.name}/{full.name}"
    seen: dict[str, int] = {}
    for run in runs:
        seen[run["name"]] = seen.get(run["name"], 0) + 1
        if seen[run["name"]] > 1:
            run["name"] += f" ({seen[run['name']]})"


def render(runs: list[dict]) -> str:
    """Return the page of runs from `load_run`; its policy forbids requests and other scripts."""
    style = _asset("style.css")
    script = "\n".join(_asset(name) for name in SCRIPTS)
    sources = f"style-src {_hash(style)}; script-src {_hash(script)}"
    data = {
        "runs": runs,
        "ranking": ranking(runs).sentence,
        "metrics": {m.name: dataclasses.asdict(m) for m in METRICS},
        "defaults": leaves(Config().to_dict()),  # the page marks what a recipe changed
    }
    parts = {
        "TITLE": escape("Headway: " + ", ".join(r["name"] for r in runs)),
        "POLICY": f"default-src 'none'; img-src data:; {sources}",
        "STYLE": style,
        "SCRIPT": script,
        "DATA": _embed(data),
    }
    # One pass over the template, so that a marker inside the data is never filled in.
    pieces = enumerate(_asset("template.html").split("%%"))
    return "".join(parts[piece] if i % 2 else piece for i, piece in pieces)


def write_report(run_dirs: Sequence[str | Path], out: str | Path) -> Path:
    """Write the report of one run, or of several in the same charts, to the file `out` and return
    its path. Raise UsageError as `load_runs` and `write_page` do."""
    return write_page(load_runs(run_dirs), out)


def load_runs(run_dirs: Sequence[str | Path]) -> list[dict]:
    """Return the runs of a page, each with a unique name. `run_dirs` are run folders with run.json
    and metrics.jsonl; a run that is still going is fine. Raises UsageError for a missing or corrupt
    run."""
    folders = [Path(d) for d in run_dirs]
    if not folders:
        fix = "give one or more run folders, as in `headway report runs/demo`"
        raise UsageError(f"no run to report; {fix}")
    runs = [load_run(folder) for folder in folders]
    _unique_names(runs, folders)
    return runs


def write_page(runs: list[dict], out: str | Path) -> Path:
    """Write the page of these runs to the file `out` and return its path. It is written under
    another name and renamed, so that a reader never sees half a page. Raise UsageError where it
    cannot be written."""
    return write_html(render(runs), out)


def static_page(title: str, body: str, style: str = "") -> str:
    """Return a page without scripts in the style of the report: `body` is HTML, `style` further
    rules. Its policy forbids requests."""
    style = _asset("style.css") + style
    policy = f"default-src 'none'; img-src data:; style-src {_hash(style)}"
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n"
        f'<body>\n<main id="main">\n{body}\n</main>\n</body>\n</html>\n'
    )


def write_html(page: str, out: str | Path) -> Path:
    """Write a page to the file `out`, complete or not at all, and return its path. Raise UsageError
    where it cannot be written."""
    out = Path(out)
    temporary = out.with_name(out.name + ".tmp")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, out)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise UsageError(f"cannot write {out}: {error.strerror}; choose another file") from None
    return out
