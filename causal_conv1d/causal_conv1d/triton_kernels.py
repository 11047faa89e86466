# ruff: noqa: RUF005 - Triton's compiler adds tuples but does not unpack them
"""The GPU backend: the convolution in Triton, one source for NVIDIA and AMD, nothing compiled at install.

Importing this module raises ImportError where Triton is not installed; `backend.py` reports that reason. A program
owns a tile of tokens x channels of one sequence. Sums over tokens and batch (the gradients of weight and bias) are
written as one share per program and added up afterwards: no atomics, the same bits on every run.
"""

import functools

import torch
import triton
import triton.language as tl

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
FORWARD_TOKENS, BACKWARD_TOKENS, CHANNELS = 32, 16, 64
LOG2_E = tl.constexpr(1.4426950408889634)


@functools.cache
def unavailable_reason() -> str | None:
    """Why these kernels cannot run here, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        wanted = ".".join(map(str, MINIMUM_TRITON))
        return f"Triton {triton.__version__} is too old: install triton >= {wanted}"
    if triton.knobs.runtime.interpret:
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device was found (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < MINIMUM_CAPABILITY:
        return (
            f"the GPU's compute capability {torch.cuda.get_device_capability()} is below {MINIMUM_CAPABILITY}: "
            "use an Ampere or newer GPU, or the reference backend"
        )
    return None


def unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why these kernels do not serve such arguments, or None."""
    if dtype not in DTYPES:
        return f"x of dtype {dtype}, the Triton kernels serve float32, bfloat16 and float16"
    if not 2 <= width <= 4:
        return f"weight: a filter of width {width}, the Triton kernels serve 2 to 4"
    return None


@triton.jit
def _int64(value):
    return tl.zeros([], tl.int64) + value


@triton.jit
def _sigmoid(v):
    return 1 / (1 + tl.exp2(v * -LOG2_E))


@triton.jit
def _read(x, initial_states, token, d, live, length, stride_d, stride_l, W: tl.constexpr):
    """x at tokens (T,) and channels (C,) in float32; tokens before the first come from initial_states (D, W-1)."""
    inside = (token >= 0) & (token < length)
    at = token.to(tl.int64)[:, None] * stride_l + d[None, :] * stride_d
    value = tl.load(x + at, mask=inside[:, None] & live[None, :], other=0.0).to(tl.float32)
    if initial_states is not None:
        early = (token < 0) & (token >= 1 - W)
        at = d[None, :] * (W - 1) + (token + W - 1)[:, None]
        value += tl.load(initial_states + at, mask=early[:, None] & live[None, :], other=0.0).to(tl.float32)
    return value


