"""The fused bidirectional mixer as one registered op: everything between a block's two projections.

Channels-last, (B, L, D): the layout the projections produce and consume. The second direction is an anti-causal
convolution and a scan from the last token to the first, so that nothing is flipped or transposed.
"""

import math
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
    conv_bias: Tensor | None  # (D,), for both directions or for neither
    x_proj_weight: Tensor  # (R + 2 N, D): time step, B, C in that order
    dt_weight: Tensor  # (D, R)
    dt_bias: Tensor  # (D,)
    A: Tensor  # (D, N), negative
    D: Tensor  # (D,)


COUNT = len(DirectionParameters._fields)
DECAYS = ("A", "log")
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


def _saved_bytes(kernels, x: Tensor, direction: DirectionParameters) -> int:
    """x: (B, L, any width) of the activations' dtype."""
    rank, d_conv = direction.dt_weight.shape[1], direction.conv_weight.shape[1]
    return kernels.bimamba_saved_bytes(x.shape[0], x.shape[1], *direction.A.shape, rank, d_conv, x.dtype)


@torch.library.custom_op(
    "mamba_ssm::bimamba",
    mutates_args=(),
    schema=f"(Tensor xz, {_BOTH}, float scale, bool save) -> {_tensors(2)}",
)
def _bimamba(xz, *rest):
    (forward, backward), (scale, save) = _directions(rest), rest[2 * COUNT :]
    with torch.autocast(xz.device.type, enabled=False):
        return _kernels(xz, forward).bimamba_forward(xz, forward, backward, scale, save)


@_bimamba.register_fake
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
def _bimamba_backward(dy, xz, *rest):
    (forward, backward), (saved, scale) = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(xz, forward)
    check_saved(saved, _saved_bytes(kernels, xz, forward))
    with torch.autocast(xz.device.type, enabled=False):
        dxz, *grads = kernels.bimamba_backward(dy, xz, forward, backward, scale, saved)
    return _op_results(xz, (dxz, *grads[0], *grads[1]))


@_bimamba_backward.register_fake
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
    grads = _bimamba_backward(dy, *inputs, saved, ctx.scale)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None, None


_bimamba.register_autograd(_autograd, setup_context=_setup_context)


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


# ---- with its projections, on a CPU in float32 -----------------------------------------------------------------


_PROJECTED = f"Tensor hidden, Tensor in_proj, Tensor out_proj, {_BOTH}"


@torch.library.custom_op(
    "mamba_ssm::bimamba_block",
    mutates_args=(),
    schema=f"({_PROJECTED}, float scale, bool bf16_products, bool save) -> {_tensors(3)}",
)
def _bimamba_block(hidden, in_proj, out_proj, *rest):
    (forward, backward), (scale, bf16_products, save) = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(hidden, forward)
    return kernels.block_forward(hidden, in_proj, out_proj, forward, backward, scale, save, bf16_products)


@_bimamba_block.register_fake
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
def _bimamba_block_backward(dout, hidden, in_proj, out_proj, *rest):
    (forward, backward), (xz, saved, scale, bf16_products) = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(hidden, forward)
    check_saved(saved, _saved_bytes(kernels, hidden, forward))
    with torch.autocast(hidden.device.type, enabled=False):
        *projections, forward_grads, backward_grads = kernels.block_backward(
            dout, hidden, in_proj, out_proj, forward, backward, scale, xz, saved, bf16_products
        )
    return _op_results(hidden, (*projections, *forward_grads, *backward_grads))


@_bimamba_block_backward.register_fake
def _(dout, *inputs):
    return _fake_gradients(dout, inputs[: 3 + 2 * COUNT])


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


# ---- with its projections, on an NVIDIA GPU in 16 bits: hidden alone is kept -----------------------------------


@torch.library.custom_op(
    "mamba_ssm::bimamba_half_block",
    mutates_args=(),
    schema=f"({_PROJECTED}, float scale, str decay) -> Tensor",
)
def _bimamba_half_block(hidden, in_proj, out_proj, *rest):
    (forward, backward), (scale, decay) = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(hidden, forward)
    return kernels.half_block_forward(hidden, in_proj, out_proj, forward, backward, scale, decay)


