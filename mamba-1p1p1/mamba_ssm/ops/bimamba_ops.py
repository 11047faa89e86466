"""The bidirectional mixer's operations as torch knows them: schema, shapes, derivative, cost.

`bimamba.py` checks what they get and chooses among them. Tensors are channels-last, (B, L, D).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from mamba_ssm.ops import backend
from mamba_ssm.ops.selective_scan_interface import check_saved, scan_flops


class DirectionParameters(NamedTuple):
    """What one direction owns. D inner channels, W convolution width, R time-step rank, N states."""

    conv_weight: Tensor  # (D, W)
    conv_bias: Tensor | None  # (D,), for both directions or for neither
    x_proj_weight: Tensor  # (R + 2 N, D): time step, B, C in that order
    dt_weight: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N), negative
    D: Tensor  # (D,)


COUNT = len(DirectionParameters._fields)
_ONE = (
    "Tensor conv_weight{0}, Tensor? conv_bias{0}, Tensor x_proj_weight{0}, Tensor dt_weight{0}, Tensor dt_bias{0}, "
    "Tensor A{0}, Tensor D{0}"
)
_BOTH = f"{_ONE.format('')}, {_ONE.format('_b')}"  # the parameters of both directions in the ops' schemas


def _directions(parameters) -> tuple[DirectionParameters, DirectionParameters]:
    """The first 2 COUNT of an op's arguments as the parameters of both directions."""
    return DirectionParameters(*parameters[:COUNT]), DirectionParameters(*parameters[COUNT : 2 * COUNT])


def _tensors(count: int) -> str:
    return f"({', '.join(['Tensor'] * count)})"


def _kernels(x: Tensor, direction: DirectionParameters):
    d_state, d_conv = direction.A.shape[1], direction.conv_weight.shape[1]
    return backend.choose("bimamba", x.device, x.dtype, d_state=d_state, d_conv=d_conv)


def _half_block_kernels(x: Tensor, direction: DirectionParameters):
    kernels = _kernels(x, direction)
    if not hasattr(kernels, "half_block_forward"):
        raise RuntimeError(
            f"this graph was made for an NVIDIA GPU in 16 bits and cannot run on {x.device} by {kernels.__name__}: "
            "compile or export the model again where it is to run"
        )
    return kernels


def _saved_bytes(kernels, x: Tensor, direction: DirectionParameters) -> int:
    """x: (B, L, any width) of the activations' dtype."""
    rank, d_conv = direction.dt_weight.shape[1], direction.conv_weight.shape[1]
    return kernels.bimamba_saved_bytes(x.shape[0], x.shape[1], *direction.A.shape, rank, d_conv, x.dtype)


@torch.library.custom_op(
    "mamba_ssm::bimamba",
    mutates_args=(),
    schema=f"(Tensor xz, {_BOTH}, float scale, bool save) -> {_tensors(2)}",
)
def mixer(xz, *rest):
    (forward, backward), (scale, save) = _directions(rest), rest[2 * COUNT :]
    with torch.autocast(xz.device.type, enabled=False):
        return _kernels(xz, forward).bimamba_forward(xz, forward, backward, scale, save)


@mixer.register_fake
def _(xz, *rest):
    forward, save = _directions(rest)[0], rest[-1]
    batch, length, double = xz.shape
    size = _saved_bytes(_kernels(xz, forward), xz, forward) if save else 0
    return xz.new_empty(batch, length, double // 2), xz.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op(
    "mamba_ssm::bimamba_backward",
    mutates_args=(),
    schema=f"(Tensor dy, Tensor xz, {_BOTH}, Tensor saved, float scale) -> {_tensors(1 + 2 * COUNT)}",
)
def mixer_backward(dy, xz, *rest):
    (forward, backward), (saved, scale) = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(xz, forward)
    check_saved(saved, _saved_bytes(kernels, xz, forward))
    with torch.autocast(xz.device.type, enabled=False):
        dxz, *grads = kernels.bimamba_backward(dy, xz, forward, backward, scale, saved)
    return _op_results(xz, (dxz, *grads[0], *grads[1]))


