"""What tests of both packages and of the program share."""

import contextlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
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
def default_dtype():
    """Sets torch's default dtype until the end of the test."""
    before = torch.get_default_dtype()
    yield torch.set_default_dtype
    torch.set_default_dtype(before)


@pytest.fixture
def triton_interpreter():
    """For tests that run Triton's interpreter in a process of their own."""
    triton = pytest.importorskip("triton")

    def older(module, *version: int) -> bool:
        return tuple(map(int, module.__version__.split(".")[:2])) < version

    if older(triton, 3, 7) and not older(np, 2, 4):
        pytest.skip(f"the interpreter of Triton {triton.__version__} cannot count with NumPy {np.__version__}")


@pytest.fixture
def emulated_cuda(monkeypatch):
    """The mixer's CUDA kernels, compiled by g++, run on CPU tensors. What is compiled stays out of the user's cache."""
    pytest.importorskip("triton")  # in which the rest of their backend is written
    from mamba_ssm.ops import backend
    from mamba_ssm.ops.cuda import runtime

    root = Path(__file__).parent
    monkeypatch.setenv("MAMBA_SSM_CUDA_EMULATION", str(root / "mamba-1p1p1" / "tests" / "cuda_emulation.h"))
    monkeypatch.setenv("MAMBA_SSM_CACHE", str(root / "output" / "emulated-kernels"))
    for cached in (backend.load, runtime.load):
        cached.cache_clear()
    yield
    for cached in (backend.load, runtime.load):
        cached.cache_clear()


class OnGpu(NamedTuple):
    """What a backend form asks of its first tensor, before it computes."""

    device: torch.device
    is_cuda: bool = True

    def get_device(self) -> int:
        return self.device.index


@pytest.fixture
def enters_the_gpu(monkeypatch):
    """Check that a decorator of backend forms makes the first tensor's GPU the current one, where it is not yet."""
    entered = []
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: entered.append(device) or contextlib.nullcontext())

    def check(decorator, **options) -> None:
        form = decorator(lambda first, second, third=None: (second, third))
        for index in (0, 1):
            assert form(OnGpu(torch.device("cuda", index)), 2, **options) == (2, options.get("third"))
        assert entered == [torch.device("cuda", 1)]

    return check
