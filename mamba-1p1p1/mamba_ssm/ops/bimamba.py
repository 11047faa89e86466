"""The fused bidirectional mixer as one registered op: everything between a block's two projections.

Channels-last, (B, L, D): the layout the projections produce and consume. The second direction is an anti-causal
convolution and a scan from the last token to the first, so that nothing is flipped or transposed.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mamba_ssm.ops import backend
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


def _saved_bytes(kernels, xz: Tensor, conv_weight: Tensor, dt_weight: Tensor, A: Tensor) -> int:
    batch, length, double = xz.shape
    return kernels.bimamba_saved_bytes(
        batch, length, double // 2, A.shape[1], dt_weight.shape[1], conv_weight.shape[1], xz.dtype
    )


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


def _check(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters) -> None:
    if xz.dim() != 3 or xz.shape[1] == 0 or xz.shape[2] != 2 * forward.D.shape[0]:
        raise ValueError(
            f"xz must be (B, L, 2 D) with L >= 1 and D = {forward.D.shape[0]} as the parameters, not {tuple(xz.shape)}"
        )
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
            if tensor is not None and tensor.device != xz.device:
                raise ValueError(f"{direction} {name} is on {tensor.device} and xz on {xz.device}: move them together")


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
    save = needs_grad(xz, *forward, *backward)
    return _bimamba(xz, *forward, *backward, scale, save)[0]
