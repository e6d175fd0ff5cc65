"""A sweep: the runs that a Python file asks for, trained by workers that share a folder.

The file has a generator `configs()`. It yields a `Config`, or `{"recipe": NAME, "field.path":
value}`, and receives a `Result` for each, which waits for its run only where it is read:

    def configs():
        results = []
        for lr in (1e-3, 2e-3):
            results.append((yield {"recipe": "demo", "optim.lr": lr}))
        best = min(results, key=lambda r: r["bits_per_byte"])      # waits
        yield {**best.item, "optim.steps": 4000}

With `"fork": True` a run leaves its checkpoint of the last step before its rate falls, and one of
more steps that begins alike goes on from there, bit for bit as if it had been alone.

The folders of the runs are the truth (lab.folder): a sweep that is called again asks the same
questions in the same order, gets stored answers at once, and trains what is missing. This process
trains nothing and does not import PyTorch."""

import difflib
import importlib.util
import math
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from platform import node
from typing import Any

from headway import recipes
from headway.config import Config, RunError, UsageError, leaves, with_leaf
from headway.config.check import validate
from headway.config.fill import filled
from headway.data.tokenizer import load_tokenizer
from headway.lab.folder import TRIES, Wanted, config_hash, errors, held_by, read_result, trunk_hash
from headway.lab.user_file import raised
from headway.lab.workers import Place, Workers
from headway.optim.schedule import begin_alike, steps_before_fall

POLL_SECONDS = 0.1
PROGRESS_SECONDS = 5.0
Item = Config | Mapping[str, Any]


@dataclass(eq=False)
class Result(Mapping[str, Any]):
    """The result.json of a run; what reads it waits for it. `bits_per_byte` is infinite where there
    is none: of a run that diverged or was given up, and of a config that is not valid; `error` says
    why."""

    item: Any
    """What was yielded."""
    key: str
    """The hash of its config; "" where that is not valid."""
    _wait: Callable[[str], dict[str, Any]]

    def __getitem__(self, name: str) -> Any:
        value = self._wait(self.key)[name]
        return math.inf if name == "bits_per_byte" and value is None else value

    def __iter__(self) -> Iterator[str]:
        return iter(self._wait(self.key))

    def __len__(self) -> int:
        return len(self._wait(self.key))


