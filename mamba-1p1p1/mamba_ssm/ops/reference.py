"""The operations in plain torch: obviously right, any dtype, any device. Every backend is tested against them.

Symbols, after Gu & Dao, Mamba (arXiv 2312.00752): B batch, L tokens, D channels, N states a channel, G groups
of channels that share B and C, R rank of the time-step projection, W convolution width, E model width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable_reason() -> str | None:
    """The reference runs wherever torch does."""
    return None


def unsupported(op: str, dtype: torch.dtype, d_state: int | None, d_conv: int | None) -> str | None:
    """The reference serves everything."""
    return None


# ---- the linear recurrence h[t] = a[t] * h[t-1] + b[t] along the first axis ------------------------------


def recurrence_loop(a: Tensor, b: Tensor) -> Tensor:
    """One token after the other. a, b, and the result: (L, ...)."""
    h, states = torch.zeros_like(b[0]), []
    for a_t, b_t in zip(a, b):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states)


def _prefix(a: Tensor, b: Tensor) -> Tensor:
    """The same by parallel prefix: halve the sequence by joining neighbours, recurse, fill in between.

    log2 L levels whose sizes add up to 2 L (Blelloch, "Prefix sums and their applications", 1990).
    """
    length = len(b)
    if length == 1:
        return b.clone()
    odd, even = slice(1, None, 2), slice(0, length - 1, 2)
    h_odd = _prefix(a[odd] * a[even], torch.addcmul(b[odd], a[odd], b[even]))  # states 1, 3, 5, ...
    h = torch.empty_like(b)
    h[0] = b[0]
    h[odd] = h_odd
    h[2::2] = torch.addcmul(b[2::2], a[2::2], h_odd[: len(b[2::2])])
    return h


class _Recurrence(torch.autograd.Function):
    """Parallel prefix with its own gradient: the adjoint of a recurrence is a recurrence in reversed time."""

    @staticmethod
    def forward(ctx, a, b):
        h = _prefix(a, b)
        ctx.save_for_backward(a, h)
        return h

    @staticmethod
    def backward(ctx, dh):
        a, h = ctx.saved_tensors
        # db[t] = dh[t] + conj(a[t+1]) * db[t+1]; da[t] = db[t] * conj(h[t-1])
        decay = torch.cat([a[1:], torch.zeros_like(a[:1])]).conj().resolve_conj()
        db = _prefix(decay.flip(0), dh.flip(0)).flip(0)
        da = torch.zeros_like(a)
        da[1:] = db[1:] * h[:-1].conj()
        return da, db


def recurrence_prefix(a: Tensor, b: Tensor) -> Tensor:
    """`recurrence_loop` in about log2 L vectorised levels. a, b, and the result: (L, ...)."""
    if torch.is_grad_enabled() and (a.requires_grad or b.requires_grad):
        return _Recurrence.apply(a, b)
    return _prefix(a, b)


RECURRENCES = {"loop": recurrence_loop, "prefix": recurrence_prefix}


# ---- selective scan ----------------------------------------------------------------------------------------


def _per_token(matrix: Tensor, channels: int, length: int, is_complex: bool) -> Tensor:
    """B or C in any public form, as a tensor that broadcasts to (L, B, D, N).

    Accepts (D, N), (B, N, L) and (B, G, N, L); with a complex A the per-token forms interleave real and
    imaginary parts along a last axis of 2 L.
    """
    if matrix.dim() == 2:
        return matrix[None, None]
    if matrix.dim() == 3:
        matrix = matrix.unsqueeze(1)  # one group
    if is_complex:
        matrix = torch.view_as_complex(matrix.unflatten(-1, (length, 2)).contiguous())
    matrix = matrix.repeat_interleave(channels // matrix.shape[1], dim=1)  # (B, D, N, L)
    return matrix.permute(3, 0, 1, 2)


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    recurrence: str = "prefix",
) -> tuple[Tensor, Tensor]:
    """Selective scan (Mamba, arXiv 2312.00752, eq. 2 with the simplified discretisation of its section 3.6).

        h[t] = exp(delta[t] A) h[t-1] + delta[t] B[t] u[t],    y[t] = <C[t], h[t]> + D u[t],    out = y silu(z)

    Args:
        u, delta, z: (B, D, L). A: (D, N) real, or complex: then y takes twice the real part.
        B, C: (D, N), (B, N, L) or (B, G, N, L); with a complex A per-token forms are (..., 2 L) interleaved.
        D, delta_bias: (D,). delta_softplus: apply softplus to delta + delta_bias.
        recurrence: "prefix" or "loop".

    Returns out (B, D, L) in u's dtype and the last state (B, D, N), computed in at least float32.
    """
    dtype = torch.promote_types(u.dtype, torch.float32)
    length, channels = u.shape[-1], u.shape[1]
    x, delta = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    is_complex = A.is_complex()
    state_dtype = torch.promote_types(dtype, torch.complex64) if is_complex else dtype
    A, B, C = (m if m.is_complex() else m.to(dtype) for m in (A, B, C))
    step = delta.permute(2, 0, 1).unsqueeze(-1)  # (L, B, D, 1)
    B, C = (_per_token(m, channels, length, is_complex).to(state_dtype) for m in (B, C))
    decay = torch.exp(step * A.to(state_dtype))  # (L, B, D, N)
    drive = (delta * x).permute(2, 0, 1).unsqueeze(-1) * B
    states = RECURRENCES[recurrence](decay, drive)
    y = (states * C).sum(-1)  # (L, B, D)
    if is_complex:
        y = 2 * y.real
    y = y.permute(1, 2, 0)  # (B, D, L)
    if D is not None:
        y = y + x * D.to(dtype)[:, None]
    if z is not None:
        y = y * F.silu(z.to(dtype))
    return y.to(u.dtype), states[-1].clone()


def selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    """Backend form of `selective_scan`: (out, last_state, saved). Nothing needs saving: backward recomputes."""
    out, last_state = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return out.contiguous(), last_state, torch.empty(0, dtype=torch.uint8, device=u.device)


def selective_scan_backward(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, saved):
    """Gradients of `selective_scan` by autograd, None for an argument that was None."""
    arguments = (u, delta, A, B, C, D, z, delta_bias)

    def outputs(*inputs):
        out, last_state = selective_scan(*inputs, delta_softplus)
        return (out,) if dlast_state is None else (out, last_state)

    return _gradients(outputs, arguments, (dout,) if dlast_state is None else (dout, dlast_state))


def selective_scan_saved_bytes(batch: int, channels: int, length: int, d_state: int, dtype: torch.dtype) -> int:
    """Size of what forward saves for backward."""
    return 0


def _gradients(function, arguments, output_grads):
    """Recompute `function` and differentiate it with respect to every argument that is a tensor."""
    inputs = [None if t is None else t.detach().requires_grad_() for t in arguments]
    with torch.enable_grad():
        outputs = function(*inputs)
        tensors = [t for t in inputs if t is not None]
        grads = iter(torch.autograd.grad(outputs, tensors, output_grads, allow_unused=True, materialize_grads=True))
    return tuple(None if t is None else next(grads) for t in inputs)


# ---- the mixer of a bidirectional block --------------------------------------------------------------------


def _direction(x: Tensor, parameters, reverse: bool) -> Tensor:
    """One direction of the mixer without its gate: convolution, projections, scan. x, result: (B, D, L)."""
    conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D = parameters
    if reverse:
        x = x.flip(-1)
    x = F.silu(F.conv1d(F.pad(x, (conv_weight.shape[1] - 1, 0)), conv_weight.unsqueeze(1), conv_bias, groups=len(D)))
    d_state = A.shape[1]
    projected = torch.einsum("bdl,rd->brl", x, x_proj_weight)
    dt, B, C = projected.split([dt_weight.shape[1], d_state, d_state], dim=1)
    delta = torch.einsum("brl,dr->bdl", dt, dt_weight)
    y, _ = selective_scan(x, delta, A, B, C, D, delta_bias=dt_bias, delta_softplus=True)
    return y.flip(-1) if reverse else y


def bimamba(xz: Tensor, forward_parameters, backward_parameters, scale: float) -> Tensor:
    """Bidirectional mixer between its two projections (Vision Mamba, arXiv 2401.09417, algorithm 1).

    Args:
        xz: (B, L, 2 D), the input projection's output: x in the first half, the gate z in the second.
        forward_parameters, backward_parameters: (conv_weight (D, W), conv_bias (D,) or None,
            x_proj_weight (R + 2 N, D), dt_weight (D, R), dt_bias (D,), A (D, N), D (D,)) of each direction.
        scale: 0.5 halves the sum of both directions, 1.0 does not.

    Returns (B, L, D) in xz's dtype.
    """
    dtype = torch.promote_types(xz.dtype, torch.float32)
    x, z = xz.to(dtype).transpose(1, 2).chunk(2, dim=1)  # (B, D, L) each
    forward_parameters, backward_parameters = (
        [None if p is None else p.to(dtype) for p in parameters]
        for parameters in (forward_parameters, backward_parameters)
    )
    y = _direction(x, forward_parameters, False) + _direction(x, backward_parameters, True)
    return (scale * y * F.silu(z)).transpose(1, 2).to(xz.dtype)


def bimamba_forward(xz, forward_parameters, backward_parameters, scale, save):
    """Backend form of `bimamba`: (y, saved). Nothing needs saving: backward recomputes."""
    y = bimamba(xz, forward_parameters, backward_parameters, scale)
    return y.contiguous(), torch.empty(0, dtype=torch.uint8, device=xz.device)


def bimamba_backward(dy, xz, forward_parameters, backward_parameters, scale, saved):
    """Gradients of `bimamba` by autograd: dxz, then those of both parameter sets, None where there was none."""
    count = len(forward_parameters)

    def output(xz, *parameters):
        return bimamba(xz, parameters[:count], parameters[count:], scale)

    dxz, *grads = _gradients(output, (xz, *forward_parameters, *backward_parameters), dy)
    return dxz, tuple(grads[:count]), tuple(grads[count:])


def bimamba_saved_bytes(
    batch: int, length: int, channels: int, d_state: int, dt_rank: int, d_conv: int, dtype: torch.dtype
) -> int:
    """Size of what forward saves for backward."""
    return 0


# ---- add and norm ------------------------------------------------------------------------------------------


def add_norm(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, kind: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """RMSNorm (arXiv 1910.07467, eq. 4) or LayerNorm (arXiv 1607.06450) of x + residual over the last axis.

    x, residual: (..., E); weight, bias: (E,); kind: "rms" or "layer". Returns out in x's dtype, and in at least
    float32 the sum, its mean and its reciprocal root mean square (or standard deviation), each (..., 1).
    """
    dtype = torch.promote_types(x.dtype, torch.float32)
    total = x.to(dtype) if residual is None else x.to(dtype) + residual.to(dtype)
    mean = total.mean(-1, keepdim=True) if kind == "layer" else torch.zeros_like(total[..., :1])
    rstd = torch.rsqrt((total - mean).square().mean(-1, keepdim=True) + eps)
    out = (total - mean) * rstd * weight.to(dtype)
    if bias is not None:
        out = out + bias.to(dtype)
    return out.to(x.dtype), total, mean, rstd


def add_norm_forward(x, residual, weight, bias, eps, kind, residual_dtype):
    """Backend form of `add_norm` on rows (M, E): (out, sum in residual_dtype, mean (M,) or None, rstd (M,))."""
    out, total, mean, rstd = add_norm(x, residual, weight, bias, eps, kind)
    total = total.to(residual_dtype)
    if total.data_ptr() == x.data_ptr():
        total = total.clone()  # an op must not return its input
    return out, total, mean.squeeze(-1) if kind == "layer" else None, rstd.squeeze(-1)


def add_norm_backward(dout, dresidual_out, residual_out, weight, bias, mean, rstd, kind, x_dtype, residual_dtype):
    """Gradients of `add_norm` on rows: (dx, dresidual or None, dweight, dbias or None).

    With n = (s - mean) rstd and g = dout * weight: ds = rstd (g - mean(g) [layer only] - n mean(g n)) + dresidual.
    """
    dtype = torch.promote_types(residual_out.dtype, torch.float32)
    total, dout = residual_out.to(dtype), dout.to(dtype)
    normed = (total if mean is None else total - mean[:, None]) * rstd[:, None]
    g = dout * weight.to(dtype)
    dtotal = g - normed * (g * normed).mean(-1, keepdim=True)
    if kind == "layer":
        dtotal = dtotal - g.mean(-1, keepdim=True)
    dtotal = dtotal * rstd[:, None]
    if dresidual_out is not None:
        dtotal = dtotal + dresidual_out.to(dtype)
    dx = dtotal.to(x_dtype)
    # The gradients of both summands are equal, but an op's outputs must not share memory.
    dresidual = None if residual_dtype is None else dtotal.to(residual_dtype, copy=True)
    dweight = (dout * normed).sum(0).to(weight.dtype)
    return dx, dresidual, dweight, None if bias is None else dout.sum(0).to(bias.dtype)
