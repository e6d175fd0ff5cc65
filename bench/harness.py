"""Does batching pay for lm-evaluation-harness, and are its scores right?

    python bench/harness.py [--items 200] [--save] [--json]

A random model scores questions of four choices: all requests in one call of `HeadwayLM`, one call
per request (with the same cache of prefixes), and by brute force, a forward pass of the whole text
per choice. CPU seconds of one thread."""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.common import add_options, print_rows, report, run, target
from headway import recipes
from headway.config import EngineConfig, with_leaf
from headway.data.tokenizer import ByteTokenizer
from headway.eval.harness import HeadwayLM
from headway.model.compute import Compute
from headway.model.packing import pack_
from headway.model.transformer import Transformer
from headway.serve.engine import Engine

SHOTS = "Q: What is 1 + 1? A: two\nQ: What is 2 + 2? A: four\n"
WORDS = "zero one two three four five six seven eight nine".split()


def requests(n_items: int) -> list[Any]:
    """Return four per question, which share the examples and the question."""
    asked = []
    for i in range(n_items):
        context = f"{SHOTS}Q: What is {i} + {i % 7}, {'if you please, ' * (i % 4)}please? A:"
        asked += [SimpleNamespace(args=(context, f" {WORDS[(i + k) % 10]}")) for k in range(4)]
    return asked


def timed(call: Callable[[], list[float]]) -> tuple[float, list[float]]:
    """Return CPU seconds, and what was returned."""
    begin = time.process_time()
    scores = call()
    return time.process_time() - begin, scores


@torch.no_grad()
def brute_force(model: Transformer, asked: list[SimpleNamespace]) -> list[float]:
    """Return Σ log p of each continuation from the logits of its whole text."""
    scores = []
    for context, continuation in (request.args for request in asked):
        ids = torch.tensor([list((context + continuation).encode())])
        logits_BSV = model(ids[:, :-1]).logits_BSV
        assert logits_BSV is not None
        log_probs = logits_BSV[0, :, : ByteTokenizer.vocab_size].double().log_softmax(-1)
        n = len(continuation.encode())
        scores.append(float(log_probs.gather(1, ids[0, 1:, None])[-n:].sum()))
    return scores


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--items", type=int, default=200)
    add_options(parser, data=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    config = with_leaf(recipes.load("moe"), "model.vocab_size", 320).model
    plain, packed = (Transformer(config, Compute(torch.float32), seed=0).eval() for _ in range(2))
    pack_(packed, torch.float32)
    asked = requests(args.items)

    def lm() -> HeadwayLM:
        """With an empty cache."""
        return HeadwayLM(Engine(packed, ByteTokenizer(), EngineConfig(max_len=257)))

    def batched() -> list[float]:
        return [score for score, _ in lm().loglikelihood(asked, disable_tqdm=True)]

    def one_by_one() -> list[float]:
        model = lm()
        return [model.loglikelihood([one], disable_tqdm=True)[0][0] for one in asked]

    batched()  # warms up
    rows, scores = [], {}
    for name, call in {"batched": batched, "one request at a time": one_by_one}.items():
        seconds, scores[name] = timed(call)
        rows.append({"how": name, "requests": len(asked), "cpu_seconds": seconds})
    seconds, scores["brute force"] = timed(lambda: brute_force(plain, asked))
    rows.append({"how": "brute force", "requests": len(asked), "cpu_seconds": seconds})
    off = max(abs(a - b) for a, b in zip(scores["batched"], scores["brute force"], strict=True))
    ratio = rows[1]["cpu_seconds"] / rows[0]["cpu_seconds"]
    targets = [
        target("times faster than one request at a time", ratio, 2.0, True),
        target("largest difference from brute force, nats", off, 1e-4, False),
    ]
    print_rows(rows)
    report("harness", rows, targets, args)


if __name__ == "__main__":
    run(main)
