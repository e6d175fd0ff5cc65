"""Exit 0 when run B's last validation is at most `--margin` bits/byte above run A's, else 1."""

import argparse
import sys
from pathlib import Path

from headway.config import UsageError
from headway.report.sinks import read_metrics


def last_validation(run: Path) -> float:
    found = [
        r["val_bits_per_byte"]
        for r in read_metrics(run / "metrics.jsonl")
        if "val_bits_per_byte" in r
    ]
    if not found:
        raise UsageError(f"{run} has no evaluation yet; train it with --run.eval-every N")
    return found[-1]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--margin", type=float, default=0.01, help="bits/byte")
    options = parser.parse_args()
    try:
        a, b = last_validation(options.run_a), last_validation(options.run_b)
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.run_a} {a:.4f}  {options.run_b} {b:.4f}  difference {b - a:+.4f} bits/byte")
    return int(b - a > options.margin)


if __name__ == "__main__":
    sys.exit(main())
