"""The CUDA kernels' foundation: their device functions, the emulation that tests use, compiling, caching, launching.

What is marked "cuda" runs on a GPU; the same source runs everywhere, compiled by g++ with cuda_emulation.h.
"""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from once import kept, shared_folder

from mamba_ssm.ops.cuda import runtime

TESTS = Path(__file__).resolve().parent
EMULATION, PROBE = TESTS / "cuda_emulation.h", TESTS / "cuda_probe.cu"
emulates = pytest.mark.skipif(shutil.which("g++") is None, reason="the emulation needs g++")
DEVICES = [pytest.param("cpu", marks=emulates), pytest.param("cuda", marks=pytest.mark.gpu)]


def compiler_problem() -> str | None:
    try:
        runtime.nvrtc_version()
    except (ImportError, RuntimeError) as error:
        return f"NVRTC is absent: {error}"
    return None


compiles = pytest.mark.skipif(compiler_problem() is not None, reason=str(compiler_problem()))


@pytest.fixture
def probe(request, device):
    """probe(kernel's name, definitions ...) of cuda_probe.cu, for `device`."""
    if device == "cpu":
        request.getfixturevalue("emulated_cuda")
    return lambda name, **defines: runtime.load(str(PROBE), name, tuple(defines.items()))


def on_cpu_only(test):
    return emulates(pytest.mark.parametrize("device", ["cpu"])(test))


# --- device functions


def interesting_floats() -> torch.Tensor:
    """Ordinary numbers, and for every 16-bit pattern of either type what lies at, halfway to and beside the next."""
    patterns = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    found = [torch.randn(1000, generator=torch.Generator().manual_seed(0)) * 100]
    for dtype in (torch.bfloat16, torch.float16):
        value = patterns.view(dtype).float()
        value = value[value.isfinite()].sort().values
        halfway = ((value[1:].double() + value[:-1].double()) / 2).float()
        beside = [torch.nextafter(halfway, torch.tensor(end)) for end in (float("inf"), -float("inf"))]
        found += [value, halfway, *beside]
    special = [float("nan"), float("inf"), -float("inf"), 65519.99, 65520.0, -65520.0, 3.4e38, 3.3961775e38, 1e-45]
    found = torch.cat([*found, torch.tensor(special)])
    return torch.cat([found, found.new_zeros(len(found) % 2)])


class Conversions(NamedTuple):
    half: torch.Tensor
    wide: torch.Tensor
    half_pairs: torch.Tensor
    wide_pairs: torch.Tensor
    tf32: torch.Tensor


def conversions(probe, v: torch.Tensor, dtype: torch.dtype) -> Conversions:
    dtypes = (dtype, torch.float32) * 2 + (torch.float32,)
    out = Conversions(*(torch.zeros_like(v, dtype=dtype) for dtype in dtypes))
    kernel = probe("conversions", HALF_IS_BF16=int(dtype == torch.bfloat16))
    kernel((4, 1, 1), 128, 0, v, *out, v.numel())
    return out


