"""The command line: each verb is one function. A user's mistake is one line on stderr and exit code
2.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake, 130 interrupted. With `--json` the last
line of stdout is one JSON object. PyTorch is imported inside the verbs that need it.
"""

import difflib
import io
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import tyro

from headway.cli.describe import describe
from headway.cli.options import parse, print_json
from headway.cli.plan import plan
from headway.cli.tokenize import tokenize
from headway.cli.train import train
from headway.config import PeerError, RankError, UsageError
from headway.train import interrupt

if TYPE_CHECKING:
    from headway.model.transformer import Transformer

VERBS = {
    "doctor": "what is here, which paths will run, what each missing extra would add",
    "train": "train a recipe: headway train demo --run runs/first --steps 200",
    "eval": "bits per byte of a trained model on validation text",
    "sample": "let a trained model write",
    "tokenize": "train a BPE tokenizer on your text, or tokenise text ahead of training",
    "report": "one offline HTML page from one run or several",
    "describe": "parameters, FLOPs, memory and traffic of a recipe, with formulas",
    "plan": "meshes for a recipe and a cluster, by predicted step time: --gpus 64 --gpu h100",
}
"""Verb → one line of help."""
SPINS = "2000"
"""Some microseconds; 5% slower than the default where nothing else wants the cores."""


def run() -> None:
    """Entry point of the `headway` command. Under torchrun only rank 0 speaks."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if "OMP_WAIT_POLICY" not in os.environ:
        # a thread that waits for the others spins before it sleeps, by default so long that steps
        # take several times longer where something else wants the cores (docs/kernels.md); read
        # when PyTorch is imported
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    code = main()
    if code == 130:
        interrupt.ignore()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb; returns the exit code. `argv` without the program's name; default: the command
    line."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _verb(args)
    except UsageError as error:
        if _speaks(error):
            rank = os.environ.get("RANK", "0")
            who = "" if rank == "0" or isinstance(error, RankError) else f"rank {rank}: "
            print(f"headway: {who}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"headway: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as end:  # tyro has printed help
        return int(end.code or 0)


def _speaks(error: UsageError) -> bool:
    """Whether this rank prints a mistake. What all ranks met, rank 0 prints, and the launcher ends
    the others while they wait here; a mistake that only this rank met is not lost."""
    if os.environ.get("RANK", "0") == "0" or isinstance(error, RankError):
        return True
    if isinstance(error, PeerError):
        return False
    time.sleep(3.0)
    return True


def _verb(args: list[str]) -> int:
    verb, rest = (args[0], args[1:]) if args else ("--help", [])
    match verb:
        case "doctor":
            return doctor(parse(Doctor, rest, "headway doctor"))
        case "train":
            return train(rest)
        case "eval":
            return evaluate(parse(Eval, rest, "headway eval"))
        case "sample":
            return sample(parse(Sample, rest, "headway sample"))
        case "tokenize":
            return tokenize(rest)
        case "report":
            return report(parse(Report, rest, "headway report"))
        case "describe":
            return describe(rest)
        case "plan":
            return plan(rest)
        case "--help" | "-h" | "help":
            print(_help())
            return 0
        case "--version":
            from headway import __version__

            print(f"headway {__version__}")
            return 0
        case _:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"unknown verb {verb!r}; {hint}use {', '.join(VERBS)}")


# doctor


@dataclass(frozen=True)
class Doctor:
    """What is here, which paths will run, and what each missing extra would add."""

    measure: str = ""
    """Measure this machine instead, for `headway plan --machine FILE`: matmuls, experts, attention,
    memory and, under torchrun, the network. The file to write.
    """
    json: bool = False
    """End with one JSON object."""


def doctor(options: Doctor) -> int:
    """`headway doctor`."""
    if options.measure:
        from headway.measure.rates import measure

        found = measure(Path(options.measure), lambda line: print(line, flush=True))
        if os.environ.get("RANK", "0") == "0":
            print(f"{options.measure}: use it with `headway plan RECIPE --gpus N --machine FILE`")
            print_json(options.json, found)
        return 0

    from headway.cli.doctor import examine, render

    found = examine()
    print(render(found))
    print_json(options.json, found)
    return 0


# eval, sample


@dataclass(frozen=True)
class Eval:
    """Bits per byte of a trained model on the validation split of its data, or of other data."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one checkpoint folder inside it."""
    data: tuple[str, ...] = ()
    """Other text, as for `train --data`; its validation split is read."""
    tokens: int = 0
    """Validation tokens, in whole windows, as `run.eval_tokens`; 0 means the whole split."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: that of training, where it is here."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matmuls; auto: that of training, where this machine multiplies it natively."""
    json: bool = False
    """End with one JSON object."""


