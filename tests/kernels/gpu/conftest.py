"""The Triton kernels run in every test here: interpreted on the CPU, or on a GPU with `-m gpu`."""

import pytest
import torch

from headway.kernels.gpu import _gpu_kernels, gpu_kernels


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request, monkeypatch) -> torch.device:
    """Where the kernels run in this test. Triton decides per process, when a kernel's file is
    imported, whether it is interpreted: a run has one or the other."""
    if request.param == "cpu" and torch.cuda.is_available():
        pytest.skip("here kernels are compiled: -m gpu")
    monkeypatch.setenv("HEADWAY_TRITON", "interpret" if request.param == "cpu" else "1")
    _gpu_kernels.cache_clear()
    found = gpu_kernels()
    assert found.device == request.param, found.why
    yield torch.device(request.param)
    _gpu_kernels.cache_clear()
