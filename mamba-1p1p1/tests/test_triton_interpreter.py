"""Runs `test_triton_kernels.py` where Triton interprets the kernels on CPU tensors; what the backend says it serves.

A process of its own: the variable must be set before Triton is imported.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
from mamba_ssm.ops import backend, reference
from mamba_ssm.ops.triton import kernels
from mamba_ssm.ops.triton.layer_norm import rms_norm_fn

KERNEL_TESTS = Path(__file__).with_name("test_triton_kernels.py")


def run_interpreted(*arguments):
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNEL_TESTS), *arguments]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1200)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


@pytest.mark.parametrize("which", ["scan", "not scan"])  # so that two of pytest's workers share them
@pytest.mark.usefixtures("triton_interpreter")
def test_kernels_in_the_interpreter(which):
    run_interpreted("-m", "not slow", "-k", which)


@pytest.mark.slow
@pytest.mark.usefixtures("triton_interpreter")
def test_long_sequences_in_the_interpreter():
    run_interpreted("-m", "slow")


@pytest.mark.parametrize(
    "arguments, named",
    [
        (("selective_scan", torch.complex64, 16, None), "complex64"),
        (("bimamba", torch.float64, 16, 4), "float64"),
        (("selective_scan", torch.float32, 64, None), "d_state=64"),
        (("bimamba", torch.bfloat16, 16, 5), "d_conv=5"),
        (("add_norm", torch.float32, None, None, 16385), "rows of width 16385"),
    ],
)
def test_what_is_not_served_is_named(arguments, named):
    assert named in kernels.unsupported(*arguments)


def test_wide_rows_go_to_the_reference_where_triton_was_not_forced(monkeypatch):
    monkeypatch.setattr(backend, "_automatic", lambda device_type: ("triton", kernels))
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    for width, chosen in ((16384, kernels), (16385, reference)):
        assert backend.choose("add_norm", torch.device("cpu"), torch.float32, width=width) is chosen
    monkeypatch.setattr(backend, "_forced_module", lambda name, device_type: kernels)
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    words = "MAMBA_SSM_BACKEND=triton: add_norm: rows of width 16385, the Triton kernels serve at most 16384; unset it"
    with pytest.raises(NotImplementedError, match=words):
        rms_norm_fn(torch.zeros(1, 16385), torch.ones(16385), None)


def test_what_vim_needs_is_served():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert kernels.unsupported("bimamba", dtype, 16, 4) is None
        assert kernels.unsupported("add_norm", dtype, None, None) is None
