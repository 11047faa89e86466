# ruff: noqa: RUF005 - Triton's compiler adds tuples but does not unpack them
"""The bidirectional mixer between its two projections, in Triton (Vision Mamba, arXiv 2401.09417, algorithm 1).

Forward is four launches: both convolutions from one read of x; both x projections, one batched matrix product; both
scans, the time step's projection inside; gate and sum. Channels-last throughout; a backward direction is index
arithmetic. Backward recomputes the first two launches and keeps of forward only the states before every chunk and
the sum of both scans.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ssm.ops.triton.common import (
    LOG2_E,
    ceil_div,
    contiguous,
    int64,
    on_its_device,
    options,
    own_memory,
    sigmoid,
)
from mamba_ssm.ops.triton.selective_scan import ScanInputs, scan_backward, scan_forward, states_shape

STRIP, STRIP_CHANNELS = 32, 64  # tokens and channels of a program of the convolutions, one warp
STRIP_GROUP = 8  # tokens whose loads it has under way at once
BACKWARD_TOKENS = 16  # of the convolution's backward
CHANNELS = 64
ROWS = 8  # of the element-wise kernels


@triton.jit
def _live(d, channels, inside):
    """The mask of a token's channels. A scalar & a vector would be no mask for Triton 3.9's interpreter."""
    return d < tl.where(inside, channels, 0)


@triton.jit
def _token(x, token, inside, stride_l, d, channels):
    """One token's channels in float32, zero outside the sequence."""
    return tl.load(x + int64(token) * stride_l + d, mask=_live(d, channels, inside), other=0.0).to(tl.float32)


@triton.jit
def _silu(v):
    return v / (1 + tl.exp2(v * -LOG2_E))  # v * sigmoid(v) would make the kernel 4 % longer