@_bimamba_half_block.register_fake
def _(hidden, *rest):
    return torch.empty_like(hidden, memory_format=torch.contiguous_format)


@torch.library.custom_op(
    "mamba_ssm::bimamba_half_block_backward",
    mutates_args=(),
    schema=f"(Tensor dout, {_PROJECTED}, float scale, str decay) -> {_tensors(3 + 2 * COUNT)}",
)
def _bimamba_half_block_backward(dout, hidden, in_proj, out_proj, *rest):
    (forward, backward), (scale, decay) = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(hidden, forward)
    with torch.autocast(hidden.device.type, enabled=False):
        *projections, forward_grads, backward_grads = kernels.half_block_backward(
            dout, hidden, in_proj, out_proj, forward, backward, scale, decay
        )
    return _op_results(hidden, (*projections, *forward_grads, *backward_grads))


@_bimamba_half_block_backward.register_fake
def _(dout, *inputs):
    return _fake_gradients(dout, inputs[: 3 + 2 * COUNT])


def _setup_half_block_context(ctx, inputs, output):
    *tensors, ctx.scale, ctx.decay = inputs
    ctx.save_for_backward(*tensors)


def _half_block_autograd(ctx, dout):
    inputs = ctx.saved_tensors
    grads = _bimamba_half_block_backward(dout, *inputs, ctx.scale, ctx.decay)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None, None


_bimamba_half_block.register_autograd(_half_block_autograd, setup_context=_setup_half_block_context)
register_flop_formula(torch.ops.mamba_ssm.bimamba_half_block)(_block_flops)
register_flop_formula(torch.ops.mamba_ssm.bimamba_half_block_backward)(_block_backward_flops)


# ---- and with the norm before it: the residual stream alone is kept --------------------------------------------

_NORMED = f"Tensor norm_weight, Tensor in_proj, Tensor out_proj, {_BOTH}, float eps, float scale, str decay"
NORMED = 3 + 2 * COUNT  # tensors of it


@torch.library.custom_op(
    "mamba_ssm::norm_bimamba_half_block",
    mutates_args=(),
    schema=f"(Tensor x, Tensor residual, {_NORMED}) -> {_tensors(2)}",
)
def _norm_bimamba_half_block(x, residual, norm_weight, in_proj, out_proj, *rest):
    directions, options = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(x, directions[0])
    return kernels.norm_half_block_forward(x, residual, norm_weight, in_proj, out_proj, *directions, *options)


@_norm_bimamba_half_block.register_fake
def _(x, residual, *rest):
    return tuple(torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in (x, residual))


@torch.library.custom_op(
    "mamba_ssm::norm_bimamba_half_block_backward",
    mutates_args=(),
    schema=f"(Tensor dout, Tensor? dtotal, Tensor total, {_NORMED}) -> {_tensors(2 + NORMED)}",
)
def _norm_bimamba_half_block_backward(dout, dtotal, total, norm_weight, in_proj, out_proj, *rest):
    directions, options = _directions(rest), rest[2 * COUNT :]
    kernels = _kernels(dout, directions[0])
    with torch.autocast(dout.device.type, enabled=False):
        *others, forward_grads, backward_grads = kernels.norm_half_block_backward(
            dout, dtotal, total, norm_weight, in_proj, out_proj, *directions, *options
        )
    return _op_results(dout, (*others, *forward_grads, *backward_grads))


@_norm_bimamba_half_block_backward.register_fake
def _(dout, dtotal, total, *rest):
    return _fake_gradients(dout, (dout, total, *rest[:NORMED]))


def _setup_norm_block_context(ctx, inputs, output):
    *tensors, ctx.eps, ctx.scale, ctx.decay = inputs
    ctx.x_dtype = tensors[0].dtype
    ctx.save_for_backward(output[1], *tensors[2:])
    ctx.set_materialize_grads(False)


