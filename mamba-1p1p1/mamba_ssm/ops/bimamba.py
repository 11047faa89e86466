"""The fused bidirectional mixer as one registered op: everything between a block's two projections.

Channels-last, (B, L, D): the layout the projections produce and consume. The second direction is an anti-causal
convolution and a scan from the last token to the first, so that nothing is flipped or transposed.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ssm.ops import backend, bimamba_ops, reference
from mamba_ssm.ops.bimamba_ops import DirectionParameters
from mamba_ssm.ops.selective_scan_interface import needs_grad

DECAYS = ("A", "log")


def _check(xz: Tensor, forward: DirectionParameters, backward: DirectionParameters) -> None:
    _check_parameters("xz", xz, forward, backward)
    channels = forward.A.shape[0]
    if xz.dim() != 3 or xz.shape[1] == 0 or xz.shape[2] != 2 * channels:
        raise ValueError(
            f"xz must be (B, L, 2 D) with L >= 1 and D = {channels} as the parameters, not {tuple(xz.shape)}"
        )


FIELDS = DirectionParameters._fields
KIND = "the mixer takes floating-point tensors"
MATRICES = {"conv_weight": "(D, W)", "x_proj_weight": "(R + 2 N, D)", "dt_weight": "(D, R)", "A": "(D, N)"}


def _check_parameters(name: str, x: Tensor, forward: DirectionParameters, backward: DirectionParameters) -> None:
    """The parameters' shapes, and that they and x, the argument of that name, are floating point on one device.

    Every forward pass of every block asks: what is right passes without a word being made up.
    """
    sides = (("forward", forward), ("backward", backward))
    for direction, parameters in sides:
        for field, tensor in zip(FIELDS, parameters):
            if tensor is None and field != "conv_bias":
                raise ValueError(f"{direction} {field} is None: only conv_bias may be")
    for field, form in MATRICES.items():
        if getattr(forward, field).dim() != 2:
            raise ValueError(f"forward {field} must be {form}, not {tuple(getattr(forward, field).shape)}")
    if (forward.conv_bias is None) != (backward.conv_bias is None):
        raise ValueError("conv_bias is given for one direction only: give it for both, or for neither")
    (channels, d_state), rank, width = forward.A.shape, forward.dt_weight.shape[1], forward.conv_weight.shape[1]
    shapes = (
        (channels, width), (channels,), (rank + 2 * d_state, channels),
        (channels, rank), (channels,), (channels, d_state), (channels,),
    )  # fmt: skip
    if not x.is_floating_point():
        raise ValueError(f"{name} has dtype {x.dtype}: {KIND}")
    for direction, parameters in sides:
        for field, tensor, shape in zip(FIELDS, parameters, shapes):
            if tensor is None:
                continue
            if tensor.shape != shape:
                raise ValueError(f"{direction} {field} must have shape {shape}, not {tuple(tensor.shape)}")
            if not tensor.is_floating_point():
                raise ValueError(f"{direction} {field} has dtype {tensor.dtype}: {KIND}")
            if tensor.device != x.device:
                raise ValueError(f"{direction} {field} is on {tensor.device}, {name} on {x.device}: move it there")


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
    return bimamba_ops.mixer(xz, *forward, *backward, scale, save)[0]


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
            return bimamba_ops.half_block(*inputs, *forward, *backward, scale, decay)
    forward, backward = with_A(forward, backward, decay)
    if transformed:
        return _in_a_row(inputs, forward, backward, scale)
    if not _under_cpu_autocast(inputs, forward, backward):
        return _block(inputs, forward, backward, scale, bf16_products=False)
    bf16_products = torch.get_autocast_dtype("cpu") == torch.bfloat16
    with torch.autocast("cpu", enabled=False):
        return _block((hidden.float(), *inputs[1:]), forward, backward, scale, bf16_products)


def _block(
    inputs: tuple, forward: DirectionParameters, backward: DirectionParameters, scale: float, bf16_products: bool
) -> Tensor:
    if not _runs_as_block(inputs, forward, backward):
        return _in_a_row(inputs, forward, backward, scale)
    save = needs_grad(*inputs, *forward, *backward)
    return bimamba_ops.block(*inputs, *forward, *backward, scale, bf16_products, save)[0]


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
    """Whether the backend has the block in one in 16 bits."""
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
    hidden, in_proj, _ = inputs
    if hidden.device.type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    if any(t is not None and t.dtype != torch.float32 for t in (*inputs, *forward, *backward)):
        return False
    # Of weights, whose sizes are known when a module is compiled for sizes of hidden that are not.
    return _serves_block(in_proj.shape[1], *forward.A.shape, forward.conv_weight.shape[1])


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
        autocast = backend.has_autocast(kind) and torch.is_autocast_enabled(kind)
        cast = autocast or hidden.dtype.itemsize == 2
        if weight.dtype != hidden.dtype and not cast:
            raise ValueError(f"{name}'s weight is {weight.dtype}, hidden {hidden.dtype}: cast one of them")
