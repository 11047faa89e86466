"""The parts of `make bench-gpu` that a GPU's hour must not find broken, run on a CPU with stand-ins."""

import gc
import math
import os
import subprocess
import sys
import weakref
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "vim"))
import models_mamba  # noqa: E402, F401  (registers the Vim names)

FAKE_SCAN = """
import selective_scan_cuda
import torch

def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False):
    assert u.is_contiguous() and B.is_contiguous() and B.dim() == 3
    delta = torch.nn.functional.softplus(delta + delta_bias[:, None])
    h, out = torch.zeros(u.shape[0], *A.shape), []
    for t in range(u.shape[-1]):
        h = torch.exp(delta[:, :, t, None] * A) * h + (delta * u)[:, :, t, None] * B[:, None, :, t]
        out.append((h * C[:, None, :, t]).sum(-1) + D * u[:, :, t])
    return torch.stack(out, -1) * torch.nn.functional.silu(z)
"""
FAKE_CONV = """
import torch

def causal_conv1d_fn(x, weight, bias=None, activation=None):
    assert activation == "silu" and weight.dim() == 2
    width = weight.shape[1]
    out = torch.nn.functional.conv1d(x, weight[:, None], bias, padding=width - 1, groups=x.shape[1])
    return torch.nn.functional.silu(out[..., : x.shape[-1]])
"""


@pytest.fixture(autouse=True)
def benchmarks_on_the_path(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))


@pytest.fixture
def published():
    import published

    published.kernels.cache_clear()
    yield published
    published.kernels.cache_clear()


@pytest.fixture
def folder(tmp_path):
    """A folder of packages with the published names; a package's own __init__ is not for us to run."""
    (tmp_path / "mamba_ssm" / "ops").mkdir(parents=True)
    (tmp_path / "mamba_ssm" / "__init__.py").write_text("raise ImportError('needs a language model')")
    (tmp_path / "mamba_ssm" / "ops" / "selective_scan_interface.py").write_text(FAKE_SCAN)
    (tmp_path / "causal_conv1d").mkdir()
    (tmp_path / "causal_conv1d" / "__init__.py").write_text(FAKE_CONV)
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        (tmp_path / f"{extension}.py").write_text("")
    yield tmp_path
    for extension in ("selective_scan_cuda", "causal_conv1d_cuda"):
        sys.modules.pop(extension, None)


