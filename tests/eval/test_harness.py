"""lm-evaluation-harness through the engine: the scores of the definition, and those that it gets from
Transformers."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval", reason="the extra [eval]")
os.environ["HF_HUB_OFFLINE"] = os.environ["HF_DATASETS_OFFLINE"] = "1"

from headway.config import EngineConfig, UsageError
from headway.eval.harness import HeadwayLM, run_all
from headway.eval.over_http import server
from headway.hub.load import load_model
from headway.model.paged import PAGE
from headway.serve.engine import Engine
from headway.serve.params import SamplingParams
from tests.command import call, mistake
from tests.hub.small_runs import MODELS, export, write_run

CONTEXT = 64
SHOTS = "Q: 1+1? A: two. Q: 2+2? A: four. "


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("harness")
    write_run(root / "run", MODELS["multi_head_token"])
    export(root / "run", root / "hf", family="headway")
    return root


def make_engine(folder, **options) -> Engine:
    """As `headway eval --tasks` makes it: one more token than the context."""
    options = {"max_len": CONTEXT + 1, "max_requests": 4, "max_batch_tokens": 40, **options}
    return Engine.load(folder / "run", EngineConfig(**options), dtype="float32")


@pytest.fixture
def lm(folder):
    return HeadwayLM(make_engine(folder))


@pytest.fixture(scope="module")
def score(folder):
    """Σ log p of the tokens from `start`, and whether each is the likeliest: by the definition."""
    model = load_model(folder / "run", dtype="float32").model.double()
    model.dtype = torch.float64

    @torch.no_grad()
    def by_definition(tokens: list[int], start: int) -> tuple[float, bool]:
        logits = model(torch.tensor([tokens])).logits_BSV[0, :, :257]
        logp = torch.log_softmax(logits, -1)[:-1]
        target = torch.tensor(tokens[1:])
        chosen = logp.gather(1, target.unsqueeze(1))[start - 1 :, 0]
        return float(chosen.sum()), bool((logp.argmax(-1) == target)[start - 1 :].all())

    return by_definition


def asks(*args):
    """A request of the harness."""
    return SimpleNamespace(args=args)


def ids(text: str) -> list[int]:
    return list(text.encode())


PAIRS = [
    ("The cat", " sat"),
    ("The cat", " ran away"),
    (SHOTS + "Q: 3+3? A:", " six"),
    (SHOTS + "Q: 3+3? A:", " seven"),
    (SHOTS + "Q: 5+3? A:", " eight"),
    ("trailing  ", "space"),
    ("", "from the start"),
    ("x" * 80, " a context that loses its beginning"),
    ("é" * 9, "ü"),
]


def test_scores_are_those_of_the_definition(lm, score):
    for _ in range(2):  # the second time from a warm cache
        scored = lm.loglikelihood([asks(*pair) for pair in PAIRS], disable_tqdm=True)
        for (context, continuation), (total, likeliest) in zip(PAIRS, scored, strict=True):
            whole = [256, *ids(continuation)] if not context else ids(context + continuation)
            n = len(continuation.encode()) + len(context) - len(context.rstrip())
            whole = whole[-CONTEXT - 1 :]
            expected = score(whole, len(whole) - n)
            assert total == pytest.approx(expected[0], rel=1e-5) and likeliest == expected[1]


def test_the_likeliest_continuation_is_said_to_be(lm, score):
    prompt = ids("The cat")
    greedy = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    reply = lm.engine.generate([prompt], greedy)[0][0].tokens
    pairs = [(("", ""), prompt, reply), (("", ""), prompt, [*reply[:-1], reply[-1] ^ 1])]
    assert [likeliest for _, likeliest in lm._loglikelihood_tokens(pairs)] == [True, False]


def test_long_texts_are_scored_in_windows(lm, score):
    text = "".join(chr(97 + i * i % 23) for i in range(150))
    whole = [256, *ids(text)]
    # each token once: the first 64, then windows whose last tokens are new
    expected = score(whole[:65], 1)[0] + score(whole[64 : 64 + 65], 1)[0]
    expected += score(whole[-65:], 65 - 22)[0]
    assert lm.loglikelihood_rolling([asks(text), asks("ab")]) == pytest.approx(
        [expected, score([256, *ids("ab")], 1)[0]], rel=1e-5
    )


def test_a_shared_prefix_is_computed_once(folder):
    engine = make_engine(folder, max_requests=16, max_batch_tokens=200)
    prompts = [ids(SHOTS + f"Q: {i}+3? A: {j}") for i in range(4) for j in range(3)]
    params = SamplingParams(max_tokens=0, prompt_logprobs=1, prompt_logprobs_start=45)
    requests = [request for request, _ in run_all(engine, prompts, [params] * len(prompts))]
    assert len(SHOTS) // PAGE == 2  # pages that all share
    assert sorted(request.n_cached for request in requests) == [0] + [2 * PAGE] * 11


def test_generation_ends_where_the_task_says(lm):
    context = ids("The cat")
    free = SamplingParams(max_tokens=12, temperature=0)
    reply = lm.engine.generate([context], free)[0][0].text
    stop = next(c for c in reply[1:] if c.isascii())
    asked = [{"until": [stop], "max_gen_toks": 12}, {"until": [], "max_gen_toks": 3}]
    texts = lm.generate_until([asks("The cat", a) for a in asked])
    assert texts[0] == reply[: reply.index(stop)] and reply.startswith(texts[1]) and texts[1]
    drawn = {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 12}
    again = [lm.generate_until([asks("The cat", drawn)] * 3) for _ in range(2)]
    assert again[0] == again[1] and len(set(again[0])) == 3  # repeats differ, runs do not


def test_what_cannot_be_had_is_one_line(lm):
    with pytest.raises(UsageError, match="num_beams=4"):
        lm.generate_until([asks("a", {"until": [], "num_beams": 4})])
    with pytest.raises(UsageError, match="max_gen_toks=64 tokens, which leaves a context of 64"):
        lm.generate_until([asks("a", {"until": [], "max_gen_toks": 64})])
    with pytest.raises(UsageError, match="continuation of 70 tokens"):
        lm.loglikelihood([asks("a", "b" * 70)], disable_tqdm=True)


TASK = """
task: letters
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: multiple_choice
test_split: test
doc_to_text: "{{{{question}}}} A:"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
  - metric: acc_norm
