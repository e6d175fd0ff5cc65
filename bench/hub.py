"""Models in and out: memory and time of an import, time until a model is ready, and how far other
tools' log-probabilities are from ours.

    python bench/hub.py [--smollm2 DIR] [--text FILE] [--vllm PYTHON] [--llama DIR]
                        [--repetitions N] [--quick] [--json] [--save]

`import` reads a folder of 1.44 GB (shape M of bench/serve.py, bfloat16), in a process of its own.
`ready` is the time of `load_model` beside that of `from_pretrained` on the same folder: a new
process for each, in turn, files in the page cache, Python's imports not counted. DIR of --smollm2
holds SmolLM2-135M-Instruct as Transformers saves it; bits per byte are those of the first 1,024
tokens of --text. PYTHON is that of an environment with vLLM, DIR of --llama has node-llama-cpp:
both go on from a prompt in float32, the most likely tokens. What is not given is left out.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from time import perf_counter, process_time

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common

HERE = Path(__file__).resolve()
PROMPT = "The capital of France is"
VLLM = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
}


def ready(side: str, folder: str, dtype: str) -> dict:
    """Load a model in this process; one thread."""
    import torch

    torch.set_num_threads(1)
    if side == "headway":
        from headway.hub.load import load_model

        def load() -> object:
            return load_model(folder, "cpu", dtype, 1)  # type: ignore[arg-type]
    else:
        from transformers import AutoConfig, AutoModelForCausalLM

        # its class is imported where it is first asked for
        AutoModelForCausalLM._model_mapping[type(AutoConfig.from_pretrained(folder))]

        def load() -> object:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).eval()

    begin, cpu = perf_counter(), process_time()
    model = load()
    seconds = {"seconds": perf_counter() - begin, "cpu_seconds": process_time() - cpu}
    del model
    return seconds


def vllm(folder: str, ids: list[int]) -> dict:
    """Twelve tokens of vLLM, with the log-probabilities of the five likeliest at each."""
    from vllm import LLM, SamplingParams  # type: ignore[import-not-found]

    llm = LLM(folder, dtype="float32", enforce_eager=True, max_model_len=64, max_num_seqs=2)
    params = SamplingParams(temperature=0, max_tokens=12, logprobs=5, ignore_eos=True)
    (done,) = llm.generate([{"prompt_token_ids": ids}], params)
    steps = [[(t, p.logprob) for t, p in step.items()] for step in done.outputs[0].logprobs]
    return {"tokens": list(done.outputs[0].token_ids), "steps": steps}


def child(*words: object, python: str = sys.executable, **environment: str) -> dict:
    """Run a side of this file in a process of its own; its last line is its answer."""
    env = {**os.environ, **environment}
    done = subprocess.run(
        [python, *map(str, words)], capture_output=True, text=True, env=env, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip()[-2000:])
    return json.loads(done.stdout.strip().splitlines()[-1])


def import_row(folder: Path, work: Path) -> dict:
    """Memory and time of `headway import`."""
    from headway.hub.folder import HubFolder

    with HubFolder(folder) as weights:
        sizes = [math.prod(weights.shape(n)) * weights.dtype(n).itemsize for n in weights.names()]
    begin = perf_counter()
    words = ("-m", "headway", "import", folder, "--to", work / "imported", "--json")
    done = child(*words, PYTHONPATH=str(common.ROOT))
    return {
        "what": "import",
        "name": f"{sum(sizes) / 1e9:.2f} GB",
        "bytes": sum(sizes),
        "largest_tensor_bytes": max(sizes),
        "peak_memory_bytes": done["peak_memory_bytes"],
        "bound_bytes": 200e6 + 3 * max(sizes),
        "seconds": perf_counter() - begin,
    }


def ready_rows(folder: Path, name: str, dtype: str, repetitions: int) -> list[dict]:
    """Time until a model is ready, ours and Transformers'."""
    sides = ("headway", "transformers")
    rivals = {s: lambda s=s: child(HERE, "--side", s, folder, dtype) for s in sides}
    rows = []
    for side, raw in common.interleaved(rivals, repetitions).items():
        row = {"what": "ready", "name": name, "dtype": dtype, "side": side}
        for key in ("seconds", "cpu_seconds"):
            row[key] = statistics.median(answer[key] for answer in raw)
        rows.append(row | {"raw": raw})
    return rows


