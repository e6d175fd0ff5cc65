"""The laboratory: what a sweep adds to the time of its runs, and the time of its tables, of the
statistics and of the page of a comparison.

    python bench/lab.py [--only PART,…] [--ray PYTHON] [--dir DIR] [--quick] [--json] [--save]

`overhead`: 8 runs of 30 s on two workers; what is not steps of training (models that are built,
text that is loaded, evaluations, saves, gaps) over the time of the workers, from the first run on
and from the call on. `schedule`: 200 runs that do nothing, asked for, taken by two workers and
answered, in a process of its own, imports not counted, in turn with Optuna's trials in its SQLite
storage and Ray Tune's on two CPUs (PYTHON is that of an environment with Ray; without it that side
is left out); the supervisor's memory too. `results`: `headway results` on 2,000 folders of runs of
1,000 records, from them alone. `bootstrap`: 10,000 draws over seeds and 1,000 documents. `page`:
the page of a comparison of 20 runs in Chromium. Bounds are on CPU seconds, on bytes, and on ratios
of what took turns in one run, which other work on the machine changes least; `load` is that of the
machine before a part, over its cores: 0 on a quiet one. With --only, --save keeps the saved rows of
other parts.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import perf_counter, process_time, time

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench import common
from headway.config import UsageError

HERE = Path(__file__).resolve()
WORKERS = 2


def overhead(root: Path, runs: int, seconds: float) -> list[dict]:
    """Runs of about that many seconds; the first, shorter one gives the time of a step, and builds
    what is built once.
    """
    sweep(root / "first", "0", 20)
    [first] = results(root / "first")
    steps = max(int(seconds / (first["seconds"] / first["steps"])), 2)
    begin = time()
    said = sweep(root / "runs", ",".join(map(str, range(runs))), steps, "--workers", str(WORKERS))
    wall = time() - begin
    trained = sum(result["seconds"] for result in results(root / "runs"))
    spans: dict[str, list[float]] = {}
    for attempts in (root / "runs" / "runs").glob("*/attempts"):
        times = (attempts, attempts.with_name("result.json"))
        spans.setdefault(attempts.read_text(), []).extend(path.stat().st_mtime for path in times)
    used = sum(max(times) - min(times) for times in spans.values())
    row = {
        "part": "overhead",
        **{"runs": said["done"], "workers": len(spans), "steps": steps, "wall": wall},
        **{"trained": trained, "outside": 1 - trained / used},
        "outside_with_start": 1 - trained / (WORKERS * wall),
    }
    return [row]


def sweep(folder: Path, seeds: str, steps: int, *options: str) -> dict:
    """What `headway sweep` says of runs of the recipe demo with these seeds."""
    folder.mkdir(parents=True)
    (folder / "file.py").write_text(
        f"def configs():\n    for seed in ({seeds},):\n"
        f"        yield {{'recipe': 'demo', 'run.seed': seed, 'optim.steps': {steps},\n"
        "               'run.sample_tokens': 0, 'run.eval_tokens': 8192,\n"
        "               'run.eval_every': 10_000}\n"
    )
    command = ["-m", "headway", "sweep", folder / "file.py", "--dir", folder, *options, "--json"]
    return child(sys.executable, *command)


def results(root: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in root.glob("runs/*/result.json")]


def child(python: str, *words: object) -> dict:
    """Run a program; its last line is its answer."""
    environment = {**os.environ, "PYTHONPATH": str(common.ROOT)}
    command = [python, *map(str, words)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment, check=True)
    return json.loads(done.stdout.strip().splitlines()[-1])


def schedule(root: Path, runs: int, ray: str, repetitions: int) -> list[dict]:
    sides = {"headway": sys.executable, "optuna": sys.executable} | ({"ray": ray} if ray else {})

    def call(side: str) -> dict:
        folder = tempfile.mkdtemp(dir=root)
        return child(sides[side], HERE, "--side", side, folder, runs)

    rivals: dict[str, Callable[[], dict]] = {side: lambda side=side: call(side) for side in sides}
    rows = common.interleaved(rivals, repetitions, warmup=0)
    return [
        {"part": "schedule", "side": side, "runs": runs, "repetitions": calls} | medians(calls)
        for side, calls in rows.items()
    ]


def one_side(side: str, folder: Path, runs: int) -> dict:
    """Schedule runs that do nothing, in this process; the seconds, and the most memory it had."""
    call = {"headway": ours, "optuna": optuna_trials, "ray": ray_trials}[side](folder, runs)
    begin = perf_counter()
    call()
    seconds = perf_counter() - begin
    (peak,) = (s for s in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in s)
    return {"seconds": seconds, "mib": int(peak.split()[1]) / 1024}


def ours(folder: Path, runs: int) -> Callable[[], object]:
    from headway.lab import workers
    from headway.lab.sweep import Sweep

    (folder / "file.py").write_text(
        f"def configs():\n    for i in range({runs}):\n"
        "        yield {'recipe': 'demo', 'run.seed': i}\n"
    )
    workers.COMMAND = [sys.executable, str(HERE), "--empty"]
    supervisor = Sweep(folder, WORKERS, log=lambda _: None)

    def call() -> None:
        said = supervisor.run(folder / "file.py")
        assert said["done"] == runs, said

    return call


def empty_worker(queue: Path) -> None:
    """A worker whose runs do nothing: it takes a lease, writes a result and releases the lease."""
    from headway.checkpoint.lock import InUseError, Lock
    from headway.lab.folder import write_json
    from headway.lab.workers import wanted

    ended = set[str]()
    result = {"bits_per_byte": 1.0, "seconds": 0.0, "validation": {"fingerprint": ""}}
    while queue.is_file():
        for folder in wanted(queue, ended):
            try:
                with Lock(folder, "lease") as lease:
                    lease.acquire(print)
                    write_json(folder / "result.json", {**result, "config_hash": folder.name})
            except InUseError:
                continue


def optuna_trials(folder: Path, runs: int) -> Callable[[], object]:
    import optuna  # type: ignore[import-not-found]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(
        storage=f"sqlite:///{folder}/study.db", sampler=optuna.samplers.RandomSampler(seed=0)
    )
    return lambda: study.optimize(lambda trial: trial.suggest_float("x", 0, 1), n_trials=runs)


def ray_trials(folder: Path, runs: int) -> Callable[[], object]:
    import ray  # type: ignore[import-not-found]
    from ray import tune  # type: ignore[import-not-found]

    ray.init(num_cpus=WORKERS, include_dashboard=False, log_to_driver=False)
    tuner = tune.Tuner(
        lambda config: {"bits": config["x"]},
        param_space={"x": tune.grid_search(list(range(runs)))},
        run_config=tune.RunConfig(storage_path=str(folder), verbose=0),
    )
    return tuner.fit


def tables(root: Path, runs: int, repetitions: int) -> list[dict]:
    """`headway results` on folders as sweeps leave them."""
    from headway.lab.folder import config_hash
    from headway.lab.sweep import resolved

    base = resolved({"recipe": "demo"})
    record = {"step": 1, "loss": 2.0, "grad_norm": 0.5, "lr": 1e-3, "tokens_per_second": 12345.6}
    for i in range(runs):
        run, optim = replace(base.run, seed=i % 50), replace(base.optim, lr=1e-3 * (1 + i // 50))
        config = replace(base, run=run, optim=optim)
        result = {
            **{"config": config.to_dict(), "config_hash": config_hash(config), "attempts": 1},
            **{"bits_per_byte": 2 + i / runs, "val_loss": 1.4, "error": "", "steps": 1000},
            **{"tokens": 8_192_000, "train_flops": 1e13, "cpu_seconds": 100.0, "seconds": 120.0},
            **{"batches_sha256": "0" * 64, "validation": {"fingerprint": "x", "windows": 300}},
        }
        folder = root / "runs" / result["config_hash"]
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text((json.dumps(record) + "\n") * 1000)
        (folder / "run.json").write_text(json.dumps({"config": result["config"]}))
        (folder / "result.json").write_text(json.dumps(result, indent=1))
    asked = {
        "all": (),
        "where": ("--where", "optim.lr<0.005 and bits_per_byte<2.5"),
        "group": ("--group", "optim.lr"),
    }

    def call(options: tuple[str, ...]) -> dict:
        command = [sys.executable, "-m", "headway", "results", str(root), *options]
        begin, before = perf_counter(), os.times()
        subprocess.run(command, stdout=subprocess.DEVNULL, cwd=common.ROOT, check=True)
        after = os.times()
        cpu = sum(after[2:4]) - sum(before[2:4])  # of children, user and system
        return {"seconds": perf_counter() - begin, "cpu_seconds": cpu}

    calls = {name: lambda options=options: call(options) for name, options in asked.items()}
    measured = common.interleaved(calls, repetitions)
    return [
        {"part": "results", "asked": name, "runs": runs, "repetitions": rows} | medians(rows)
        for name, rows in measured.items()
    ]


def medians(rows: list[dict]) -> dict:
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


def bootstrap(draws: int, repetitions: int) -> list[dict]:
    import numpy as np

    from headway.lab.statistics import crossed_bootstrap

    generator = np.random.default_rng(0)
    arm_SN, baseline_SN = generator.gamma(2.0, 500.0, (2, 8, 1000))
    bytes_N = generator.integers(200, 5000, 1000).astype(float)
    crossed_bootstrap(arm_SN, baseline_SN, bytes_N, draws=draws)  # imports scipy
    calls = []
    for _ in range(repetitions):
        begin, cpu = perf_counter(), process_time()
        crossed_bootstrap(arm_SN, baseline_SN, bytes_N, draws=draws)
        calls.append({"seconds": perf_counter() - begin, "cpu_seconds": process_time() - cpu})
    row = {"part": "bootstrap", "draws": draws, "documents": 1000, "seeds": 8}
    return [row | medians(calls) | {"repetitions": calls}]


def page(root: Path, arms: int, seeds: int) -> list[dict]:
    """A comparison of tiny models, and its page in Chromium."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    from headway import recipes
    from headway.config import with_leaf
    from headway.lab.compare import compare
    from headway.lab.experiment import Arm, Experiment
    from headway.lab.page import write_comparison
    from headway.train.budget import Budget

    config = recipes.load("demo")
    tiny = {"model.n_layers": 1, "model.d_model": 32, "model.moe.d_expert": 16, "data.seq_len": 64}
    tiny |= {"data.batch_size": 4, "model.moe.top_k": 2, "model.moe.n_experts": 4}
    for field, value in tiny.items():
        config = with_leaf(config, field, value)
    designs = tuple(
        Arm(f"width {16 + 8 * i}", with_leaf(config, "model.moe.d_expert", 16 + 8 * i))
        for i in range(arms)
    )
    experiment = Experiment(designs, tuple(range(seeds)), Budget(steps=400), eval_tokens=4096)
    comparison = compare(experiment, root, log=lambda _: None)
    path = write_comparison(comparison, root / "report.html")
    options = webdriver.ChromeOptions()
    for flag in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(flag)
    program = shutil.which("chromedriver")
    if program is None:
        raise UsageError("part page needs chromium and chromedriver; install them, or use --only")
    driver = webdriver.Chrome(options=options, service=Service(program))
    driver.get("data:text/html,first")
    begin = perf_counter()
    driver.get(path.resolve().as_uri())
    seconds = perf_counter() - begin
    charts = driver.execute_script("return document.querySelectorAll('svg.chart').length")
    driver.quit()
    row = {"part": "page", "runs": len(comparison.rows), "charts": charts, "seconds": seconds}
    return [row | {"megabytes": path.stat().st_size / 1e6}]


