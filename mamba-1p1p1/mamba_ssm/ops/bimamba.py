"""The fused bidirectional mixer as one registered op: everything between a block's two projections.

Channels-last, (B, L, D): the layout the projections produce and consume. The second direction is an anti-causal
convolution and a scan from the last token to the first, so that nothing is flipped or transposed.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mamba_ssm.ops import backend, reference
from mamba_ssm.ops.selective_scan_interface import check_saved, needs_grad, scan_flops


class DirectionParameters(NamedTuple):
    """What one direction owns. D inner channels, W convolution width, R time-step rank, N states."""

    conv_weight: Tensor  # (D, W)
    conv_bias: Tensor | None  # (D,)
    x_proj_weight: Tensor  # (R + 2 N, D): time step, B, C in that order
    dt_weight: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N), negative
    D: Tensor  # (D,)


COUNT = len(DirectionParameters._fields)


def _kernels(xz: Tensor, A: Tensor, conv_weight: Tensor):
    return backend.choose("bimamba", xz.device, xz.dtype, d_state=A.shape[1], d_conv=conv_weight.shape[1])


def _saved_bytes(kernels, x: Tensor, conv_weight: Tensor, dt_weight: Tensor, A: Tensor) -> int:
    """x: (B, L, any width) of the activations' dtype."""
    channels, d_state = A.shape
    return kernels.bimamba_saved_bytes(
        x.shape[0], x.shape[1], channels, d_state, dt_weight.shape[1], conv_weight.shape[1], x.dtype
    )


def _block_keeps(kernels, hidden: Tensor, in_proj: Tensor, conv_weight, dt_weight, A) -> tuple[tuple[int, ...], int]:
    """What the block keeps for backward: the shape of xz, and bytes. Kernels without BLOCK_KEEPS make it all again."""
    if not kernels.BLOCK_KEEPS:
        return (0,), 0
    xz_shape = (*hidden.shape[:2], in_proj.shape[0])
    return xz_shape, _saved_bytes(kernels, hidden, conv_weight, dt_weight, A)


@torch.library.custom_op("mamba_ssm::bimamba", mutates_args=())
def _bimamba(
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight_b: Tensor,
    conv_bias_b: Tensor | None,
    x_proj_weight_b: Tensor,
    dt_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_b: Tensor,
    D_b: Tensor,
    scale: float,
    save: bool,
) -> tuple[Tensor, Tensor]:
    forward = DirectionParameters(conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D)
    backward = DirectionParameters(conv_weight_b, conv_bias_b, x_proj_weight_b, dt_weight_b, dt_bias_b, A_b, D_b)
    with torch.autocast(xz.device.type, enabled=False):
        return _kernels(xz, A, conv_weight).bimamba_forward(xz, forward, backward, scale, save)