@triton.jit
def conv_forward_kernel(
    x, weight, bias, initial_states, out, length, channels,
    x_stride_b, x_stride_d, x_stride_l, out_stride_b, out_stride_d, out_stride_l,
    W: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """out[t] = bias + sum_k weight[k] x[t - (W-1) + k]. Grid: (batch * token tiles, channel blocks)."""
    tiles = tl.cdiv(length, TOKENS)
    b = _int64(tl.program_id(0) // tiles)
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    d = _int64(tl.program_id(1)) * CHANNELS + tl.arange(0, CHANNELS)
    live = d < channels
    x += b * x_stride_b
    if initial_states is not None:
        initial_states += b * channels * (W - 1)
    value = tl.zeros([TOKENS, CHANNELS], tl.float32)
    if bias is not None:
        value += tl.load(bias + d, mask=live, other=0.0).to(tl.float32)[None, :]
    for k in tl.static_range(W):
        tap = tl.load(weight + d * W + k, mask=live, other=0.0).to(tl.float32)
        shifted = _read(x, initial_states, token + (k - (W - 1)), d, live, length, x_stride_d, x_stride_l, W)
        value += tap[None, :] * shifted
    if SILU:
        value = value * _sigmoid(value)
    at = b * out_stride_b + token.to(tl.int64)[:, None] * out_stride_l + d[None, :] * out_stride_d
    tl.store(out + at, value.to(out.dtype.element_ty), mask=(token < length)[:, None] & live[None, :])


@triton.jit
def conv_backward_kernel(
    dout, x, weight, bias, initial_states, dx, dinitial_states, dweight, length, channels,
    dout_stride_b, dout_stride_d, dout_stride_l, x_stride_b, x_stride_d, x_stride_l, dx_stride_b, dx_stride_d,
    dx_stride_l,
    W: tl.constexpr, SILU: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx (and dinitial_states), and this program's share of dweight (programs, W + 1, D), dbias in the last row.

    Tiles cover the tokens from -(W-1) on, so that the initial states are tokens like the others.
    Grid: (batch * token tiles, channel blocks).
    """
    tiles = tl.cdiv(length + W - 1, TOKENS)
    pid = _int64(tl.program_id(0))
    b = pid // tiles
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS) - (W - 1)
    d = _int64(tl.program_id(1)) * CHANNELS + tl.arange(0, CHANNELS)
    live = d < channels
    x += b * x_stride_b
    dout += b * dout_stride_b
    dweight += pid * (W + 1) * channels
    if initial_states is not None:
        initial_states += b * channels * (W - 1)
    near = ()  # x at tokens - (W-1) ... tokens + (W-1)
    for shift in tl.static_range(2 * W - 1):
        tile = _read(x, initial_states, token + (shift - (W - 1)), d, live, length, x_stride_d, x_stride_l, W)
        near = near + (tile,)
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + k, mask=live, other=0.0).to(tl.float32),)
    total = tl.zeros([TOKENS, CHANNELS], tl.float32)
    for m in tl.static_range(W):  # the output m tokens later saw this token through tap W - 1 - m
        at = token + m
        inside = ((at >= 0) & (at < length))[:, None] & live[None, :]
        slope = tl.load(
            dout + at.to(tl.int64)[:, None] * dout_stride_l + d[None, :] * dout_stride_d, mask=inside, other=0.0
        ).to(tl.float32)
        if SILU:
            before = tl.zeros([TOKENS, CHANNELS], tl.float32)
            if bias is not None:
                before += tl.load(bias + d, mask=live, other=0.0).to(tl.float32)[None, :]
            for k in tl.static_range(W):
                before += taps[k][None, :] * near[m + k]
            s = _sigmoid(before)
            slope = slope * s * (1 + before * (1 - s))
        total += taps[W - 1 - m][None, :] * slope
        if m == 0:
            for k in tl.static_range(W):
                tl.store(dweight + k * channels + d, tl.sum(slope * near[k], 0), mask=live)
            tl.store(dweight + W * channels + d, tl.sum(slope, 0), mask=live)
    at = b * dx_stride_b + token.to(tl.int64)[:, None] * dx_stride_l + d[None, :] * dx_stride_d
    inside = ((token >= 0) & (token < length))[:, None] & live[None, :]
    tl.store(dx + at, total.to(dx.dtype.element_ty), mask=inside)
    if dinitial_states is not None:
        at = (b * channels + d)[None, :] * (W - 1) + (token + W - 1)[:, None]
        early = (token < 0)[:, None] & live[None, :]
        tl.store(dinitial_states + at, total.to(dinitial_states.dtype.element_ty), mask=early)


# --- launchers

_OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": True}


def _contiguous(*tensors):
    return (None if tensor is None else tensor.contiguous() for tensor in tensors)


def _own_memory(view, dtype):
    """A contiguous copy: what a registered op returns may share memory with nothing."""
    return view.to(dtype, copy=True, memory_format=torch.contiguous_format)


def _on_its_device(form):
    """A backend form whose launches go to its first tensor's GPU: Triton launches on the current one."""

    @functools.wraps(form)
    def guarded(first, *args):
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return form(first, *args)
        with torch.cuda.device(first.device):
            return form(first, *args)

    return guarded


@_on_its_device
def conv_forward(x, weight, bias, initial_states, silu):
    """Backend form: out (B, D, L) in x's dtype and memory layout."""
    batch, channels, length = x.shape
    weight, bias, initial_states = _contiguous(weight, bias, initial_states)
    out = torch.empty_like(x)
    grid = (batch * triton.cdiv(length, FORWARD_TOKENS), triton.cdiv(channels, CHANNELS))
    if out.numel():
        conv_forward_kernel[grid](
            x, weight, bias, initial_states, out, length, channels, *x.stride(), *out.stride(),
            W=weight.shape[1], SILU=silu, TOKENS=FORWARD_TOKENS, CHANNELS=CHANNELS, **_OPTIONS,
        )  # fmt: skip
    return out


@_on_its_device
def conv_backward(dout, x, weight, bias, initial_states, silu):
    """Gradients of `conv_forward`: (dx, dweight, dbias or None, dinitial_states or None)."""
    batch, channels, length = x.shape
    width = weight.shape[1]
    contiguous_weight, contiguous_bias, contiguous_states = _contiguous(weight, bias, initial_states)
    dx = torch.empty_like(x)
    dinitial = None if initial_states is None else torch.empty_like(contiguous_states)
    programs = batch * triton.cdiv(length + width - 1, BACKWARD_TOKENS)
    shares = torch.empty((programs, width + 1, channels), dtype=torch.float32, device=x.device)
    if dx.numel():
        conv_backward_kernel[(programs, triton.cdiv(channels, CHANNELS))](
            dout, x, contiguous_weight, contiguous_bias, contiguous_states, dx, dinitial, shares, length, channels,
            *dout.stride(), *x.stride(), *dx.stride(),
            W=width, SILU=silu, TOKENS=BACKWARD_TOKENS, CHANNELS=CHANNELS, **_OPTIONS,
        )  # fmt: skip
    sums = shares.sum(0)  # (W + 1, D)
    dbias = None if bias is None else _own_memory(sums[-1], bias.dtype)
    return dx, _own_memory(sums[:-1].T, weight.dtype), dbias, dinitial
