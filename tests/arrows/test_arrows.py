"""Imports go one way, extras stay optional, and a few habits stay out of the package."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.arrows.rooms import ALLOWED, PACKAGE, ROOT

FILES = sorted(PACKAGE.rglob("*.py"))

CORE = {"torch", "numpy", "safetensors", "tyro", "tokenizers", "headway"} | set(
    sys.stdlib_module_names
)

BESIDE_CORE = {
    PACKAGE / "kernels" / "gpu": {"triton"},
    PACKAGE / "eval" / "harness.py": {"lm_eval"},
    PACKAGE / "eval" / "tasks.py": {"lm_eval", "yaml"},
}
"""Folder or file, itself imported in functions alone → extras that it imports at its top."""


def room(path: Path) -> str:
    """The folder of a file in the package, or its own name at the top."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return parts[0]


def imports(path: Path) -> list[tuple[str, bool]]:
    """(module, whether at the top of the file) of every import; `from a import b` counts as `a.b` where that is a module."""
    tree = ast.parse(path.read_text("utf-8"))
    top = {id(node) for node in tree.body}
    modules = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            modules += [(alias.name, id(node) in top) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            if path.parent.name == "remote":  # copied into folders, where it is no part of headway
                continue
            assert node.level == 0, f"{path}: imports are absolute"
            module = node.module or ""
            names = [f"{module}.{alias.name}" for alias in node.names]
            if module == "headway":
                modules += [(name, id(node) in top) for name in names]
            else:
                modules.append((module, id(node) in top))
    return modules


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_go_one_way(path):
    for module, _ in imports(path):
        parts, here = module.split("."), room(path)
        if parts[0] != "headway" or parts[1:] in ([], ["__version__"]):
            continue
        assert parts[1] != "cli" or here in ("cli", "__main__"), "nothing imports the command line"
        if here in ALLOWED and parts[1] != here:
            assert parts[1] in ALLOWED[here], f"{here} may not import {module}"


def test_config_needs_the_standard_library_alone():
    for path in (PACKAGE / "config").glob("*.py"):
        modules = {module for module, _ in imports(path)}
        other = {m.split(".")[0] for m in modules if not m.startswith("headway.config")}
        assert other <= set(sys.stdlib_module_names), path


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_extras_are_imported_where_they_are_used(path):
    """At the top of a file only the core dependencies; GPU kernels import Triton too, the harness's
    model its base class."""
    known = CORE | BESIDE_CORE.get(path.parent, set()) | BESIDE_CORE.get(path, set())
    for module, at_top in imports(path):
        assert not at_top or module.split(".")[0] in known, (
            f"{module} is an extra: import it in the function"
        )


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_habits(path):
    text = path.read_text("utf-8")
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in {"hasattr", "getattr", "setattr", "eval", "exec"}, (
                f"{node.func.id}() in line {node.lineno}: ask the type, not the name"
            )
        if isinstance(node, ast.Global):
            raise AssertionError(f"global state in line {node.lineno}")
        if room(path) in ("model", "kernels") and isinstance(node, ast.Attribute):
            assert node.attr != "item", f".item() in line {node.lineno} waits for the device"


def tracked() -> list[Path]:
    """Files of the repository; of the working tree where there is no git."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode == 0 and listed.stdout:
        return [ROOT / line for line in listed.stdout.splitlines() if (ROOT / line).is_file()]
    skipped = {
        ".venv",
        ".git",
        "runs",
        "__pycache__",
        ".pytest_cache",
        ".ruff_cache",
        ".hypothesis",
    }
    return [
        p for p in ROOT.rglob("*") if p.is_file() and not skipped & set(p.relative_to(ROOT).parts)
    ]


@pytest.mark.parametrize(
    "skill", sorted(ROOT.glob(".agents/skills/*/SKILL.md")), ids=lambda p: p.parent.name
)
def test_a_skill_names_what_is_there(skill):
    """Files, and before a file in parentheses the functions that it holds: `a` and `b` (`file`)."""
    text = skill.read_text()
    paths = re.findall(r"(?:headway|tests|docs|\.agents)/[\w./-]*\w", text)
    assert paths and [p for p in paths if not (ROOT / p).exists()] == []
    file = r"`[\w/.-]+\.(?:py|cpp)`"
    for names, files in re.findall(
        rf"((?:`[\w.]+`\s+and\s+)*`[\w.]+`)\s+\(({file}(?:,\s+{file})*)\)", text
    ):
        held = "".join((ROOT / name).read_text() for name in re.findall(r"[\w/.-]+", files))
        for name in re.findall(r"`([\w.]+)`", names):
            assert re.search(rf"\b{name.rpartition('.')[2]}\(", held), f"{name} is not in {files}"


def test_no_path_of_a_machine_in_a_file():
    """Somebody's home or work folder, or a registry, in a file that others will read."""
    pattern = re.compile(
        rb"/(?:home|Users)/[A-Za-z0-9_.-]+/|/work/[a-z]+/|(?:index|extra)-url|/root/"
    )
    for path in tracked():
        if path == Path(__file__) or path.suffix in (".png", ".bin", ".safetensors"):
            continue
        hit = pattern.search(path.read_bytes())
        assert not hit, f"{path.relative_to(ROOT)}: {hit.group() if hit else ''}"


BLOCK = """
import sys
sys.modules.update(dict.fromkeys({blocked!r}))  # None: importing it raises ModuleNotFoundError
"""

EXTRAS = [
    "triton",
    "transformers",
    "datasets",
    "pyarrow",
    "trackio",
    "matplotlib",
    "selenium",
    "pandas",
    "scipy",
]


def test_the_core_works_without_extras(tmp_path):
    """`import headway` and a training run, where no extra can be imported."""
    text = tmp_path / "text.txt"
    text.write_text("All happy families are alike. " * 400)
    program = (
        BLOCK.format(blocked=EXTRAS)
        + f"""
import headway
from headway.cli import main as cli
code = cli.main(["train", "multi_head_latent", "--data", {str(text)!r}, "--run", {str(tmp_path / "run")!r},
                 "--steps", "2", "--model.n-layers", "1", "--model.d-model", "16", "--model.moe.d-expert", "8",
                 "--data.seq-len", "16", "--run.sample-tokens", "4"])
assert code == 0, code
assert cli.main(["report", {str(tmp_path / "run")!r}]) == 0
"""
    )
    done = python(program)
    assert done.returncode == 0, done.stderr


def test_layers_and_kernels_work_without_tyro():
    program = (
        BLOCK.format(blocked=[*EXTRAS, "tyro", "tokenizers", "safetensors"])
        + """
import torch
from headway import LatentMoE, MoE, MultiHeadLatentMoE
for layer in (MoE(16, 4, 2, 8), LatentMoE(16, 8, 4, 2, 8), MultiHeadLatentMoE(16, 2, 4, 2, 8)):
    y, stats = layer(torch.ones(3, 16))
    assert y.shape == (3, 16) and stats.counts_HE.sum() == 3 * 2 * layer.n_heads
"""
    )
    done = python(program)
    assert done.returncode == 0, done.stderr


def python(program: str) -> subprocess.CompletedProcess:
    """A new interpreter."""
    import os

    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment
    )
