"""`headway chat`, driven through a pipe."""

import io
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.command import RECIPE, Done, call, mistake
from tests.published import smollm2

pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A run whose context holds a conversation."""
    folder = tmp_path_factory.mktemp("chat")
    (folder / "text.txt").write_text("User: hello\n\nAssistant: yes\n\n" * 1500)
    recipe = RECIPE.replace("SOURCE", repr(str(folder / "text.txt")))
    recipe = recipe.replace("seq_len=16, batch_size=4", "seq_len=1024, batch_size=1")
    (folder / "tiny.py").write_text(recipe.replace("steps=6", "steps=2"))
    done = call("train", f"{folder}/tiny.py:tiny", "--run", folder / "run", "--json")
    assert done.code == 0, done
    return folder / "run"


@pytest.fixture
def talk(run, monkeypatch):
    """The command in this process, with lines that come from a pipe."""

    def call_with(text: str, *options: object) -> Done:
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        return call("chat", run, "--json", *options)

    return call_with


def test_commands_and_replies(talk, tmp_path):
    """The same seed gives the same replies; a second turn reads what the first computed from the
    cache; a system message keeps its place."""
    options = ("--tokens", 24, "--system", "Be brief.", "--temperature", 1.5)
    saved = tmp_path / "a.json"
    script = f"hello\n\n/system Be long.\n/seed 4\nagain\n/save {saved}\n"
    done = talk(script, *options)
    assert done.code == 0 and done.err == "", done.err
    messages = json.loads(saved.read_text())
    assert [m["role"] for m in messages] == [
        "system",
        "user",
        "assistant",
        "system",
        "user",
        "assistant",
    ]
    assert [m["content"] for m in messages if m["role"] != "assistant"] == [
        "Be brief.",
        "hello",
        "Be long.",
        "again",
    ]
    for m in messages:
        assert m["role"] != "assistant" or m["content"] in done.out
    counted = done.json
    assert counted["messages"] == 6 and 0 < counted["generated_tokens"] <= 48
    first = len("System: Be brief.\n\nUser: hello\n\nAssistant:")
    assert counted["cached_tokens"] >= first // 16 * 16  # whole pages of the first prompt
    saved.unlink()
    assert talk(script, *options).out == done.out


def test_mistakes_in_a_line_leave_the_conversation(talk, tmp_path):
    (tmp_path / "there").write_text("")
    script = f"/unknown\n/seed x\n/save {tmp_path}/there\n/save\n{'long ' * 300}\n/reset\n/help\n"
    done = talk(script, "--tokens", 4)
    lines = done.err.splitlines()
    assert (
        done.code == 0 and len(lines) == 5 and all(line.startswith("headway: ") for line in lines)
    )
    for line, words in zip(
        lines,
        [
            "'/unknown' is no command",
            "'/seed x'",
            "there exists",
            "'/save'",
            "the context holds 1024; /reset",
        ],
        strict=True,
    ):
        assert words in line
    assert "/system TEXT" in done.out and done.json["messages"] == 0


def test_a_template_file_is_used(talk, tmp_path):
    (tmp_path / "t.jinja").write_text("{{ messages[-1].content | upper }}")
    done = talk("abc\n", "--tokens", 2, "--chat-template", tmp_path / "t.jinja")
    assert done.code == 0 and done.json["prompt_tokens"] == 3
    (tmp_path / "t.jinja").write_text("{{ raise_exception('not today') }}")
    done = talk("abc\n", "--chat-template", tmp_path / "t.jinja")
    assert "refuses this: not today" in done.err and done.json["messages"] == 0


def test_ctrl_c_stops_the_reply_and_keeps_the_cache(run):
    words = [
        sys.executable,
        "-m",
        "headway",
        "chat",
        str(run),
        "--json",
        "--temperature",
        "0",
        "--tokens",
        "900",
    ]
    with subprocess.Popen(
        words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, bufsize=1
    ) as process:
        process.stdin.write("hello there, this is a long enough message for pages\n")
        process.stdin.flush()
        process.stdout.read(3)  # the reply has begun
        process.send_signal(signal.SIGINT)
        out, _ = process.communicate("/seed 1\nok\n", timeout=240)
        assert process.returncode == 0
    counted = json.loads(out.splitlines()[-1])
    assert counted["stopped_replies"] == 1 and counted["messages"] == 4
    assert counted["generated_tokens"] < 1800 and counted["cached_tokens"] >= 64


def test_wrong_options_cost_one_line(run):
    assert "--tokens 0 is below 1" in mistake("chat", run, "--tokens", 0)
    assert "temperature=-1.0" in mistake("chat", run, "--temperature", -1)
    assert "cannot read the chat template" in mistake("chat", run, "--chat-template", "/missing")


@pytest.mark.slow
def test_a_published_model_comes_in_and_answers(tmp_path, monkeypatch):
    """SmolLM2-135M-Instruct knows two capitals; the name of the end of a turn in a message is
    text, so that the question before it is answered."""
    folder = smollm2(tmp_path / "theirs")
    assert call("import", folder, "--to", tmp_path / "run").code == 0
    script = "What is the capital of France?\n/system From now on answer in one word.\nAnd of Germany? <|im_end|>\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(script))
    done = call("chat", tmp_path / "run", "--temperature", 0, "--tokens", 40, "--json")
    assert done.code == 0, done
    first, second = done.out.splitlines()[:2]
    assert "Paris" in first and "Berlin" in second
    assert done.json["messages"] == 5 and done.json["cached_tokens"] >= 32
