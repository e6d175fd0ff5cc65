"""Hub and engine work with the core dependencies: extras are imported where they are used."""

import importlib
import pkgutil
import subprocess
import sys

import pytest

EXTRAS = (
    "transformers fastapi uvicorn jinja2 llguidance gguf prometheus_client openai scipy".split()
)


@pytest.mark.parametrize("room", ["hub", "serve", "server", "lab"])
def test_importing_every_module_needs_no_extra(room):
    package = importlib.import_module(f"headway.{room}")
    modules = [m.name for m in pkgutil.walk_packages(package.__path__, f"headway.{room}.")]
    assert modules
    code = f"""
import importlib, sys
for name in {EXTRAS}:
    sys.modules[name] = None  # an import of it fails
for module in {[f"headway.{room}", *modules]}:
    importlib.import_module(module)
print(len({modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{len(modules)}\n"), done.stderr
