import bz2
import gzip
import json
import lzma
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from headway.config import UsageError
from headway.data import records as rows
from headway.data import units
from headway.data.document import Bad
from headway.data.units import plan, read, train_texts


def found(spec, skip_bad=False, val_fraction=0.05):
    """(documents, what could not be read) of a source."""
    made, bad = [], []
    for unit in plan(str(spec), val_fraction)[0]:
        for one in read(unit, skip_bad):
            if isinstance(one, Bad):
                bad.append(one.why)
            elif one.begins:
                made.append(one.text)
            else:
                made[-1] += one.text
    return made, bad


def error(spec):
    with pytest.raises(UsageError) as caught:
        found(spec)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def zstd(content):
    return pa.compress(content, codec="zstd", asbytes=True)


TEXTS = ["eins", "zwei ü", "drei\nlines", 'vi"er, 4']
LINES = "".join(json.dumps({"n": 1, "text": text}) + "\n" for text in TEXTS)


@pytest.mark.parametrize(
    "suffix, pack",
    [("", bytes), (".gz", gzip.compress), (".bz2", bz2.compress), (".xz", lzma.compress)],
)
def test_rows_of_every_kind(tmp_path, suffix, pack):
    quoted = [text.replace('"', '""') for text in TEXTS]
    kinds = {
        "a.jsonl": LINES,
        "b.ndjson": LINES,
        "c.json": "\n" + LINES,
        "d.csv": "\ufeffid,text\r\n" + "".join(f'1,"{text}"\r\n' for text in quoted),
        "e.tsv": "text\tid\n" + "".join(f'"{text}"\t2\n' for text in quoted),
    }
    for name, content in kinds.items():
        (tmp_path / (name + suffix)).write_bytes(pack(content.encode()))
    assert found(tmp_path) == (TEXTS * 5, [])


def test_zstd_of_several_frames(tmp_path):
    half = LINES.index("\n") + 1
    (tmp_path / "a.jsonl.zst").write_bytes(
        zstd(LINES[:half].encode()) + zstd(LINES[half:].encode())
    )
    assert found(tmp_path) == (TEXTS, [])


@pytest.mark.parametrize(
    "content, lines",
    [
        ('{"text": "one"}', True),
        ('{"text": "one"}\n{"text": "two"}', True),
        ('{"name": "x"}', False),  # the settings of some program
        ('{\n "text": "one"\n}', False),
        ('[{"text": "one"}]', False),
        ('{"text": "one"}\n[1]', False),
        ("[" * 100_000, False),
    ],
)
def test_json_is_lines_or_text(tmp_path, content, lines):
    (tmp_path / "a.json").write_text(content)
    texts, bad = found(tmp_path)
    assert not bad and (("".join(texts) == content) != lines)


def test_json_of_objects_without_text_is_refused(tmp_path):
    (tmp_path / "a.json").write_text('{"body": "x"}\n{"body": "y"}')
    assert "a.json:1 has no `text` (fields: body)" in error(tmp_path)


def test_bad_documents_are_left_out_one_by_one(tmp_path):
    deep = '{"text": "x", "y": ' + "[" * 200_000 + "]" * 200_000 + "}"
    lines = [
        "{",
        '{"text": "good"}',
        deep,
        '{"text": null}',
        '{"text": 3}',
        '{"a": 1}',
        "",
        '{"text": "\\ud800"}',
    ]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    pq.write_table(pa.table({"text": ["p", None, "q"]}), tmp_path / "b.parquet")
    pq.write_table(pa.table({"body": ["p"]}), tmp_path / "c.parquet")
    (tmp_path / "d.csv").write_text("text,n\nr,1\nshort\ns,2\n")
    (tmp_path / "e.csv").write_text("id,body\n1,2\n")
    (tmp_path / "f.txt").write_bytes(b"\xff\xfe")
    (tmp_path / "g.txt").write_text("t")
    (tmp_path / "h.jsonl.gz").write_bytes(gzip.compress(LINES.encode())[:-20])
    (tmp_path / "i.parquet").write_bytes(b"nothing")
    texts, bad = found(tmp_path, skip_bad=True)
    assert texts[:6] == ["good", "\ufffd", "p", "q", "r", "s"] and "t" in texts
    said = [why.removeprefix(f"{tmp_path}/") for why in bad]
    wanted = [
        "a.jsonl:1 is not JSON",
        "a.jsonl:3 is JSON nested too deeply",
        "a.jsonl:4 has null for its `text`",
        "a.jsonl:5 has a `text` of type int",
        "a.jsonl:6 has no `text` (fields: a)",
        "b.parquet row 2 has null for its `text`",
        "c.parquet has no `text` (columns: body)",
        "d.csv:3 has 1 columns, the header 2",
        "e.csv has no `text` (columns: id, body)",
        "f.txt is not UTF-8 text (byte 0xff at 0)",
        f"cannot read {tmp_path}/h.jsonl.gz: Compressed file ended",
        f"cannot read {tmp_path}/i.parquet as parquet",
    ]
    assert len(said) == len(wanted) and all(
        a.startswith(b) for a, b in zip(said, wanted, strict=True)
    )
    assert "a.jsonl:1 is not JSON" in error(tmp_path) and "data.skip_bad" in error(tmp_path)


