"""Machine, versions, commit."""

import json
import platform
import subprocess

import pytest
import torch

import headway
from headway.report.provenance import commit, machine, provenance, versions


def git(folder, *arguments):
    identity = ("-c", "user.name=Test", "-c", "user.email=test@example.org")
    done = subprocess.run(
        ["git", "-C", str(folder), *identity, *arguments],
        check=True,
        capture_output=True,
        text=True,
    )
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path):
    """A repository with the package folder `pkg` and a file beside it."""
    (tmp_path / "pkg").mkdir()
    (tmp_path / "pkg" / "code.py").write_text("x = 1\n")
    (tmp_path / "bench.py").write_text("y = 1\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    return tmp_path


def test_a_clean_tree(tree):
    assert commit(tree / "pkg") == (git(tree, "rev-parse", "HEAD"), False)


@pytest.mark.parametrize(
    ("file", "dirty"),
    [("pkg/code.py", True), ("bench.py", True), ("pkg/new.py", True), ("notes.txt", False)],
)
def test_dirty(tree, file, dirty):
    (tree / file).write_text("changed\n")
    assert commit(tree / "pkg")[1] is dirty


def test_a_folder_that_does_not_count(tree):
    (tree / "docs").mkdir()
    (tree / "docs" / "numbers.json").write_text("1")
    git(tree, "add", ".")
    git(tree, "commit", "-q", "-m", "second")
    (tree / "docs" / "numbers.json").write_text("2")
    assert commit(tree / "pkg")[1] and not commit(tree / "pkg", besides="docs")[1]
    (tree / "bench.py").write_text("changed\n")
    assert commit(tree / "pkg", besides="docs")[1]


def test_outside_git_and_without_git(tmp_path, monkeypatch):
    assert commit(tmp_path) == ("unknown", False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert commit(tmp_path) == ("unknown", False)


def test_an_installed_package_does_not_take_the_commit_of_the_folder_around_it(tree):
    (tree / ".gitignore").write_text(".venv\n")
    installed = tree / ".venv" / "headway"
    installed.mkdir(parents=True)
    (installed / "code.py").write_text("")
    assert commit(installed) == ("unknown", False)


def test_versions_and_machine_are_this_process():
    info = versions()
    assert info["python"] == platform.python_version()
    assert info["torch"] == torch.__version__
    assert set(info) == {"python", "torch", "cuda", "triton", "numpy", "safetensors", "headway"}
    assert info["headway"] == headway.__version__
    here = machine()
    assert here["cpu_capability"] == torch.backends.cpu.get_cpu_capability()
    assert isinstance(here["cores"], int) and here["cores"] >= 1
    assert isinstance(here["memory_gib"], float) and here["memory_gib"] > 0.1
    assert (here["gpu"] is None) == (not torch.cuda.is_available())


def test_provenance_is_json_without_this_machines_name():
    text = json.dumps(provenance())
    assert set(json.loads(text)) == {"commit", "dirty", "versions", "machine"}
    assert platform.node() not in text or len(platform.node()) < 4