def evaluate(options: Eval) -> int:
    """`headway eval RUN|CHECKPOINT`."""
    import dataclasses

    from headway.checkpoint.runtime import load_trained
    from headway.data.shards import prepare
    from headway.data.stream import Stream
    from headway.data.validation import validation_text
    from headway.eval.bits_per_byte import evaluate as measure

    if options.tokens < 0:
        raise UsageError(f"--tokens {options.tokens} is below 0; 0 means the whole split")
    found = load_trained(options.run, options.device, options.dtype)
    _tell(found.problems, found.remarks)
    data = found.config.data
    if options.data:
        data = dataclasses.replace(data, source=options.data, weights=())
    stream = Stream(prepare(data, found.tokenizer), data, found.config.run.seed)
    text = validation_text(stream, options.tokens)
    # other data may share what they like: the model was not trained on them
    for note in stream.dataset.approximate if options.data else stream.dataset.notes:
        print(f"note: {note}")
    result = measure(found.model, stream, text.windows, data.micro_batch_size)
    print(
        f"{found.checkpoint}: {result.val_bits_per_byte:.4f} bits/byte, "
        f"{result.val_loss:.4f} nats/token on {text.sentence}"
    )
    print_json(
        options.json,
        {
            "val_bits_per_byte": result.val_bits_per_byte,
            "val_loss": result.val_loss,
            "windows": text.windows,
            "validation": text.fingerprint,
            "data": list(data.source),
            "checkpoint": str(found.checkpoint),
            **_where(found.model),
        },
    )
    return 0


@dataclass(frozen=True)
class Sample:
    """Text from a trained model, streamed as it is written."""

    run: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]
    """A run folder, or one checkpoint folder inside it."""
    prompt: str = ""
    """Where the text starts; empty starts a document."""
    tokens: int = 200
    """Most tokens to write; fewer when the document ends."""
    temperature: float = 0.8
    """Divides the logits; 0 takes the most likely token each time."""
    top_k: int = 50
    """Draw from the k most likely tokens; 0 keeps all."""
    top_p: float = 1.0
    """Then from the smallest set whose probability reaches p; 1 keeps all."""
    seed: int = 0
    """The same seed gives the same text."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: that of training, where it is here."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the matmuls; auto: that of training, where this machine multiplies it natively."""
    json: bool = False
    """End with one JSON object."""


def sample(options: Sample) -> int:
    """`headway sample RUN`."""
    from headway.checkpoint.runtime import load_trained
    from headway.eval.sampling import check_sampling, generate

    check_sampling(options.temperature, options.top_k, options.top_p)
    if options.tokens < 1:
        raise UsageError(f"--tokens {options.tokens} is below 1; use 1 or more")
    found = load_trained(options.run, options.device, options.dtype)
    _tell(found.problems, found.remarks)
    if factor := found.config.model.moe.capacity_factor:
        print(
            f"note: trained with model.moe.capacity_factor={factor}; sampling drops no token",
            file=sys.stderr,
        )

    def show(text: str) -> None:
        print(text, end="", flush=True)

    show(options.prompt)
    text = generate(
        found.model,
        found.tokenizer,
        options.prompt,
        options.tokens,
        options.temperature,
        options.top_k,
        options.top_p,
        options.seed,
        on_token=show,
    )
    print()
    print_json(
        options.json,
        {
            "prompt": options.prompt,
            "text": text,
            "tokens": len(found.tokenizer.encode(text)),
            "seed": options.seed,
            "checkpoint": str(found.checkpoint),
            **_where(found.model),
        },
    )
    return 0


# report


@dataclass(frozen=True)
class Report:
    """One offline HTML page from one run, or from several laid over each other."""

    runs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN …]")]
    """Run folders."""
    out: str = ""
    """File to write; empty means report.html in the run folder, or here for several runs."""
    json: bool = False
    """End with one JSON object."""


def report(options: Report) -> int:
    """`headway report RUN [RUN…]`."""
    from headway.report.html import load_runs, write_page
    from headway.report.ranking import ranking

    alone = len(options.runs) == 1
    out = options.out or (str(Path(options.runs[0]) / "report.html") if alone else "report.html")
    runs = load_runs(options.runs)
    path, ranked = write_page(runs, out), ranking(runs)
    print(f"report of {', '.join(options.runs)}: {path}")
    if ranked.sentence:
        print(ranked.sentence)
    print_json(
        options.json,
        {"report": str(path), "runs": list(options.runs), "ranking": ranked.order},
    )
    return 0


# shared


def _tell(problems: list[str], remarks: Sequence[str]) -> None:
    for line in [*(f"{problem}; using the one before" for problem in problems), *remarks]:
        print(f"headway: {line}", file=sys.stderr)


def _where(model: "Transformer") -> dict[str, str]:
    """Device and dtype of the matmuls, for `--json`."""
    dtype = str(model.dtype).removeprefix("torch.")
    return {"device": model.embed.weight.device.type, "dtype": dtype}


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10} {line}" for verb, line in VERBS.items())
    return (
        f"usage: headway VERB …\n\n{verbs}\n\n"
        "`headway VERB --help` lists the options of a verb, "
        "`headway train RECIPE --help` every leaf of the config."
    )