def bits(values: torch.Tensor) -> torch.Tensor:
    return values.view(torch.int16 if values.dtype.itemsize == 2 else torch.int32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device", DEVICES)
def test_conversions(probe, device, dtype):
    """Bit for bit what torch does: ties to even, subnormals, overflow to infinity; NaN stays NaN."""
    v = interesting_floats().to(device)
    out, nan = conversions(probe, v, dtype), v.isnan()
    assert nan.any() and all(got[nan].isnan().all() for got in out[:5])
    expected = v[~nan].to(dtype)
    assert expected.isinf().sum() > v.isinf().sum()
    for got in (out.half, out.half_pairs):
        assert torch.equal(bits(got[~nan]), bits(expected))
    for got in (out.wide, out.wide_pairs):
        assert torch.equal(bits(got[~nan]), bits(expected.float()))


@pytest.mark.parametrize("device", DEVICES)
def test_rounding_to_tf32(probe, device):
    """Ten bits of fraction, ties away from zero."""
    v = torch.tensor([1.0, 1 + 2**-11, -1 - 2**-11, 1 + 2**-11 - 2**-20, 1 + 3 * 2**-11, 0.1, 2.5, float("inf")])
    expected = [1.0, 1 + 2**-10, -1 - 2**-10, 1.0, 1 + 2**-9, 0.0999755859375, 2.5, float("inf")]
    assert conversions(probe, v.to(device), torch.bfloat16).tf32.tolist() == expected
    v = interesting_floats().to(device)
    out = conversions(probe, v, torch.bfloat16)
    ordinary = v.isfinite() & (v.abs() > 1.2e-38) & (v.abs() < 3.4e38)
    assert ((out.tf32 / v - 1).abs()[ordinary] <= 2**-11).all()


def check_relative(got, expected, bound):
    """At most `bound` of the expected value away, and 1.2e-38 where it is subnormal."""
    assert (np.abs(got - expected) <= bound * np.abs(expected) + 1.2e-38).all(), np.nanmax(np.abs(got / expected - 1))


@pytest.mark.parametrize("device", DEVICES)
def test_elementary_functions_are_as_near_as_promised(probe, device):
    v = torch.cat([torch.linspace(-80, 80, 40001), torch.linspace(-1e-3, 1e-3, 2001)]).to(device)
    out = torch.full((6, v.numel()), float("nan"), device=device)
    probe("functions")((-(-v.numel() // 128), 1, 1), 128, 0, v, out, v.numel())
    x, got = v.double().cpu().numpy(), out.double().cpu().numpy()
    check_relative(got[0], np.exp2(x), 3e-7)
    positive = x > 0
    assert (np.abs(got[1][positive] - np.log2(x[positive])) < 3e-6).all()
    assert np.isnan(got[1][x < 0]).all()
    check_relative(got[2][x != 0], 1 / x[x != 0], 2e-7)
    exact_softplus = np.logaddexp(0, x)
    check_relative(got[4], exact_softplus, 5e-6)  # e^x = 2^(x log2 e): that product of up to 115 is rounded
    for row in (got[3], got[5]):
        check_relative(row, np.exp(x - exact_softplus), 1e-5)
    middle = np.abs(x) < 8
    check_relative(got[4][middle], exact_softplus[middle], 1.2e-6)


@pytest.mark.parametrize("device", DEVICES)
def test_functions_at_the_ends(probe, device):
    inf, nan = float("inf"), float("nan")
    v = torch.tensor([0.0, inf, -inf, nan, 1e-40, 200.0, -200.0, 3e38], device=device)
    out = torch.empty(6, 8, device=device)
    probe("functions")((1, 1, 1), 32, 0, v, out, 8)
    exp2, log2, inverse, sigmoid, softplus, slope = out.cpu()
    expected = {
        "exp2": (exp2, [1, inf, 0, nan, 1, inf, 0, inf]),
        "log2": (log2[:5], [-inf, inf, nan, nan, -inf]),
        "inverse": (inverse, [inf, 0, -0.0, nan, inf, 1 / 200, -1 / 200, 0]),
        "sigmoid": (sigmoid, [0.5, 1, 0, nan, 0.5, 1, 0, 1]),
        "softplus": (softplus, [0.6931472, inf, 0, nan, 0.6931472, 200, 0, 3e38]),
        "slope": (slope[4:], [0.5, 1, 0, 1]),
    }
    for name, (got, wanted) in expected.items():
        torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-6, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("device", DEVICES)
def test_product_of_integers_is_exact(probe, device):
    generator = torch.Generator().manual_seed(1)
    a = torch.randint(-50, 50, (6, 16, 8), generator=generator).float().to(device)
    b = torch.randint(-50, 50, (6, 8, 8), generator=generator).float().to(device)
    c = torch.full((6, 16, 8), float("nan"), device=device)
    probe("products")((3, 1, 1), 64, 0, a, b, c, 0.5, 2)
    assert torch.equal(c.cpu(), torch.from_numpy(0.5 * (a.cpu().numpy() @ b.cpu().numpy())))


@pytest.mark.parametrize("device", DEVICES)
def test_product_has_the_accuracy_of_tf32(probe, device):
    generator = torch.Generator().manual_seed(2)
    a = torch.randn(1, 16, 8, generator=generator).to(device)
    b = torch.randn(1, 8, 8, generator=generator).to(device)
    c = torch.empty(1, 16, 8, device=device)
    probe("products")((1, 1, 1), 32, 0, a, b, c, 1.0, 1)
    error = (c.double() - a.double() @ b.double()).abs() / (a.double().abs() @ b.double().abs())
    assert 1e-5 < error.max() < 2**-10


@pytest.mark.parametrize("device", DEVICES)
def test_short_product(probe, device):
    """Exact for integers; of other factors the unit cuts off all but ten bits, towards zero."""
    generator = torch.Generator().manual_seed(5)
    a, b, c = (torch.randint(-50, 50, shape, generator=generator).float() for shape in ((16, 4), (4, 8), (16, 8)))
    expected = torch.from_numpy(c.numpy() + a.numpy() @ b.numpy())
    sums = c.to(device)
    probe("short_product")((1, 1, 1), 32, 0, a.to(device), b.to(device), sums)
    assert torch.equal(sums.cpu(), expected)

    a, b = torch.zeros(16, 4), torch.zeros(4, 8)
    a[:, 0] = torch.linspace(-4, 4, 16)
    b[0] = torch.tensor([1.0, 1 + 2**-10, 1 + 2**-11, 1 + 2**-10 - 2**-23, -1 - 2**-11, 2 + 2**-10, 3.0, 0.0])
    seen = torch.tensor([1.0, 1 + 2**-10, 1.0, 1.0, -1.0, 2.0, 3.0, 0.0])
    sums = torch.zeros(16, 8, device=device)
    probe("short_product")((1, 1, 1), 32, 0, a.to(device), b.to(device), sums)
    cut = (a[:, :1].view(torch.int32) & ~0x1FFF).view(torch.float32)
    assert torch.equal(sums.cpu(), cut * seen)


def pipeline_arguments(device, blocks=3, tiles=5):
    x = torch.randn(blocks, tiles, 128, generator=torch.Generator().manual_seed(3)).to(device)
    out = torch.zeros(blocks, tiles + 1, 128, device=device)
    last = x[:, -1:].flip(2)
    pairs = last + last.view(blocks, 1, 64, 2).flip(3).reshape(blocks, 1, 128)
    return x, out, torch.cat([x.flip(2), pairs], 1)


@pytest.mark.parametrize("device", DEVICES)
def test_copies_and_shuffles(probe, device):
    x, out, expected = pipeline_arguments(device)
    probe("pipeline")((3, 1, 1), 128, 1024, x, out, 5, 0)
    assert torch.equal(out, expected)


def barriers_expected(x):
    v = x.view(2, 64).roll(-5, 1).reshape(128)
    return v[torch.arange(128, device=x.device) ^ 9]


@pytest.mark.parametrize("device", DEVICES)
def test_barriers(probe, device):
    x = torch.randn(128, generator=torch.Generator().manual_seed(4)).to(device)
    out = torch.zeros(128, device=device)
    probe("barriers")((1, 1, 1), 128, 512, x, out, 0)
    assert torch.equal(out, barriers_expected(x))


# --- what the emulation finds


@on_cpu_only
@pytest.mark.parametrize("fault", [1, 2, 3, 4])
def test_races_of_copies_show(probe, fault):
    """A missing copy, wait or barrier gives wrong numbers: NaN where something was read too early."""
    x, out, expected = pipeline_arguments("cpu")
    probe("pipeline")((3, 1, 1), 128, 1024, x, out, 5, fault)
    assert not torch.equal(out, expected)
    assert fault == 4 or out.isnan().any()
    if fault == 1:
        assert out[:, 0].isnan().all() and torch.equal(out[:, 1:], expected[:, 1:])


@on_cpu_only
def test_a_missing_warp_barrier_shows(probe):
    x, out = torch.randn(128), torch.zeros(128)
    probe("barriers")((1, 1, 1), 128, 512, x, out, 3)
    assert not torch.equal(out, barriers_expected(x))


FAULTS = {
    1: r": deadlock: 64 of 128 threads \(the first is 0\) wait in sync_named 1; 64 of 128 threads \(the first is 64\) "
       r"wait in sync_named 2; 0 of 128 have returned",
    2: r", thread \d+: lanes of one warp are in s\w+ and in s\w+",
    4: r": deadlock: 127 of 128 threads \(the first is 0\) wait in sync_block; 1 of 128 have returned",
    5: r": wrote 0 bytes behind its 512 bytes of shared memory",
    6: r", thread \d+: cp_async: misaligned for 16 bytes",
    7: r", thread \d+: cp_async: destination at byte 512 of 512 of shared memory",
    8: r", thread \d+: sync_named 0: 1 to 15",
}  # fmt: skip


@on_cpu_only
@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_reported(probe, fault):
    with pytest.raises(RuntimeError, match=r"^barriers: block \(0, 0, 0\)" + FAULTS[fault]):
        probe("barriers")((1, 1, 1), 128, 512, torch.zeros(128), torch.zeros(128), fault)


@on_cpu_only
def test_a_kernel_runs_after_one_that_failed(probe):
    x, out = torch.randn(128), torch.zeros(128)
    kernel = probe("barriers")
    with pytest.raises(RuntimeError, match=r"wrote \d+ bytes behind its 256 bytes"):
        kernel((1, 1, 1), 128, 256, x, out, 0)
    kernel((1, 1, 1), 128, 512, x, out, 0)
    assert torch.equal(out, barriers_expected(x))


@on_cpu_only
@pytest.mark.parametrize(
    "grid, block, shared, message",
    [
        ((1, 1, 1), 40, 0, "40 threads: a block has 32 to 1024, whole warps"),
        ((1, 1, 1), 32, 240_000, "240000 bytes of shared memory: a block has at most 232448"),
        ((1, 70_000, 1), 32, 0, r"grid \(1, 70000, 1\): 1 to 65535"),
    ],
)
def test_launches_that_a_gpu_refuses(probe, grid, block, shared, message):
    with pytest.raises(RuntimeError, match=message):
        probe("barriers")(grid, block, shared, torch.zeros(128), torch.zeros(128), 0)


def run_under_address_sanitizer(program: str, *arguments: str) -> subprocess.CompletedProcess:
    """Emulated, in a process of its own, which must begin with the sanitizer's library."""
    libraries = [
        subprocess.run(["g++", f"-print-file-name={name}"], capture_output=True, text=True, check=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("g++ has no address sanitizer")
    environment = os.environ | {
        "LD_PRELOAD": " ".join(libraries), "ASAN_OPTIONS": "detect_leaks=0",
        "MAMBA_SSM_CUDA_EMULATION_FLAGS": "-g1 -O0 -fsanitize=address",
    }  # fmt: skip
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
@emulates
@pytest.mark.usefixtures("emulated_cuda")
def test_address_sanitizer_finds_what_is_out_of_bounds():
    program = (
        "import sys, torch; from mamba_ssm.ops.cuda import runtime\n"
        f"kernel = runtime.load({str(PROBE)!r}, 'barriers')\n"
        "for size in map(int, sys.argv[1:]):\n"
        "    kernel((1, 1, 1), 128, 512, torch.zeros(128), torch.zeros(size), 0); print(size, flush=True)\n"
    )
    run = run_under_address_sanitizer(program, "128", "127")
    assert run.stdout.split() == ["128"], run.stderr
    assert "heap-buffer-overflow" in run.stderr and re.search(r"in barriers .*cuda_probe\.cu:\d+", run.stderr)


@pytest.mark.slow
@emulates
@pytest.mark.usefixtures("emulated_cuda")
def test_short_sequences_stay_in_bounds():
    """Copies that nothing waits for as well: those of the first sequence would begin before the tensor."""
    program = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
        "import test_cuda_kernels as mixer; from mamba_ssm.ops.cuda import bimamba as kernels\n"
        "kernels._device, kernels.FEW_WARPS = lambda: kernels.Device(1), 0\n"
        "for length in (1, 5, 9, 17):\n"
        "    xz, ahead, behind, dy = mixer.arguments(mixer.case(length=length))\n"
        "    kernels.bimamba_forward(xz, ahead, behind, 0.5, True)\n"
        "    kernels.bimamba_backward(dy, xz, ahead, behind, 0.5, None); print(length, flush=True)\n"
    )
    run = run_under_address_sanitizer(program)
    assert run.stdout.split() == ["1", "5", "9", "17"], run.stderr[:3000]


# --- arguments


def test_parameters_are_read_from_the_source():
    text = """
extern "C" __global__ void __launch_bounds__(64 * (A + 1), 24 / (2 * B)) first(
    const float* __restrict__ x,  // a comment, with a comma (and parentheses)
    unsigned short *y, const long long n, int64 m, float scale, int k) {}
extern "C" __global__ void second() {}
extern "C" __global__ void third(Pair of, float x) {}
"""
    source = runtime.Source(Path("some.cu"), text, ())
    assert list(runtime.kernels(text)) == ["first", "second", "third"]
    assert runtime.parameter_formats(source, "first") == ["Q", "Q", "q", "q", "f4x", "i4x"]
    assert runtime.parameter_formats(source, "second") == []
    with pytest.raises(ValueError, match="third: parameter `Pair of` is no pointer, long long, int64, int, float"):
        runtime.parameter_formats(source, "third")
    with pytest.raises(ValueError, match=r"some\.cu declares no kernel 'sec'; it declares first, second, third"):
        runtime.parameter_formats(source, "sec")


@on_cpu_only
def test_arguments_that_do_not_fit(probe):
    kernel, x = probe("pipeline"), torch.zeros(128)
    cases = [
        ((x, x, 1), r"\(Tensor, Tensor, int\) do not fit its 4 parameters: .*4 items.*got 3"),
        ((x,), r"\(Tensor\) do not fit its 4 parameters: list index"),
        ((x, x, 1.5, 0), r"\(Tensor, Tensor, float, int\) do not fit its 4 parameters: required argument is not"),
        ((x, 7, 1, 0), r"\(Tensor, int, int, int\) do not fit its 4 parameters: 'int' object has no attribute"),
        ((x, x, x, 0), r"\(Tensor, Tensor, Tensor, int\) do not fit its 4 parameters: "),
    ]
    for arguments, message in cases:
        with pytest.raises(TypeError, match="^pipeline: " + message):
            kernel((1, 1, 1), 128, 1024, *arguments)


# --- compiling


@emulates
def test_the_hosts_compiler_error_is_shown(emulated_cuda, tmp_path):
    (tmp_path / "wrong.cu").write_text('#include "device.cuh"\nextern "C" __global__ void wrong(float* x) { x = y; }\n')
    with pytest.raises(runtime.CompileError, match=r"(?s)wrong.cu does not compile for the CPU:.*wrong.cu:2.*y"):
        runtime.load(str(tmp_path / "wrong.cu"), "wrong")


@compiles
def test_nvrtcs_error_is_shown(tmp_path):
    (tmp_path / "wrong.cu").write_text('#include "device.cuh"\nextern "C" __global__ void wrong(float* x) { x = y; }\n')
    with pytest.raises(runtime.CompileError, match=r'(?s)wrong.cu does not compile.*wrong.cu\(2\): error.*"y"'):
        runtime.compile_cubin(runtime.read_source(str(tmp_path / "wrong.cu")), (), "sm_90")


@compiles
def test_architectures():
    assert runtime.architecture((8, 0)) == "sm_80" and runtime.architecture((9, 0)) == "sm_90"
    assert runtime.architecture((8, 7)).startswith("sm_8")
    with pytest.raises(RuntimeError, match=r"NVRTC \d+.\d+ does not know compute capability \(99, 0\)"):
        runtime.architecture((99, 0))


@compiles
def test_machine_code_is_kept(monkeypatch, tmp_path):
    """By source, headers, definitions and architecture; what is kept is not compiled again."""
    compiled = []
    monkeypatch.setattr(runtime, "compile_cubin", lambda *args: compiled.append(args) or b"code %d" % len(compiled))
    monkeypatch.setenv("MAMBA_SSM_CACHE", str(tmp_path / "cache"))
    source = runtime.read_source(str(PROBE))
    changed = source._replace(headers=((source.headers[0][0], source.headers[0][1] + "//"), *source.headers[1:]))
    cases = [
        (source, (), "sm_90"), (source, (), "sm_80"), (source, (("A", 1),), "sm_90"), (source, (("A", 2),), "sm_90"),
        (changed, (), "sm_90"), (source._replace(text=source.text + "//"), (), "sm_90"),
    ]  # fmt: skip
    for _ in range(2):
        assert [runtime.cached_cubin(*case) for case in cases] == [b"code %d" % (i + 1) for i in range(len(cases))]
    assert len(compiled) == len(cases) == len(list((tmp_path / "cache").iterdir()))


@compiles
@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-1], lambda whole: b"?" + whole[1:]])
def test_damaged_machine_code_is_compiled_anew(damage, monkeypatch, tmp_path):
    """As a machine that crashed leaves it. Else no later process could load it."""
    compiled = []
    monkeypatch.setattr(runtime, "compile_cubin", lambda *args: compiled.append(args) or b"code")
    monkeypatch.setenv("MAMBA_SSM_CACHE", str(tmp_path))
    case = (runtime.read_source(str(PROBE)), (), "sm_90")
    assert runtime.cached_cubin(*case) == b"code"
    (file,) = tmp_path.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    for _ in range(2):
        assert runtime.cached_cubin(*case) == b"code"
    assert len(compiled) == 2


@compiles
def test_without_a_home_the_cache_is_done_without(monkeypatch, tmp_path):
    def home():
        raise RuntimeError("Could not determine home directory.")

    for variable in ("MAMBA_SSM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(Path, "home", home)
    monkeypatch.setattr(runtime, "compile_cubin", lambda *args: b"code")
    assert runtime.cached_cubin(runtime.read_source(str(PROBE)), (), "sm_90") == b"code"
    monkeypatch.setenv("MAMBA_SSM_CACHE", str(tmp_path))
    assert runtime.cache_folder() == tmp_path


@compiles
def test_a_cache_that_cannot_be_written(monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("MAMBA_SSM_CACHE", str(tmp_path / "file" / "cache"))
    monkeypatch.setattr(runtime, "compile_cubin", lambda *args: b"code")
    assert runtime.cached_cubin(runtime.read_source(str(PROBE)), (), "sm_90") == b"code"


def test_where_machine_code_is_kept(monkeypatch, tmp_path):
    for variable in ("MAMBA_SSM_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert runtime.cache_folder() == tmp_path / ".cache" / "mamba_ssm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert runtime.cache_folder() == Path("/elsewhere/mamba_ssm")
    monkeypatch.setenv("MAMBA_SSM_CACHE", "/here")
    assert runtime.cache_folder() == Path("/here")


# --- availability


def test_reasons_why_kernels_cannot_run(monkeypatch, tmp_path):
    monkeypatch.delenv("MAMBA_SSM_CUDA_EMULATION", raising=False)

    def reason() -> str | None:
        runtime._device_problem.cache_clear()
        runtime.nvrtc_version.cache_clear()
        return runtime.unavailable_reason()

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert reason() == "no CUDA device was found"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (7, 5))
    assert reason().startswith("the GPU's compute capability (7, 5) is below (8, 0): use an Ampere or newer GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *device: (9, 0))
    if compiler_problem() is None:
        assert reason() is None
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "cuda.bindings", None)
        assert re.match(r"cuda.bindings cannot be imported \(.*\): pip install cuda-bindings", reason())
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert reason() == "the CUDA kernels need an NVIDIA GPU; this torch was built for ROCm"
    monkeypatch.setenv("MAMBA_SSM_CUDA_EMULATION", str(EMULATION))
    assert reason() is None
    runtime._device_problem.cache_clear()
    runtime.nvrtc_version.cache_clear()


# --- launching: a driver that writes down what it is told

DRIVER = r"""
#include <string.h>
static void* contexts[8]; static __thread void* current; static int limit;
static unsigned long long record[16]; static unsigned long long values[4]; static int launches; static char code[64];
extern "C" {
int cuDeviceGet(int* number, int device) { *number = device + 100; return 0; }
int cuDevicePrimaryCtxRetain(void** context, int number) { *context = contexts + number - 100; return 0; }
int cuCtxSetCurrent(void* context) { current = context; return 0; }
int cuModuleLoadData(void** module, const char* image) { strncpy(code, image, 63); *module = code; return 0; }
int cuModuleGetFunction(void** function, void* module, const char* name) {
    *function = (void*)1234; return strcmp(name, "pipeline") ? 500 : 0;
}
int cuFuncSetAttribute(void* function, int attribute, int value) {
    if (attribute != 8 || value > 232448) return 1;
    limit = value; return 0;
}
int cuGetErrorName(int status, const char** name) {
    *name = status == 500 ? "CUDA_ERROR_NOT_FOUND" : "CUDA_ERROR"; return 0;
}
int cuLaunchKernel(void* function, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                   unsigned shared, void* stream, void** parameters, void** extra) {
    if (!current) return 201;
    if (shared > 49152 && shared > limit || extra) return 1;
    unsigned told[7] = {gx, gy, gz, bx, by, bz, shared};
    for (int i = 0; i < 7; i++) record[i + 1] = told[i];
    record[0] = (unsigned long long)function; record[8] = (unsigned long long)stream;
    for (int i = 0; i < 4; i++) memcpy(values + i, parameters[i], 8);
    launches++; return 0;
}
unsigned long long* what_was_told() { return record; }
unsigned long long* what_was_passed() { return values; }
int how_many_launches() { return launches; }
int shared_limit() { return limit; }
}
"""


@pytest.fixture
def driver(monkeypatch, tmp_path):
    """Stands in for libcuda where there is no GPU; device 1 is the current one, its stream is 77."""
    (tmp_path / "driver.cpp").write_text(DRIVER)
    subprocess.run(["g++", "-shared", "-fPIC", "-o", tmp_path / "driver.so", tmp_path / "driver.cpp"], check=True)
    library = runtime._declare(ctypes.CDLL(str(tmp_path / "driver.so")))
    for name in ("what_was_told", "what_was_passed"):
        getattr(library, name).restype = ctypes.POINTER(ctypes.c_uint64)
    monkeypatch.setattr(runtime, "_libcuda", lambda: library)
    monkeypatch.setattr(runtime, "architecture", lambda capability: f"sm_{capability[0]}{capability[1]}")
    monkeypatch.setattr(runtime, "cached_cubin", lambda source, defines, arch: f"{defines} {arch}".encode())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "device", lambda device: torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: type("Stream", (), {"cuda_stream": 76 + device}))
    return library


@emulates
def test_launch(driver):
    """Grid, block, shared memory, the device's stream and the arguments' bytes reach the driver."""
    kernel = runtime.CudaKernel(runtime.read_source(str(PROBE)), "pipeline", (), 1)
    x = torch.zeros(4)
    kernel.launch((7, 8, 9), 128, 1024, (x[1:], None, 2**40 - 5, -7))
    assert driver.what_was_told()[:9] == [1234, 7, 8, 9, 128, 1, 1, 1024, 77]
    assert driver.what_was_passed()[:4] == [x.data_ptr() + 4, 0, 2**40 - 5, 2**32 - 7]


@emulates
def test_a_threads_first_launch(driver):
    """The driver knows no context in a new thread, such as autograd's: the kernel's becomes the thread's."""
    kernel = runtime.CudaKernel(runtime.read_source(str(PROBE)), "pipeline", (), 1)
    thread = threading.Thread(target=kernel.launch, args=((7, 1, 1), 32, 0, (None, None, 1, 0)))
    thread.start()
    thread.join()
    assert driver.how_many_launches() == 1 and driver.what_was_told()[1] == 7


@emulates
def test_much_shared_memory_is_asked_for_once(driver):
    kernel = runtime.CudaKernel(runtime.read_source(str(PROBE)), "pipeline", (), 0)
    arguments = ((1, 1, 1), 32), (None, None, 1, 0)
    for shared, limit in [(49152, 0), (100_000, 100_000), (60_000, 100_000), (232_448, 232_448)]:
        kernel.launch(*arguments[0], shared, arguments[1])
        assert driver.shared_limit() == limit and driver.what_was_told()[7] == shared
    with pytest.raises(RuntimeError, match=r"allowing pipeline 240000 bytes of shared memory: .* CUDA_ERROR \(1\)"):
        kernel.launch(*arguments[0], 240_000, arguments[1])


@emulates
def test_the_drivers_error_is_named(driver):
    with pytest.raises(RuntimeError, match=r"finding barriers: the CUDA driver answered CUDA_ERROR_NOT_FOUND \(500\)"):
        runtime.CudaKernel(runtime.read_source(str(PROBE)), "barriers", (), 0)


def test_cpu_tensors_are_refused(monkeypatch):
    monkeypatch.delenv("MAMBA_SSM_CUDA_EMULATION", raising=False)
    kernel = runtime.Kernel(runtime.read_source(str(PROBE)), "pipeline", ())
    with pytest.raises(ValueError, match="pipeline takes CUDA tensors, and got one on the CPU"):
        kernel((1, 1, 1), 128, 1024, None, torch.zeros(128), 1, 0)


@pytest.mark.gpu
def test_launches_are_captured_in_a_graph():
    x, out, expected = pipeline_arguments("cuda")
    kernel = runtime.load(str(PROBE), "pipeline")
    kernel((3, 1, 1), 128, 1024, x, out, 5, 0)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernel((3, 1, 1), 128, 1024, x, out, 5, 0)
    torch.cuda.synchronize()
    out.zero_()
    x.mul_(2)
    graph.replay()
    assert torch.equal(out, 2 * expected)


@pytest.mark.gpu
def test_launch_from_a_new_thread_with_much_shared_memory():
    x, out, expected = pipeline_arguments("cuda")
    kernel = runtime.load(str(PROBE), "pipeline", (("FRESH", 1),))
    thread = threading.Thread(target=kernel, args=((3, 1, 1), 128, 100_000, x, out, 5, 0))
    thread.start()
    thread.join()
    assert torch.equal(out, expected)


# --- machine code


@pytest.fixture(scope="module")
def gpu_code():
    """benchmarks/gpu_code.py, which reads the machine code by a tool of Triton's wheel."""
    pytest.importorskip("triton")
    from benchmarks import gpu_code

    return gpu_code


@pytest.fixture
def compiled_once(gpu_code, tmp_path_factory, monkeypatch):
    """Half of these kernels are test_machine_code.py's, too."""
    folder = shared_folder(tmp_path_factory, "machine-code")
    monkeypatch.setattr(runtime, "compile_cubin", kept(folder, runtime.compile_cubin))
    monkeypatch.setattr(gpu_code, "cuobjdump", kept(folder, gpu_code.cuobjdump))


@pytest.fixture(scope="module")
def package_launches(gpu_code):
    """All (file, kernel, definitions) that the mixers of Vim-Ti, -S and -B launch."""
    models = [(192, torch.bfloat16), (384, torch.bfloat16), (768, torch.bfloat16), (192, torch.float16)]
    return {
        launch
        for multiprocessors in (1, 48)  # many sequences for each, few
        for model in models
        for launch in gpu_code.cuda_launches(*model, multiprocessors)
    }


def test_every_kernel_of_the_package_is_launched(package_launches):
    files = runtime.FOLDER.glob("*.cu")
    declared = {(path.name, name) for path in files for name in runtime.kernels(path.read_text())}
    assert declared and declared == {(file, name) for file, name, _ in package_launches}


@compiles
@pytest.mark.slow
@pytest.mark.usefixtures("compiled_once")
@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_no_register_is_spilled_and_no_barrier_is_numbered_by_one(package_launches, gpu_code, arch):
    """The package's kernels compile without a GPU. A barrier numbered by a register claims all that there are."""
    code = {
        (file, defines): runtime.compile_cubin(runtime.read_source(file), defines, arch)
        for file, defines in {(file, defines) for file, _, defines in package_launches}
    }
    used = {(name, defines): gpu_code.resources(code[file, defines], name) for file, name, defines in package_launches}
    spilling = {key: use for key, use in used.items() if use["spill_bytes"]}
    assert not spilling, "\n".join(f"{name} {dict(defines)}: {use}" for (name, defines), use in spilling.items())
    barriers = {
        instruction
        for file, name, defines in package_launches
        for _, instruction in gpu_code.disassemble(code[file, defines], name)
        if "BAR.SYNC" in instruction
    }
    assert barriers and not any(re.search(r"BAR\.SYNC\S* U?R\d", each) for each in barriers), barriers
