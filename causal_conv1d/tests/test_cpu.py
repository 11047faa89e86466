"""The C++ convolution against the reference in float64: output and every gradient, for each instruction set that
this processor has, in every memory layout.
"""

import ctypes
import re
import shutil

import pytest
import torch

from causal_conv1d import cpu, reference

pytestmark = [
    pytest.mark.skipif(bool(cpu.unavailable_reason()), reason=str(cpu.unavailable_reason())),
    pytest.mark.usefixtures("poisoned"),
]

ISAS = cpu.available_isas() if not cpu.unavailable_reason() else ()


@pytest.fixture(params=ISAS)
def isa(request, monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, request.param)
    return request.param


def check(name, actual, expected, tolerance):
    """Largest error relative to the largest expected value."""
    assert (actual is None) == (expected is None), name
    if expected is None:
        return
    assert actual.shape == expected.shape, name
    error = ((actual.double() - expected).abs().max() / expected.abs().max()).item()
    assert error <= tolerance, f"{name}: {error:.2e} > {tolerance:.0e}"


def widened(tensors):
    return [None if t is None else t.double() for t in tensors]


LAYOUTS = {
    "tokens": lambda B, D, L, dtype: torch.randn(B, D, L).to(dtype),
    "channels": lambda B, D, L, dtype: torch.randn(B, L, D).to(dtype).transpose(1, 2),
    "half of the channels": lambda B, D, L, dtype: torch.randn(B, L, 2 * D).to(dtype)[..., D:].transpose(1, 2),
    "neither": lambda B, D, L, dtype: torch.randn(B, 2 * D, 3 * L).to(dtype)[:, ::2, ::3],
}


def check_conv(shape, width, layout="tokens", dtype=torch.float32, silu=True, has_bias=True, has_initial=True):
    torch.manual_seed(0)
    B, D, _ = shape
    x, dout = LAYOUTS[layout](*shape, dtype), torch.randn(shape).to(dtype)
    weight, bias = torch.randn(D, width), torch.randn(D) if has_bias else None
    initial = torch.randn(B, D, width - 1).to(dtype) if has_initial else None
    inputs = [x, weight, bias, initial]
    out = cpu.conv_forward(*inputs, silu)
    activations = 6e-3 if dtype == torch.bfloat16 else 2e-5
    assert out.dtype == dtype and out.stride() == torch.empty_like(x).stride()
    check("out", out, reference.conv_forward(*widened(inputs), silu), activations)
    expected = reference.conv_backward(dout.double(), *widened(inputs), silu)
    actual = cpu.conv_backward(dout, *inputs, silu)
    tolerances = {"dx": activations, "dweight": 2e-5, "dbias": 2e-5, "dinitial_states": activations}
    for (name, tolerance), got, want in zip(tolerances.items(), actual, expected):
        check(name, got, want, tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("L", [1, 2, 63, 64, 65, 197])
def test_lengths(isa, L, layout, dtype):
    check_conv((3, 20, L), 4, layout, dtype)


@pytest.mark.parametrize("layout", ["tokens", "channels"])
@pytest.mark.parametrize("L", [730, 1000, 1025])
def test_long_sequences_equal_the_reference(isa, L, layout):
    check_conv((1, 70, L), 4, layout)


@pytest.mark.parametrize("layout", ["tokens", "channels"])
@pytest.mark.parametrize("has_initial", [False, True])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("width", [2, 3, 4])
def test_every_combination_of_arguments_equals_the_reference(isa, width, silu, has_bias, has_initial, layout):
    check_conv((2, 5, 40), width, layout, silu=silu, has_bias=has_bias, has_initial=has_initial)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_any_number_of_threads_equals_the_reference(threads):
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        check_conv((2, 130, 50), 4, "channels")
    finally:
        torch.set_num_threads(before)


def test_unknown_instruction_set_raises(monkeypatch):
    monkeypatch.setenv(cpu.ISA_VARIABLE, "sse9")
    with pytest.raises(ValueError, match="'sse9' is unknown: use avx512, avx2, portable"):
        cpu.conv_forward(torch.randn(1, 2, 3), torch.randn(2, 4), None, None, True)


def test_without_a_compiled_library_the_reason_says_how_to_mend_it(monkeypatch):
    monkeypatch.setattr(cpu, "_library_path", lambda: None)
    assert "g++" in cpu.unavailable_reason()


def test_a_library_that_cannot_be_loaded_is_no_reason_to_fail(monkeypatch, tmp_path):
    """Such as one whose OpenMP is not there: the reference runs, and the reason tells the loader's words."""
    damaged = tmp_path / "_cpu_kernels.so"
    damaged.write_bytes(b"no library")
    monkeypatch.setattr(cpu, "_library_path", lambda: damaged)
    monkeypatch.setattr(cpu, "_library", cpu._library.__wrapped__)  # which knows none from before
    assert re.search(rf"cannot be loaded \({damaged}: .+\): `pip install` the package again", cpu.unavailable_reason())


def test_on_macos_openmp_is_that_of_torch(monkeypatch):
    """Whose functions the kernels find only if every library may use them."""
    loaded = []
    monkeypatch.setattr(cpu.ctypes, "CDLL", lambda *arguments, **options: loaded.append((arguments, options)))
    monkeypatch.setattr(cpu.sys, "platform", "darwin")
    cpu._library.__wrapped__()
    (openmp, options), (kernels, _) = loaded
    assert openmp[0].endswith("libomp.dylib") and options == {"mode": ctypes.RTLD_GLOBAL}
    assert kernels == (str(cpu._library_path()),)


def test_a_library_of_other_sources_is_refused(monkeypatch, tmp_path):
    """As after `git pull` without an install: its argument blocks may differ, and it would read rubbish."""
    shutil.copytree(cpu._ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(cpu._ROOT / "setup.py", tmp_path)
    monkeypatch.setattr(cpu, "_ROOT", tmp_path)
    monkeypatch.setattr(cpu, "_sources_digest", cpu._sources_digest.__wrapped__)
    assert cpu.unavailable_reason() is None
    with open(tmp_path / "csrc" / "kernels.cpp", "a") as file:
        file.write("// changed\n")
    assert "csrc changed: `pip install` the package again" in cpu.unavailable_reason()
    shutil.rmtree(tmp_path / "csrc")  # as beside a wheel, whose files belong together
    assert cpu.unavailable_reason() is None


@pytest.mark.parametrize("arguments, word", [((torch.float64, 4), "float64"), ((torch.float32, 5), "width 5")], ids=str)
def test_what_the_kernels_do_not_serve_is_named(arguments, word):
    assert word in cpu.unsupported(*arguments)
    assert cpu.unsupported(torch.bfloat16, 2) is None
