"""Exit 0 when run B's last validation is at most `--margin` bits/byte above run A's, else 1."""

import argparse
import sys
from pathlib import Path

from headway.config import UsageError
from headway.report.html import load_runs
from headway.report.ranking import ranking


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run_a", type=Path)
    parser.add_argument("run_b", type=Path)
    parser.add_argument("--margin", type=float, default=0.01, help="bits/byte")
    options = parser.parse_args()
    try:
        runs = load_runs([options.run_a, options.run_b])
    except UsageError as error:
        print(error, file=sys.stderr)
        return 1
    ranked = ranking(runs)
    if ranked.order is None:
        print(ranked.sentence, file=sys.stderr)
        return 1
    a, b = (run["headline"]["val_last"] for run in runs)
    print(f"{options.run_a} {a:.4f}  {options.run_b} {b:.4f}  difference {b - a:+.4f} bits/byte")
    return int(b - a > options.margin)


if __name__ == "__main__":
    sys.exit(main())
