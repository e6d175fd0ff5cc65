"""Text sets from packages that are built here; the real ones are slow tests."""

import hashlib
import importlib.util
import json
import shutil
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.data import text_sets
from headway.data.corpus import files, identity
from headway.data.text_forms import documents, page_text
from headway.data.text_sets import LANGUAGES, PYTHON, Package, labels, manifests
from tests.data.test_corpus import texts

needs_dpkg = pytest.mark.skipif(not shutil.which("dpkg-deb"), reason="this is no Debian system")

PAGE = """<html><head><title>Seite</title><script>var x = "nein";</script></head><body>
<header><p>Kopf</p></header><div id="DisplayArea"><meta name="m"><nav>weg</nav>
<h1>Öffnen</h1><p class="a">Ein <b>fetter</b>
  Satz.<br>Noch einer &amp; mehr.</p><aside><p>daneben</p></aside><table><tr><td>A</td><td>B</td>
</tr></table></div><p>Fuß</p></body></html>"""


def build(folder: Path, package: str, version: str, contents: dict[str, str]) -> Path:
    """A Debian package with these files."""
    root = folder / "root"
    shutil.rmtree(root, ignore_errors=True)
    (root / "DEBIAN").mkdir(parents=True)
    control = f"Package: {package}\nVersion: {version}\nArchitecture: all\nMaintainer: x\n"
    (root / "DEBIAN" / "control").write_text(control + "Description: x\n")
    for name, text in contents.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    target = folder / f"{package}_{version.replace(':', '%3a')}_all.deb"
    subprocess.run(["dpkg-deb", "-b", str(root), str(target)], check=True, capture_output=True)
    return target


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """A folder of packages that `apt-get` and `apt-cache` of this test know, and a cache."""
    programs, held = tmp_path / "bin", tmp_path / "archive"
    programs.mkdir(), held.mkdir()
    scripts = {
        "apt-cache": "for f in ARCHIVE/$2_*; do v=${f##*/$2_}; v=${v%_all.deb}; "
        'echo "$2 | $v | here" | sed s/%3a/:/; done',
        "apt-get": 'name=${3%%=*}; version=$(echo "${3#*=}" | sed s/:/%3a/); '
        'cp ARCHIVE/${name}_${version}_all.deb . || { echo "E: gone" >&2; exit 100; }',
    }
    for name, script in scripts.items():
        path = programs / name
        path.write_text("#!/bin/bash\nshopt -s nullglob\n" + script.replace("ARCHIVE", str(held)))
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{Path(shutil.which('dpkg-deb')).parent}:/bin:/usr/bin")
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    return held


def error(spec: str) -> str:
    with pytest.raises(UsageError) as caught:
        files(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def page_of(label: str, text: str) -> dict[str, str]:
    return {f"usr/share/libreoffice/help/{label}/text/shared/a.html": text}


@needs_dpkg
def test_pages_are_fetched_once_and_kept_by_language(archive, tmp_path, capfd):
    version = text_sets.HELP_VERSION
    for label, folder in (("de", "de"), ("pt-br", "pt-BR")):
        build(tmp_path, f"libreoffice-help-{label}", version, page_of(folder, PAGE))
        shutil.move(next(tmp_path.glob("*.deb")), archive)
    read = texts("set:help:de")
    assert "".join(read) == "Öffnen\n\nEin fetter Satz.\n\nNoch einer & mehr.\n\nA\n\nB\n"
    assert capfd.readouterr().err == f"fetching libreoffice-help-de {version}\n"
    [path] = [file.path for file in files("set:help:pt-br").files]
    assert path.parts[-4:] == ("text", "pt-br", "shared", "a.txt")
    shutil.rmtree(archive)
    before = identity("set:help:de")
    assert texts("set:help:de") == read and identity("set:help:de") == before
    [(name, manifest)] = manifests("set:help:de").items()
    assert name == "libreoffice-help-de-4_7.4.7-1+deb12u14"
    line = f"de/shared/a.txt\0{hashlib.sha256(''.join(read).encode()).hexdigest()}\n"
    assert manifest["text_sha256"] == hashlib.sha256(line.encode()).hexdigest()
    assert (manifest["files"], manifest["bytes"]) == (1, len("".join(read).encode()))
    assert "libreoffice-help-fr is not known here; run apt-get update" in error("set:help:fr")


@needs_dpkg
def test_another_version_is_said_and_a_changed_package_refused(archive, capfd):
    contents = {"usr/share/doc/linux-doc-6.1/Documentation/a/b.rst": "Title\n=====\n"}
    build(archive, "linux-doc-6.1", "6.1.999-1", contents)
    assert [file.path.name for file in files("set:kernel-docs").files] == ["b.rst"]
    assert "linux-doc-6.1-6.1.999-1 in place of version 6.1.192-2" in capfd.readouterr().err
    files("set:kernel-docs")
    assert "in place of" in capfd.readouterr().err, "said at each use"
    shutil.rmtree(text_sets.cache_root() / "texts")
    build(archive, "linux-doc-6.1", "6.1.192-2", contents)
    assert "not the recorded d1d1b5a602f0d439" in error("set:kernel-docs")
    assert not list((text_sets.cache_root() / "texts").glob("linux*")), "nothing is left behind"


def test_what_cannot_be_had_is_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path / "cache"))
    assert "there are python, kernel-docs" in error("set:books")
    assert "it has bn, cs, cy" in error("set:languages:xx") and "none" in error("set:kernel-docs:x")
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "needs apt-cache, which this system does not have" in error("set:help:de")
    missing = Package("headway-no-such-package", "1", "", lambda a, b: None, pypi=True)
    monkeypatch.setattr(text_sets, "packages", lambda name, label: [missing])
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    assert "cannot fetch headway-no-such-package: ERROR:" in error("set:wiki")


def test_python_is_the_installed_packages():
    found = [file.path for file in files("set:python:numpy").files]
    root = Path(importlib.util.find_spec("numpy").origin).parent
    assert found == sorted(found) and all(path.is_relative_to(root) for path in found)
    assert root / "__init__.py" in found and {path.suffix for path in found} == {".py"}
    assert labels("python") == list(PYTHON)
    assert len(files("set:python").files) > len(found)


@given(st.text(alphabet="ab\n. 。é", max_size=300), st.integers(1, 40))
@settings(deadline=None)
def test_documents_are_the_text_in_parts(text, size):
    parts = documents(text, size)
    assert "".join(parts) == text and all(parts)
    for part in parts[:-1]:
        assert len(part.encode()) >= size and part[-1] in "\n 。"


def test_text_of_a_page_leaves_out_what_is_around_it():
    assert page_text(PAGE).startswith("Öffnen\n\n") and "daneben" not in page_text(PAGE)
    assert page_text("<p>no display area</p>") == ""


@pytest.mark.slow
@needs_dpkg
def test_languages_and_summaries_are_what_they_were(tmp_path, monkeypatch):
    monkeypatch.setenv("HEADWAY_CACHE", str(tmp_path))
    for label in ("de", "cy"):
        assert sum(map(len, texts(f"set:languages:{label}"))) > 100_000
    assert len(files("set:languages").files) == len(LANGUAGES)
    assert len(texts("set:wiki:en")) == 10_033
    rows = [manifests(spec) for spec in ("set:languages", "set:wiki")]
    digests = [row["text_sha256"] for one in rows for row in one.values()]
    assert [digest[:16] for digest in digests] == ["bf99be708ca2ab41", "e767b72e54afe60b"], (
        json.dumps(rows)
    )
