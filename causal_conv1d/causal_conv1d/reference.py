"""The convolution in plain torch: obviously right, any dtype, any device. Every backend is tested against it.

Symbols: B batch, D channels, L tokens, W filter width, S tokens of one update.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def unavailable_reason() -> str | None:
    """The reference runs wherever torch does."""
    return None


def unsupported(dtype: torch.dtype, width: int) -> str | None:
    """The reference serves every floating dtype and width."""
    return None


def _compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.promote_types(torch.promote_types(x.dtype, weight.dtype), torch.float32)


def _after_initial_states(x: Tensor, initial_states: Tensor | None, width: int) -> Tensor:
    """x behind the W-1 tokens that the first taps see, zeros where none are given: (B, D, W-1+L)."""
    if initial_states is None:
        return F.pad(x, (width - 1, 0))
    return torch.cat([initial_states.to(x.dtype), x], dim=-1)


def causal_conv1d(x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, silu: bool) -> Tensor:
    """`y[t] = bias + sum_k weight[k] * x[t - (W-1) + k]`, then SiLU if asked, differentiable by autograd.

    Args:
        x: (B, D, L); weight: (D, W); bias: (D,) or None.
        initial_states: (B, D, W-1), what comes before the first token; None means zeros.

    Returns (B, D, L) in x's dtype, computed in at least float32.
    """
    dtype = _compute_dtype(x, weight)
    padded = _after_initial_states(x.to(dtype), initial_states, weight.shape[1])
    bias = None if bias is None else bias.to(dtype)
    out = F.conv1d(padded, weight.to(dtype).unsqueeze(1), bias, groups=weight.shape[0])
    return (F.silu(out) if silu else out).to(x.dtype)


def causal_conv1d_packed(x: Tensor, weight: Tensor, bias: Tensor | None, seq_idx: Tensor, silu: bool) -> Tensor:
    """The same over several sequences packed in one row: a tap reaches only tokens of its own sequence.

    `seq_idx` (B, L) integer: tokens with equal numbers belong together, so give each sequence one of its own. Negative
    numbers are padding, whose output is zero before the activation.
    """
    dtype = _compute_dtype(x, weight)
    width, length = weight.shape[1], x.shape[-1]
    padded = F.pad(x.to(dtype), (width - 1, 0))
    numbers = F.pad(seq_idx, (width - 1, 0), value=-1)
    out = x.new_zeros(x.shape, dtype=dtype)
    for k in range(width):
        other = (numbers[:, k : k + length] != seq_idx) | (seq_idx < 0)  # (B, L)
        # Filled, not multiplied by 0: NaN would stay NaN.
        near = padded[..., k : k + length].masked_fill(other.unsqueeze(1), 0)
        out = out + weight[:, k, None].to(dtype) * near
    if bias is not None:
        out = out + bias[:, None].to(dtype) * (seq_idx >= 0).unsqueeze(1)
    return (F.silu(out) if silu else out).to(x.dtype)


def conv_forward(x, weight, bias, initial_states, silu):
    """Backend form of `causal_conv1d`."""
    # The out's memory layout is part of the op's contract: that of x.
    return torch.empty_like(x).copy_(causal_conv1d(x, weight, bias, initial_states, silu))


def conv_backward(dout, x, weight, bias, initial_states, silu):
    """Gradients of `causal_conv1d`: (dx, dweight, dbias or None, dinitial_states or None)."""
    dtype = _compute_dtype(x, weight)
    width, length = weight.shape[1], x.shape[-1]
    padded = _after_initial_states(x.to(dtype), initial_states, width)
    dout = dout.to(dtype)
    if silu:
        wide_bias = None if bias is None else bias.to(dtype)
        before = F.conv1d(padded, weight.to(dtype).unsqueeze(1), wide_bias, groups=len(weight))
        gate = torch.sigmoid(before)
        dout = dout * gate * (1 + before * (1 - gate))
    dweight = torch.stack([(dout * padded[..., k : k + length]).sum((0, 2)) for k in range(width)], dim=1)
    # y[t] = sum_k w[k] x[t - (W-1) + k], hence dx is the correlation of dy with the taps in reversed order.
    reversed_taps = weight.to(dtype).flip(-1).unsqueeze(1)
    dpadded = F.conv1d(F.pad(dout, (width - 1, width - 1)), reversed_taps, groups=len(weight))
    dx = torch.empty_like(x).copy_(dpadded[..., width - 1 :])
    dbias = None if bias is None else dout.sum((0, 2)).to(bias.dtype)
    if initial_states is None:
        return dx, dweight.to(weight.dtype), dbias, None
    dinitial = torch.empty_like(initial_states).copy_(dpadded[..., : width - 1])
    return dx, dweight.to(weight.dtype), dbias, dinitial


def causal_conv1d_update(
    x: Tensor, conv_state: Tensor, weight: Tensor, bias: Tensor | None, silu: bool, cache_seqlens: Tensor | None
) -> Tensor:
    """Convolve S new tokens (B, D, S) after the cached ones, and shift them into `conv_state` in place.

    `conv_state` (B, D, at least W-1) holds the latest tokens, the newest last. With `cache_seqlens` (B,) it is
    a ring instead: token t lives in slot t modulo its length, and `cache_seqlens` tokens came before x.
    """
    width, state_length, steps = weight.shape[1], conv_state.shape[-1], x.shape[-1]
    if cache_seqlens is None:
        recent = torch.cat([conv_state, x.to(conv_state.dtype)], dim=-1)  # (B, D, state + S)
        before = conv_state[..., state_length - (width - 1) :].clone()
        conv_state.copy_(recent[..., recent.shape[-1] - state_length :].detach())
        return causal_conv1d(x, weight, bias, before, silu)
    positions = torch.arange(-(width - 1), 0, device=x.device) + cache_seqlens[:, None]  # (B, W-1)
    slots = positions.remainder(state_length).unsqueeze(1).expand(-1, x.shape[1], -1)
    before = conv_state.gather(2, slots)
    new = torch.arange(steps, device=x.device) + cache_seqlens[:, None]  # (B, S)
    slots = new.remainder(state_length).unsqueeze(1).expand(-1, x.shape[1], -1)
    conv_state.scatter_(2, slots, x.to(conv_state.dtype).detach())
    return causal_conv1d(x, weight, bias, before, silu)


def varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` tokens of each packed sequence, zeros before short ones.

    x (total tokens, D), cu_seqlens (B+1,) -> (B, D, state_len).
    """
    if len(x) == 0 or len(cu_seqlens) < 2:
        return x.new_zeros(max(len(cu_seqlens) - 1, 0), x.shape[1], state_len)
    ends = cu_seqlens[1:, None]
    positions = ends + torch.arange(-state_len, 0, device=x.device)  # (B, state_len)
    inside = positions >= cu_seqlens[:-1, None]
    # Filled, not multiplied by 0: the token of another sequence may be NaN.
    tokens = x[positions.clamp(min=0)].masked_fill(~inside.unsqueeze(-1), 0)  # (B, state_len, D)
    return tokens.transpose(1, 2)
