import builtins
import json
import random
import sys
import sysconfig
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from headway.config import UsageError
from headway.data import corpus, document
from headway.data import records as rows
from headway.data.document import Text, TextFile, split
from headway.data.units import plan, read, train_texts


def texts(spec, val_fraction=0.05, skip_bad=False):
    """Every document of a source; a lone one in two parts."""
    made = []
    for unit in plan(str(spec), val_fraction)[0]:
        for piece in read(unit, skip_bad):
            if piece.begins:
                made.append("")
            made[-1] += piece.text
    return [text for text in made if text]


def parts(spec, val_fraction=0.2):
    made = {"train": [], "val": []}
    for part, text in split(texts(spec, val_fraction), val_fraction):
        made[part].append(text)
    return made


def paths(spec):
    return [file.path for file in corpus.files(spec).files]


def whole(document):
    return "".join(piece.text for piece in document.pieces())


def error(spec):
    with pytest.raises(UsageError) as caught:
        texts(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---- sources ----


def test_stdlib_is_library_code_in_a_fixed_order():
    found = paths("stdlib")
    root = Path(sysconfig.get_path("stdlib"))
    names = [path.relative_to(root).as_posix() for path in found]
    assert {"argparse.py", "json/decoder.py", "asyncio/events.py"} <= set(names)
    assert names == sorted(names)
    for name in names:
        folders = set(name.split("/")[:-1])
        left_out = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
        assert not folders & left_out and name.endswith(".py")
    assert not any("_sysconfigdata" in name for name in names)
    documents = texts("stdlib")
    assert len(documents) > 200
    assert (root / "argparse.py").read_bytes().decode() in documents


def test_folder_is_read_recursively_and_sorted(tmp_path):
    for name, text in {"b.txt": "B", "a/z.md": "AZ", "a/b.py": "AB", "c.txt": ""}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    (tmp_path / ".hidden").write_bytes(b"\0\0")
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x").write_text("no")
    assert texts(tmp_path) == ["AB", "AZ", "B"]
    assert "".join(texts(tmp_path / "**" / "*.md")) == "AZ"
    assert texts(tmp_path / "a*") == ["AB", "AZ"]  # a glob that matches a folder
    assert texts(tmp_path / "**") == ["AB", "AZ", "B"]  # nothing twice


def test_text_keeps_every_character_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "PIECE_BYTES", 7)
    text = "é日本\r\n𝄞 line\nlonger line without an end ü"
    (tmp_path / "t.txt").write_bytes(text.encode())
    pieces = list(TextFile(tmp_path / "t.txt", 0, len(text.encode())).pieces())
    assert "".join(piece.text for piece in pieces) == text and len(pieces) > 3
    assert [piece.begins for piece in pieces] == [True] + [False] * (len(pieces) - 1)
    assert [piece.ends for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    monkeypatch.setattr(document, "PIECE_BYTES", 28)
    in_memory = list(Text("", text).pieces())
    assert in_memory == list(TextFile(tmp_path / "t.txt").pieces()) and len(in_memory) == 2


def test_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "t.txt").write_bytes("\ufeffabc".encode())
    assert "".join(texts(tmp_path / "t.txt")) == "abc"


def test_jsonl_and_parquet(tmp_path):
    rows = ["one", "zwei ü", "", "drei\nlines"]
    lines = [json.dumps({"id": i, "text": text}) for i, text in enumerate(rows)]
    (tmp_path / "d.jsonl").write_text("\n".join(lines) + "\n\n")
    pq.write_table(pa.table({"text": rows, "n": [1, 2, 3, 4]}), tmp_path / "d.parquet")
    wanted = ["one", "zwei ü", "drei\nlines"]
    assert texts(tmp_path / "d.jsonl") == wanted
    assert texts(tmp_path / "d.parquet") == wanted
    assert texts(tmp_path) == wanted * 2


def test_lone_surrogates_are_replaced(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"text": "a\\ud800b"}\n{"text": "\\ud834\\udd1e"}')
    assert texts(tmp_path / "d.jsonl") == ["a\ufffdb", "𝄞"]


def test_hugging_face_local_data_set(tmp_path):
    rows = [f"row {i}" for i in range(9)]
    (tmp_path / "plain").mkdir()
    for name, part in {"train": rows[:6], "test": rows[6:]}.items():
        lines = [json.dumps({"text": text}) for text in part]
        (tmp_path / "plain" / f"{name}.jsonl").write_text("\n".join(lines))
    plain = f"hf:{tmp_path / 'plain'}"
    assert texts(plain) == rows[:6]
    assert texts(plain + ":test") == rows[6:]
    assert texts(plain + ":train:2") == rows[:2]
    saved = datasets.Dataset.from_dict({"text": rows})
    saved.save_to_disk(tmp_path / "saved")
    assert texts(f"hf:{tmp_path / 'saved'}") == rows
    datasets.DatasetDict({"dev": saved}).save_to_disk(tmp_path / "both")
    assert texts(f"hf:{tmp_path / 'both'}:dev") == rows
    assert "nothing" in error(plain + ":nothing")
    assert "it has dev" in error(f"hf:{tmp_path / 'both'}:test")
    assert "leave 'test' out" in error(f"hf:{tmp_path / 'saved'}:test")
    datasets.Dataset.from_dict({"body": rows}).save_to_disk(tmp_path / "bad")
    assert "row 1 has no `text` (fields: body)" in error(f"hf:{tmp_path / 'bad'}")