@triton.jit
def conv_both_kernel(
    xz, weight, weight_b, bias, bias_b, u, length, channels, stride_b, stride_l,
    W: tl.constexpr, STRIP: tl.constexpr, GROUP: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """u (2, B, L, D) = silu(conv(x)): causal in u[0], anti-causal in u[1].

    A program walks a strip of tokens. What both convolutions of GROUP tokens read, the W - 1 tokens before them and
    behind them included, is in registers: every token is loaded once, plus 2 (W - 1) per strip.
    Grid: (batch * strips, channel blocks).
    """
    strips = tl.cdiv(length, STRIP)
    b = int64(tl.program_id(0) // strips)
    first = tl.program_id(0) % strips * STRIP
    end = tl.minimum(first + STRIP, length)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = d < channels
    taps = ()
    taps_b = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + k, mask=live, other=0.0).to(tl.float32),)
        taps_b = taps_b + (tl.load(weight_b + d * W + k, mask=live, other=0.0).to(tl.float32),)
    start = tl.zeros([CHANNELS], tl.float32)
    start_b = tl.zeros([CHANNELS], tl.float32)
    if bias is not None:
        start += tl.load(bias + d, mask=live, other=0.0).to(tl.float32)
        start_b += tl.load(bias_b + d, mask=live, other=0.0).to(tl.float32)
    x = xz + b * stride_b
    u += b * length * channels + d
    u_b = u + int64(tl.num_programs(0) // strips) * length * channels
    x_rows = ()  # tokens - (W - 1) ... tokens + GROUP + W - 2 of the group
    for k in tl.static_range(2 * W - 2):
        early = first + (k - (W - 1))
        x_rows = x_rows + (_token(x, early, (early >= 0) & (early < length), stride_l, d, channels),)
    for token in range(first, end, GROUP):
        for k in tl.static_range(GROUP):
            late = token + (k + W - 1)
            x_rows = x_rows + (_token(x, late, late < length, stride_l, d, channels),)
        for k in tl.static_range(GROUP):
            ahead, behind = start, start_b
            for tap in tl.static_range(W):
                ahead += taps[tap] * x_rows[k + tap]
                behind += taps_b[W - 1 - tap] * x_rows[k + W - 1 + tap]
            at, inside = int64(token + k) * channels, _live(d, channels, token + k < end)
            tl.store(u + at, _silu(ahead).to(u.dtype.element_ty), mask=inside)
            tl.store(u_b + at, _silu(behind).to(u.dtype.element_ty), mask=inside)
        kept = ()
        for k in tl.static_range(2 * W - 2):
            kept = kept + (x_rows[GROUP + k],)
        x_rows = kept


@triton.jit
def merge_kernel(
    scans, xz, y, total, rows, length, channels, stride_b, stride_l, scale,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y = scale silu(z) (forward scan + backward scan); the sum alone to `total` if it is wanted."""
    row = int64(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (row < rows)[:, None] & (d < channels)[None, :]
    at = row[:, None] * channels + d[None, :]
    both = tl.load(scans + at, mask=mask, other=0.0).to(tl.float32)
    both += tl.load(scans + int64(rows) * channels + at, mask=mask, other=0.0).to(tl.float32)
    if total is not None:
        tl.store(total + at, both.to(total.dtype.element_ty), mask=mask)
    z_row = row // length * stride_b + row % length * stride_l + channels
    z = tl.load(xz + z_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(y + at, (scale * z * sigmoid(z) * both).to(y.dtype.element_ty), mask=mask)


@triton.jit
def gate_backward_kernel(
    dy, xz, total, dscan, dxz, rows, length, channels, stride_b, stride_l, scale,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Gradients of `merge_kernel`: dscan (B, L, D), the same for both scans, and dz in the second half of dxz."""
    row = int64(tl.program_id(0)) * ROWS + tl.arange(0, ROWS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    mask = (row < rows)[:, None] & (d < channels)[None, :]
    at = row[:, None] * channels + d[None, :]
    z_row = row // length * stride_b + row % length * stride_l + channels
    z = tl.load(xz + z_row[:, None] + d[None, :], mask=mask, other=0.0).to(tl.float32)
    incoming = scale * tl.load(dy + at, mask=mask, other=0.0).to(tl.float32)
    both = tl.load(total + at, mask=mask, other=0.0).to(tl.float32)
    s = sigmoid(z)
    tl.store(dscan + at, (incoming * z * s).to(dscan.dtype.element_ty), mask=mask)
    dz = incoming * both * s * (1 + z * (1 - s))
    tl.store(dxz + row[:, None] * (2 * channels) + channels + d[None, :], dz.to(dxz.dtype.element_ty), mask=mask)


@triton.jit
def _conv_backward(
    x, du, weight, bias, dx, dweight, b, token, d, live, length, channels,
    SIGN: tl.constexpr, W: tl.constexpr,
):  # fmt: skip
    """One direction's share of dx, and its part of dweight (W + 1, D), the bias's gradient in the last row.

    x: the 2 W - 1 tiles shifted by -(W - 1) ... W - 1 tokens. SIGN 1: causal, -1: anti-causal.
    """
    taps = ()
    for k in tl.static_range(W):
        taps = taps + (tl.load(weight + d * W + k, mask=live, other=0.0).to(tl.float32),)
    for m in tl.static_range(W):  # the output m tokens later in scan order saw this token through tap W - 1 - m
        before = tl.zeros_like(dx)
        if bias is not None:
            before += tl.load(bias + d, mask=live, other=0.0).to(tl.float32)[None, :]
        for k in tl.static_range(W):
            before += taps[k][None, :] * x[W - 1 + SIGN * (m - (W - 1) + k)]
        at = token + SIGN * m
        inside = ((at >= 0) & (at < length) & (token < length))[:, None] & live[None, :]
        incoming = tl.load(
            du + (b * length + at.to(tl.int64))[:, None] * channels + d[None, :], mask=inside, other=0.0
        ).to(tl.float32)
        s = sigmoid(before)
        slope = incoming * s * (1 + before * (1 - s))
        dx += taps[W - 1 - m][None, :] * slope
        if m == 0:
            for k in tl.static_range(W):
                tl.store(dweight + k * channels + d, tl.sum(slope * x[W - 1 + SIGN * (k - (W - 1))], 0), mask=live)
            tl.store(dweight + W * channels + d, tl.sum(slope, 0), mask=live)
    return dx


@triton.jit
def conv_backward_kernel(
    xz, du, weight, weight_b, bias, bias_b, dxz, dweight, length, channels, stride_b, stride_l,
    W: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """dx of both convolutions, in the first half of dxz; dweight (2, programs, W + 1, D) are partial sums.

    Grid: (batch * token tiles, channel blocks).
    """
    tiles = tl.cdiv(length, TOKENS)
    pid, programs = int64(tl.program_id(0)), tl.num_programs(0)
    b = pid // tiles
    token = tl.program_id(0) % tiles * TOKENS + tl.arange(0, TOKENS)
    d = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    live = d < channels
    x = ()
    for shift in tl.static_range(2 * W - 1):
        at = token + shift - (W - 1)
        inside = ((at >= 0) & (at < length))[:, None] & live[None, :]
        tile = tl.load(xz + b * stride_b + at.to(tl.int64)[:, None] * stride_l + d[None, :], mask=inside, other=0.0)
        x = x + (tile.to(tl.float32),)
    dx = tl.zeros([TOKENS, CHANNELS], tl.float32)
    dx = _conv_backward(
        x, du, weight, bias, dx, dweight + pid * (W + 1) * channels, b, token, d, live, length, channels, 1, W
    )
    batch = programs // tiles
    dx = _conv_backward(
        x, du + int64(batch) * length * channels, weight_b, bias_b, dx,
        dweight + (programs + pid) * (W + 1) * channels, b, token, d, live, length, channels, -1, W,
    )  # fmt: skip
    at = (b * length + token)[:, None] * (2 * channels) + d[None, :]
    tl.store(dxz + at, dx.to(dxz.dtype.element_ty), mask=(token < length)[:, None] & live[None, :])


# --- launchers


class Parameters(NamedTuple):
    """Of both directions each, as pairs; see `mamba_ssm.ops.bimamba.DirectionParameters`."""

    conv_weight: tuple[Tensor, Tensor]
    conv_bias: tuple[Tensor | None, Tensor | None]
    x_proj_weight: tuple[Tensor, Tensor]
    dt_weight: tuple[Tensor, Tensor]
    dt_bias: tuple[Tensor, Tensor]
    A: tuple[Tensor, Tensor]
    D: tuple[Tensor, Tensor]


def _parameters(forward_params, backward_params) -> Parameters:
    """As pairs of contiguous tensors of any dtype: the kernels widen them as they read."""
    return Parameters(*(contiguous(*pair) for pair in zip(forward_params, backward_params)))


def _adjacent(xz: Tensor) -> Tensor:
    """xz as the kernels read it: channels side by side, batch and tokens any strides apart."""
    return xz if xz.stride(2) == 1 else xz.contiguous()


def conv_both(xz: Tensor, parameters: Parameters) -> Tensor:
    """u (2, B, L, D): the convolution and SiLU of both directions. xz (B, L, 2 D), its last axis contiguous."""
    conv_weight = parameters.conv_weight
    batch, length, double = xz.shape
    channels = double // 2
    u = torch.empty((2, batch, length, channels), dtype=xz.dtype, device=xz.device)
    conv_both_kernel[(batch * ceil_div(length, STRIP), ceil_div(channels, STRIP_CHANNELS))](
        xz, *conv_weight, *parameters.conv_bias, u, length, channels, xz.stride(0), xz.stride(1),
        W=conv_weight[0].shape[1], STRIP=STRIP, GROUP=STRIP_GROUP, CHANNELS=STRIP_CHANNELS, **options(),
    )  # fmt: skip
    return u


def project(u: Tensor, parameters: Parameters) -> Tensor:
    """(2, B, L, R + 2 N) float32: the time step, B and C of both directions, u times the x projections' weights.

    The weights are rounded to u's dtype as under autocast; sums are float32, and stay so. A float32 u obeys torch's
    setting for TF32, as all matrix products of a network do.
    """
    weights = _stacked(parameters.x_proj_weight, u.dtype).transpose(1, 2)  # (2, D, R + 2 N)
    return product_in_float32(u.flatten(1, 2), weights).unflatten(1, u.shape[1:3])


def product_in_float32(a: Tensor, b: Tensor) -> Tensor:
    """a @ b of two matrices, or of two batches of them, with float32 sums and result."""
    product = torch.bmm if a.dim() == 3 else torch.mm
    if a.is_cuda and torch.version.hip is None and a.dtype != torch.float32:
        return product(a, b, out_dtype=torch.float32)
    return product(a.float(), b.float())  # only NVIDIA's libraries write sums of 16-bit products in float32


def _stacked(pair: tuple[Tensor, Tensor], dtype: torch.dtype) -> Tensor:
    """Both tensors as one of another dtype, in a single launch."""
    out = torch.empty((2, *pair[0].shape), dtype=dtype, device=pair[0].device)
    torch._foreach_copy_(list(out), list(pair))
    return out


def _scan_inputs(u: Tensor, projected: Tensor, parameters: Parameters) -> ScanInputs:
    _, _, _, dt_weight, dt_bias, A, D = parameters
    states, rank = A[0].shape[1], dt_weight[0].shape[1]
    dt, B, C = projected.split([rank, states, states], dim=-1)
    B, C = (m.unsqueeze(2).transpose(3, 4) for m in (B, C))  # (2, B, 1, N, L)
    return ScanInputs(u.transpose(2, 3), dt.transpose(2, 3), None, B, C, A, D, dt_weight, dt_bias, True)


def _rows_grid(rows: int, channels: int) -> tuple[tuple[int, int], int]:
    """Of a kernel over ROWS tokens and a block of channels: (the grid, channels of a block)."""
    block = min(triton.next_power_of_2(channels), 512)
    return (ceil_div(rows, ROWS), ceil_div(channels, block)), block


@on_its_device
def bimamba_forward(xz, forward_params, backward_params, scale, save, segments=None):
    """Backend form: (y (B, L, D), saved)."""
    xz = _adjacent(xz)
    batch, length, double = xz.shape
    channels = double // 2
    parameters = _parameters(forward_params, backward_params)
    u = conv_both(xz, parameters)
    projected = project(u, parameters)
    scans = torch.empty_like(u)
    states = total = None
    saved = xz.new_empty(0, dtype=torch.uint8)
    if save:
        saved, states, total = _new_saved(xz, parameters.A[0].shape[1])
    scan_forward(_scan_inputs(u, projected, parameters), scans.transpose(2, 3), states, None, segments)
    y = torch.empty((batch, length, channels), dtype=xz.dtype, device=xz.device)
    grid, block = _rows_grid(batch * length, channels)
    merge_kernel[grid](
        scans, xz, y, total, batch * length, length, channels, xz.stride(0), xz.stride(1), scale,
        ROWS=ROWS, CHANNELS=block, **options(num_warps=4),
    )  # fmt: skip
    return y, saved


def _new_saved(xz: Tensor, d_state: int) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, double = xz.shape
    size = bimamba_saved_bytes(batch, length, double // 2, d_state, 0, 0, xz.dtype)
    saved = torch.empty(size, dtype=torch.uint8, device=xz.device)
    return saved, *_split_saved(saved, xz, d_state)


def _split_saved(saved: Tensor, xz: Tensor, d_state: int) -> tuple[Tensor, Tensor]:
    """Views of what forward saves: the chunks' states, and the sum of both scans (B, L, D)."""
    batch, length, double = xz.shape
    shape = states_shape(2, batch, double // 2, length, d_state)
    size = 4 * torch.Size(shape).numel()
    states = saved[:size].view(torch.float32).view(shape)
    return states, saved[size:].view(xz.dtype).view(batch, length, double // 2)


def bimamba_saved_bytes(
    batch: int, length: int, channels: int, d_state: int, dt_rank: int, d_conv: int, dtype: torch.dtype
) -> int:
    """Size of what forward saves for backward."""
    states = torch.Size(states_shape(2, batch, channels, length, d_state)).numel()
    return 4 * states + dtype.itemsize * batch * length * channels


@on_its_device
def bimamba_backward(dy, xz, forward_params, backward_params, scale, saved, segments=None):
    """Gradients: (dxz, those of the forward direction's parameters in order, those of the backward one's)."""
    xz = _adjacent(xz)
    batch, length, double = xz.shape
    channels = double // 2
    parameters = _parameters(forward_params, backward_params)
    states, total = _split_saved(saved, xz, parameters.A[0].shape[1])
    dxz = torch.empty((batch, length, double), dtype=xz.dtype, device=xz.device)
    dscan = torch.empty((batch, length, channels), dtype=xz.dtype, device=xz.device)
    grid, block = _rows_grid(batch * length, channels)
    gate_backward_kernel[grid](
        dy.contiguous(), xz, total, dscan, dxz, batch * length, length, channels, xz.stride(0), xz.stride(1), scale,
        ROWS=ROWS, CHANNELS=block, **options(num_warps=4),
    )  # fmt: skip
    u = conv_both(xz, parameters)
    projected = project(u, parameters)
    inputs = _scan_inputs(u, projected, parameters)
    du, ddelta = torch.empty_like(u), torch.empty_like(u)
    both = dscan.transpose(1, 2).expand(2, -1, -1, -1)
    sums = scan_backward(
        inputs, both, None, states, du.transpose(2, 3), ddelta.transpose(2, 3), None, segments=segments
    )
    dx_proj, ddt_weight = _projections_backward(du, ddelta, u, inputs, sums, parameters)
    dconv = _conv_backward_launch(xz, du, parameters, dxz)
    grads = [
        (dconv[i, :, :-1], None if parameters.conv_bias[i] is None else dconv[i, :, -1], dx_proj[i], ddt_weight[i],
         sums.bias[i], sums.A[i], sums.D[i])
        for i in range(2)
    ]  # fmt: skip
    return dxz, _as_gradients(grads[0], forward_params), _as_gradients(grads[1], backward_params)


def _projections_backward(du, ddelta, u, inputs: ScanInputs, sums, parameters: Parameters):
    """Add to du (2, B, L, D) what comes back through both projections; the gradients of their weights."""
    x_proj, dt_weight = parameters.x_proj_weight, parameters.dt_weight
    dt = inputs.delta.transpose(2, 3).to(u.dtype)  # (2, B, L, R)
    dB, dC = (m.squeeze(2).transpose(2, 3).to(u.dtype) for m in (sums.B, sums.C))  # (2, B, L, N)
    dx_proj, ddt_weight = [], []
    for i in range(2):
        flat_u, flat_ddelta = u[i].flatten(0, 1), ddelta[i].flatten(0, 1)  # (B L, D)
        ddt = flat_ddelta @ dt_weight[i].to(u.dtype)  # (B L, R)
        dprojected = torch.cat([ddt, dB[i].flatten(0, 1), dC[i].flatten(0, 1)], dim=1)
        du[i].flatten(0, 1).addmm_(dprojected, x_proj[i].to(u.dtype))
        dx_proj.append(product_in_float32(dprojected.T, flat_u))
        ddt_weight.append(product_in_float32(flat_ddelta.T, dt[i].flatten(0, 1)))
    return dx_proj, ddt_weight


def _conv_backward_launch(xz, du, parameters: Parameters, dxz) -> Tensor:
    """Write dx into dxz. Returns (2, D, W + 1): the weights' gradients and, last, the biases'."""
    conv_weight = parameters.conv_weight
    batch, length, double = xz.shape
    channels, width = double // 2, conv_weight[0].shape[1]
    programs = batch * ceil_div(length, BACKWARD_TOKENS)
    parts = torch.empty((2, programs, width + 1, channels), dtype=torch.float32, device=xz.device)
    conv_backward_kernel[(programs, ceil_div(channels, CHANNELS))](
        xz, du, *conv_weight, *parameters.conv_bias, dxz, parts, length, channels, xz.stride(0), xz.stride(1),
        W=width, TOKENS=BACKWARD_TOKENS, CHANNELS=CHANNELS, **options(num_warps=4),
    )  # fmt: skip
    return parts.sum(1).transpose(1, 2)


def _as_gradients(sums, parameters) -> tuple[Tensor | None, ...]:
    """Each parameter's gradient in its dtype and in memory of its own."""
    return tuple(None if p is None else own_memory(s, p.dtype) for s, p in zip(sums, parameters))
