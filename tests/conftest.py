"""What every test gets: a cache of its own session, no machine-wide settings; for those that ask, a
folder with a recipe."""

import contextlib
import os

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # read when torch is imported

import torch

from headway.config import cache_root
from headway.kernels.cpp import cpp_kernels

if not torch.cuda.is_available():
    # Triton then interprets its kernels; it asks once, when something first imports it
    os.environ["TRITON_INTERPRET"] = "1"


@pytest.fixture(scope="session", autouse=True)
def cache_folder(tmp_path_factory):
    """Tokenised data go to a temporary folder: tests never write to the user's cache, but for the
    compiled kernels, which are named by the hash of their sources and take half a minute."""
    folder = tmp_path_factory.mktemp("cache")
    with contextlib.suppress(OSError):  # a home that cannot be written
        native = cache_root() / "native"
        native.mkdir(parents=True, exist_ok=True)
        (folder / "native").symlink_to(native)
    before = os.environ.get("HEADWAY_CACHE")
    os.environ["HEADWAY_CACHE"] = str(folder)
    cpp_kernels()  # before a test has a cache of its own, and builds them there
    yield folder
    if before is None:
        del os.environ["HEADWAY_CACHE"]
    else:
        os.environ["HEADWAY_CACHE"] = before


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a text and `tiny.py:tiny`, a recipe that trains on it."""
    from tests.command import write_recipe  # the command line needs tyro; kernels and layers do not

    folder = tmp_path_factory.mktemp("cli")
    write_recipe(folder)
    return folder
