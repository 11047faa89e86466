"""The Triton convolution against the float64 reference: forward and every gradient.

Without a GPU `test_in_the_interpreter` runs this file again in a process of its own, where Triton interprets the
kernels on CPU tensors (the variable must be set before Triton is imported). On a GPU the cases run there: `-m gpu`.
"""

import os
import subprocess
import sys

import pytest
import torch

from causal_conv1d import reference

pytest.importorskip("triton")
from causal_conv1d import triton_kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"

# The interpreter cuts bfloat16 off instead of rounding it: up to 2^-7 of a value.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 1e-2 if INTERPRETED else 6e-3, torch.float16: 6e-3}
# batch, channels, length, width, silu, bias, initial states, channels-last, dtype
CASES = {
    "one-token": (1, 3, 1, 4, True, True, False, True, torch.float32),
    "one-channel": (2, 1, 5, 4, True, True, True, False, torch.float32),
    "shorter-than-filter": (2, 5, 2, 4, True, True, True, True, torch.float32),
    "states": (3, 5, 63, 4, True, True, True, False, torch.float32),
    "two-channel-blocks": (1, 70, 65, 3, True, False, False, True, torch.float32),
    "no-silu": (1, 4, 33, 2, False, True, False, False, torch.float32),
    "vim": (1, 8, 197, 4, True, True, False, True, torch.float32),
    "bf16": (2, 6, 40, 4, True, True, True, True, torch.bfloat16),
    "fp16": (1, 6, 40, 3, True, False, True, False, torch.float16),
}


@pytest.mark.skipif(INTERPRETED, reason="this is the process that it starts")
@pytest.mark.usefixtures("triton_interpreter")
def test_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(
        command, env=os.environ | {"TRITON_INTERPRET": "1"}, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert f"{len(CASES) + 2} passed" in result.stdout


def on_the_device(test):
    """What runs the kernels: on a GPU with `-m gpu`, or in the interpreter."""
    test = pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU here")(test)
    return test if INTERPRETED else pytest.mark.gpu(test)


def relative_error(actual, expected):
    assert actual.shape == expected.shape
    return ((actual.double().cpu() - expected).abs().max() / expected.abs().max()).nan_to_num(float("inf")).item()


def arguments(batch, channels, length, width, bias, states, channels_last, dtype):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    x = draw(batch, length, channels, dtype=dtype).transpose(1, 2)
    return (
        x if channels_last else x.contiguous(),
        draw(channels, width),
        draw(channels) if bias else None,
        draw(batch, channels, width - 1, dtype=dtype) if states else None,
    )


def in_float64(tensors):
    return [None if t is None else t.cpu().double() for t in tensors]


@on_the_device
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_forward_and_gradients(case, poisoned):
    batch, channels, length, width, silu, bias, states, channels_last, dtype = case
    inputs = arguments(batch, channels, length, width, bias, states, channels_last, dtype)
    out = triton_kernels.conv_forward(*inputs, silu)
    assert out.stride() == inputs[0].stride() and out.dtype == dtype
    assert relative_error(out, reference.conv_forward(*in_float64(inputs), silu)) <= TOLERANCE[dtype]
    dout = torch.randn_like(out)
    grads = triton_kernels.conv_backward(dout, *inputs, silu)
    expected = reference.conv_backward(dout.cpu().double(), *in_float64(inputs), silu)
    for name, grad, right, like in zip(("x", "weight", "bias", "initial_states"), grads, expected, inputs):
        assert (grad is None) == (like is None), name
        if grad is not None:
            tolerance = TOLERANCE[like.dtype]
            assert grad.dtype == like.dtype and relative_error(grad, right) <= tolerance, name
    given = [grad for grad in grads if grad is not None]
    assert len({grad.untyped_storage().data_ptr() for grad in given}) == len(given)
    assert not any(grad.storage_offset() for grad in given)


@on_the_device
def test_backward_gives_the_same_bits_twice():
    inputs = arguments(2, 6, 37, 4, True, True, True, torch.float32)
    dout = torch.randn_like(inputs[0])
    first, second = (triton_kernels.conv_backward(dout, *inputs, True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second))


@on_the_device
@pytest.mark.skipif(INTERPRETED, reason="needs a GPU's memory")
def test_more_than_2_to_the_31_elements():
    """The last row of a batch whose tensor passes 2^31 elements equals that row alone."""
    x = torch.randn(3, 2**20, 768, device="cuda", dtype=torch.bfloat16).transpose(1, 2)
    assert x.numel() > 2**31
    weight, bias = torch.randn(768, 4, device="cuda"), torch.randn(768, device="cuda")
    out = triton_kernels.conv_forward(x, weight, bias, None, True)
    assert torch.equal(out[2:], triton_kernels.conv_forward(x[2:], weight, bias, None, True))
    del out
    grads = triton_kernels.conv_backward(x, x, weight, bias, None, True)
    alone = triton_kernels.conv_backward(x[2:], x[2:], weight, bias, None, True)
    assert torch.equal(grads[0][2:], alone[0])


def test_what_is_not_served_is_named():
    assert "float64" in triton_kernels.unsupported(torch.float64, 4)
    assert "width 5" in triton_kernels.unsupported(torch.float32, 5)
    assert triton_kernels.unsupported(torch.bfloat16, 4) is None
