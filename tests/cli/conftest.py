"""A finished run for the tests of all verbs."""

import json
from pathlib import Path

import pytest

from tests.command import call, write_recipe


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a text and `tiny.py:tiny`, for all tests of the command line."""
    folder = tmp_path_factory.mktemp("cli")
    write_recipe(folder)
    return folder


@pytest.fixture(scope="session")
def run(place) -> Path:
    """A finished run, made by the command."""
    folder = place / "runs" / "first"
    done = call(
        "train", f"{place}/tiny.py:tiny", "--run", folder, "--checkpoint-every", 2, "--json"
    )
    assert done.code == 0, done
    result = done.json
    assert result["steps"] == 6 and result["tokens"] == 6 * 4 * 16
    assert result["val_bits_per_byte"] < result["first_val_bits_per_byte"] < 8.5
    assert result["tokens_per_second"] > 0
    assert Path(result["checkpoint"]).name == "step-000006" and Path(result["report"]).is_file()
    for word in (
        "parameters",
        "bits/byte",
        "balance",
        "Head Parallel",
        "Expert Parallel",
        "report",
    ):
        assert word in done.out
    info = json.loads((folder / "run.json").read_text())
    assert "def tiny()" in info["recipe_source"]
    return folder