def targets(rows: list[dict]) -> list[dict]:
    by = {(row["part"], row.get("side") or row.get("asked")): row for row in rows}
    met = []
    if row := by.get(("overhead", None)):
        what = f"{row['runs']} runs of {row['trained'] / row['runs']:.0f} s, {WORKERS} workers: "
        met += [
            common.target(f"sweep, {what}time outside training", row["outside"], 0.02, False),
            common.target(f"sweep, {what}start included", row["outside_with_start"], 0.05, False),
        ]
    if row := by.get(("schedule", "headway")):
        for side, bound in (("optuna", 1.0), ("ray", 0.2)):
            if rival := by.get(("schedule", side)):
                name = f"sweep: {row['runs']} empty runs, time over {side}'s"
                met.append(common.target(name, row["seconds"] / rival["seconds"], bound, False))
        met.append(common.target("sweep: memory of the supervisor, MiB", row["mib"], 50, False))
    for asked in ("all", "where", "group"):
        if row := by.get(("results", asked)):
            name = f"headway results, {row['runs']:,} folders, {asked}: CPU seconds"
            met.append(common.target(name, row["cpu_seconds"], 1.0, False))
    if row := by.get(("bootstrap", None)):
        name = f"bootstrap, {row['draws']:,} draws, 1,000 documents: CPU seconds"
        met.append(common.target(name, row["cpu_seconds"], 1.0, False))
    if row := by.get(("page", None)):
        name = f"comparison page of {row['runs']} runs in Chromium: "
        met.append(common.target(f"{name}seconds", row["seconds"], 2.0, False))
        met.append(common.target(f"{name}MB", row["megabytes"], 5.0, False))
    return met


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    common.add_options(parser, data=False)
    parser.add_argument("--only", default="overhead,schedule,results,bootstrap,page")
    parser.add_argument("--ray", default="", help="Python of an environment with Ray Tune")
    parser.add_argument("--dir", default="", help="folder of the runs; default: a temporary one")
    parser.add_argument("--quick", action="store_true", help="tiny sizes")
    parser.add_argument("--side", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--empty", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.side:
        print(json.dumps(one_side(args.side[0], Path(args.side[1]), int(args.side[2]))))
        return
    if args.empty:
        empty_worker(Path(args.empty))
        return
    quick = args.quick
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(args.dir or temporary)
        root.mkdir(parents=True, exist_ok=True)
        parts: dict[str, Callable[[], list[dict]]] = {
            "overhead": lambda: overhead(root / "overhead", 2 if quick else 8, 1 if quick else 30),
            "schedule": lambda: schedule(root, 10 if quick else 200, args.ray, 1 if quick else 3),
            "results": lambda: tables(root / "results", 20 if quick else 2000, 1 if quick else 5),
            "bootstrap": lambda: bootstrap(1000 if quick else 10_000, 1 if quick else 5),
            "page": lambda: page(root / "page", 2 if quick else 4, 2 if quick else 5),
        }
        rows = []
        for part in args.only.split(","):
            load = os.getloadavg()[0] / (os.cpu_count() or 1)
            measured = [row | {"load": round(load, 2)} for row in parts[part]()]
            common.print_rows(
                [{k: v for k, v in r.items() if k != "repetitions"} for r in measured]
            )
            rows += measured
        if args.save:  # parts that are not measured anew stay
            parts_now = {row["part"] for row in rows}
            rows += [row for row in common.load_rows("lab") if row["part"] not in parts_now]
    common.report("lab", rows, targets(rows), args)


if __name__ == "__main__":
    common.run(main)
