"""The registration of a study: what was decided before its first row, in a file that cannot be
changed unnoticed.

`studies/registered/NAME.json` holds the claims with their regions, margins and predictions, the
rules with the functions that judge by them, every arm of every series with the config fields that
make it, the hashes of the texts, the seeds, how runs are left out, and a sha256 of all that. It is
committed before the first row; a later version of the study's file may add arms and notes, which
are exploratory, but not touch what is here."""

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from headway.config import Config, UsageError, leaves
from headway.data.shards import prepare
from headway.data.tokenizer import load_tokenizer
from headway.lab import edits
from headway.lab.experiment import PlannedArm
from headway.lab.folder import ELSEWHERE, write_json
from headway.lab.sealed import Kind, read_sealed, sealed
from headway.lab.study import Claim, Rule, Study, Task, tasks
from headway.train.records import Log

KIND = Kind("headway study registration", "headway study NAME --register")
EXCLUSION = "a run that diverges drops its pair, and is named; nothing else is left out"
STAGES = ("screen", "confirm")
LOOKS = "one: at the registered number of seeds, and not before"


def registered_file(folder: Path, name: str) -> Path:
    """Return the path of the registration of a study in `folder`."""
    return folder / "registered" / f"{name}.json"


def describe(study: Study, log: Log = lambda _: None) -> dict[str, Any]:
    """Return what a registration holds, but for its hash. Reads the texts."""
    todo = list(tasks(study, log))
    stated = [stated.id for stated in (*study.claims, *study.rules)]
    if len(set(stated)) < len(stated):
        raise UsageError(f"study {study.name} states two claims of one name among {stated}")
    seeds = {stage: sorted({t.seed for t in todo if t.stage == stage}) for stage in STAGES}
    if twice := set(seeds["screen"]) & set(seeds["confirm"]):
        raise UsageError(
            f"study {study.name}: seeds {sorted(twice)} both screen and confirm; use other ones"
        )
    return {
        "study": study.name,
        "title": study.title,
        "claims": [claim_record(claim) for claim in study.claims],
        "rules": [rule_record(rule) for rule in study.rules],
        "scores": edits.source(study.scores) if study.scores is not None else [],
        "scores_read": edits.helpers(study.scores) if study.scores is not None else {},
        "arms": _arms(todo),
        "texts": _texts(todo, log),
        "seeds": seeds,
        "exclusion": EXCLUSION,
        "looks": LOOKS,
    }


def _texts(todo: Sequence[Task], log: Log) -> dict[str, str]:
    """Return the name of each text → the hash of its tokens."""
    texts: dict[str, str] = {}
    for task in todo:
        if task.corpus not in texts:
            data = next(iter(task.planned.values())).config.data
            texts[task.corpus] = prepare(data, load_tokenizer(data.vocabulary), log).fingerprint
    return texts


def claim_record(claim: Claim) -> dict[str, Any]:
    """Return a claim as JSON has it: tuples are lists."""
    return json.loads(json.dumps(dataclasses.asdict(claim)))


def rule_record(rule: Rule) -> dict[str, Any]:
    """Return a rule as JSON has it: for its function the source, and that of what it reads of the
    studies' modules."""
    record = {f.name: vars(rule)[f.name] for f in dataclasses.fields(rule)}
    functions = {"judge": edits.source(rule.judge), "judge_reads": edits.helpers(rule.judge)}
    return json.loads(json.dumps({**record, **functions}))


def ids(record: dict[str, Any] | None) -> set[str]:
    """Return the names of the claims and rules of a registration; none where there is none."""
    if record is None:
        return set()
    return {stated["id"] for stated in (*record["claims"], *record.get("rules", ()))}


def _arms(todo: Sequence[Task]) -> list[dict[str, Any]]:
    """Return a record of each arm at each budget; seeds are listed."""
    records: dict[tuple, dict[str, Any]] = {}
    for task in todo:
        for steps, arm in task.planned.items():
            key = (task.stage, task.corpus, task.arm, steps)
            record = records.setdefault(key, arm_record(task, steps, arm))
            record["seeds"] = sorted({*record["seeds"], task.seed})
    return list(records.values())


