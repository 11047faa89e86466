"""RMSNorm and LayerNorm of a sum, with the sum kept as the float32 residual stream.

The path of this module is its public name; it imports and runs without Triton, and `backend.py` decides which
code serves a tensor.
"""

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import register_flop_formula

from mamba_ssm.ops import backend, reference
from mamba_ssm.ops.checks import check_kinds, check_tensors


@torch.library.custom_op("mamba_ssm::add_norm", mutates_args=())
def _add_norm(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    bias: Tensor | None,
    eps: float,
    kind: str,
    residual_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = backend.choose("add_norm", x.device, x.dtype, width=x.shape[1])
    out, total, mean, rstd = kernels.add_norm_forward(x, residual, weight, bias, eps, kind, residual_dtype)
    return out, total, x.new_empty(0, dtype=rstd.dtype) if mean is None else mean, rstd


@_add_norm.register_fake
def _(x, residual, weight, bias, eps, kind, residual_dtype):
    statistics = torch.promote_types(x.dtype, torch.float32)
    rows = x.shape[0]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape, dtype=residual_dtype),
        x.new_empty(rows if kind == "layer" else 0, dtype=statistics),
        x.new_empty(rows, dtype=statistics),
    )


@torch.library.custom_op("mamba_ssm::add_norm_backward", mutates_args=())
def _add_norm_backward(
    dout: Tensor,
    dresidual_out: Tensor | None,
    residual_out: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    kind: str,
    x_dtype: torch.dtype,
    residual_dtype: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = backend.choose("add_norm", dout.device, x_dtype, width=dout.shape[1])
    mean = mean if kind == "layer" else None
    grads = kernels.add_norm_backward(
        dout, dresidual_out, residual_out, weight, bias, mean, rstd, kind, x_dtype, residual_dtype
    )
    return tuple(dout.new_empty(0) if grad is None else grad for grad in grads)


@_add_norm_backward.register_fake
def _(dout, dresidual_out, residual_out, weight, bias, mean, rstd, kind, x_dtype, residual_dtype):
    return (
        dout.new_empty(dout.shape, dtype=x_dtype),
        dout.new_empty(0) if residual_dtype is None else dout.new_empty(dout.shape, dtype=residual_dtype),
        torch.empty_like(weight),
        dout.new_empty(0) if bias is None else torch.empty_like(bias),
    )


backend.differentiable_once(_add_norm_backward)


def _setup_context(ctx, inputs, output):
    x, residual, weight, bias, _, ctx.kind, _ = inputs
    ctx.x_dtype, ctx.residual_dtype = x.dtype, None if residual is None else residual.dtype
    ctx.save_for_backward(output[1], weight, bias, output[2], output[3])
    ctx.set_materialize_grads(False)


def _autograd(ctx, dout, dresidual_out, _, __):
    residual_out, weight, bias, mean, rstd = ctx.saved_tensors
    if dout is None:
        dout = torch.zeros_like(residual_out, dtype=ctx.x_dtype)
    dx, dresidual, dweight, dbias = _add_norm_backward(
        dout.contiguous(),
        None if dresidual_out is None else dresidual_out.contiguous(),
        residual_out, weight, bias, mean, rstd, ctx.kind, ctx.x_dtype, ctx.residual_dtype,
    )  # fmt: skip
    residual_grad = None if ctx.residual_dtype is None else dresidual
    return dx, residual_grad, dweight, None if bias is None else dbias, None, None, None


_add_norm.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.mamba_ssm.add_norm)
def _forward_flops(x_shape, *args, out_shape=None, **kwargs) -> int:
    """Add, square, sum, scale, weight."""
    rows, width = x_shape
    return 5 * rows * width


@register_flop_formula(torch.ops.mamba_ssm.add_norm_backward)
def _backward_flops(dout_shape, *args, out_shape=None, **kwargs) -> int:
    return 2 * _forward_flops(dout_shape)