def test_hugging_face_names():
    parse = rows.HfName.parse
    assert parse("hf:a/b") == rows.HfName("a/b", None, "train", None)
    assert parse("hf:a/b@c:dev:10") == rows.HfName("a/b", "c", "dev", 10)
    for bad in ("hf:", "hf::train", "hf:a:b:0", "hf:a:b:x", "hf:a:b:1:2"):
        with pytest.raises(UsageError, match="hf:NAME"):
            parse(bad)


def test_identity_follows_the_files(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    first = corpus.identity(str(tmp_path))
    assert json.loads(json.dumps(first)) == first == corpus.identity(str(tmp_path))
    (tmp_path / "b.txt").write_text("b")
    assert corpus.identity(str(tmp_path)) != first


# ---- mistakes ----


def test_missing_and_empty(tmp_path):
    assert "does not exist" in error(tmp_path / "none.txt")
    assert "matches no file" in error(tmp_path / "*.txt")
    assert "empty folder" in error(tmp_path)


@pytest.mark.parametrize(
    "content, said",
    [(b"text\0more", "NUL byte at 4"), (b"abc\xff", "byte 0xff at 3"), (b"ab\xc3", "0xc3 at 2")],
)
def test_binary_data_name_the_file_and_the_place(tmp_path, content, said):
    (tmp_path / "image.png").write_bytes(content)
    message = error(tmp_path)
    assert "image.png" in message and said in message


def test_binary_place_is_right_across_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(document, "PIECE_BYTES", 4)
    (tmp_path / "t").write_bytes("aaaé".encode()[:4] + b"\xff....")
    assert "byte 0xc3 at 3" in error(tmp_path / "t")


@pytest.mark.parametrize(
    "line, said",
    [
        (b'{"body": "x"}', "has no `text` (fields: body)"),
        (b"{}", "has no `text` (no fields)"),
        (b'{"text": NaN}', "`text` of type float"),
        (b'{"text": ["x"]}', "`text` of type list"),
        (b'"text"', "is a str, not a JSON object"),
        (b"plain text", "is not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8"),
    ],
)
def test_jsonl_mistakes_name_file_and_line(tmp_path, line, said):
    (tmp_path / "d.jsonl").write_bytes(b'{"text": "fine"}\n' + line)
    message = error(tmp_path / "d.jsonl")
    assert "d.jsonl:2 " in message and said in message


def test_parquet_mistakes(tmp_path):
    pq.write_table(pa.table({"body": ["x"]}), tmp_path / "a.parquet")
    assert "a.parquet has no `text` (columns: body)" in error(tmp_path / "a.parquet")
    pq.write_table(pa.table({"text": ["x", None]}), tmp_path / "b.parquet")
    assert "b.parquet row 2 has null for its `text`" in error(tmp_path / "b.parquet")
    (tmp_path / "c.parquet").write_text("not parquet at all")
    assert "cannot read" in error(tmp_path / "c.parquet")


def test_missing_extra_is_named(tmp_path, monkeypatch):
    (tmp_path / "a.parquet").write_text("x")
    real = builtins.__import__

    def without(name, *rest):
        if name.split(".")[0] in ("pyarrow", "datasets"):
            raise ImportError(name)
        return real(name, *rest)

    for module in [m for m in sys.modules if m.split(".")[0] in ("pyarrow", "datasets")]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(builtins, "__import__", without)
    assert "needs pyarrow: pip install 'headway[data]'" in error(tmp_path / "a.parquet")
    assert "needs datasets: pip install 'headway[data]'" in error("hf:some/name")


# ---- the split ----


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 400), st.floats(0.001, 0.999))
def test_split_keeps_order_and_share(n, val_fraction):
    marked = list(split((Text(str(i), "x") for i in range(n)), val_fraction))
    assert [d.name for _, d in marked if isinstance(d, Text)] == [str(i) for i in range(n)]
    val = sum(part == "val" for part, _ in marked)
    assert 1 <= val <= n - 1
    assert abs(val - n * val_fraction) <= 1 + 1e-9


def test_split_is_stable_when_documents_are_added():
    def marks(n):
        return [part for part, _ in split((Text(str(i), "x") for i in range(n)), 0.1)]

    assert marks(1000)[:500] == marks(500)
    gaps = [i for i, part in enumerate(marks(1000)) if part == "val"]
    steps = {b - a for a, b in zip(gaps, gaps[1:], strict=False)}
    assert len(steps) > 5, "validation documents must not be periodic"


def test_single_text_is_cut_into_head_and_tail(tmp_path):
    text = "".join(random.Random(0).choice("abc\n") for _ in range(1000))
    (tmp_path / "t.txt").write_text(text)
    assert parts(tmp_path / "t.txt", 0.1) == {"train": [text[:900]], "val": [text[900:]]}
    (tmp_path / "t.jsonl").write_text(json.dumps({"text": text}))
    assert parts(tmp_path / "t.jsonl", 0.1) == {"train": [text[:900]], "val": [text[900:]]}


@settings(max_examples=100, deadline=None)
@given(text=st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1))
def test_the_cut_never_breaks_a_character(tmp_path_factory, text):
    path = tmp_path_factory.mktemp("cut") / "t.txt"
    path.write_bytes(text.encode())
    head, tail = TextFile(path, 0, len(text.encode())).halves(0.3)
    assert whole(head) + whole(tail) == text.removeprefix("\ufeff")


def test_train_texts_leave_validation_out(tmp_path):
    for i in range(20):
        (tmp_path / f"{i:02d}.txt").write_text(f"document {i}")
    made = parts(tmp_path, 0.2)
    assert list(train_texts([str(tmp_path)], 0.2)) == made["train"]
    assert len(made["val"]) == 4