@dataclass
class Sweep:
    """The supervisor. `run` does it all."""

    root: Path
    workers: int = 1
    threads: int = 1
    """Of a run whose config leaves them open."""
    on: Place = "here"
    log: Callable[[str], None] = print
    _results: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    """Every run that was asked for → its result; None while it is open."""
    _forks: dict[str, Config] = field(default_factory=dict)
    """The runs that leave a checkpoint, until the end of the sweep."""
    _reused: int = 0
    _invalid: list[str] = field(default_factory=list)
    _shown: float = 0.0

    def run(self, path: Path) -> dict[str, Any]:
        """Train what a file asks for; return `runs`, `done`, `failed`, `reused`, `started`,
        `invalid` (a line each), `best` (hash and bits per byte; None where runs were validated on
        different text), `seconds`, and `overhead`: the share of the workers' time that went into
        anything but runs, where all were new and these workers trained them. Raises UsageError for
        a file that is no sweep, or raises, and for a folder that cannot be written; RunError where
        workers cannot start."""
        begin = time.monotonic()
        generator, answer = load(path), None
        with Workers(self.root, self.workers, self.threads, self.on, self.log) as processes:
            while (item := _next(generator, answer, path)) is not None:
                answer = self._ask(item, processes)
            for key in self._results:
                self._wait(key, processes)
            ours = all(processes.trained(key) for key in self._results)
        for key in self._forks:
            shutil.rmtree(self.root / "runs" / key / "checkpoints", ignore_errors=True)
        return self._summary(time.monotonic() - begin, ours)

    def _ask(self, item: Item, processes: Workers) -> Result:
        """Ask for a run."""
        try:
            config = resolved(item, self.threads)
        except UsageError as error:
            self._invalid.append(str(error))
            self.log(f"invalid, left out: {error}")
            result = {"bits_per_byte": None, "error": str(error)}
            return Result(item, "", lambda _: result)
        key = config_hash(config)
        if key in self._results:
            self.log(f"asked for twice, run once: {key}")
        else:
            self._results[key] = read_result(self.root / "runs" / key)
            self._reused += self._results[key] is not None
            fork = isinstance(item, Mapping) and bool(item.get("fork"))
            if self._results[key] is None:
                forks = [steps_before_fall(config.optim)] if fork else []
                processes.ask(key, Wanted(config, None, forks, self._start(config) if fork else ""))
            if fork:
                self._forks[key] = config
        return Result(item, key, lambda key: self._wait(key, processes))

    def _start(self, config: Config) -> str:
        """Return the last checkpoint of a run that is the same up to it; "" where there is none."""
        checkpoints = {}
        for key, trunk in self._forks.items():
            step = steps_before_fall(trunk.optim)
            checkpoint = f"{key}/checkpoints/step-{step:06d}"
            same = trunk_hash(config) == trunk_hash(trunk)
            alike = same and begin_alike(config.optim, trunk.optim, step)
            if alike and (self.root / "runs" / checkpoint).is_dir():
                checkpoints[step] = checkpoint
        return checkpoints[max(checkpoints)] if checkpoints else ""

    def _wait(self, key: str, processes: Workers) -> dict[str, Any]:
        """Return the result of a run, when it is there."""
        while self._look(key) is None:
            processes.keep(self._open())
            self._progress()
            if self._look(key) is None:
                time.sleep(POLL_SECONDS)
        result = self._results[key]
        assert result is not None
        return result

    def _look(self, key: str) -> dict[str, Any] | None:
        """Return the result of a run that has ended, or was given up; else None."""
        if self._results[key] is None:
            folder = self.root / "runs" / key
            self._results[key] = read_result(folder)
            if self._results[key] is None and len(failed := errors(folder)) >= TRIES:
                self._results[key] = {"bits_per_byte": None, "error": failed[-1], "failed": True}
                self.log(f"given up after {len(failed)} tries: {key}: {failed[-1]}")
        return self._results[key]

    def _open(self) -> list[str]:
        """Return the runs that have not ended."""
        return [key for key, result in self._results.items() if result is None]

    def _progress(self) -> None:
        now = time.monotonic()
        if now - self._shown < PROGRESS_SECONDS:
            return
        self._shown = now
        open_runs = [key for key in self._open() if self._look(key) is None]
        holders = [held_by(self.root / "runs" / key) for key in open_runs]
        hosts = {holder.host for holder in holders if holder is not None}
        done, failed = self._counts()
        line = f"{done} of {len(self._results)} done, {len(holders) - holders.count(None)} running"
        if hosts - {node()}:
            line += f" (on {', '.join(sorted(hosts))})"
        line += f", {failed} failed"
        if best := self._best():
            line += f"; best {best['bits_per_byte']:.4f} bits/byte ({best['config_hash']})"
        seconds = [r["seconds"] for r in self._results.values() if r and r.get("seconds")]
        if seconds:
            left = sum(seconds) / len(seconds) * len(open_runs) / max(self.workers, 1)
            line += f"; about {left:,.0f} s left"
        self.log(line)

    def _counts(self) -> tuple[int, int]:
        """Return how many runs are done, diverged ones too, and how many were given up."""
        ended = [result for result in self._results.values() if result is not None]
        failed = sum(bool(result.get("failed")) for result in ended)
        return len(ended) - failed, failed

    def _best(self) -> dict[str, Any] | None:
        ended = [r for r in self._results.values() if r and r["bits_per_byte"] is not None]
        if len({r["validation"]["fingerprint"] for r in ended}) > 1:
            return None  # losses on different text cannot be compared
        best = min(ended, key=lambda r: r["bits_per_byte"], default=None)
        return best and {name: best[name] for name in ("config_hash", "bits_per_byte")}

    def _summary(self, seconds: float, ours: bool) -> dict[str, Any]:
        done, failed = self._counts()
        started = len(self._results) - self._reused
        trained = sum(map(_seconds, self._results.values()))
        used = seconds * min(self.workers, max(started, 1))
        return {
            "runs": len(self._results),
            "done": done,
            "failed": failed,
            "reused": self._reused,
            "started": started,
            "invalid": self._invalid,
            "best": self._best(),
            "seconds": seconds,
            "overhead": max(1 - trained / used, 0.0) if ours and 0 < done == started else None,
        }