def _norm_block_autograd(ctx, dout, dtotal):
    total, *parameters = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(total, dtype=ctx.x_dtype)
    grads = _norm_bimamba_half_block_backward(dout, dtotal, total, *parameters, ctx.eps, ctx.scale, ctx.decay)
    return *(None if t is None else grad for t, grad in zip((dout, total, *parameters), grads)), None, None, None


_norm_bimamba_half_block.register_autograd(_norm_block_autograd, setup_context=_setup_norm_block_context)


@register_flop_formula(torch.ops.mamba_ssm.norm_bimamba_half_block)
def _norm_block_flops(x_shape, residual_shape, norm_shape, *args, out_shape=None, **kwargs) -> int:
    """And of add, square, sum, scale, weight."""
    return 5 * math.prod(x_shape) + _block_flops(x_shape, *args)


@register_flop_formula(torch.ops.mamba_ssm.norm_bimamba_half_block_backward)
def _norm_block_backward_flops(dout_shape, dtotal_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _norm_block_flops(dout_shape, *args)


def _check(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters) -> None:
    _check_parameters("xz", xz, forward, backward)
    channels = forward.A.shape[0]
    if xz.dim() != 3 or xz.shape[1] == 0 or xz.shape[2] != 2 * channels:
        raise ValueError(
            f"xz must be (B, L, 2 D) with L >= 1 and D = {channels} as the parameters, not {tuple(xz.shape)}"
        )


MATRICES = {"conv_weight": "(D, W)", "x_proj_weight": "(R + 2 N, D)", "dt_weight": "(D, R)", "A": "(D, N)"}


def _check_parameters(name: str, x: Tensor, forward: DirectionParameters, backward: DirectionParameters) -> None:
    """The parameters' shapes, and that they and x, the argument of that name, are floating point on one device."""
    sides = (("forward", forward), ("backward", backward))
    for direction, parameters in sides:
        for field, tensor in parameters._asdict().items():
            if tensor is None and field != "conv_bias":
                raise ValueError(f"{direction} {field} is None: only conv_bias may be")
    for field, form in MATRICES.items():
        shape = tuple(getattr(forward, field).shape)
        if len(shape) != 2:
            raise ValueError(f"forward {field} must be {form}, not {shape}")
    if (forward.conv_bias is None) != (backward.conv_bias is None):
        raise ValueError("conv_bias is given for one direction only: give it for both, or for neither")
    (channels, d_state), rank, width = forward.A.shape, forward.dt_weight.shape[1], forward.conv_weight.shape[1]
    shapes = DirectionParameters(
        (channels, width), (channels,), (rank + 2 * d_state, channels),
        (channels, rank), (channels,), (channels, d_state), (channels,),
    )  # fmt: skip
    given = {name: x}
    for direction, parameters in sides:
        for field, tensor, shape in zip(DirectionParameters._fields, parameters, shapes):
            if tensor is None:
                continue
            given[f"{direction} {field}"] = tensor
            if tuple(tensor.shape) != shape:
                raise ValueError(f"{direction} {field} must have shape {shape}, not {tuple(tensor.shape)}")
    for what, tensor in given.items():
        if not tensor.is_floating_point():
            raise ValueError(f"{what} has dtype {tensor.dtype}: the mixer takes floating-point tensors")
        if tensor.device != x.device:
            raise ValueError(f"{what} is on {tensor.device}, {name} on {x.device}: move it there")


def bimamba(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters, scale: float = 0.5) -> Tensor:
    """The bidirectional mixer ("v2") between its projections (Vision Mamba, arXiv 2401.09417, algorithm 1).

    Args:
        xz: (B, L, 2 D), x in the first half of the last axis and the gate z in the second; float32, bfloat16,
            float16 or float64, while the parameters usually stay float32.
        forward, backward: the parameters of each direction.
        scale: 0.5 halves the sum of both directions as the published models do, 1.0 does not.

    Returns (B, L, D) in xz's dtype; state, time step, A and D are float32 at least.

    Raises ValueError for shapes, dtypes or devices that do not fit, NotImplementedError for what a backend that
    MAMBA_SSM_BACKEND forces does not serve.
    """
    _check(xz, forward, backward)
    return _mixer(xz, forward, backward, scale)


def _mixer(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters, scale: float) -> Tensor:
    """`bimamba` of checked arguments."""
    if backend.differentiated_beyond_autograd():
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
    decay: str = "A",
) -> Tensor:
    """`bimamba` with its two projections, without bias: out_proj(bimamba(in_proj(hidden))).

    On a CPU in float32 a tile of tokens passes through all of it while it is in the cache. CPU autocast of float32
    weights keeps to this path: where the processor multiplies bfloat16 faster, the operands of in_proj and of
    backward's products are rounded to it, and everything else is float32, the result included. On an NVIDIA GPU with
    16-bit activations, by autocast or not, backward keeps `hidden` alone and recomputes the rest. Elsewhere it
    is the three of them in a row.

    Args:
        hidden: (B, L, E), floating point. in_proj_weight: (2 D, E), x before z. out_proj_weight: (E, D), both of
            hidden's dtype or of another where hidden has 16 bits or autocast casts.
        forward, backward, scale: as of `bimamba`.
        decay: what A of both directions holds, "A", or "log": log(-A), of which a GPU makes A with its other weights.

    Returns (B, L, E) in hidden's dtype; under autocast in float32 on a CPU and in autocast's dtype elsewhere, but
    float64 stays float64. Raises as `bimamba` does.
    """
    inputs = (hidden, in_proj_weight, out_proj_weight)
    _check_block(*inputs, forward, backward, decay)
    transformed = backend.differentiated_beyond_autograd()
    half = None if transformed else _half_block_dtype(hidden, forward)
    if half is not None:
        with torch.autocast(hidden.device.type, enabled=False):
            inputs = (hidden.to(half), *inputs[1:])
            return _bimamba_half_block(*inputs, *forward, *backward, scale, decay)
    forward, backward = with_A(forward, backward, decay)
    if transformed:
        return _in_a_row(inputs, forward, backward, scale)
    if not _under_cpu_autocast(inputs, forward, backward):
        return _block(inputs, forward, backward, scale, bf16_products=False)
    bf16_products = torch.get_autocast_dtype("cpu") == torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        return _block((hidden.float(), *inputs[1:]), forward, backward, scale, bf16_products)


