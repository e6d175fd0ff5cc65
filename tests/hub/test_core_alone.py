"""The room works with the core dependencies: extras are imported where they are used."""

import pkgutil
import subprocess
import sys

import headway.hub

EXTRAS = "transformers fastapi uvicorn jinja2 llguidance gguf prometheus_client openai".split()


def test_importing_every_module_needs_no_extra():
    modules = [m.name for m in pkgutil.walk_packages(headway.hub.__path__, "headway.hub.")]
    code = f"""
import importlib, sys
for name in {EXTRAS}:
    sys.modules[name] = None  # an import of it fails
for module in {["headway.hub", *modules]}:
    importlib.import_module(module)
print(len({modules}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"{len(modules)}\n"), done.stderr
