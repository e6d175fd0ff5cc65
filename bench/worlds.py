"""How fast a core draws items of synthetic worlds, as tokens and targets and as JSON lines.

    python bench/worlds.py [--seconds 1] [--repeats 3] [--save] [--json]

Seconds are those of the CPU, so the machine's load matters little. Windows are of the longest item,
and only its own tokens count.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from bench.common import add_options, print_rows, report, run, target
from headway.data.worlds.lines import BLOCK, lines
from headway.data.worlds.spec import TASKS, parse_world
from headway.data.worlds.world import World, WorldSplit, written


def arrays(world: World, split: WorldSplit) -> Iterator[int]:
    """Draw blocks of items for ever; yield the tokens of each."""
    for block in range(1 << 30):
        index_B = np.arange(block * BLOCK, (block + 1) * BLOCK, dtype=np.uint64)
        yield int((written(world, split, index_B).tokens_BT >= 0).sum())


def json_lines(world: World, split: WorldSplit) -> Iterator[int]:
    """Write items for ever; yield the tokens of each."""
    for line in lines(world, split, 1 << 30):
        yield line.count(",", line.index('"tokens"'), line.index('"targets"'))


def rate(
    draw: Callable[[World, WorldSplit], Iterator[int]],
    world: World,
    split: WorldSplit,
    seconds: float,
) -> float:
    """Return tokens per CPU second."""
    tokens, began = 0, time.process_time()
    for n in draw(world, split):
        tokens += n
        if (elapsed := time.process_time() - began) >= seconds:
            return tokens / elapsed
    raise AssertionError


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--repeats", type=int, default=3)
    add_options(parser, data=False)
    args = parser.parse_args()
    rows = []
    for task in TASKS.split(", "):
        world = parse_world(task)
        row: dict = {"task": task, "tokens": world.n_tokens}
        splits: tuple[WorldSplit, ...] = ("train", "test")
        for split in splits:
            row[split] = [rate(arrays, world, split, args.seconds) for _ in range(args.repeats)]
        row["lines"] = [rate(json_lines, world, "train", args.seconds) for _ in range(args.repeats)]
        rows.append(row)
    print_rows(rows)
    slowest = min(float(np.median(row[split])) for row in rows for split in ("train", "test"))
    report(
        "worlds", rows, [target("tokens/s per core of the slowest world", slowest, 1e6, True)], args
    )


if __name__ == "__main__":
    run(main)