def takes_norm(x: Tensor, residual: Tensor, forward: DirectionParameters) -> bool:
    """Whether `norm_bimamba_block` runs here: on an NVIDIA GPU in 16 bits, x being in them, the residual stream in
    float32, at the widths that the kernel has registers for.
    """
    if backend.differentiated_beyond_autograd():
        return False
    half = _half_block_dtype(x, forward)
    return half == x.dtype and residual.dtype == torch.float32 and _serves_norm(x.device.type, half, x.shape[-1])


def norm_bimamba_block(
    x: Tensor,
    residual: Tensor,
    norm_weight: Tensor,
    in_proj_weight: Tensor,
    out_proj_weight: Tensor,
    forward: DirectionParameters,
    backward: DirectionParameters,
    eps: float = 1e-5,
    scale: float = 0.5,
    decay: str = "A",
) -> tuple[Tensor, Tensor]:
    """`bimamba_block` of the RMSNorm (arXiv 1910.07467, eq. 4) of x + residual, where `takes_norm`: norm and in_proj
    are one pass over the residual stream. Backward keeps x + residual alone.

    Args:
        x, residual: (B, L, E), in 16 bits and in float32. norm_weight: (E,), of the norm, with its `eps`.
        in_proj_weight, out_proj_weight, forward, backward, scale, decay: as of `bimamba_block`.

    Returns (out, x + residual), in the dtypes of x and residual. Raises ValueError for what does not fit.
    """
    for name, tensor, shape in (("residual", residual, x.shape), ("norm_weight", norm_weight, x.shape[-1:])):
        if tensor.shape != shape or tensor.device != x.device:
            given = f"{tuple(tensor.shape)} on {tensor.device}"
            raise ValueError(f"{name} must be {tuple(shape)} on {x.device}, not {given}")
    _check_block(x, in_proj_weight, out_proj_weight, forward, backward, decay)
    inputs = (x, residual, norm_weight, in_proj_weight, out_proj_weight, *forward, *backward)
    with torch.autocast(x.device.type, enabled=False):
        return _norm_bimamba_half_block(*inputs, eps, scale, decay)


