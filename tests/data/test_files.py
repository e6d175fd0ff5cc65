import os
import socket
from pathlib import Path

import pytest

from headway.config import UsageError
from headway.data import corpus, files
from headway.data.corpus import identity


def names(spec, root):
    return [file.path.relative_to(root).as_posix() for file in corpus.files(str(spec)).files]


def left_out(spec):
    return {what: n for what, n in corpus.files(str(spec)).left_out.items() if n}


@pytest.fixture
def linked(tmp_path):
    """A folder with a link to a folder elsewhere, one to a folder inside, two loops, a broken one."""
    (tmp_path / "else").mkdir()
    (tmp_path / "else" / "x.txt").write_text("x")
    root = tmp_path / "data"
    (root / "real").mkdir(parents=True)
    (root / "real" / "a.txt").write_text("a")
    (root / "elsewhere").symlink_to(tmp_path / "else")
    (root / "alias").symlink_to(root / "real")
    (root / "loop").symlink_to(root)
    (root / "real" / "up").symlink_to(tmp_path)
    (root / "broken.txt").symlink_to(root / "nothing")
    (root / "file.txt").symlink_to(tmp_path / "else" / "x.txt")
    os.mkfifo(root / "pipe")
    return root


def test_linked_folders_are_read_once_and_loops_end(linked):
    assert names(linked, linked) == ["elsewhere/x.txt", "file.txt", "real/a.txt"]
    assert left_out(linked) == {
        "links to folders that are read already": 1,
        "links to a folder around them": 2,
        "broken links": 1,
        "pipes, sockets and devices": 1,
    }


def test_glob_reads_a_linked_file_once_under_its_shortest_name(linked):
    assert names(linked / "**" / "*.txt", linked) == ["file.txt", "real/a.txt"]
    assert left_out(linked / "**" / "*.txt")["links to files that are read already"] == 1


def test_folder_of_hidden_folders_is_not_called_empty(tmp_path):
    (tmp_path / ".venv" / "lib").mkdir(parents=True)
    (tmp_path / ".venv" / "lib" / "a.py").write_text("x = 1")
    (tmp_path / ".env").write_text("x")
    with pytest.raises(UsageError) as caught:
        corpus.files(str(tmp_path))
    assert "holds no file to read; left out: hidden files (1), hidden folders (1)" in str(
        caught.value
    )
    assert names(tmp_path / ".venv", tmp_path) == [".venv/lib/a.py"]


def test_socket_as_a_source(tmp_path):
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(tmp_path / "s"))
    with pytest.raises(UsageError, match="left out: pipes, sockets and devices"):
        corpus.files(str(tmp_path / "s"))


@pytest.mark.parametrize("large", [False, True])
def test_identity_sees_a_change_that_keeps_size_and_time(tmp_path, monkeypatch, large):
    """As `cp -p`, rsync and tar leave it."""
    path, other = tmp_path / "a.txt", tmp_path / "b.txt"
    if large:
        monkeypatch.setattr(files, "SAMPLED_BYTES", 40_960)
    path.write_bytes(b"a" * 300_000)
    other.write_bytes(b"b" * 300_000)
    before, stat = identity(str(tmp_path)), path.stat()
    for place in (0, 299_999, *(() if large else (123_456,))):
        content = bytearray(b"a" * 300_000)
        content[place] = ord("x")
        path.write_bytes(content)
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
        assert path.stat().st_mtime_ns == stat.st_mtime_ns and identity(str(tmp_path)) != before
    path.write_bytes(b"a" * 300_000)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert identity(str(tmp_path)) == before


@pytest.mark.parametrize("suffix", files.COMPRESSED)
def test_damaged_packed_file_is_one_line(tmp_path, suffix):
    path = tmp_path / f"x.txt{suffix}"
    path.write_bytes(b"no such format, and long enough to tell")
    with pytest.raises(files.BadData) as caught, files.open_file(path) as file:
        file.read()
    assert str(caught.value).startswith(f"cannot read {path}: ") and "\n" not in str(caught.value)


def test_kind_is_told_by_the_inner_suffix():
    assert files.kind_of(Path("a/b.JSONL.gz")) == ".jsonl"
    assert files.kind_of(Path("a.tar.xz")) == ".tar"
    assert files.kind_of(Path(".gz")) == files.kind_of(Path("name")) == ""