def test_the_published_composition_computes_our_vim(published, folder):
    """Flips, orders and halves: on any right kernels it is the same function."""
    import causal_conv1d
    import mamba_ssm

    torch.manual_seed(0)
    model, images = timm.create_model("vim_nano_patch4_32").eval(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        ours = model(images)
        theirs = published.use_published_kernels(model, published.kernels(folder))(images)
    assert torch.allclose(theirs, ours, rtol=0, atol=1e-5 * ours.abs().max().item())
    assert sys.modules["mamba_ssm"] is mamba_ssm and sys.modules["causal_conv1d"] is causal_conv1d
    assert "ops" in vars(mamba_ssm) and str(folder) not in sys.path


def test_the_published_composition_has_gradients(published, folder):
    model = published.use_published_kernels(timm.create_model("vim_nano_patch4_32"), published.kernels(folder))
    model(torch.randn(1, 3, 32, 32)).sum().backward()
    unreached = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not unreached


def test_published_kernels_that_are_not_built_are_named(published, folder, monkeypatch):
    monkeypatch.setattr(published, "FOLDER", ROOT / "output" / "nothing-here")
    published.kernels.cache_clear()
    with pytest.raises(ImportError, match=r"build_published\.sh"):
        published.kernels(ROOT / "output" / "nothing-here")
    (folder / "selective_scan_cuda.py").write_text("raise ImportError('undefined symbol')")
    with pytest.raises(ImportError, match="undefined symbol"):
        published.kernels(folder)
    import mamba_ssm.ops.bimamba  # ours, after a failure too

    assert mamba_ssm.ops.bimamba.__file__.startswith(str(ROOT))


def test_the_build_says_what_it_lacks(tmp_path):
    environment = {"PATH": os.environ["PATH"], "CUDA_HOME": str(tmp_path)}
    script = ROOT / "benchmarks" / "build_published.sh"
    result = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and f"no {tmp_path}/bin/nvcc" in result.stderr


def test_a_build_made_before_is_used_as_it_is(tmp_path):
    environment = {"PATH": os.environ["PATH"], "PUBLISHED_PREBUILT": str(tmp_path)}
    script = ROOT / "benchmarks" / "build_published.sh"
    result = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 1 and "lacks one of the two extensions" in result.stderr
    for name in ("selective_scan_cuda.abi3.so", "causal_conv1d_cuda.abi3.so"):
        (tmp_path / name).touch()
    result = subprocess.run(["bash", script], env=environment, capture_output=True, text=True)
    assert result.returncode == 0 and str(tmp_path) in result.stdout
    command = [sys.executable, "-c", "import published; print(published.FOLDER)"]
    environment |= {"PYTHONPATH": str(ROOT / "benchmarks")}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.stdout.strip() == str(tmp_path.resolve()), result.stderr


# --- graphs, and the part of a run that only a GPU takes


@pytest.fixture
def pretended_gpu(monkeypatch):
    """A device whose graphs are the calls themselves."""
    import harness

    monkeypatch.setattr(harness, "on_side_stream", lambda call: call())
    monkeypatch.setattr(harness, "capture", lambda call, pool=None: lambda: call())
    monkeypatch.setattr(harness, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    return torch.device("cuda")


def test_a_rival_that_cannot_be_captured_is_timed_eagerly_and_says_so(pretended_gpu, monkeypatch):
    import harness

    calls = []

    def call():
        calls.append(1)

    graph, how = harness.launched(call, "graph", pretended_gpu)
    assert how == "cuda graph" and len(calls) == 1 and graph is not call
    assert harness.launched(call, "eager", pretended_gpu) == (call, "eager")
    assert harness.launched(call, "graph", torch.device("cpu")) == (call, "eager")

    def refuse(call, pool=None):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(harness, "capture", refuse)
    kept, how = harness.launched(call, "graph", pretended_gpu)
    assert kept is call and how == "eager (RuntimeError: operation not permitted when stream is capturing)"


def test_a_graph_holds_the_weights_and_inputs_that_it_reads(monkeypatch):
    """Freed, their memory would be given to the next rival, and labels of a later replay be anything."""
    import harness

    replayed = []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=lambda: replayed.append(1)))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: nullcontext())
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, pool: nullcontext())
    weights = torch.zeros(3)
    held = weakref.ref(weights)
    replay = harness.capture(partial(weights.add_, 1))
    del weights
    gc.collect()
    replay()
    assert held() is not None and len(replayed) == 1


def test_a_case_on_a_gpu_measures_memory_and_time_of_one_build(pretended_gpu, monkeypatch):
    import harness
    import memory
    import vim_vs_deit
    from subjects import Subject

    monkeypatch.setattr(harness, "SAMPLE_SECONDS", 0.0)
    case = [Subject(f"vim_{size}_patch16_224", 224, 2, device="cuda") for size in ("tiny", "small", "base")]
    built = []

    def ready_on_gpu(subject):
        built.append(subject)
        return (None, None) if "base" in subject.name else (lambda: None, 7)

    def launched(call, launch, device, pool=None):
        assert pool == "pool"
        return call, "cuda graph" if launch == "graph" else "eager (RuntimeError: no)"

    monkeypatch.setattr(memory, "ready_on_gpu", ready_on_gpu)
    monkeypatch.setattr(harness, "launched", launched)
    settings = vim_vs_deit.Settings(pretended_gpu, "bfloat16", "none", (), seconds=0.0)
    assert vim_vs_deit.peaks_beforehand([case], settings) == {}
    records = vim_vs_deit.measure_case(case, {}, settings)
    assert built == case
    assert [record["peak_memory"] for record in records] == [7, 7, None]
    assert [record["launch"] for record in records] == ["cuda graph", "cuda graph", None]
    assert records[1]["first_faster_by"]["median"] > 0 and records[2]["seconds"] is None
    table = vim_vs_deit.table(records, "infer")
    assert "does not fit" in table and "RuntimeError" not in table
    records[1]["launch"] = "eager (RuntimeError: no)"
    assert "224 px, vim_small: launched eager (RuntimeError: no)" in vim_vs_deit.table(records, "infer")


