"""From the command line to the expert matmul a reader opens seven files, each imports the next."""

import ast
import itertools
import re
import tomllib

from tests.arrows.rooms import PACKAGE, ROOT


def way():
    """The files that AGENTS.md lists."""
    text = (ROOT / "AGENTS.md").read_text("utf-8")
    said = re.search(r"From verb to expert matmul, 7 files: (.+?)\s\(", text, re.DOTALL)
    assert said is not None
    return [PACKAGE / name.strip().strip("`") for name in said[1].split("→")]


def imported(path):
    """Modules that a file imports, also inside functions; `from a import b` may be module a.b."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        match node:
            case ast.Import(names=aliases):
                yield from (alias.name for alias in aliases)
            case ast.ImportFrom(module=str(module), names=aliases):
                yield module
                yield from (f"{module}.{alias.name}" for alias in aliases)


def products(path):
    """Calls of torch's matmuls in a file, without those of its reference."""
    tree = ast.parse(path.read_text("utf-8"))
    for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
        if "reference" in function.name:
            continue
        for node in ast.walk(function):
            match node:
                case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr=name)):
                    if name in ("mm", "bmm", "matmul", "addmm"):
                        yield node.lineno


def test_it_has_seven_files_and_begins_at_the_command():
    files = way()
    assert len(files) == 7
    script = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["scripts"]
    module = script["headway"].partition(":")[0]
    assert files[0] == ROOT / f"{module.replace('.', '/')}.py"


def test_each_file_imports_the_next():
    for here, there in itertools.pairwise(way()):
        module = ".".join(there.relative_to(ROOT).with_suffix("").parts)
        assert module in set(imported(here)), (here, there)


def test_the_last_file_multiplies():
    assert list(products(way()[-1]))