def test_training_text_of_a_tokenizer_skips_what_training_skips(tmp_path):
    """A text that turns out to be bad keeps its number, so that no other becomes training text."""
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_bytes(f"document {i}".encode() + b"\xff" * (i % 7 == 3))
    whole = list(train_texts([str(tmp_path)], 0.2, skip_bad=True))
    good = [f"document {i}" for i in range(30) if i % 7 != 3]
    assert set(whole) < set(good) and len(whole) > 15
    for i in range(30):
        (tmp_path / f"{i:02d}.txt").write_text(f"document {i}")
    mended = list(train_texts([str(tmp_path)], 0.2))
    assert whole == [text for text in mended if text in good]


@pytest.mark.parametrize(
    "pack, suffix", [(bytes, ""), (lambda content: gzip.compress(content, 1), ".gz")]
)
def test_cut_files_give_each_row_once_and_name_its_line(tmp_path, monkeypatch, pack, suffix):
    monkeypatch.setattr(units, "UNIT_BYTES", (1 << 20, 1 << 20))
    draw = random.Random(0)
    texts = ["".join(draw.choices("abc\nü", k=draw.randrange(1, 5000))) for _ in range(900)]
    texts[300] = "long" * 700_000  # over more than two units
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    path = tmp_path / f"a.jsonl{suffix}"
    path.write_bytes(pack("\n\n".join(lines).encode()))
    assert len(plan(str(path), 0.1)[0]) > 2
    assert found(path) == (texts, [])
    lines[800] = "{"
    path.write_bytes(pack("\n\n".join(lines).encode()))
    assert f"a.jsonl{suffix}:1601 is not JSON" in error(path)


def test_large_parquet_is_cut_at_row_groups(tmp_path, monkeypatch):
    monkeypatch.setattr(units, "UNIT_BYTES", (1 << 20, 1 << 20))
    draw = random.Random(0)
    texts = [draw.randbytes(2000).hex() for _ in range(800)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", row_group_size=100)
    made = plan(str(tmp_path / "a.parquet"), 0.1)[0]
    assert [(unit.spans[0].start, unit.spans[0].end) for unit in made] == [(0, 3), (3, 6), (6, 8)]
    assert found(tmp_path / "a.parquet") == (texts, [])


def test_a_lone_row_is_halved_wherever_it_is(tmp_path):
    (tmp_path / "a.jsonl").write_text('\n{"text": ""}\n')
    (tmp_path / "b.jsonl").write_text('{"text": "0123456789"}')
    (tmp_path / "c.csv").write_text("text\n")
    assert found(tmp_path, val_fraction=0.2) == (["01234567", "89"], [])
    (tmp_path / "d.txt.gz").write_bytes(gzip.compress(b""))
    (tmp_path / "b.jsonl").unlink()
    (tmp_path / "e.txt.gz").write_bytes(gzip.compress(b"0123456789"))
    (tmp_path / "d.txt.gz").unlink()
    assert found(tmp_path, val_fraction=0.2) == (["01234567", "89"], [])


def test_what_a_source_is_made_of(tmp_path):
    for name in ("a.py", "b.py", "README", "d.json", "e.jsonl.gz", "empty.py"):
        content = LINES.encode() if ".json" in name else b"text" * (name != "empty.py")
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / ".git").mkdir()
    said = plan(str(tmp_path), 0.1)[1]
    assert said == (
        "5 files (1 no suffix, 2 .py, 1 .json of JSON lines, 1 .jsonl.gz); "
        "left out: empty files (1), hidden folders (1)"
    )


MEMORY = """
import resource, sys
from headway.data.units import plan, read
have = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (have + int(sys.argv[2]),) * 2)
for unit in plan(sys.argv[1], 0.1)[0]:
    for one in read(unit, skip_bad=True):
        print(one)
"""


@pytest.mark.parametrize(
    "size, room, said",
    [
        (200 << 20, 100 << 20, "not enough memory"),
        pytest.param(3 << 30, 900 << 20, "a line of more than 256 MiB", marks=pytest.mark.slow),
    ],
)
def test_huge_line_in_little_memory(tmp_path, size, room, said):
    path = tmp_path / "a.jsonl"
    with path.open("wb") as file:  # sparse: it takes no room on disk
        file.write(b'{"text": "first"}\n{"text": "')
        file.seek(size, 1)
        file.write(b'"}\n{"text": "last"}\n')
    command = [sys.executable, "-c", MEMORY, path, str(room)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stderr and said in done.stdout, done
    assert "text='fir" in done.stdout and ("'last'" in done.stdout) == (size > rows.LINE_BYTES)


def test_line_that_is_too_long_is_left_out(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "LINE_BYTES", 1 << 20)
    monkeypatch.setattr(units, "UNIT_BYTES", (1 << 20, 1 << 20))
    long = '{"text": "' + "x" * 5_000_000 + '"}\n'
    (tmp_path / "a.jsonl").write_text(LINES + long + LINES)
    texts, bad = found(tmp_path, skip_bad=True)
    assert texts == TEXTS * 2
    (line,) = bad
    assert "a.jsonl:5 is a line of more than 1 MiB" in line