def test_torch_compiles_own_graphs_are_not_captured_again():
    from subjects import Subject
    from vim_vs_deit import Settings, launch_of

    settings = Settings(torch.device("cuda"), "bfloat16", "none", (), 1.0)
    modes = ("none", "default", "reduce-overhead")
    subjects = [Subject("vim_tiny_patch16_224", 224, 1, device="cuda", compile=mode) for mode in modes]
    assert [launch_of(subject, settings) for subject in subjects] == ["graph", "graph", "eager"]


def test_the_gpus_tests_run_in_several_processes_where_they_can(monkeypatch):
    import harness

    monkeypatch.setattr(harness.os, "cpu_count", lambda: 6)
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: name)
    assert harness._workers(torch.device("cuda")) == ["-n", "6"]
    assert harness._workers(torch.device("cpu")) == []
    monkeypatch.setattr(harness.importlib.util, "find_spec", lambda name: None)
    assert harness._workers(torch.device("cuda")) == []


def test_a_copy_without_its_repository_can_name_its_commit(monkeypatch):
    import harness

    monkeypatch.setenv("BENCHMARK_COMMIT", "0123abc")
    assert harness.commit() == "0123abc"


@pytest.mark.usefixtures("triton_interpreter")
def test_the_microbenchmarks_kernels_compute_what_they_count():
    """Under the interpreter, in a process of its own; 3 rounds."""
    program = """
import sys, torch
sys.path.insert(0, sys.argv[1])
import limits
lane = torch.arange(8.0)
out = torch.empty(16)
limits.multiply_add_kernel[(2,)](out, 3, 0.5, LANES=8)
x = [lane * k * 1e-3 for k in (1, 2, 3, 4)]
for _ in range(3):
    x = [0.5 * v + 1 for v in x]
assert torch.allclose(out, sum(x).repeat(2)), out
limits.exp_kernel[(2,)](out, 3, LANES=8)
x = [-lane * k * 1e-3 for k in (1, 2, 3, 4)]
for _ in range(3):
    x = [-torch.exp2(v) for v in x]
assert torch.allclose(out, sum(x).repeat(2)), out
"""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    command = [sys.executable, "-c", program, str(ROOT / "benchmarks")]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-2000:]


def test_stability_is_judged_by_both_curves():
    from stability import judge

    falling = [2.3 - 0.01 * step + 0.02 * (step % 2) for step in range(200)]
    good = judge(falling, falling)
    assert good["finite"] and good["falls"] and good["as_float32"]
    assert not judge([*falling[:-1], math.nan], falling)["finite"]
    assert not judge(falling[::-1], falling)["falls"]
    assert not judge([loss + 5 for loss in falling], falling)["as_float32"]


def test_the_learning_rate_warms_up_to_its_full_height():
    from stability import warmup

    assert warmup(0, 1000) == pytest.approx(0.01) and warmup(25, 1000) == pytest.approx(0.505)
    assert warmup(50, 1000) == warmup(999, 1000) == 1.0


@pytest.mark.slow
def test_a_small_model_trains_alike_in_both_precisions(tmp_path):
    import stability

    result = stability.run("vim_nano_patch4_32", 32, 4, 8, torch.device("cpu"), tmp_path)
    assert result["verdict"]["finite"] and len(result["losses"]["float32"]) == 8
    assert (tmp_path / "stability_cpu.md").exists()
