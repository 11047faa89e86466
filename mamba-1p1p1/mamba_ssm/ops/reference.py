"""The operations in plain torch: obviously right, any dtype, any device. Every backend is tested against them.

Symbols, after Gu & Dao, Mamba (arXiv 2312.00752): B batch, L tokens, D channels, N states per channel, G groups
of channels that share B and C, R rank of the time-step projection, W convolution width, E model width.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable_reason() -> str | None:
    """The reference runs wherever torch does."""
    return None


def unsupported(
    op: str, dtype: torch.dtype, d_state: int | None = None, d_conv: int | None = None, width: int | None = None
) -> str | None:
    """The reference serves everything."""
    return None


# --- the linear recurrence h[t] = a[t] * h[t-1] + b[t] along the first axis


def recurrence_loop(a: Tensor, b: Tensor) -> Tensor:
    """One token after the other. a, b, and the result: (L, ...)."""
    h, states = torch.zeros_like(b[0]), []
    for a_t, b_t in zip(a, b):
        h = a_t * h + b_t
        states.append(h)
    return torch.stack(states)


def recurrence_prefix(a: Tensor, b: Tensor) -> Tensor:
    """The same by parallel prefix: join neighbours to halve the sequence, recurse, fill in between.

    log2 L levels whose sizes add up to 2 L (Blelloch, "Prefix sums and their applications", 1990). Nothing is
    written into slices: those would export as scatters.
    """
    length = len(b)
    if length == 1:
        return b
    odd, even = slice(1, None, 2), slice(0, length - 1, 2)
    h_odd = recurrence_prefix(a[odd] * a[even], torch.addcmul(b[odd], a[odd], b[even]))  # states 1, 3, 5, ...
    h_even = torch.cat([b[:1], torch.addcmul(b[2::2], a[2::2], h_odd[: (length - 1) // 2])])  # 0, 2, 4, ...
    if length % 2:
        h_odd = torch.cat([h_odd, h_odd[-1:]])  # to pair up; cut off again below
    pairs = torch.cat([h_even.flatten(1), h_odd.flatten(1)], dim=1)  # torch 2.11 exports no stack of them for any batch
    return pairs.reshape(2 * len(pairs), *b.shape[1:])[:length]


RECURRENCES = {"loop": recurrence_loop, "prefix": recurrence_prefix}


# --- selective scan


def matrix_groups(matrix: Tensor) -> int:
    """Of B or C: (D, N), (B, N, L) or (B, G, N, L)."""
    return matrix.shape[1] if matrix.dim() == 4 else 1


def common_groups(B: Tensor, C: Tensor) -> int:
    """The fewest groups in which channels share both B and C."""
    return math.lcm(matrix_groups(B), matrix_groups(C))


def expanded_groups(matrix: Tensor, groups: int) -> Tensor:
    """(B, G, ...) for more groups, a multiple of G; what is constant (D, N) as it is."""
    if matrix.dim() == 2 or matrix.shape[1] == groups:
        return matrix
    return matrix.repeat_interleave(groups // matrix.shape[1], dim=1)


def collapsed_groups(gradient: Tensor, groups: int) -> Tensor:
    """The gradient of `expanded_groups`."""
    if gradient.dim() == 2 or gradient.shape[1] == groups:
        return gradient
    return gradient.unflatten(1, (groups, -1)).sum(2)


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
        matrix = matrix.to(torch.promote_types(matrix.dtype, torch.float32))  # torch has no complex bfloat16
        matrix = torch.complex(*matrix.unflatten(-1, (length, 2)).unbind(-1))
    return expanded_groups(matrix, channels).permute(3, 0, 1, 2)  # of (B, D, N, L)


def _per_token_gradient(grad: Tensor, matrix: Tensor, is_complex: bool) -> Tensor:
    """The adjoint of `_per_token`: (L, B, D, N) summed back to the form of `matrix`."""
    if matrix.dim() == 2:
        grad = grad.sum((0, 1))
        return (grad if matrix.is_complex() else _real(grad)).to(matrix.dtype)
    grad = collapsed_groups(grad.permute(1, 2, 3, 0), matrix_groups(matrix))  # (B, G, N, L)
    if is_complex:
        grad = torch.view_as_real(grad.contiguous()).flatten(-2)
    return grad.reshape(matrix.shape).to(matrix.dtype)


class _ScanTerms(NamedTuple):
    """What forward and backward of the scan share. Per token: (L, B, D, ...)."""

    x: Tensor  # (B, D, L)
    delta: Tensor  # (B, D, L), biased, after softplus
    A: Tensor  # (D, N)
    B: Tensor  # broadcasts to (L, B, D, N), and so does C
    C: Tensor
    decay: Tensor  # (L, B, D, N)
    states: Tensor  # (L, B, D, N)
    y: Tensor  # (B, D, L), before the gate


def _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, recurrence) -> _ScanTerms:
    dtype = torch.promote_types(u.dtype, torch.float32)
    state_dtype = torch.promote_types(dtype, torch.complex64) if A.is_complex() else dtype
    x, delta = u.to(dtype), delta.to(dtype)
    if delta_bias is not None:
        delta = delta + delta_bias.to(dtype)[:, None]
    if delta_softplus:
        delta = F.softplus(delta)
    B, C = (_per_token(m, u.shape[1], u.shape[2], A.is_complex()).to(state_dtype) for m in (B, C))
    A = A.to(state_dtype)
    decay = torch.exp(_token_first(delta) * A)
    if u.shape[2] == 1:
        recurrence = "loop"  # "prefix" does not read a lone token's decay, whose gradient is 0 and not None
    states = RECURRENCES[recurrence](decay, _token_first(delta * x) * B)
    y = (states * C).sum(-1).permute(1, 2, 0)  # (B, D, L)
    if A.is_complex():
        y = 2 * y.real
    if D is not None:
        y = y + x * D.to(dtype)[:, None]
    return _ScanTerms(x, delta, A, B, C, decay, states, y)


def _token_first(tensor: Tensor) -> Tensor:
    """(B, D, L) -> (L, B, D, 1)."""
    return tensor.permute(2, 0, 1).unsqueeze(-1)


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
    terms = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, recurrence)
    out = terms.y if z is None else terms.y * F.silu(z.to(terms.y.dtype))
    return out.to(u.dtype), terms.states[-1].clone()


def selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    """Backend form of `selective_scan`: (out, last_state, saved). Nothing needs saving: backward recomputes."""
    out, last_state = selective_scan(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return out.contiguous(), last_state, torch.empty(0, dtype=torch.uint8, device=u.device)


def selective_scan_backward(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, saved):
    """Gradients of `selective_scan`, None for an argument that was None.

    The adjoint of the recurrence is a recurrence in reversed time: with g[t] the gradient that y[t] sends to
    h[t], the gradient of its drive is db[t] = g[t] + conj(a[t+1]) db[t+1], and that of a[t] is db[t] conj(h[t-1]).
    """
    terms = _scan(u, delta, A, B, C, D, delta_bias, delta_softplus, "prefix")
    x, step = terms.x, _token_first(terms.delta)
    dy, dz = dout.to(x.dtype), None
    if z is not None:
        gate = torch.sigmoid(z.to(x.dtype))
        dz = dy * terms.y * gate * (1 + z * (1 - gate))
        dy = dy * z * gate
    dy_token = _token_first(dy) * (2 if A.is_complex() else 1)  # y = 2 Re <C, h> for a complex A
    dstates = dy_token * terms.C.conj()
    if dlast_state is not None:
        dstates = torch.cat([dstates[:-1], dstates[-1:] + dlast_state])
    next_decay = torch.cat([terms.decay[1:], torch.zeros_like(terms.decay[:1])]).conj().resolve_conj()
    ddrive = recurrence_prefix(next_decay.flip(0), dstates.flip(0)).flip(0)
    previous = torch.cat([torch.zeros_like(terms.states[:1]), terms.states[:-1]])
    dexponent = ddrive * (previous * terms.decay).conj()  # of delta A
    dproduct = _real((ddrive * terms.B.conj()).sum(-1)).permute(1, 2, 0)  # of delta u
    ddelta = _real((dexponent * terms.A.conj()).sum(-1)).permute(1, 2, 0) + dproduct * x
    if delta_softplus:  # its derivative, sigmoid(v), is 1 - exp(-softplus(v)); above 20 torch's softplus(v) is v
        ddelta = ddelta * -torch.expm1(-terms.delta).where(terms.delta <= 20, -1.0)
    du = dproduct * terms.delta
    if D is not None:
        du = du + dy * D.to(x.dtype)[:, None]
    dB = _per_token_gradient(ddrive * step * _token_first(x), B, A.is_complex())
    dC = _per_token_gradient(dy_token * terms.states.conj(), C, A.is_complex())
    dA = (dexponent * step).sum((0, 1)).to(A.dtype)
    dD = None if D is None else (dy * x).sum((0, 2)).to(D.dtype)
    dbias = None if delta_bias is None else ddelta.sum((0, 2)).to(delta_bias.dtype)
    return du.to(u.dtype), ddelta.to(delta.dtype), dA, dB, dC, dD, None if z is None else dz.to(z.dtype), dbias


def _real(tensor: Tensor) -> Tensor:
    return tensor.real if tensor.is_complex() else tensor


def selective_scan_saved_bytes(batch: int, channels: int, length: int, d_state: int, dtype: torch.dtype) -> int:
    """Size of what forward saves for backward."""
    return 0


# --- the mixer of a bidirectional block


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Causal depthwise convolution of x (B, D, L) with weight (D, W)."""
    return F.conv1d(F.pad(x, (weight.shape[1] - 1, 0)), weight.unsqueeze(1), bias, groups=len(weight))