"""


@pytest.fixture(scope="module")
def tasks_folder(tmp_path_factory):
    """A folder with one local task, of 20 questions."""
    place = tmp_path_factory.mktemp("tasks")
    questions = [
        {
            "question": f"Letter {i} of {'the long ' * (i % 4)}alphabet?",
            "choices": [f" {chr(97 + (i * k) % 26)}{'b' * k}" for k in range(1, 5)],
            "answer": i % 4,
        }
        for i in range(20)
    ]
    (place / "letters.jsonl").write_text("".join(json.dumps(q) + "\n" for q in questions))
    (place / "letters.yaml").write_text(TASK.format(file=place / "letters.jsonl"))
    return place


@pytest.fixture(scope="module")
def tasks(tasks_folder):
    """A task manager that knows it."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(tasks_folder), include_defaults=False)


def evaluate(lm, tasks) -> tuple[dict, list]:
    """Accuracies, and the answers of the model."""
    import lm_eval

    results = lm_eval.simple_evaluate(
        lm, tasks=["letters"], task_manager=tasks, bootstrap_iters=0, log_samples=True
    )
    samples = sorted(results["samples"]["letters"], key=lambda s: s["doc_id"])
    accuracy = {k: v for k, v in results["results"]["letters"].items() if "acc" in k}
    return accuracy, [answer for s in samples for answer in s["filtered_resps"]]


@pytest.fixture(scope="module")
def expected(folder, tasks):
    """What the task gives in Transformers."""
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoTokenizer

    from headway.hub.remote.modeling_headway import HeadwayForCausalLM

    model = HFLM(
        pretrained=HeadwayForCausalLM.from_pretrained(folder / "hf").eval(),
        tokenizer=AutoTokenizer.from_pretrained(folder / "hf"),
        batch_size=8,
        device="cpu",
        max_length=CONTEXT,
    )
    accuracy, answers = evaluate(model, tasks)
    assert len(answers) == 80
    return accuracy, answers


def assert_same(scored, expected):
    """The same accuracies, log-likelihoods to 1e-4, and greedy continuations."""
    assert scored[0] == expected[0]
    for (ours, greedy), (theirs, their_greedy) in zip(scored[1], expected[1], strict=True):
        assert ours == pytest.approx(theirs, abs=1e-4) and greedy == their_greedy


def test_a_local_task_scores_as_in_transformers(lm, tasks, expected):
    for _ in range(2):  # the second time from a warm cache
        assert_same(evaluate(lm, tasks), expected)
    assert lm.engine.counters.cached_tokens > 0


def test_a_local_task_scores_the_same_over_http(folder, tasks, expected):
    pytest.importorskip("fastapi", reason="the extra [serve]")
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    with server([str(folder / "run"), "--dtype", "float32", "--threads", "1"]) as url:
        client = LocalCompletionsAPI(
            base_url=f"{url}/v1/completions",
            model="run",
            tokenizer=str(folder / "hf"),
            tokenizer_backend="huggingface",
            batch_size=8,
            max_length=CONTEXT,
        )
        for _ in range(2):
            assert_same(evaluate(client, tasks), expected)


