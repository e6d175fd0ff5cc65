"""Tasks of lm-evaluation-harness on data that this machine has (extra `eval`): its YAML files, and
JSON tasks of BIG-bench (PyPI `bigbench` 1.0.0), without the network.

BIG-bench's prompt is its own, without examples: its prefixes around the question and, where a task
wants that, the choices in front of the answer, here in alphabetical order."""

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from lm_eval.api.registry import metric_registry
from lm_eval.evaluator import simple_evaluate
from lm_eval.tasks import TaskManager
from lm_eval.tasks._yaml_loader import load_yaml

from headway.config import UsageError
from headway.eval.harness import HeadwayLM
from headway.eval.multiple_choice import Question, multiple_choice
from headway.serve.engine import Engine

BIGBENCH = "bigbench:"
FORMATS = ("json", "csv", "parquet", "arrow", "text")
"""What `dataset_path` may be beside a folder: files that `data_files` names."""
Record = dict[str, Any]


def run_tasks(engine: Engine, tasks: Sequence[str]) -> dict[str, Record]:
    """Return the metrics of local tasks, YAML files or `bigbench:TASK`, by the task's name; of
    multiple choice also what `eval.multiple_choice` gives. Raises UsageError for a file that is
    none, and for one that wants the network."""
    configs: list[str | Record] = []
    folders = []
    for name in tasks:
        if name.startswith(BIGBENCH):
            configs.append(bigbench_task(name))
            continue
        configs.append(_local_task(Path(name)))
        folders.append(str(Path(name).absolute().parent))
    manager = TaskManager(include_path=list(dict.fromkeys(folders)), include_defaults=False)
    lm = HeadwayLM(engine)
    results: Any = simple_evaluate(
        lm,
        tasks=configs,  # type: ignore[arg-type]
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
    )
    answer = {}
    for name, metrics in results["results"].items():
        numbers = {k: v for k, v in metrics.items() if isinstance(v, (int, float))}
        questions = [_question(lm, sample) for sample in results["samples"].get(name, ())]
        known = [question for question in questions if question is not None]
        answer[name] = numbers | (multiple_choice(known) if known else {})
    return answer


def _local_task(path: Path) -> str:
    """Return the name of the task of a YAML file, whose data and metrics are local."""
    try:
        config = load_yaml(path, resolve_func=False)
    except (OSError, ValueError, yaml.YAMLError) as error:
        why = " ".join(str(error).split())
        raise UsageError(f"cannot read the task {path}: {why}; give a YAML file") from None
    if not isinstance(config.get("task"), str):
        raise UsageError(f"{path} has no `task: NAME`; give a task of lm-evaluation-harness")
    source, kwargs = config.get("dataset_path"), config.get("dataset_kwargs") or {}
    files = [*_names(kwargs.get("data_files"))]
    local = source in FORMATS and files and not any("://" in file for file in files)
    if not (local or config.get("custom_dataset") or (source and Path(source).is_dir())):
        wanted = next((file for file in files if "://" in file), source)
        raise UsageError(
            f"{path} wants {wanted} from the network; give `dataset_path: json` with local files "
            "under `dataset_kwargs: data_files:`"
        )
    for file in files:
        if not any(mark in file for mark in "*?[") and not Path(file).exists():
            raise UsageError(f"{path} reads {file}, which does not exist; give its whole path")
    for metric in config.get("metric_list") or ():
        name = metric["metric"]
        if isinstance(name, str) and not name.startswith("!") and name not in metric_registry:
            raise UsageError(f"{path} wants the metric {name} from the network; use acc or another")
    return config["task"]


def _names(files: Any) -> list[str]:
    """Return the names in `data_files`: a name, a list, or either by split."""
    match files:
        case None:
            return []
        case str():
            return [files]
        case dict():
            return [name for part in files.values() for name in _names(part)]
        case _:
            return [str(name) for name in files]


def bigbench_task(name: str) -> Record:
    """Return the harness's config of `bigbench:TASK` or `bigbench:TASK/SUBTASK`: multiple choice
    where the examples have `target_scores`, else exact match of a generated line. Raises
    UsageError where the package or the task is missing."""
    spec = importlib.util.find_spec("bigbench")
    if spec is None or not spec.submodule_search_locations:
        raise UsageError(f"{name} needs the package bigbench; pip install bigbench==1.0.0")
    folder = Path(spec.submodule_search_locations[0]) / "benchmark_tasks"
    task = folder / name.removeprefix(BIGBENCH) / "task.json"
    if not task.is_file():
        raise UsageError(f"{name}: {folder} has no such JSON task; use bigbench:general_knowledge")
    data = json.loads(task.read_text("utf-8"))
    if not data.get("examples"):
        parts = sorted(path.parent.name for path in task.parent.glob("*/task.json"))
        raise UsageError(f"{name} has sub-tasks; use {name}/{parts[0] if parts else 'SUBTASK'}")
    from datasets import Dataset

    choices = all("target_scores" in example for example in data["examples"])
    rows = [_example(data, example, choices) for example in data["examples"]]
    shared = {
        "task": name,
        "custom_dataset": lambda **_: {"test": Dataset.from_list(rows)},
        "test_split": "test",
        "doc_to_text": "prompt",
        "target_delimiter": "",
    }
    if choices:
        metrics = [{"metric": "acc"}]
        kind = {"output_type": "multiple_choice", "doc_to_choice": "choices"}
        return {**shared, **kind, "doc_to_target": "right", "metric_list": metrics}
    kind = {"output_type": "generate_until", "doc_to_target": "targets"}
    ends = {"until": ["\n"], "max_gen_toks": 32}
    return {
        **shared,
        **kind,
        "generation_kwargs": ends,
        "metric_list": [{"metric": "exact_match", "ignore_case": False}],
    }


def _example(data: Record, example: Record, choices: bool) -> Record:
    """Return prompt, and choices with the numbers of the right ones, or the targets."""
    text = example["input"]
    if not choices:
        target = example["target"]
        targets = target if isinstance(target, list) else [target]
    else:
        scores = example["target_scores"]
        if data.get("append_choices_to_input", True):
            prefix = data.get("choice_prefix", "\n  choice: ")
            text += "".join(prefix + choice for choice in sorted(scores))
        best = max(scores.values())
        targets = [i for i, score in enumerate(scores.values()) if score == best]
    before = data.get("example_input_prefix", "\nQ: ")
    prompt = before + text + data.get("example_output_prefix", "\nA: ")
    if choices:
        if "" in example["target_scores"]:
            raise UsageError(
                f"a choice of the item {example['input'][-40:]!r} is empty; it needs a text"
            )
        return {"prompt": prompt, "choices": list(example["target_scores"]), "right": targets}
    return {"prompt": prompt, "targets": targets}


def _question(lm: HeadwayLM, sample: Record) -> Question | None:
    """Return a scored question of the harness; None of a sample that is none."""
    target, answers = sample["target"], sample["filtered_resps"]
    pairs = [arguments for arguments in sample["arguments"] if len(arguments) == 2]
    if not isinstance(target, (int, list)) or len(pairs) != len(answers) or len(pairs) < 2:
        return None
    texts = [str(continuation) for _, continuation in pairs]
    n_tokens = [len(lm.tok_encode(text, add_special_tokens=False)) for text in texts]
    return Question(
        np.array([float(answer[0]) for answer in answers]),
        np.array([float(len(text.encode())) for text in texts]),
        np.array(n_tokens, dtype=np.float64),
        frozenset([target] if isinstance(target, int) else target),
    )