def bits_rows(folder: Path, text: str) -> list[dict]:
    """Bits per byte of the first 1,024 tokens, ours and Transformers'."""
    import torch
    from transformers import AutoModelForCausalLM

    from headway.hub.load import load_model

    loaded = load_model(folder, "cpu", "float32")
    ids = loaded.tokenizer.encode(text[:8192])[:1024].tolist()
    n_bytes = int(loaded.tokenizer.token_bytes[ids[1:]].sum())
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        logits = {
            "headway": loaded.model(torch.tensor([ids])).logits_BSV[0, :-1],
            "transformers": theirs(torch.tensor([ids])).logits[0, :-1],
        }
    targets = torch.tensor(ids[1:])
    rows = []
    for side, logits_SV in logits.items():
        nats = float(torch.nn.functional.cross_entropy(logits_SV, targets, reduction="sum"))
        rows.append({"what": "bits", "side": side, "bits_per_byte": nats / math.log(2) / n_bytes})
    difference = float((logits["headway"] - logits["transformers"]).abs().max())
    return [row | {"max_logit_difference": difference} for row in rows]


def beside(side: str, folder: Path, ids: list[int], answer: dict) -> dict:
    """How far another tool's log-probabilities are from ours along its own text."""
    import torch

    from headway.hub.load import load_model

    loaded = load_model(folder, "cpu", "float32")
    whole = [*ids, *answer["tokens"]]
    with torch.no_grad():
        logits_SV = loaded.model(torch.tensor([whole])).logits_BSV[0, len(ids) - 1 : -1]
    ours = logits_SV[:, : loaded.tokenizer.vocab_size].log_softmax(-1)
    steps = zip(ours, answer["steps"], strict=True)
    return {
        "what": "log-probabilities",
        "name": loaded.info.name,
        "side": side,
        "greedy_equal": ours.argmax(-1).tolist() == answer["tokens"],
        "largest_difference": max(
            abs(value - float(row[token])) for row, step in steps for token, value in step
        ),
    }


def other_tools(args: argparse.Namespace, work: Path) -> list[dict]:
    """Log-probabilities of SmolLM2 by vLLM, and by llama.cpp from our GGUF."""
    from headway.cli.main import main as headway
    from headway.hub.tokenizer_files import load_hub_tokenizer

    folder, rows = Path(args.smollm2), []
    ids = load_hub_tokenizer(folder).encode(PROMPT).tolist()
    if args.vllm:
        words = (HERE, "--side", "vllm", folder, json.dumps(ids))
        rows.append(beside("vllm", folder, ids, child(*words, python=args.vllm, **VLLM)))
    if args.llama:
        file = work / "smollm2.gguf"
        words = ["export", str(folder), "--to", str(file), "--format", "gguf", "--dtype", "float32"]
        assert headway(words) == 0
        script = HERE.with_name("hub_llama.mjs")
        answer = child(script, args.llama, file, json.dumps(ids), python="node")
        rows.append(beside("llama.cpp", folder, ids, answer))
    return rows


def targets(rows: list[dict]) -> list[dict]:
    """The bounds that the rows should keep."""
    found = []
    for row in rows:
        match row["what"]:
            case "import":
                share = row["peak_memory_bytes"] / row["bound_bytes"]
                found.append(common.target("import: peak memory / bound", share, 1.0, False))
            case "ready" if row["side"] == "headway":
                (other,) = (
                    r
                    for r in rows
                    if r["what"] == "ready" and r["side"] != "headway" and r["name"] == row["name"]
                )
                ratio = row["seconds"] / other["seconds"]
                name = f"ready, {row['name']}: time / from_pretrained"
                found.append(common.target(name, ratio, 1.2, False))
            case "log-probabilities":
                name = f"{row['name']}, {row['side']}: largest difference of log-probabilities"
                bound = 1e-3 if row["side"] == "vllm" else 1e-2
                found.append(common.target(name, row["largest_difference"], bound, False))
    return found


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--side", nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--smollm2", default="")
    parser.add_argument("--text", default="")
    parser.add_argument("--vllm", default="")
    parser.add_argument("--llama", default="")
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="shape S, once")
    common.add_options(parser, data=False)
    args = parser.parse_args()
    if args.side:
        side, folder, what = args.side
        print(json.dumps(vllm(folder, json.loads(what)) if side == "vllm" else ready(*args.side)))
        return
    from bench.serve import prepare

    shape, repetitions = ("S", 1) if args.quick else ("M", args.repetitions)
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        prepare(shape, work, gguf=False, hf=True)
        rows = [import_row(work / "hf", work)]
        rows += ready_rows(work / "hf", f"shape {shape}", "bfloat16", repetitions)
        if args.smollm2:
            rows += ready_rows(Path(args.smollm2), "SmolLM2-135M", "float32", repetitions)
            rows += other_tools(args, work)
        if args.smollm2 and args.text:
            rows += bits_rows(Path(args.smollm2), Path(args.text).read_text("utf-8"))
    common.print_rows([{k: v for k, v in row.items() if k != "raw"} for row in rows])
    common.report("hub", rows, targets(rows), args)


if __name__ == "__main__":
    common.run(main)
