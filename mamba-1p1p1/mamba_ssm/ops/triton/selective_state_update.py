"""One step of the selective scan, for token-by-token inference."""

import torch
import torch.nn.functional as F
from torch import Tensor

from mamba_ssm.ops.checks import check_kinds, check_tensors


def _check(state: Tensor, others: dict[str, Tensor | None]) -> None:
    """`others`: the tensors of `selective_state_update` beside the state, by name."""
    check_tensors({"state": state, **others}, optional=("D", "z", "dt_bias"))
    if state.dim() not in (3, 4):
        raise ValueError(f"state must be (B, D, N) or (B, heads, D, N), not {tuple(state.shape)}")
    batch, *heads, channels, d_state = state.shape
    vector = (*heads, channels)
    token = (batch, *vector)
    shapes = {"x": token, "dt": token, "A": (*vector, d_state), "D": vector, "z": token, "dt_bias": vector}
    for name, tensor in others.items():
        if tensor is None:
            continue
        given, wanted = tuple(tensor.shape), shapes.get(name, (batch, d_state))
        if name in ("B", "C") and heads:
            if len(given) != 3 or given[::2] != wanted or given[1] == 0 or heads[0] % given[1]:
                raise ValueError(
                    f"{name} must be (B, groups, N) = ({batch}, groups, {d_state}) with groups dividing the {heads[0]} "
                    f"heads of state, not {given}"
                )
        elif given != wanted:
            raise ValueError(f"{name} must have shape {wanted} beside a state of {tuple(state.shape)}, not {given}")
    check_kinds("the update", "state", state, others)


def selective_state_update(
    state: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
) -> Tensor:
    """Advance the state by one token, in place, and return that token's output (Mamba, arXiv 2312.00752, eq. 2).

        h = exp(dt A) h + dt B x,    y = <C, h> + D x,    out = y silu(z)

    Plain torch operations, whatever MAMBA_SSM_BACKEND names: there is no kernel for it.

    Args:
        state: (B, D, N), or (B, heads, D, N); changed in place. All tensors: floating point of any dtype.
        x, dt, z: (B, D), or (B, heads, D). A: (D, N), or (heads, D, N). D, dt_bias: (D,), or (heads, D).
        B, C: (B, N), or (B, groups, N) with groups dividing heads.
        dt_softplus: softplus of dt + dt_bias.

    Returns (B, D), or (B, heads, D), in x's dtype; computed in x's and state's, in float32 at least. Gradients of it
    do not reach earlier tokens by way of the state. Raises TypeError for what is no tensor, ValueError for shapes,
    dtypes or devices that do not fit.
    """
    _check(state, {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias})
    dtype = torch.promote_types(torch.promote_types(x.dtype, state.dtype), torch.float32)
    if state.dim() == 3:  # no heads: one group of all channels
        B, C = B[..., None, :], C[..., None, :]  # (B, 1, N)
    else:
        heads = state.shape[1]
        B, C = (m.repeat_interleave(heads // m.shape[1], dim=1).unsqueeze(-2) for m in (B, C))  # (B, heads, 1, N)
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    delta = delta.unsqueeze(-1)  # (..., D, 1)
    before = state.to(dtype, copy=torch.is_grad_enabled())  # autograd keeps it, and state is changed
    new = before * torch.exp(delta * A.to(dtype)) + delta * B.to(dtype) * x.to(dtype).unsqueeze(-1)
    state.copy_(new.detach())
    out = (new * C.to(dtype)).sum(-1)
    if D is not None:
        out = out + x.to(dtype) * D.to(dtype)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype)


# One vectorised expression is both the function and its reference.
selective_state_update_ref = selective_state_update