@_bimamba.register_fake
def _(xz, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D, *rest):
    save = rest[-1]
    batch, length, double = xz.shape
    size = _saved_bytes(_kernels(xz, A, conv_weight), xz, conv_weight, dt_weight, A) if save else 0
    return xz.new_empty(batch, length, double // 2), xz.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("mamba_ssm::bimamba_backward", mutates_args=())
def _bimamba_backward(
    dy: Tensor,
    xz: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight_b: Tensor,
    conv_bias_b: Tensor | None,
    x_proj_weight_b: Tensor,
    dt_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_b: Tensor,
    D_b: Tensor,
    saved: Tensor,
    scale: float,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    forward = DirectionParameters(conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D)
    backward = DirectionParameters(conv_weight_b, conv_bias_b, x_proj_weight_b, dt_weight_b, dt_bias_b, A_b, D_b)
    kernels = _kernels(xz, A, conv_weight)
    check_saved(saved, _saved_bytes(kernels, xz, conv_weight, dt_weight, A))
    with torch.autocast(xz.device.type, enabled=False):
        dxz, forward_grads, backward_grads = kernels.bimamba_backward(dy, xz, forward, backward, scale, saved)
    # An op returns tensors only, of a known layout: an input that was None has an empty gradient.
    grads = (dxz, *forward_grads, *backward_grads)
    return tuple(xz.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


@_bimamba_backward.register_fake
def _(dy, xz, *rest):
    return tuple(xz.new_empty(0) if t is None else t.new_empty(t.shape) for t in (xz, *rest[: 2 * COUNT]))


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, dy, _):
    *inputs, saved = ctx.saved_tensors
    grads = _bimamba_backward(dy, *inputs, saved, ctx.scale)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None, None


_bimamba.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.mamba_ssm.bimamba)
def _forward_flops(xz_shape, conv_shape, bias_shape, x_proj_shape, dt_shape, dt_bias_shape, A_shape, *args, out_shape=None, **kwargs) -> int:  # fmt: skip  # noqa: E501
    """Both directions: convolution, both small projections, scan."""
    batch, length, _ = xz_shape
    channels, width = conv_shape
    per_token = 2 * channels * width + 2 * channels * x_proj_shape[0] + 2 * channels * dt_shape[1]
    return 2 * (batch * length * per_token + scan_flops(batch, channels, length, A_shape[1]))


@register_flop_formula(torch.ops.mamba_ssm.bimamba_backward)
def _backward_flops(dy_shape, xz_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _forward_flops(xz_shape, *args)


# ---- with its projections --------------------------------------------------------------------------------------


@torch.library.custom_op("mamba_ssm::bimamba_block", mutates_args=())
def _bimamba_block(
    hidden: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight_b: Tensor,
    conv_bias_b: Tensor | None,
    x_proj_weight_b: Tensor,
    dt_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_b: Tensor,
    D_b: Tensor,
    scale: float,
    bf16_products: bool,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    forward = DirectionParameters(conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D)
    backward = DirectionParameters(conv_weight_b, conv_bias_b, x_proj_weight_b, dt_weight_b, dt_bias_b, A_b, D_b)
    kernels = _kernels(hidden, A, conv_weight)
    return kernels.block_forward(hidden, in_proj, out_proj, forward, backward, scale, save, bf16_products)


@_bimamba_block.register_fake
def _(hidden, in_proj, out_proj, conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D, *rest):
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not rest[-1]:
        return out, hidden.new_empty(0), hidden.new_empty(0, dtype=torch.uint8)
    shape, size = _block_keeps(_kernels(hidden, A, conv_weight), hidden, in_proj, conv_weight, dt_weight, A)
    return out, hidden.new_empty(shape), hidden.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op("mamba_ssm::bimamba_block_backward", mutates_args=())
def _bimamba_block_backward(
    dout: Tensor,
    hidden: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    x_proj_weight: Tensor,
    dt_weight: Tensor,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    conv_weight_b: Tensor,
    conv_bias_b: Tensor | None,
    x_proj_weight_b: Tensor,
    dt_weight_b: Tensor,
    dt_bias_b: Tensor,
    A_b: Tensor,
    D_b: Tensor,
    xz: Tensor,
    saved: Tensor,
    scale: float,
    bf16_products: bool,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    forward = DirectionParameters(conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D)
    backward = DirectionParameters(conv_weight_b, conv_bias_b, x_proj_weight_b, dt_weight_b, dt_bias_b, A_b, D_b)
    kernels = _kernels(hidden, A, conv_weight)
    check_saved(saved, _block_keeps(kernels, hidden, in_proj, conv_weight, dt_weight, A)[1])
    with torch.autocast(hidden.device.type, enabled=False):
        *projections, forward_grads, backward_grads = kernels.block_backward(
            dout, hidden, in_proj, out_proj, forward, backward, scale, xz, saved, bf16_products
        )
    grads = (*projections, *forward_grads, *backward_grads)
    return tuple(hidden.new_empty(0) if grad is None else grad for grad in grads)


@_bimamba_block_backward.register_fake
def _(dout, *inputs):
    tensors = inputs[: 3 + 2 * COUNT]
    return tuple(dout.new_empty(0) if t is None else t.new_empty(t.shape) for t in tensors)


def _setup_block_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.bf16_products, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _block_autograd(ctx, dout, *_):
    *inputs, xz, saved = ctx.saved_tensors
    grads = _bimamba_block_backward(dout, *inputs, xz, saved, ctx.scale, ctx.bf16_products)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None, None, None


_bimamba_block.register_autograd(_block_autograd, setup_context=_setup_block_context)


@register_flop_formula(torch.ops.mamba_ssm.bimamba_block)
def _block_flops(hidden_shape, in_shape, out_proj_shape, *parameters, out_shape=None, **kwargs) -> int:
    batch, length, embedding = hidden_shape
    projections = 2 * batch * length * embedding * (in_shape[0] + out_proj_shape[1])
    return projections + _forward_flops((batch, length, in_shape[0]), *parameters)


@register_flop_formula(torch.ops.mamba_ssm.bimamba_block_backward)
def _block_backward_flops(dout_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _block_flops(*args)


def _check(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters) -> None:
    if xz.dim() != 3 or xz.shape[1] == 0 or xz.shape[2] != 2 * forward.D.shape[0]:
        raise ValueError(
            f"xz must be (B, L, 2 D) with L >= 1 and D = {forward.D.shape[0]} as the parameters, not {tuple(xz.shape)}"
        )
    if not xz.is_floating_point():
        raise ValueError(f"xz has dtype {xz.dtype}: the mixer takes floating-point tensors")
    _check_parameters(xz, forward, backward)


def _check_parameters(x: Tensor, forward: DirectionParameters, backward: DirectionParameters) -> None:
    channels, d_state = forward.A.shape
    rank, width = forward.dt_weight.shape[1], forward.conv_weight.shape[1]
    shapes = DirectionParameters(
        (channels, width), (channels,), (rank + 2 * d_state, channels),
        (channels, rank), (channels,), (channels, d_state), (channels,),
    )  # fmt: skip
    for direction, parameters in (("forward", forward), ("backward", backward)):
        for name, tensor, shape in zip(DirectionParameters._fields, parameters, shapes):
            if tensor is not None and tuple(tensor.shape) != shape:
                raise ValueError(f"{direction} {name} must have shape {shape}, not {tuple(tensor.shape)}")
            if tensor is not None and not tensor.is_floating_point():
                raise ValueError(f"{direction} {name} has dtype {tensor.dtype}: the mixer takes floating-point tensors")
            if tensor is not None and tensor.device != x.device:
                raise ValueError(f"{direction} {name} is on {tensor.device}, its input on {x.device}: move it there")


def bimamba(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters, scale: float = 0.5) -> Tensor:
    """The bidirectional mixer ("v2") between its projections (Vision Mamba, arXiv 2401.09417, algorithm 1).

    Args:
        xz: (B, L, 2 D), x in the first half of the last axis and the gate z in the second; float32, bfloat16,
            float16 or float64, while the parameters usually stay float32.
        forward, backward: the parameters of each direction.
        scale: 0.5 halves the sum of both directions as the published models do, 1.0 does not.

    Returns (B, L, D) in xz's dtype; state, time step, A and D are float32 at least.
    """
    _check(xz, forward, backward)
    if backend.differentiated_by_functorch():
        return reference.bimamba(xz, forward, backward, scale)
    save = needs_grad(xz, *forward, *backward)
    return _bimamba(xz, *forward, *backward, scale, save)[0]


def bimamba_block(
    hidden: Tensor,
    in_proj_weight: Tensor,
    out_proj_weight: Tensor,
    forward: DirectionParameters,
    backward: DirectionParameters,
    scale: float = 0.5,
) -> Tensor:
    """`bimamba` with its two projections, without bias: out_proj(bimamba(in_proj(hidden))).

    On a CPU in float32 a tile of tokens passes through all of it while it is in the cache. CPU autocast of float32
    weights keeps to this path: where the processor multiplies bfloat16 faster, the operands of in_proj and of
    backward's products are rounded to it, and everything else is float32, the result included. On an NVIDIA GPU with
    16-bit activations, by autocast or not, backward keeps `hidden` alone and makes everything else again. Elsewhere it
    is the three of them in a row.

    Args:
        hidden: (B, L, E). in_proj_weight: (2 D, E), x before z. out_proj_weight: (E, D).
        forward, backward, scale: as of `bimamba`.

    Returns (B, L, E) in hidden's dtype; under autocast in float32 on a CPU and in autocast's dtype elsewhere.
    """
    inputs = (hidden, in_proj_weight, out_proj_weight)
    if backend.differentiated_by_functorch():
        return F.linear(bimamba(F.linear(hidden, in_proj_weight), forward, backward, scale), out_proj_weight)
    half = _half_block_dtype(hidden, forward)
    if half is not None:
        with torch.autocast(hidden.device.type, enabled=False):
            return _run_block((hidden.to(half), *inputs[1:]), forward, backward, scale, bf16_products=False)
    if not _under_cpu_autocast(inputs, forward, backward):
        return _block(inputs, forward, backward, scale, bf16_products=False)
    bf16_products = torch.get_autocast_dtype("cpu") == torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        return _block((hidden.float(), *inputs[1:]), forward, backward, scale, bf16_products)


def _block(
    inputs: tuple, forward: DirectionParameters, backward: DirectionParameters, scale: float, bf16_products: bool
) -> Tensor:
    hidden, in_proj, out_proj = inputs
    if not _runs_as_block(inputs, forward, backward):
        return F.linear(bimamba(F.linear(hidden, in_proj), forward, backward, scale), out_proj)
    return _run_block(inputs, forward, backward, scale, bf16_products)


def _run_block(inputs: tuple, forward: DirectionParameters, backward: DirectionParameters, scale, bf16_products: bool):
    _check_block(*inputs, forward.D.shape[0])
    _check_parameters(inputs[0], forward, backward)
    save = needs_grad(*inputs, *forward, *backward)
    return _bimamba_block(*inputs, *forward, *backward, scale, bf16_products, save)[0]


def _half_block_dtype(hidden: Tensor, forward: DirectionParameters) -> torch.dtype | None:
    """The 16-bit dtype in which a GPU's block runs, by autocast or by `hidden` itself; None where it does not."""
    kind = hidden.device.type
    if kind != "cuda" and not (kind == "cpu" and _emulates_cuda()):
        return None
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    rank, d_conv = forward.dt_weight.shape[1], forward.conv_weight.shape[1]
    return dtype if _serves_half_block(kind, dtype, *forward.A.shape, rank, d_conv) else None


@torch.compiler.assume_constant_result
def _emulates_cuda() -> bool:
    """Whether a test runs the CUDA kernels on CPU tensors."""
    return backend.forced() == "cuda"


@torch.compiler.assume_constant_result
def _serves_half_block(kind: str, dtype: torch.dtype, channels: int, d_state: int, rank: int, d_conv: int) -> bool:
    if dtype not in (torch.bfloat16, torch.float16):
        return False
    kernels = backend.choose("bimamba", torch.device(kind), dtype, d_state=d_state, d_conv=d_conv)
    return hasattr(kernels, "serves_block") and kernels.serves_block(dtype, channels, d_state, rank, d_conv)


def _under_cpu_autocast(inputs: tuple, forward: DirectionParameters, backward: DirectionParameters) -> bool:
    """Whether autocast is on, on a CPU, for what it casts: parameters in float32, hidden in that or 16 bits."""
    hidden, *weights = inputs
    if hidden.device.type != "cpu" or not torch.is_autocast_enabled("cpu"):
        return False
    if hidden.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return False
    return all(t is None or t.dtype == torch.float32 for t in (*weights, *forward, *backward))


def _runs_as_block(inputs: tuple, forward: DirectionParameters, backward: DirectionParameters) -> bool:
    hidden = inputs[0]
    if hidden.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if any(t is not None and t.dtype != torch.float32 for t in (*inputs, *forward, *backward)):
        return False
    return _serves_block(hidden.shape[-1], *forward.A.shape, forward.conv_weight.shape[1])


@torch.compiler.assume_constant_result
def _serves_block(embedding: int, channels: int, d_state: int, d_conv: int) -> bool:
    """Whether the CPU's backend has the block in one, for these widths."""
    kernels = backend.choose("bimamba", torch.device("cpu"), torch.float32, d_state=d_state, d_conv=d_conv)
    return hasattr(kernels, "block_unsupported") and kernels.block_unsupported(embedding, channels) is None


def _check_block(hidden: Tensor, in_proj: Tensor, out_proj: Tensor, channels: int) -> None:
    embedding = hidden.shape[-1]
    if hidden.dim() != 3 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be (B, L, E) with L >= 1, not {tuple(hidden.shape)}")
    shapes = {"in_proj": (in_proj, (2 * channels, embedding)), "out_proj": (out_proj, (embedding, channels))}
    for name, (weight, shape) in shapes.items():
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name}'s weight must have shape {shape}, not {tuple(weight.shape)}")
        if weight.device != hidden.device:
            raise ValueError(f"{name}'s weight is on {weight.device}, hidden on {hidden.device}: move it there")
