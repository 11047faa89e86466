"""What tests of both packages and of the program share."""

from pathlib import Path

import pytest
import torch


@pytest.fixture
def poisoned():
    """Memory from torch.empty holds NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The mixer's CUDA kernels, compiled by g++, run on CPU tensors."""
    from mamba_ssm.ops import backend
    from mamba_ssm.ops.cuda import runtime

    emulation = Path(__file__).parent / "mamba-1p1p1" / "tests" / "cuda_emulation.h"
    monkeypatch.setenv("MAMBA_SSM_CUDA_EMULATION", str(emulation))
    for cached in (backend.load, runtime.load):
        cached.cache_clear()
    yield
    for cached in (backend.load, runtime.load):
        cached.cache_clear()
