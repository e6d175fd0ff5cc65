"""Everything that is worth knowing about a GPU, in one command of a few minutes.

    python bench/gpu_day.py --out DIR [--stages tests profile …] [--minutes 11] [--json] [--save]
    python bench/gpu_day.py --out DIR --dry     every stage at toy sizes on a CPU

Stages (bench/gpu_stages.py) run one after the other, each in a process of its own: what crashes or
hangs costs its own stage and no other. Each writes DIR/STAGE.json row by row; a stage that is whole
there is not run again, so a call that was cut off goes on where it stopped. Needs torch and Triton,
for the stage `tests` pytest and hypothesis (with pytest-xdist they share the cores), for the stage
`step` transformers. docs/kernels.md tells what was found.
"""

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
if "--dry" in sys.argv:
    os.environ["HEADWAY_TRITON"] = os.environ.get("HEADWAY_TRITON", "interpret")
    os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported
from bench import common, gpu_stages
from headway.config import UsageError


def run_stage(name: str, folder: Path, dry: bool, seconds: float) -> dict:
    """One stage in a child process; its document, with `error` where it did not end well."""
    command = [sys.executable, "-W", "ignore", str(Path(__file__).resolve())]
    command += ["--out", str(folder), "--child", name, *(["--dry"] if dry else [])]
    with (folder / f"{name}.log").open("w") as log:
        # a process group of its own, so that nothing of a stage that hangs disturbs the next one
        child = subprocess.Popen(
            command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            code = child.wait(seconds)
            error = f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            error = f"stopped after {seconds:.0f} s"
        except KeyboardInterrupt:
            os.killpg(child.pid, signal.SIGKILL)
            raise
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGKILL)
        child.wait()
    document = gpu_stages.load(folder, name)
    if error:
        document["error"] = error
        gpu_stages.write(folder, name, document)
    return document


def run_all(args: argparse.Namespace, folder: Path) -> dict[str, dict]:
    """Every stage that is asked for; no stage is started after the minutes are over."""
    end, found = time.monotonic() + 60 * args.minutes, {}
    for name in args.stages:
        before = gpu_stages.load(folder, name)
        if before.get("done"):
            print(f"{name}: done before, {len(before['rows'])} rows", flush=True)
            found[name] = before
            continue
        left = end - time.monotonic()
        if left < 5:
            print(f"{name}: left out, {args.minutes:g} minutes are over", flush=True)
            continue
        started = time.monotonic()
        found[name] = run_stage(name, folder, args.dry, min(left, gpu_stages.SECONDS[name]))
        state = found[name].get("error") or "done"
        failed = sum("error" in row for row in found[name]["rows"])
        print(
            f"{name}: {state} in {time.monotonic() - started:.0f} s, "
            f"{len(found[name]['rows'])} rows" + (f", {failed} failed" if failed else ""),
            flush=True,
        )
        for line in gpu_stages.lines(name, found[name]["rows"]):
            print("  " + line, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, help="folder for results and logs")
    parser.add_argument("--stages", nargs="+", default=list(gpu_stages.STAGES), metavar="STAGE")
    parser.add_argument("--minutes", type=float, default=11.0, help="for all stages together")
    parser.add_argument("--dry", action="store_true", help="toy sizes, on a CPU")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    common.add_options(parser, data=False)
    args = parser.parse_args()
    if unknown := [s for s in args.stages if s not in gpu_stages.STAGES]:
        known = ", ".join(gpu_stages.STAGES)
        raise UsageError(f"--stages {unknown[0]} is not known; use some of {known}")
    if args.minutes <= 0:
        raise UsageError(f"--minutes must be above 0, not {args.minutes:g}")
    gpu_stages.check_device(args.dry)
    folder = Path(args.out)
    folder.mkdir(parents=True, exist_ok=True)
    if args.child:
        gpu_stages.run(args.child, folder, args.dry)
        return
    found = run_all(args, folder)
    rows = [{"stage": name} | row for name, stage in found.items() for row in stage["rows"]]
    missing = [name for name in args.stages if not found.get(name, {}).get("done")]
    targets = gpu_stages.targets(rows)
    targets.append(common.target("stages not whole", len(missing), 0, False))
    common.report("gpu_day_dry" if args.dry else "gpu_day", rows, targets, args)
    if args.json:
        return
    print(json.dumps({"folder": str(folder), "missing": missing}))


if __name__ == "__main__":
    common.run(main)