def _seconds(result: Mapping[str, Any] | None) -> float:
    """Return the seconds of the steps that a run itself has done."""
    if not result or not result.get("steps"):
        return 0.0
    return result["seconds"] * (1 - result.get("continued", 0) / result["steps"])


def load(path: Path) -> Generator[Item, Result | None, None]:
    """Return the generator of a sweep file. Raises UsageError for another file."""
    if not path.is_file():
        raise UsageError(f"there is no file {path}; give a .py file with a generator configs()")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise UsageError(f"{path} is no Python file; give a .py file with a generator configs()")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        function = vars(module).get("configs")
        generator = function() if callable(function) else None
    except UsageError:
        raise
    except Exception as error:
        raise raised(error, path) from error
    if not isinstance(generator, Generator):
        what = "has no function configs()" if function is None else "has a configs() that is none"
        raise UsageError(f"{path} {what}; a sweep is a generator: def configs(): yield …")
    return generator


def _next(
    generator: Generator[Item, Result | None, None], answer: Result | None, path: Path
) -> Item | None:
    try:
        item = generator.send(answer)
    except StopIteration:
        return None
    except (UsageError, RunError):  # of a run that it waits for
        raise
    except Exception as error:
        raise raised(error, path) from error
    if not isinstance(item, Config | Mapping):
        raise UsageError(
            f"{path} yields a {type(item).__name__}; yield a Config, or a dict with recipe and "
            "fields"
        )
    return item


def resolved(item: Item, threads: int = 1) -> Config:
    """Return the whole config of what a sweep yields, as its runs are named by. Raises UsageError
    for one that cannot be."""
    config = item if isinstance(item, Config) else _from_mapping(item)
    if config.mesh.size > 1:
        raise UsageError(f"runs of a sweep are one process each, and mesh is {config.mesh}")
    config = with_leaf(config, "run.dir", "")
    config = with_leaf(config, "run.threads", config.run.threads or threads)
    config = filled(config, load_tokenizer(config.data.vocabulary).vocab_size)[0]
    validate(config)
    return config


def _from_mapping(item: Mapping[str, Any]) -> Config:
    if not isinstance(item.get("recipe"), str):
        raise UsageError(f"{dict(item)} names no recipe; use {', '.join(recipes.RECIPES)}")
    if not isinstance(item.get("fork", False), bool):
        raise UsageError(f"fork is a bool, not {item['fork']!r}")
    # its clock would end the runs of a busy machine earlier
    config = with_leaf(recipes.load(item["recipe"]), "run.max_seconds", 0.0)
    known = leaves(config.to_dict())
    for path, value in item.items():
        if path in ("recipe", "fork"):
            continue
        if path not in known:
            like = difflib.get_close_matches(path, known, n=1)
            fix = f"did you mean {like[0]}?" if like else "as in model.moe.top_k"
            raise UsageError(f"there is no field {path}; {fix}")
        before, value = known[path], tuple(value) if isinstance(value, list) else value
        if isinstance(before, float) and type(value) is int:
            value = float(value)
        if type(before) is not type(value):
            kinds = f"a {type(before).__name__}, not {value!r}"
            raise UsageError(f"{path} is {kinds}")
        config = with_leaf(config, path, value)
    return config