def _project(x: Tensor, parameters) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """From the convolved x (B, D, L): its projection (B, R + 2 N, L), delta (B, D, L), B and C (B, N, L)."""
    _, _, x_proj_weight, dt_weight, _, A, _ = parameters
    projected = torch.einsum("bdl,rd->brl", x, x_proj_weight)
    dt, B, C = projected.split([dt_weight.shape[1], A.shape[1], A.shape[1]], dim=1)
    return projected, torch.einsum("brl,dr->bdl", dt, dt_weight), B, C


def _direction(x: Tensor, parameters) -> Tensor:
    """One direction without its gate: convolution, projections, scan. x and the result: (B, D, L)."""
    conv_weight, conv_bias, _, _, dt_bias, A, D = parameters
    x = F.silu(_convolve(x, conv_weight, conv_bias))
    _, delta, B, C = _project(x, parameters)
    return selective_scan(x, delta, A, B, C, D, delta_bias=dt_bias, delta_softplus=True)[0]


def _direction_backward(dy: Tensor, x: Tensor, parameters):
    """Gradients of `_direction`: dx, then those of its parameters in order."""
    conv_weight, conv_bias, x_proj_weight, dt_weight, dt_bias, A, D = parameters
    before = _convolve(x, conv_weight, conv_bias)
    after = F.silu(before)
    projected, delta, B, C = _project(after, parameters)
    dafter, ddelta, dA, dB, dC, dD, _, ddt_bias = selective_scan_backward(
        dy, None, after, delta, A, B, C, D, None, dt_bias, True, None
    )
    ddt_weight = torch.einsum("bdl,brl->dr", ddelta, projected[:, : dt_weight.shape[1]])
    dprojected = torch.cat([torch.einsum("bdl,dr->brl", ddelta, dt_weight), dB, dC], dim=1)
    dx_proj_weight = torch.einsum("brl,bdl->rd", dprojected, after)
    dafter = dafter + torch.einsum("brl,rd->bdl", dprojected, x_proj_weight)
    gate = torch.sigmoid(before)
    dbefore = dafter * gate * (1 + before * (1 - gate))
    width, length = conv_weight.shape[1], x.shape[-1]
    # y[t] = sum_k w[k] x[t - (W-1) + k], hence dx is the correlation of dy with the taps in reversed order.
    dx = F.conv1d(F.pad(dbefore, (0, width - 1)), conv_weight.flip(-1).unsqueeze(1), groups=len(conv_weight))
    padded = F.pad(x, (width - 1, 0))
    dconv_weight = torch.stack([(dbefore * padded[..., k : k + length]).sum((0, 2)) for k in range(width)], dim=1)
    dconv_bias = None if conv_bias is None else dbefore.sum((0, 2))
    return dx, (dconv_weight, dconv_bias, dx_proj_weight, ddt_weight, ddt_bias, dA, dD)