@mixer_backward.register_fake
def _(dy, xz, *rest):
    return _fake_gradients(xz, (xz, *rest[: 2 * COUNT]))


def _op_results(like: Tensor, grads: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    """An op returns tensors only, of a known layout: an input that was None has an empty gradient."""
    return tuple(like.new_empty(0) if grad is None else grad.contiguous() for grad in grads)


def _fake_gradients(like: Tensor, inputs: tuple[Tensor | None, ...]) -> tuple[Tensor, ...]:
    return tuple(like.new_empty(0) if t is None else t.new_empty(t.shape) for t in inputs)


def _setup_context(ctx, inputs, output):
    *tensors, ctx.scale, _ = inputs
    ctx.save_for_backward(*tensors, output[1])


def _autograd(ctx, dy, _):
    *inputs, saved = ctx.saved_tensors
    grads = mixer_backward(dy, *inputs, saved, ctx.scale)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None, None


mixer.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.mamba_ssm.bimamba)
def _forward_flops(xz_shape, *args, out_shape=None, **kwargs) -> int:
    """Both directions: convolution, both small projections, scan."""
    batch, length, _ = xz_shape
    (channels, width), _, x_proj_shape, dt_shape, _, A_shape, _ = args[:COUNT]
    per_token = 2 * channels * width + 2 * channels * x_proj_shape[0] + 2 * channels * dt_shape[1]
    return 2 * (batch * length * per_token + scan_flops(batch, channels, length, A_shape[1]))