def test_eval_runs_tasks(folder, tasks_folder, expected):
    words = ["eval", folder / "run", "--dtype", "float32", "--threads", 1]
    done = call(*words, "--tasks", tasks_folder / "letters.yaml", "--json")
    assert done.code == 0, done
    metrics = done.json["tasks"]["letters"]
    assert metrics["acc,none"] == expected[0]["acc,none"]
    # the same by our own count, beside the other ways to compare choices
    assert metrics["accuracy"] == expected[0]["acc,none"] and metrics["questions"] == 20
    scores = np.array([score for score, _ in expected[1]]).reshape(20, 4)
    sizes = np.arange(1, 5) + 3  # two blanks, a letter, k times b
    right = ((scores / sizes).argmax(1) == np.arange(20) % 4).mean()
    assert metrics["accuracy_per_byte"] == metrics["accuracy_per_token"] == right
    shares = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    bins = metrics["calibration"]
    mean = sum(row["n"] * row["confidence"] for row in bins) / 20
    assert mean == pytest.approx(shares.max(1).mean(), abs=1e-4)
    assert "has no `task: NAME`" in mistake(*words, "--tasks", folder / "run" / "run.json")
    assert "cannot read the task" in mistake(*words, "--tasks", folder / "none.yaml")
    text = (tasks_folder / "letters.yaml").read_text()
    other = tasks_folder.parent / "other.yaml"
    wrong = {
        "dataset_path: json": ("dataset_path: allenai/ai2_arc", "wants allenai/ai2_arc from the"),
        f"test: {tasks_folder}/": (
            "test: https://x.org/",
            "wants https://x.org/letters.jsonl from",
        ),
        "letters.jsonl": ("gone.jsonl", "gone.jsonl, which does not exist"),
        "metric: acc_norm": ("metric: bleurt", "wants the metric bleurt from the network"),
    }
    for before, (after, said) in wrong.items():
        other.write_text(text.replace(before, after))
        assert said in mistake(*words, "--tasks", other)


def test_a_model_is_named_by_its_folder(folder, lm):
    named = HeadwayLM(str(folder / "run"))
    requests = [asks(*pair) for pair in PAIRS[:3]]
    expected = [score for score, _ in lm.loglikelihood(requests)]
    assert [s for s, _ in named.loglikelihood(requests)] == pytest.approx(expected, rel=2e-2)


WRITE = """
task: write
dataset_path: json
dataset_kwargs:
  data_files:
    test: {file}
output_type: generate_until
test_split: test
doc_to_text: "{{{{question}}}} A:"
doc_to_target: "{{{{answer}}}}"
generation_kwargs:
  until: ["\\n\\n"]
  max_gen_toks: 10
metric_list:
  - metric: exact_match
"""


def lm_eval_command(tasks_folder, out, *words: str) -> tuple[dict, dict]:
    """Results and answers, by task and document, of `lm_eval` as a process of its own."""
    command = [sys.executable, "-m", "lm_eval", "--tasks", "letters,write", "--log_samples"]
    place = ["--include_path", str(tasks_folder), "--output_path", str(out)]
    done = subprocess.run([*command, *place, *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads(next(out.glob("*/results_*.json")).read_text())["results"]
    answers = {}
    for path in out.glob("*/samples_*.jsonl"):
        for sample in map(json.loads, path.read_text().splitlines()):
            answers[path.name.split("_")[1], sample["doc_id"]] = sample["filtered_resps"]
    return results, answers


@pytest.mark.slow
def test_the_command_scores_a_server_as_it_scores_transformers(folder, tasks_folder, tmp_path):
    """Concurrent requests in batches, scores and texts."""
    pytest.importorskip("fastapi", reason="the extra [serve]")
    (tasks_folder / "write.yaml").write_text(WRITE.format(file=tasks_folder / "letters.jsonl"))
    hf = f"pretrained={folder / 'hf'},trust_remote_code=True,dtype=float32,max_length={CONTEXT}"
    words = ["--model", "hf", "--model_args", hf, "--device", "cpu"]
    expected, answers = lm_eval_command(tasks_folder, tmp_path / "hf", *words)
    assert len(answers) == 40
    with server([str(folder / "run"), "--dtype", "float32", "--threads", "1"]) as url:
        http = f"base_url={url}/v1/completions,model=run,tokenizer={folder / 'hf'}"
        args = f"{http},max_length={CONTEXT},num_concurrent=4"
        words = ["--model", "local-completions", "--model_args", args, "--batch_size", "4"]
        scored, ours = lm_eval_command(tasks_folder, tmp_path / "http", *words)
    assert scored.keys() == expected.keys() == {"letters", "write"}
    for task, metrics in expected.items():
        assert scored[task] == metrics
    assert ours.keys() == answers.keys()
    for key, theirs in answers.items():
        for a, b in zip(ours[key], theirs, strict=True):
            if isinstance(b, str):
                assert a == b
            else:
                assert float(a[0]) == pytest.approx(float(b[0]), abs=1e-4)
                assert str(a[1]) == str(b[1])
