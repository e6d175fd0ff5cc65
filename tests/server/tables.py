"""The tables of docs/serving.md: fields from the bodies that are read, flags from the verb's options.

`python -m tests.server.tables` writes them.
"""

import ast
import re
from pathlib import Path

from headway.server.bodies import Bounds, bodies

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "serving.md"
BODIES = bodies(Bounds(vocab_size=1000, max_len=2048, max_tokens=2048, max_n=64))


def fields() -> str:
    """One row per field; where it is taken, its default, what it does."""
    rows = ["| field | in | default | what it does |", "|---|---|---|---|"]
    completion, chat = BODIES.completion.fields, BODIES.chat.fields
    for name in dict.fromkeys((*completion, *chat)):
        places = [p for p, f in (("completions", completion), ("chat", chat)) if name in f]
        field = (completion if name in completion else chat)[name]
        default = (
            "needed"
            if field.needed
            else ""
            if field.default in (None, (), {}, "")
            else str(field.default).lower()
        )
        help = field.help
        if name == "logprobs":
            help = f"{help} In chat true or false."
        where = "both" if len(places) == 2 else places[0]
        rows.append(f"| `{name}` | {where} | {default} | {help} |")
    return "\n".join(rows)


def unsupported() -> str:
    """One row per field that is refused, with what to do instead."""
    reasons = {**BODIES.completion.unsupported, **BODIES.chat.unsupported}
    rows = [f"| `{name}` | {why} |" for name, why in sorted(reasons.items())]
    return "\n".join(["| not supported | instead |", "|---|---|", *rows])


def flags() -> str:
    """One row per flag of `headway serve`, from the docstrings of its options."""
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    for path in ("cli/trained", "config/engine", "config/server", "cli/serve"):
        tree = ast.parse((ROOT / "headway" / f"{path}.py").read_text("utf-8"))
        options = next(n for n in ast.walk(tree) if isinstance(n, ast.ClassDef))
        for field, text in zip(options.body, options.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name), value=ast.expr() as value), ast.Expr(
                    value=ast.Constant(value=str() as help)
                ):
                    default = eval(ast.unparse(value))  # a number, a text or a product of numbers
                    shown = default if default != "" else " "
                    rows.append(
                        f"| `--{name.replace('_', '-')}` | {str(shown).lower()} | {' '.join(help.split())} |"
                    )
    return "\n".join(rows)


def rewrite(page: str) -> str:
    """Put each table between its marks."""
    for name, table in (("fields", fields()), ("unsupported", unsupported()), ("flags", flags())):
        mark, end = f"<!-- {name}: python -m tests.server.tables -->", f"<!-- end of {name} -->"
        page, n = re.subn(f"{mark}.*?{end}", lambda _, b=f"{mark}\n{table}\n{end}": b, page, flags=re.S)  # fmt: skip
        assert n == 1, f"the marks of {name} are missing"
    return page


if __name__ == "__main__":
    PAGE.write_text(rewrite(PAGE.read_text("utf-8")), "utf-8")