@register_flop_formula(torch.ops.mamba_ssm.bimamba_backward)
def _backward_flops(dy_shape, xz_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _forward_flops(xz_shape, *args)


# --- with its projections, on a CPU in float32


_PROJECTED = f"Tensor hidden, Tensor in_proj, Tensor out_proj, {_BOTH}"


@torch.library.custom_op(
    "mamba_ssm::bimamba_block",
    mutates_args=(),
    schema=f"({_PROJECTED}, float scale, bool bf16_products, bool save) -> {_tensors(3)}",
)
def block(hidden, in_proj, out_proj, *rest):
    (forward, backward), (scale, bf16_products, save) = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(hidden, forward)
    if hasattr(kernels, "block_forward"):
        return kernels.block_forward(hidden, in_proj, out_proj, forward, backward, scale, save, bf16_products)
    # A graph that was exported or compiled with the CPU kernels and runs where they are not. `bf16_products` allows
    # 16 bits, it asks for none.
    with torch.autocast(hidden.device.type, enabled=False):
        xz = F.linear(hidden, in_proj)
        y, saved = kernels.bimamba_forward(xz, forward, backward, scale, save)
        return F.linear(y, out_proj), xz if save else hidden.new_empty(0), saved


@block.register_fake
def _(hidden, in_proj, out_proj, *rest):
    out = torch.empty_like(hidden, memory_format=torch.contiguous_format)
    if not rest[-1]:
        return out, hidden.new_empty(0), hidden.new_empty(0, dtype=torch.uint8)
    forward = _directions(rest)[0]
    size = _saved_bytes(_kernels(hidden, forward), hidden, forward)
    return out, hidden.new_empty(*hidden.shape[:2], in_proj.shape[0]), hidden.new_empty(size, dtype=torch.uint8)


@torch.library.custom_op(
    "mamba_ssm::bimamba_block_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {_PROJECTED}, Tensor xz, Tensor saved, float scale, bool bf16_products) -> "
    f"{_tensors(3 + 2 * COUNT)}",
)
def block_backward(dout, hidden, in_proj, out_proj, *rest):
    (forward, backward), (xz, saved, scale, bf16_products) = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(hidden, forward)
    check_saved(saved, _saved_bytes(kernels, hidden, forward))
    with torch.autocast(hidden.device.type, enabled=False):
        if hasattr(kernels, "block_backward"):
            *projections, forward_grads, backward_grads = kernels.block_backward(
                dout, hidden, in_proj, out_proj, forward, backward, scale, xz, saved, bf16_products
            )
        else:
            y, _ = kernels.bimamba_forward(xz, forward, backward, scale, False)
            dxz, forward_grads, backward_grads = kernels.bimamba_backward(
                dout @ out_proj, xz, forward, backward, scale, saved
            )
            projections = dxz @ in_proj, _weight_gradient(dxz, hidden), _weight_gradient(dout, y)
    return _op_results(hidden, (*projections, *forward_grads, *backward_grads))


def _weight_gradient(dout: Tensor, x: Tensor) -> Tensor:
    """Gradient (F, E) of the weight of a projection x (B, L, E) -> (B, L, F), for dout (B, L, F)."""
    return dout.flatten(0, 1).T @ x.flatten(0, 1)


@block_backward.register_fake
def _(dout, *inputs):
    return _fake_gradients(dout, inputs[: 3 + 2 * COUNT])


def _setup_block_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.bf16_products, _ = inputs
    ctx.save_for_backward(*tensors, *output[1:])
    ctx.set_materialize_grads(False)


def _block_autograd(ctx, dout, *_):
    *inputs, xz, saved = ctx.saved_tensors
    grads = block_backward(dout, *inputs, xz, saved, ctx.scale, ctx.bf16_products)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None, None, None


block.register_autograd(_block_autograd, setup_context=_setup_block_context)


@register_flop_formula(torch.ops.mamba_ssm.bimamba_block)
def _block_flops(hidden_shape, in_shape, out_proj_shape, *parameters, out_shape=None, **kwargs) -> int:
    batch, length, embedding = hidden_shape
    projections = 2 * batch * length * embedding * (in_shape[0] + out_proj_shape[1])
    return projections + _forward_flops((batch, length, in_shape[0]), *parameters)


@register_flop_formula(torch.ops.mamba_ssm.bimamba_block_backward)
def _block_backward_flops(dout_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _block_flops(*args)


# --- with its projections, on an NVIDIA GPU in 16 bits: hidden alone is kept


@torch.library.custom_op(
    "mamba_ssm::bimamba_half_block",
    mutates_args=(),
    schema=f"({_PROJECTED}, float scale, str decay) -> Tensor",
)
def half_block(hidden, in_proj, out_proj, *rest):
    (forward, backward), (scale, decay) = _directions(rest), rest[2 * COUNT :]
    kernels = _half_block_kernels(hidden, forward)
    return kernels.half_block_forward(hidden, in_proj, out_proj, forward, backward, scale, decay)


@half_block.register_fake
def _(hidden, *rest):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "mamba_ssm::bimamba_half_block_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {_PROJECTED}, float scale, str decay) -> {_tensors(3 + 2 * COUNT)}",
)
def half_block_backward(dout, hidden, in_proj, out_proj, *rest):
    (forward, backward), (scale, decay) = _directions(rest), rest[2 * COUNT :]
    kernels = _half_block_kernels(hidden, forward)
    with torch.autocast(hidden.device.type, enabled=False):
        *projections, forward_grads, backward_grads = kernels.half_block_backward(
            dout, hidden, in_proj, out_proj, forward, backward, scale, decay
        )
    return _op_results(hidden, (*projections, *forward_grads, *backward_grads))


@half_block_backward.register_fake
def _(dout, *inputs):
    return _fake_gradients(dout, inputs[: 3 + 2 * COUNT])


def _setup_half_block_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.decay = inputs
    ctx.save_for_backward(*tensors)


def _half_block_autograd(ctx, dout):
    inputs = ctx.saved_tensors
    grads = half_block_backward(dout, *inputs, ctx.scale, ctx.decay)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None, None


half_block.register_autograd(_half_block_autograd, setup_context=_setup_half_block_context)
register_flop_formula(torch.ops.mamba_ssm.bimamba_half_block)(_block_flops)
register_flop_formula(torch.ops.mamba_ssm.bimamba_half_block_backward)(_block_backward_flops)


for _operation in (mixer_backward, block_backward, half_block_backward):
    backend.differentiable_once(_operation)
