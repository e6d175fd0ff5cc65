"""Sources → files. A source is what the user names; its files come in a fixed order.

stdlib                 the .py files of the running interpreter's standard library
FILE, FOLDER or GLOB   .jsonl, .ndjson, and .json with an object per line (field `text`); .csv, .tsv
                       and .parquet (column `text`); anything else is text, one document per file;
                       each may be packed (.gz, .bz2, .xz, .zst); .parquet and .zst need `[data]`
hf:NAME[@CONFIG][:SPLIT[:N]]
                       a Hugging Face data set, streamed, or its first N rows (extra `[data]`)
set:NAME[:LABEL]       text out of packages: see text_sets.py
"""

import glob
import os
import sys
import sysconfig
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path

from headway.config import UsageError
from headway.data.files import Found, counted, once, ordinary, sampled_hashes, walk
from headway.data.records import HfName
from headway.data.text_sets import text_set

_NOT_LIBRARY = "site-packages dist-packages __pycache__ test tests idle_test lib-dynload".split()
# These say how and where this machine's Python was built.
_OF_THE_MACHINE = ("_sysconfigdata", "sitecustomize", "usercustomize", "config-")


def files(spec: str) -> Found:
    """Return the files of a source, sorted, and what else is there. Folders are searched for all
    but hidden files and `__pycache__`; `hf:NAME` has those of a local folder. UsageError if there
    are none."""
    if spec == "stdlib":
        return Found(ordinary(_stdlib_files(), Counter()))
    if spec.startswith("set:"):
        return text_set(spec)
    if spec.startswith("hf:"):
        folder = Path(HfName.parse(spec).name).expanduser()
        return walk(folder) if folder.is_dir() else Found()
    path = Path(spec).expanduser()
    if path.exists():
        left_out = Counter()
        source = walk(path) if path.is_dir() else Found(ordinary([path], left_out), left_out)
        if not source.files:
            reason = "is an empty folder; it needs text, .jsonl, .csv or .parquet files"
            if said := counted(source.left_out):
                reason = (
                    f"holds no file to read; left out: {said}; name such a folder or file itself"
                )
            raise UsageError(f"data source {spec!r} {reason}")
        return source
    # glob itself would follow a loop of links until names are too long, along every way there is
    first = path.parts.index("**") if "**" in path.parts else len(path.parts)
    pattern = path.parts[first:]
    matches, left_out = [], Counter()
    for match in map(Path, glob.glob(str(Path(*path.parts[:first])))):
        if match.is_dir():
            below = walk(match)
            left_out += below.left_out
            paths = ((file, file.path.relative_to(match).parts) for file in below.files)
            matches += [file for file, parts in paths if _matches(parts, pattern)]
        elif not pattern:
            matches += ordinary([match], left_out)
    source = Found(once(matches, left_out), left_out)
    if not source.files:
        what = "matches no file" if glob.has_magic(spec) else "does not exist"
        fix = "give stdlib, a file, a folder, a glob, hf:NAME[:SPLIT] or set:NAME"
        raise UsageError(f"data source {spec!r} {what}; {fix}")
    return source


def identity(spec: str) -> list:
    """Return what tells two states of a source apart, JSON-ready: absolute path, size, modification
    time and a hash of each file, sampled in large sources (`sampled_hashes`). A data set of the hub
    is known by its name: delete its folder in the cache to fetch it again."""
    listed = files(spec).files
    version = list(sys.version_info[:3]) if spec == "stdlib" else []
    label = spec if spec.startswith("hf:") else "files"
    stated = zip(listed, sampled_hashes(listed), strict=True)
    states = ([os.path.abspath(path), *state, digest] for (path, *state), digest in stated)
    return [label, version, *states]


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    """Return whether a pattern fits a path or a folder of it; `**` is any number of folders."""
    if not pattern:
        return True
    if pattern[0] == "**":
        return any(_matches(parts[n:], pattern[1:]) for n in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def _stdlib_files() -> list[Path]:
    root = Path(sysconfig.get_path("stdlib"))
    paths = []
    for here, folders, names in os.walk(root):
        searched = [name for name in folders if not name.startswith(_OF_THE_MACHINE)]
        folders[:] = [name for name in searched if name not in _NOT_LIBRARY]
        sources = [name for name in names if name.endswith(".py")]
        paths += [Path(here, name) for name in sources if not name.startswith(_OF_THE_MACHINE)]
    if not paths:
        problem = f"this Python has no library sources in {root}"
        raise UsageError(f"{problem}; give other data than stdlib")
    return sorted(paths, key=lambda path: path.relative_to(root).as_posix())
