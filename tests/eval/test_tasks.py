"""Tasks of BIG-bench, as the package bigbench holds them."""

import json
import os
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="the extra [eval]")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from headway.config import EngineConfig
from headway.eval.harness import HeadwayLM
from headway.eval.tasks import bigbench_task
from headway.serve.engine import Engine
from tests.command import call, mistake
from tests.hub.small_runs import MODELS, write_run

BIGBENCH = {
    "plants": {
        "examples": [
            {"input": "Is a rose a plant?", "target_scores": {"yes": 1, "no": 0}},
            {"input": "Is a cat?", "target_scores": {"maybe": 1, "no": 1, "yes": 0}},
        ]
    },
    "sums": {"examples": [{"input": "1+1", "target": ["2", "two"]}, {"input": "2", "target": "2"}]},
    "many": {"description": "of sub-tasks"},
    "many/one": {
        "append_choices_to_input": False,
        "example_input_prefix": "",
        "example_output_prefix": " is ",
        "examples": [{"input": "grass", "target_scores": {"green": 1.0, "red": 0.0}}],
    },
    "hole": {
        "name": "hole",
        "example_output_prefix": "",
        "examples": [{"input": "grass", "target_scores": {"green": 1.0, "": 0.0}}],
    },
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("tasks") / "run"
    write_run(root, MODELS["multi_head_token"])
    return root


def test_eval_runs_tasks_of_bigbench(run, tmp_path, monkeypatch):
    """A package as it is installed, with tasks of its form."""
    words = ["eval", run, "--dtype", "float32", "--threads", 1]
    assert "pip install bigbench" in mistake(*words, "--tasks", "bigbench:plants")
    for name, task in BIGBENCH.items():
        place = tmp_path / "bigbench" / "benchmark_tasks" / name
        place.mkdir(parents=True)
        (place / "task.json").write_text(json.dumps(task))
    (tmp_path / "bigbench" / "__init__.py").write_text("raise ImportError('tensorflow')")
    monkeypatch.syspath_prepend(str(tmp_path))
    plants = bigbench_task("bigbench:plants")["custom_dataset"]()["test"]
    assert plants[0]["prompt"] == "\nQ: Is a rose a plant?\n  choice: no\n  choice: yes\nA: "
    assert plants[0]["choices"] == ["yes", "no"] and plants[0]["right"] == [0]
    assert plants[1]["right"] == [0, 1]
    one = bigbench_task("bigbench:many/one")["custom_dataset"]()["test"][0]
    assert one["prompt"] == "grass is "
    names = ["bigbench:plants", "bigbench:sums", "bigbench:many/one"]
    tasks = call(*words, "--tasks", *names, "--json").json["tasks"]
    assert list(tasks) == names
    lm = HeadwayLM(Engine.load(run, EngineConfig(max_len=65, max_requests=4), dtype="float32"))
    pairs = [(plants[0]["prompt"], choice) for choice in ("yes", "no")]
    best = np.argmax(
        [score for score, _ in lm.loglikelihood([SimpleNamespace(args=p) for p in pairs])]
    )
    assert tasks["bigbench:plants"]["accuracy"] in (best == 0, 0.5 + (best == 0) / 2)
    assert tasks["bigbench:plants"]["acc,none"] == tasks["bigbench:plants"]["accuracy"]
    assert 0 <= tasks["bigbench:sums"]["exact_match,none"] <= 1
    assert "use bigbench:many/one" in mistake(*words, "--tasks", "bigbench:many")
    assert "a choice of the item 'grass' is empty" in mistake(*words, "--tasks", "bigbench:hole")
    assert "has no such JSON task" in mistake(*words, "--tasks", "bigbench:none")
