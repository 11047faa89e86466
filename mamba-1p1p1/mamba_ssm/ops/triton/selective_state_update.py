"""One step of the selective scan, for token-by-token inference."""

import torch
import torch.nn.functional as F
from torch import Tensor


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
    """Advance the state by one token, in place, and return the output of that token.

    Args:
        state: (B, D, N), or (B, heads, D, N); changed in place.
        x, dt, z: (B, D), or (B, heads, D). A: (D, N), or (heads, D, N). D, dt_bias: (D,), or (heads, D).
        B, C: (B, N), or (B, groups, N) with groups dividing heads.

    Returns (B, D), or (B, heads, D), in x's dtype; computed in at least float32.
    """
    if state.dim() not in (3, 4) or x.shape != state.shape[:-1] or dt.shape != x.shape:
        raise ValueError(
            f"state must be (B, D, N) or (B, heads, D, N) and x, dt without N, not {tuple(state.shape)}, "
            f"{tuple(x.shape)}, {tuple(dt.shape)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    if state.dim() == 3:  # no heads: one group of all channels
        B, C = B[..., None, :], C[..., None, :]  # (B, 1, N)
    else:
        heads = state.shape[1]
        if B.shape[1] == 0 or heads % B.shape[1]:
            raise ValueError(f"the {B.shape[1]} groups of B must divide the {heads} heads of state")
        B, C = (m.repeat_interleave(heads // m.shape[1], dim=1).unsqueeze(-2) for m in (B, C))  # (B, heads, 1, N)
    delta = dt.to(dtype)
    if dt_bias is not None:
        delta = delta + dt_bias.to(dtype)
    if dt_softplus:
        delta = F.softplus(delta)
    delta = delta.unsqueeze(-1)  # (..., D, 1)
    new = state.to(dtype) * torch.exp(delta * A.to(dtype)) + delta * B.to(dtype) * x.to(dtype).unsqueeze(-1)
    state.copy_(new)
    out = (new * C.to(dtype)).sum(-1)
    if D is not None:
        out = out + x.to(dtype) * D.to(dtype)
    if z is not None:
        out = out * F.silu(z.to(dtype))
    return out.to(x.dtype)


# One vectorised expression is both the function and its reference.
selective_state_update_ref = selective_state_update
