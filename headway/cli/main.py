"""The command line: one file per verb, and here what they share: exit codes and error lines.

Exit codes: 0 done, 1 the run failed, 2 the user's mistake (one line on stderr), 130 interrupted.
With `--json` the last line of stdout is one JSON object. PyTorch is imported inside the verbs that
need it."""

import difflib
import io
import os
import sys
import time
from collections.abc import Sequence

from headway import __version__
from headway.cli.chat import chat
from headway.cli.compare import compare
from headway.cli.describe import describe
from headway.cli.diversity import diversity
from headway.cli.doctor import doctor
from headway.cli.eval import evaluate
from headway.cli.export import export
from headway.cli.import_ import import_
from headway.cli.law import law
from headway.cli.plan import plan
from headway.cli.report import report
from headway.cli.results import results
from headway.cli.sample import sample
from headway.cli.serve import serve
from headway.cli.study import study
from headway.cli.sweep import sweep
from headway.cli.tokenize import tokenize
from headway.cli.train import train
from headway.cli.worlds import worlds
from headway.config import PeerError, RankError, RunError, UsageError
from headway.train import interrupt

VERBS = {
    "doctor": "hardware, the kernels that will run, what each missing extra would add",
    "train": "train a recipe: headway train demo --run runs/first --steps 200",
    "eval": "bits per byte of a trained model on validation text",
    "sample": "text from a trained model",
    "chat": "a conversation with a trained model in the terminal",
    "export": "a trained model as a Hugging Face folder, or as GGUF for llama.cpp",
    "import": "a run folder from a Hugging Face folder",
    "serve": "an OpenAI-compatible server of a trained model",
    "worlds": "items of a synthetic world as JSON lines: headway worlds mqar --n 200 --out FILE",
    "tokenize": "train a BPE tokenizer on your text, or tokenise text ahead of training",
    "report": "one offline HTML page from one run or several",
    "describe": "parameters, FLOPs, memory and traffic of a recipe, with formulas",
    "compare": "designs at equal cost, with the same seeds, and their differences with intervals",
    "sweep": "the runs that a Python file asks for, by several processes that may be killed",
    "study": "registered studies: list, register, run, judge by their rows",
    "results": "tables of finished runs: by condition, by group, as CSV",
    "law": "scaling laws: fit, predict, register a forecast and score it, gain of a change",
    "diversity": "how different the documents of texts are: Vendi, G-Vendi, near-duplicates",
    "plan": "meshes for a recipe and a cluster, by predicted step time: --gpus 64 --gpu h100",
}
"""Verb → one line of help."""
SPINS = "2000"
"""GOMP_SPINCOUNT, some microseconds; 5% slower than the default on idle cores."""


def run() -> None:
    """Run the `headway` command and exit. Under torchrun only rank 0 writes to stdout."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a file's name need not be UTF-8
            stream.reconfigure(errors="backslashreplace")
    if os.environ.get("RANK", "0") != "0":
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
    if "OMP_WAIT_POLICY" not in os.environ:
        # An OpenMP thread that waits spins before it sleeps, by default so long that steps take
        # several times longer on busy cores (docs/kernels.md). It is read when PyTorch is imported.
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
    code = main()
    if code == 130:
        interrupt.ignore()
    sys.exit(code)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code. `argv` has no program name; None: the process's."""
    args = list(sys.argv[1:] if argv is None else argv)
    try:
        return _verb(args)
    except UsageError as error:
        if _reports(error):
            rank = os.environ.get("RANK", "0")
            who = "" if rank == "0" or isinstance(error, RankError) else f"rank {rank}: "
            print(f"headway: {who}{' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except RunError as error:
        if str(error):  # else another rank says it
            print(f"headway: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"headway: {str(error) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except SystemExit as end:  # tyro has printed help
        return int(end.code or 0)


def _reports(error: UsageError) -> bool:
    """Return whether this rank prints a user error. Rank 0 prints what all ranks met, and the
    launcher ends the others while they wait here, so that an error of one rank is printed too."""
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
            return doctor(rest)
        case "train":
            return train(rest)
        case "eval":
            return evaluate(rest)
        case "import":
            return import_(rest)
        case "sample":
            return sample(rest)
        case "chat":
            return chat(rest)
        case "export":
            return export(rest)
        case "serve":
            return serve(rest)
        case "worlds":
            return worlds(rest)
        case "tokenize":
            return tokenize(rest)
        case "report":
            return report(rest)
        case "compare":
            return compare(rest)
        case "sweep":
            return sweep(rest)
        case "study":
            return study(rest)
        case "results":
            return results(rest)
        case "law":
            return law(rest)
        case "diversity":
            return diversity(rest)
        case "describe":
            return describe(rest)
        case "plan":
            return plan(rest)
        case "--help" | "-h" | "help":
            print(_help())
            return 0
        case "--version":
            print(f"headway {__version__}")
            return 0
        case _:
            near = difflib.get_close_matches(verb, VERBS, n=1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise UsageError(f"unknown verb {verb!r}; {hint}use {', '.join(VERBS)}")


def _help() -> str:
    verbs = "\n".join(f"  {verb:<10} {line}" for verb, line in VERBS.items())
    return (
        f"usage: headway VERB …\n\n{verbs}\n\n"
        "`headway VERB --help` lists the options of a verb, "
        "`headway train RECIPE --help` every leaf of the config."
    )