def _block(
    inputs: tuple, forward: DirectionParameters, backward: DirectionParameters, scale: float, bf16_products: bool
) -> Tensor:
    if not _runs_as_block(inputs, forward, backward):
        return _in_a_row(inputs, forward, backward, scale)
    save = needs_grad(*inputs, *forward, *backward)
    return _bimamba_block(*inputs, *forward, *backward, scale, bf16_products, save)[0]


def negative_exp(A_log: Tensor) -> Tensor:
    """A = -exp(A_log), float32 at least."""
    return -torch.exp(_at_least_float32(A_log))


def negative_exps(A_logs: list[Tensor]) -> list[Tensor]:
    """`negative_exp` of several. On a GPU two launches serve all; a compiler fuses them by itself."""
    if A_logs[0].is_cuda and not torch.compiler.is_compiling():
        return _negative_exps_together(A_logs)
    return [negative_exp(A_log) for A_log in A_logs]


def _negative_exps_together(A_logs: list[Tensor]) -> list[Tensor]:
    return torch._foreach_neg(torch._foreach_exp([_at_least_float32(A_log) for A_log in A_logs]))


def with_A(forward: DirectionParameters, backward: DirectionParameters, decay: str) -> list[DirectionParameters]:
    """Both with A, where they hold what `decay` says."""
    if decay == "A":
        return [forward, backward]
    As = negative_exps([forward.A, backward.A])
    return [direction._replace(A=A) for direction, A in zip((forward, backward), As)]


def _at_least_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _in_a_row(inputs: tuple, forward: DirectionParameters, backward: DirectionParameters, scale: float) -> Tensor:
    hidden, in_proj, out_proj = inputs
    y = _mixer(F.linear(hidden, in_proj.to(hidden.dtype)), forward, backward, scale)
    return F.linear(y, out_proj.to(y.dtype))


def _half_block_dtype(hidden: Tensor, forward: DirectionParameters) -> torch.dtype | None:
    """The 16-bit dtype in which a GPU's block runs, by autocast or by `hidden` itself; None where it does not."""
    kind = hidden.device.type
    if kind != "cuda" and not (kind == "cpu" and _emulates_cuda()):
        return None
    if hidden.dtype == torch.float64:  # which autocast leaves alone
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


@torch.compiler.assume_constant_result
def _serves_norm(kind: str, dtype: torch.dtype, width: int) -> bool:
    """Of sizes that `_serves_half_block`."""
    return backend.choose("bimamba", torch.device(kind), dtype).serves_norm(width)


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


def _check_block(
    hidden: Tensor,
    in_proj: Tensor,
    out_proj: Tensor,
    forward: DirectionParameters,
    backward: DirectionParameters,
    decay: str,
) -> None:
    if decay not in DECAYS:
        raise ValueError(f"decay={decay!r} is unknown: use one of {', '.join(map(repr, DECAYS))}")
    _check_parameters("hidden", hidden, forward, backward)
    if hidden.dim() != 3 or hidden.shape[1] == 0:
        raise ValueError(f"hidden must be (B, L, E) with L >= 1, not {tuple(hidden.shape)}")
    channels, embedding = forward.A.shape[0], hidden.shape[-1]
    shapes = {"in_proj": (in_proj, (2 * channels, embedding)), "out_proj": (out_proj, (embedding, channels))}
    for name, (weight, shape) in shapes.items():
        if tuple(weight.shape) != shape:
            raise ValueError(f"{name}'s weight must have shape {shape}, not {tuple(weight.shape)}")
        if weight.device != hidden.device:
            raise ValueError(f"{name}'s weight is on {weight.device}, hidden on {hidden.device}: move it there")
        kind = hidden.device.type
        autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
        cast = autocast or hidden.dtype.itemsize == 2
        if weight.dtype != hidden.dtype and not cast:
            raise ValueError(f"{name}'s weight is {weight.dtype}, hidden {hidden.dtype}: cast one of them")