def _widen(xz: Tensor, *parameter_sets):
    """x and z as (B, D, L), and the parameters, in at least float32."""
    dtype = torch.promote_types(xz.dtype, torch.float32)
    x, z = xz.to(dtype).transpose(1, 2).chunk(2, dim=1)
    return x, z, *([None if p is None else p.to(dtype) for p in parameters] for parameters in parameter_sets)


def bimamba(xz: Tensor, forward_parameters, backward_parameters, scale: float) -> Tensor:
    """Bidirectional mixer between its two projections (Vision Mamba, arXiv 2401.09417, algorithm 1).

    Args:
        xz: (B, L, 2 D), the input projection's output: x in the first half, the gate z in the second.
        forward_parameters, backward_parameters: (conv_weight (D, W), conv_bias (D,) or None,
            x_proj_weight (R + 2 N, D), dt_weight (D, R), dt_bias (D,), A (D, N), D (D,)) of each direction.
        scale: 0.5 halves the sum of both directions, 1.0 does not.

    Returns (B, L, D) in xz's dtype.
    """
    x, z, forward_parameters, backward_parameters = _widen(xz, forward_parameters, backward_parameters)
    y = _direction(x, forward_parameters) + _direction(x.flip(-1), backward_parameters).flip(-1)
    return (scale * y * F.silu(z)).transpose(1, 2).to(xz.dtype)


