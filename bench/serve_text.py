"""What the engine does beside the model's pass: drawing tokens, masks of grammars, text of tokens.

    python bench/serve_text.py [--vocab N] [--rows N] [--tokens N] [--repetitions N] [--json]
                                [--save]

CPU time of one thread, so that other work on the machine counts little. The bounds are 10% of the
engine's own step of a 722M model (160M active, V 32,768) with 16 requests, which bench/serve.py
measured (docs/numbers/serve.json). Logits are random with a standard deviation of 2; grammars are
followed by random allowed tokens.
"""

import argparse
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import process_time

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from headway.config import UsageError
from headway.data.detokenizer import Detokenizer
from headway.data.tokenizer import Tokenizer, train_bpe
from headway.serve.params import SamplingParams
from headway.serve.sampling import Row, sample
from headway.server.grammar import GrammarCompiler

WAYS = {
    "greedy": {"temperature": 0.0},
    "temperature": {},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "top_k, top_p, penalty": {"top_k": 50, "top_p": 0.9, "repetition_penalty": 1.1},
    "top_p 0.9, 5 logprobs": {"top_p": 0.9, "logprobs": 5},
}
PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}


def milliseconds(call: Callable[[], object], repetitions: int) -> list[float]:
    """CPU time of each call after a first one."""
    times = []
    for _ in range(repetitions + 1):
        begin = process_time()
        call()
        times.append(1e3 * (process_time() - begin))
    return times[1:]


def draws(args: argparse.Namespace) -> list[dict]:
    """Times of one draw for all rows."""
    logits_RV = torch.randn(args.rows, args.vocab, generator=torch.Generator().manual_seed(0)) * 2
    rows = []
    for name, change in WAYS.items():
        params = SamplingParams(**change)
        batch = [Row(params, i, 0, range(100), [1] * 50, (0,)) for i in range(args.rows)]
        raw = milliseconds(lambda batch=batch: sample(logits_RV, batch), args.repetitions)
        rows.append({"what": "draw", "name": name, "ms": statistics.median(raw), "raw": raw})
    return rows


def masks(tokenizer: Tokenizer, args: argparse.Namespace) -> list[dict]:
    """Times of mask and accept for all rows, a mean over the tokens of their texts."""
    compiler = GrammarCompiler(tokenizer)
    rows = []
    for name, compiled in {
        "json_schema": lambda: compiler.json_schema(PERSON),
        "json_object": compiler.json_object,
        "regex": lambda: compiler.regex(r"[a-z]+@[a-z]+\.(com|org)"),
    }.items():
        begin = process_time()
        grammar = compiled()
        compile_ms = 1e3 * (process_time() - begin)
        raw = []
        for seed in range(args.repetitions):
            draw, matcher, times = random.Random(seed), grammar.matcher(), []
            for _ in range(200):
                begin = process_time()
                allowed_V = matcher.mask()
                mask_seconds = process_time() - begin
                token = draw.choice(np.flatnonzero(allowed_V).tolist())
                begin = process_time()
                matcher.accept(token)
                times.append(mask_seconds + process_time() - begin)
                if token == tokenizer.eos:
                    break
            raw.append(1e3 * args.rows * statistics.mean(times))
        ms = statistics.median(raw)
        rows.append({"what": "mask", "name": name, "ms": ms, "compile_ms": compile_ms, "raw": raw})
    return rows


def texts(tokenizer: Tokenizer, args: argparse.Namespace) -> list[dict]:
    """Times of the text of a reply of `args.tokens` tokens, and of half as many."""
    ids = tokenizer.encode(Path(argparse.__file__).read_text("utf-8")).tolist()
    ids = (ids * (args.tokens // len(ids) + 1))[: args.tokens]
    stop = ("\n\nUser:", "</s>")

    def text(n: int) -> str:
        detokenizer = Detokenizer(tokenizer, stop=stop)
        return "".join([*map(detokenizer.add, ids[:n]), detokenizer.finish()])

    rows = []
    for n in (args.tokens // 2, args.tokens):
        raw = milliseconds(lambda n=n: text(n), args.repetitions)
        rows.append(
            {"what": "text", "name": f"{n} tokens", "ms": statistics.median(raw), "raw": raw}
        )
    return rows


def step_ms() -> float:
    """The engine's step with 16 requests, in milliseconds."""
    wanted = {"shape": "M", "task": "decode batch 16", "side": "headway"}
    for row in common.load_rows("serve"):
        if row | wanted == row:
            return 1e3 * row["median"]
    raise UsageError("docs/numbers/serve.json has no step of M; run bench/serve.py --save first")


def main() -> None:
    """Measure, print and save."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--vocab", type=int, default=32_768)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--repetitions", type=int, default=20)
    common.add_options(parser, data=False)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = sorted(Path(argparse.__file__).parent.glob("**/*.py"))[: args.vocab // 40]
    with tempfile.TemporaryDirectory() as folder:
        written = (path.read_text("utf-8", "replace") for path in sources)
        tokenizer = train_bpe(written, args.vocab, Path(folder) / "tokenizer.json")
    rows = [*draws(args), *masks(tokenizer, args), *texts(tokenizer, args)]
    common.print_rows([{k: v for k, v in row.items() if k != "raw"} for row in rows])
    step, targets = step_ms(), []
    for row in rows:
        if row["what"] in ("draw", "mask"):
            row["step_ms"] = step
            name = f"{row['what']}, {args.rows} rows, {row['name']}: share of a step"
            targets.append(common.target(name, row["ms"] / step, 0.1, at_least=False))
    half, whole = (row["ms"] for row in rows if row["what"] == "text")
    name = f"text of {args.tokens} tokens over that of half as many"
    common.report(
        "serve_text", rows, [*targets, common.target(name, whole / half, 2.2, False)], args
    )


if __name__ == "__main__":
    common.run(main)