def _check_norm(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None) -> None:
    check_tensors({"x": x, "weight": weight, "bias": bias, "residual": residual}, optional=("bias", "residual"))
    if x.dim() == 0 or weight.dim() != 1 or x.shape[-1] != weight.shape[0] or x.shape[-1] == 0:
        raise ValueError(f"x {tuple(x.shape)} must end in the width, at least 1, of weight {tuple(weight.shape)}")
    for name, tensor, shape in (("bias", bias, weight.shape), ("residual", residual, x.shape)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {tuple(shape)}, not {tuple(tensor.shape)}")
    check_kinds("the norm", "x", x, {"weight": weight, "bias": bias, "residual": residual})


def _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, kind):
    """Flatten to rows, call the op, restore the shape."""
    _check_norm(x, weight, bias, residual)
    if residual is not None:
        residual_dtype = residual.dtype
    else:
        residual_dtype = torch.promote_types(x.dtype, torch.float32) if residual_in_fp32 else x.dtype
    if backend.differentiated_beyond_autograd():
        out, total, _, _ = reference.add_norm(x, residual, weight, bias, eps, kind)
        return (out, total.to(residual_dtype)) if prenorm else out
    rows = x.reshape(-1, x.shape[-1]).contiguous()  # (M, E)
    residual_rows = None if residual is None else residual.reshape(rows.shape).contiguous()
    # Backward reads the sum beside its statistics: a rounded one would not be theirs.
    wide = residual_dtype if residual is None else torch.promote_types(residual_dtype, torch.float32)
    out, total, _, _ = _add_norm(rows, residual_rows, weight, bias, eps, kind, wide)
    return (out.view(x.shape), total.to(residual_dtype).view(x.shape)) if prenorm else out.view(x.shape)


def layer_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    is_rms_norm: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """LayerNorm (arXiv 1607.06450), or RMSNorm (arXiv 1910.07467), of x + residual over the last axis.

        out = (s - mean(s) [LayerNorm only]) rstd(s) weight + bias,    s = x + residual

    Args:
        x, residual: (..., E), float32, bfloat16, float16 or float64, each its own. weight, bias: (E,), floating point.
        prenorm: also return the sum, the residual stream of a pre-norm network; in residual's dtype, or, without
            a residual, in float32 if `residual_in_fp32` and in x's dtype otherwise.

    Returns out with x's shape and dtype, or (out, sum). Statistics are float32 at least. Backward reads the sum: as
    with the published function, it is not to be changed in place.

    Raises TypeError for what is no tensor, ValueError for shapes, dtypes or devices that do not fit,
    NotImplementedError for what a backend that MAMBA_SSM_BACKEND forces does not serve.
    """
    kind = "rms" if is_rms_norm else "layer"
    return _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, kind)


def rms_norm_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    prenorm: bool = False,
    residual_in_fp32: bool = False,
    eps: float = 1e-6,
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467, eq. 4) of x + residual: `layer_norm_fn` with `is_rms_norm`, dtypes and errors too."""
    return _norm(x, weight, bias, residual, eps, prenorm, residual_in_fp32, "rms")


def _reference_norm(x, weight, bias, residual, eps, prenorm, upcast, kind):
    _check_norm(x, weight, bias, residual)
    out, total, _, _ = reference.add_norm(x, residual, weight, bias, eps, kind)
    if not upcast:
        total = total.to(x.dtype)
    if total is x:
        total = total.clone()  # the caller may change it in place
    return (out, total) if prenorm else out


def layer_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`layer_norm_fn` in plain torch operations, for comparison. `upcast` keeps the sum in float32."""
    return _reference_norm(x, weight, bias, residual, eps, prenorm, upcast, "layer")


def rms_norm_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor | None = None,
    eps: float = 1e-6,
    prenorm: bool = False,
    upcast: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """`rms_norm_fn` in plain torch operations, for comparison. `upcast` keeps the sum in float32."""
    return _reference_norm(x, weight, bias, residual, eps, prenorm, upcast, "rms")


class RMSNorm(nn.Module):
    """Root-mean-square norm (arXiv 1910.07467) of x, or of x + residual, over a last axis of `hidden_size`."""

    def __init__(self, hidden_size: int, eps: float = 1e-5, device=None, dtype=None):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def forward(
        self, x: Tensor, residual: Tensor | None = None, prenorm: bool = False, residual_in_fp32: bool = False
    ) -> Tensor | tuple[Tensor, Tensor]:
        """x, residual: (..., hidden_size). Returns out, or (out, residual stream) with `prenorm`."""
        return rms_norm_fn(x, self.weight, self.bias, residual, prenorm, residual_in_fp32, self.eps)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}"