def arm_record(task: Task, steps: int, arm: PlannedArm) -> dict[str, Any]:
    """Return the fields that make an arm what it is: those that differ from an empty config's, so
    that options which are added later change nothing."""
    default = leaves(Config().to_dict())
    fields = {
        name: value
        for name, value in leaves(arm.config.to_dict()).items()
        if value != default[name] and name not in ELSEWHERE
    }
    return {
        "stage": task.stage,
        "corpus": task.corpus,
        "arm": task.arm,
        "budget": steps,
        "seeds": [task.seed],
        "train_flops": arm.train_flops,
        "edit": edits.source(arm.edit) if arm.edit is not None else [],
        "fields": json.loads(json.dumps(fields)),
    }


def register(study: Study, folder: Path, log: Log = print) -> Path:
    """Write the registration of a study, once. Raises UsageError where there is one."""
    path = registered_file(folder, study.name)
    if path.exists():
        raise UsageError(f"{path} is registered already; a new question is a new study")
    record = describe(study, log)
    write_json(path, sealed({"kind": KIND.name, **record}))
    return path


def read(study: Study, folder: Path) -> dict[str, Any] | None:
    """Return the registration of a study, None where there is none. Raises UsageError where it was
    changed by hand, or a claim or rule of the study's file is no longer the one registered."""
    path = registered_file(folder, study.name)
    if not path.is_file():
        return None
    record = read_sealed(path, KIND)
    now = {claim.id: claim_record(claim) for claim in study.claims}
    now |= {rule.id: rule_record(rule) for rule in study.rules}
    for claim in (*record["claims"], *record.get("rules", ())):
        if (other := now.get(claim["id"])) is None:
            raise UsageError(f"claim {claim['id']} is registered in {path} and no longer stated")
        for name, value in claim.items():
            if other[name] != value:
                raise UsageError(
                    f"claim {claim['id']} is not the one registered in {path}: {name} was "
                    f"{value!r} and is {other[name]!r}"
                )
    scores = edits.source(study.scores) if study.scores is not None else []
    helpers = edits.helpers(study.scores) if study.scores is not None else {}
    # registrations before this one do not have what functions read
    if record.get("scores", []) != scores or record.get("scores_read", helpers) != helpers:
        raise UsageError(f"what {study.name} measures of its runs is not what {path} registered")
    return sealed(record)


def check(record: dict[str, Any], todo: Sequence[Task]) -> None:
    """Raise UsageError where an arm would be trained otherwise than it was registered, with other
    seeds, or on another text."""
    for name, fingerprint in _texts(todo, lambda _: None).items():
        if record["texts"].get(name, fingerprint) != fingerprint:
            raise UsageError(
                f"the text {name} is not the one that was registered; install the versions of the "
                "packages that it is made of"
            )
    registered = {_arm_key(arm): arm for arm in record["arms"]}
    for arm in _arms(todo):
        before = registered.get(_arm_key(arm))
        if before is None:
            continue  # exploratory: no claim of the registration reads it
        if more := sorted(set(arm["seeds"]) - set(before["seeds"])):
            raise UsageError(
                f"arm {arm['arm']} at {arm['budget']} steps on {arm['corpus']}: seeds {more} are "
                f"not registered, and would be a second look; use {before['seeds']}"
            )
        for name in ("fields", "edit", "train_flops"):
            if arm[name] != before[name]:
                raise UsageError(
                    f"arm {arm['arm']} at {arm['budget']} steps on {arm['corpus']} is not the one "
                    f"that was registered: {_first_difference(before[name], arm[name])}"
                )


def _arm_key(arm: dict[str, Any]) -> tuple:
    return arm["stage"], arm["corpus"], arm["arm"], arm["budget"]


def _first_difference(before: Any, now: Any) -> str:
    if not isinstance(before, dict):
        return f"{before!r} is now {now!r}"
    name = next(n for n in {**before, **now} if before.get(n) != now.get(n))
    return f"{name} was {before.get(name, 'not set')!r} and is {now.get(name, 'not set')!r}"


def commit_of(path: Path) -> str | None:
    """Return the commit that added a file; None where git does not know."""
    command = ["git", "log", "--diff-filter=A", "--format=%H", "--", path.name]
    with contextlib.suppress(OSError):
        done = subprocess.run(command, cwd=path.parent, capture_output=True, text=True, check=False)
        return (done.stdout.split() or [None])[-1]
    return None
