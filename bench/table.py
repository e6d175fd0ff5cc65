"""Write the measured figures of docs/numbers/*.json into README.md and docs/numbers.md.

python bench/table.py            # rewrites the blocks between the `numbers` marks
python bench/table.py --check    # exit 1 when a block differs from its files
"""

import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NUMBERS = ROOT / "docs" / "numbers"
PAGES = (ROOT / "README.md", ROOT / "docs" / "numbers.md")
BEGIN, END = "<!-- numbers: written by bench/table.py -->", "<!-- end of numbers -->"


def block(folder: Path = NUMBERS) -> str:
    """A table of targets for each bench that has any, in the order of their names."""
    parts = []
    for path in sorted(folder.glob("*.json")):
        found = json.loads(path.read_text())
        if not found["targets"]:
            continue
        machine, versions = found["machine"], found["versions"]
        parts.append(
            f"`bench/{found['bench']}.py` on {_machine(machine)}, torch {versions['torch']}, "
            f"commit {found['commit'][:10]}{' with changes' if found['dirty'] else ''}:\n\n"
            "| measured | value | target | met |\n|---|---|---|---|\n"
            + "\n".join(_row(t) for t in found["targets"])
        )
    return "\n\n".join(parts) if parts else "Nothing has been measured yet."


def _machine(machine: dict) -> str:
    if machine["gpu"]:
        return machine["gpu"]
    return f"{machine['cpu']}, {machine['cores']} cores ({machine['cpu_capability']})"


def _row(target: dict) -> str:
    value = "never reached" if target["value"] is None else f"{target['value']:.4g}"
    sign = "≥" if target["at_least"] else "≤"
    met = "yes" if target["pass"] else "**no**"
    return f"| {target['name']} | {value} | {sign} {target['bound']:g} | {met} |"


def rewrite(page: str, numbers: str) -> str:
    """The page with the block between its marks replaced."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{numbers}\n{END}{after}"


def main() -> int:
    numbers, stale = block(), []
    for path in PAGES:
        old = path.read_text()
        new = rewrite(old, numbers)
        if new != old:
            stale.append(path.name)
            if "--check" not in sys.argv:
                path.write_text(new)
    for name in stale:
        print(f"{name} differs from docs/numbers" if "--check" in sys.argv else f"wrote {name}")
    return int(bool(stale) and "--check" in sys.argv)


if __name__ == "__main__":
    sys.exit(main())
