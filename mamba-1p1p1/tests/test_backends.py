"""Which backend serves a call, by choice and by force, and what is said of it."""

import functools
import importlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inputs import mixer_inputs, scan_inputs

import mamba_ssm as package
from mamba_ssm import selective_scan_fn
from mamba_ssm.ops import backend, reference
from mamba_ssm.ops.bimamba import DirectionParameters, bimamba


@pytest.mark.skipif(backend.load("cpu")[0] is None, reason="the C++ library was not built")
@pytest.mark.parametrize(
    ("dtype", "A_dtype", "d_state", "words"),
    [
        (torch.float64, torch.float64, 4, "u of dtype torch.float64"),
        (torch.float32, torch.complex64, 4, "A of dtype torch.complex64"),
        (torch.float32, torch.float32, 300, "A with d_state=300"),
    ],
)
def test_a_forced_backend_names_what_it_does_not_serve(dtype, A_dtype, d_state, words, monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cpu")
    u, A = torch.ones(1, 6, 5, dtype=dtype), -torch.ones(6, d_state, dtype=A_dtype)
    with pytest.raises(NotImplementedError, match=words):
        selective_scan_fn(u, u, A, A, A)


@pytest.mark.parametrize("d_state, d_conv", [(300, 4), (4, 5)])
def test_what_no_kernel_serves_runs_in_the_reference(d_state, d_conv):
    """More states than the kernels serve, and a longer filter: the same function, output and gradients."""
    xz, ahead, behind = mixer_inputs(N=d_state, W=d_conv, dtype=torch.float32)
    y = bimamba(xz, ahead, behind)
    wide = [DirectionParameters(*(p.detach().double() for p in side)) for side in (ahead, behind)]
    torch.testing.assert_close(y.double(), reference.bimamba(xz.detach().double(), *wide, 0.5), rtol=1e-4, atol=1e-5)
    y.sum().backward()
    assert torch.isfinite(xz.grad).all()


def test_unknown_backend(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "fastest")
    with pytest.raises(ValueError, match="reference, cpu, triton"):
        selective_scan_fn(*scan_inputs())


def test_forced_backend_that_cannot_serve(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="triton"):
        selective_scan_fn(*scan_inputs())


def test_the_backend_of_a_device_is_said(caplog):
    caplog.set_level("INFO", logger="mamba_ssm")
    assert backend._automatic.__wrapped__("xpu")[0] == "reference"
    assert caplog.messages == ["xpu tensors: reference backend"]


def test_report_of_backends(tmp_path):
    """From a folder where nothing of ours is."""
    command = [sys.executable, "-m", "mamba_ssm"]
    run = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, env=dict(os.environ))
    assert package.__version__ in run.stdout
    assert all(name in run.stdout for name in ("reference  available", "cpu", "triton", backend.ENVIRONMENT_VARIABLE))


@pytest.mark.parametrize("value", ["1", "true", "ON", "0", ""])
def test_the_interpreter_is_switched_on_as_triton_reads_it(value, monkeypatch):
    knobs = pytest.importorskip("triton.knobs")
    monkeypatch.setenv("TRITON_INTERPRET", value)
    assert backend._interpreted() == knobs.runtime.interpret


def test_report_of_a_forced_backend_that_cannot_run(monkeypatch):
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert "cpu tensors -> an error: MAMBA_SSM_BACKEND=triton " in backend.report()
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    assert backend.report().endswith("tensors -> reference")


@pytest.mark.parametrize("variable", [backend.ENVIRONMENT_VARIABLE, "MAMBA_SSM_CPU_ISA"])
def test_report_of_an_unknown_choice_is_one_line(variable):
    environment = dict(os.environ) | {variable: "fastest"}
    run = subprocess.run([sys.executable, "-m", "mamba_ssm"], capture_output=True, text=True, env=environment)
    assert run.returncode == 1 and run.stderr.count("\n") == 1
    assert run.stderr.startswith(f"{variable}='fastest' is unknown: use ")


def test_the_report_tells_what_tensors_of_another_gpu_get(monkeypatch):
    monkeypatch.delenv(backend.ENVIRONMENT_VARIABLE, raising=False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    assert backend.report().endswith("mps tensors -> reference")


@pytest.mark.slow
def test_without_a_compiler_the_install_works_and_says_so_once(tmp_path):
    tools = {"CC": "/nonexistent/cc", "CXX": "/nonexistent/c++", "PYTHONPATH": str(tmp_path / "lib")}
    environment = {k: v for k, v in os.environ.items() if k != backend.ENVIRONMENT_VARIABLE} | tools
    run = functools.partial(subprocess.run, capture_output=True, text=True, check=True, env=environment)
    build = ["setup.py", "-q", "build", "--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path / "lib")]
    said = run([sys.executable, *build], cwd=Path(__file__).parents[1]).stderr
    assert "'/nonexistent/c++'" in said
    script = (
        "import pathlib, torch, mamba_ssm as p; m = p.Mamba(16, bimamba_type='v2'); x = torch.ones(1, 3, 16);"
        "print(pathlib.Path(p.__file__).parents[1], (m(x) + m(x)).isfinite().all().item())"
    )
    used = run([sys.executable, "-c", script], cwd=tmp_path)
    assert used.stdout == f"{tmp_path / 'lib'} True\n"
    assert used.stderr.count("reference backend, slow") == used.stderr.count("install a C++ compiler") == 1


def test_torch_func_does_not_leave_a_forced_backend(monkeypatch):
    inputs = scan_inputs()
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "cpu")
    with pytest.raises(NotImplementedError, match=r"=cpu: autograd alone has derivatives of it; unset it, or use ref"):
        torch.func.grad(lambda u: selective_scan_fn(u, *inputs[1:]).sum())(inputs[0].detach())
    monkeypatch.setenv(backend.ENVIRONMENT_VARIABLE, "reference")
    torch.func.grad(lambda u: selective_scan_fn(u, *inputs[1:]).sum())(inputs[0].detach())


@pytest.mark.parametrize("name", ["triton", "cuda"])
def test_kernels_are_launched_on_their_tensors_gpu(name, enters_the_gpu):
    """Triton launches on the current one, whatever the tensors are on."""
    pytest.importorskip("triton")
    from mamba_ssm.ops.triton import common

    kernels = importlib.import_module(backend.MODULES[name])
    forms = [form for form in kernels.__all__ if form.endswith(("_forward", "_backward"))]
    assert forms and all(hasattr(getattr(kernels, form), "__wrapped__") for form in forms)
    enters_the_gpu(common.on_its_device, third=3)
