"""Workers on the nodes of a Ray cluster: `python -m headway.lab.ray_workers QUEUE N THREADS`.

Ray only starts processes: each of N tasks keeps a worker on its node for as long as the queue is
there, and which run is trained where is a matter of leases in the shared folder. This is a process
of its own, since Ray ends its drivers when its head is gone. It prints `ready`, or the one line
that says why not."""

import os
import signal
import sys
import time
from pathlib import Path

from headway.lab.workers import Processes, wanted

POLL_SECONDS = 1.0


def keep_worker(queue: Path, threads: int) -> None:
    """Keep a worker on this node until the queue is gone."""
    ended = set[str]()
    with Processes(queue, threads) as processes:
        while queue.is_file():
            processes.keep(1, [folder.name for folder in wanted(queue, ended)])
            time.sleep(POLL_SECONDS)


def main() -> int:
    """Run as a program."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    queue, n, threads = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor ends this by its queue
    environment = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
    try:
        ray.init("auto", runtime_env=environment, log_to_driver=False, logging_level="ERROR")
    except ConnectionError:
        print("--on ray: no Ray cluster runs here; call ray start, or set RAY_ADDRESS")
        return 2
    sees = ray.remote(num_cpus=0)(Path.is_file)
    for node in filter(lambda node: node["Alive"], ray.nodes()):
        there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
        if not ray.get(sees.options(scheduling_strategy=there).remote(queue)):
            root = queue.parent.parent
            print(f"--on ray: node {node['NodeName']} does not see {root}; use a folder they share")
            return 2
    print("ready", flush=True)
    keep = ray.remote(num_cpus=threads, max_retries=-1)(keep_worker)
    tasks = [keep.remote(queue, threads) for _ in range(n)]
    while tasks and os.getppid() == parent:
        ended, tasks = ray.wait(tasks, timeout=POLL_SECONDS)
        ray.get(ended)
    return 0


if __name__ == "__main__":
    sys.exit(main())
