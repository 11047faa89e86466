"""Add and norm in one pass, in Triton: RMSNorm (arXiv 1910.07467) and LayerNorm (arXiv 1607.06450), with gradients.

A program of forward owns one row; one of backward owns every PROGRAMS-th row and adds up its share of the weight's
gradient in registers. Shares are summed afterwards: no atomics, the same bits on every run.
"""

import torch
import triton
import triton.language as tl

from mamba_ssm.ops.triton.common import contiguous, int64, on_its_device, options

MAX_WIDTH = 16384


@triton.jit
def add_norm_forward_kernel(
    x, residual, weight, bias, out, residual_out, mean, rstd, width, eps,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: s = x + residual, out = (s - mean) rstd weight + bias, the statistics in float32."""
    row = int64(tl.program_id(0))
    column = tl.arange(0, BLOCK)
    mask = column < width
    total = tl.load(x + row * width + column, mask=mask, other=0.0).to(tl.float32)
    if residual is not None:
        total += tl.load(residual + row * width + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(residual_out + row * width + column, total.to(residual_out.dtype.element_ty), mask=mask)
    if LAYER:
        center = tl.sum(total, 0) / width
        tl.store(mean + row, center)
        total = tl.where(mask, total - center, 0.0)
    scale = 1 / tl.sqrt(tl.sum(total * total, 0) / width + eps)
    tl.store(rstd + row, scale)
    value = total * scale * tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    if bias is not None:
        value += tl.load(bias + column, mask=mask, other=0.0).to(tl.float32)
    tl.store(out + row * width + column, value.to(out.dtype.element_ty), mask=mask)


@triton.jit
def add_norm_backward_kernel(
    dout, dresidual_out, residual_out, weight, mean, rstd, dx, dresidual, dweight, dbias, rows, width,
    LAYER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Rows pid, pid + programs, ...: ds = rstd (g - n mean(g n) [- mean(g)]) + dresidual_out, with g = dout weight."""
    pid, programs = tl.program_id(0), tl.num_programs(0)
    column = tl.arange(0, BLOCK)
    mask = column < width
    scale = tl.load(weight + column, mask=mask, other=0.0).to(tl.float32)
    sum_weight = tl.zeros([BLOCK], tl.float32)
    sum_bias = tl.zeros([BLOCK], tl.float32)
    for i in range(pid, rows, programs):
        row = int64(i)
        normed = tl.load(residual_out + row * width + column, mask=mask, other=0.0).to(tl.float32)
        if LAYER:
            normed = tl.where(mask, normed - tl.load(mean + row), 0.0)
        r = tl.load(rstd + row)
        normed = normed * r
        incoming = tl.load(dout + row * width + column, mask=mask, other=0.0).to(tl.float32)
        sum_weight += incoming * normed
        sum_bias += incoming
        g = incoming * scale
        ds = g - normed * (tl.sum(g * normed, 0) / width)
        if LAYER:
            ds -= tl.sum(g, 0) / width
        ds = ds * r
        if dresidual_out is not None:
            ds += tl.load(dresidual_out + row * width + column, mask=mask, other=0.0).to(tl.float32)
        tl.store(dx + row * width + column, ds.to(dx.dtype.element_ty), mask=mask)
        if dresidual is not None:
            tl.store(dresidual + row * width + column, ds.to(dresidual.dtype.element_ty), mask=mask)
    tl.store(dweight + int64(pid) * width + column, sum_weight, mask=mask)
    if dbias is not None:
        tl.store(dbias + int64(pid) * width + column, sum_bias, mask=mask)


def _block(width: int) -> dict:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, **options(num_warps=min(max(block // 256, 1), 8))}


def _programs(rows: int, width: int, device: torch.device) -> int:
    """Programs of backward: few, so that there are few shares to sum, but enough to keep memory busy.

    A program waits for the 10 to 14 bytes per column of one row at a time: with 8 for each multiprocessor, rows of 192
    had 15 of the 23 kB in flight that 4.3 TB/s need, and reached half of that rate (H200).
    """
    if device.type != "cuda":  # Triton's interpreter
        return min(rows, 2)
    each = min(max(3072 // width, 8), 32)
    return min(rows, each * torch.cuda.get_device_properties(device).multi_processor_count)


@on_its_device
def add_norm_forward(x, residual, weight, bias, eps, kind, residual_dtype):
    """Backend form on rows (M, E): (out, x + residual in residual_dtype, mean (M,) or None, rstd (M,))."""
    x, residual, weight, bias = contiguous(x, residual, weight, bias)
    rows, width = x.shape
    out, residual_out = torch.empty_like(x), torch.empty_like(x, dtype=residual_dtype)
    mean = torch.empty(rows, dtype=torch.float32, device=x.device) if kind == "layer" else None
    rstd = torch.empty(rows, dtype=torch.float32, device=x.device)
    if rows:
        add_norm_forward_kernel[(rows,)](
            x, residual, weight, bias, out, residual_out, mean, rstd, width, eps,
            LAYER=kind == "layer", **_block(width),
        )  # fmt: skip
    return out, residual_out, mean, rstd


@on_its_device
def add_norm_backward(dout, dresidual_out, residual_out, weight, bias, mean, rstd, kind, x_dtype, residual_dtype):
    """Gradients of `add_norm_forward`: (dx, dresidual or None, dweight, dbias or None)."""
    dout, dresidual_out, residual_out, weight = contiguous(dout, dresidual_out, residual_out, weight)
    rows, width = dout.shape
    dx = torch.empty_like(dout, dtype=x_dtype)
    dresidual = None if residual_dtype is None else torch.empty_like(dout, dtype=residual_dtype)
    programs = _programs(rows, width, dout.device)
    dweight = torch.empty((programs, width), dtype=torch.float32, device=dout.device)
    dbias = None if bias is None else torch.empty_like(dweight)
    if rows:
        add_norm_backward_kernel[(programs,)](
            dout, dresidual_out, residual_out, weight, mean, rstd, dx, dresidual, dweight, dbias, rows, width,
            LAYER=kind == "layer", **_block(width),
        )  # fmt: skip
    dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
    return dx, dresidual, dweight.sum(0).to(weight.dtype), dbias