def bimamba_forward(xz, forward_parameters, backward_parameters, scale, save):
    """Backend form of `bimamba`: (y, saved). Nothing needs saving: backward recomputes."""
    y = bimamba(xz, forward_parameters, backward_parameters, scale)
    return y.contiguous(), torch.empty(0, dtype=torch.uint8, device=xz.device)


def bimamba_backward(dy, xz, forward_parameters, backward_parameters, scale, saved):
    """Gradients of `bimamba`: dxz, then those of both parameter sets, None where there was no parameter."""
    x, z, ahead, behind = _widen(xz, forward_parameters, backward_parameters)
    y = _direction(x, ahead) + _direction(x.flip(-1), behind).flip(-1)
    dy = scale * dy.to(x.dtype).transpose(1, 2)  # (B, D, L)
    gate = torch.sigmoid(z)
    dz = dy * y * gate * (1 + z * (1 - gate))
    dy = dy * z * gate
    dx, grads = _direction_backward(dy, x, ahead)
    dx_b, grads_b = _direction_backward(dy.flip(-1), x.flip(-1), behind)
    dxz = torch.cat([dx + dx_b.flip(-1), dz], dim=1).transpose(1, 2).to(xz.dtype)
    return dxz, _narrow(grads, forward_parameters), _narrow(grads_b, backward_parameters)


def _narrow(grads, parameters):
    return tuple(None if g is None else g.to(p.dtype) for g, p in zip(grads, parameters))


def bimamba_saved_bytes(
    batch: int, length: int, channels: int, d_state: int, dt_rank: int, d_conv: int, dtype: torch.dtype
) -> int:
    """Size of what forward saves for backward."""
    return 0


# --- add and norm


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
