"""Convolution states of sequences packed without padding."""

import torch
from torch import Tensor

from causal_conv1d import reference


def causal_conv1d_varlen_states(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The last `state_len` tokens of every packed sequence, to start `causal_conv1d_update` from.

    Plain torch operations, whatever CAUSAL_CONV1D_BACKEND names: there is no kernel for it.

    Args:
        x: (total tokens, D), the sequences one after the other.
        cu_seqlens: (B+1,) integers, the offset where each sequence starts, and the total at the end.
        state_len: how many tokens to keep; shorter sequences are padded with zeros on the left.

    Returns (B, D, state_len). Raises ValueError for shapes and dtypes that do not fit, IndexError for offsets beyond x
    or in no order.
    """
    if x.dim() != 2 or cu_seqlens.dim() != 1:
        raise ValueError(
            f"x must be (total tokens, D) and cu_seqlens (B+1,), not {tuple(x.shape)}, {tuple(cu_seqlens.shape)}"
        )
    if cu_seqlens.is_floating_point() or cu_seqlens.is_complex() or cu_seqlens.dtype == torch.bool:
        raise ValueError(f"cu_seqlens must be integers, not {cu_seqlens.dtype}")
    if state_len < 0:
        raise ValueError(f"state_len={state_len} is invalid: use 0 or a positive number of tokens")
    if cu_seqlens.device.type == "cpu" and len(cu_seqlens) and not 0 <= cu_seqlens.min() <= cu_seqlens.max() <= len(x):
        raise IndexError(f"cu_seqlens goes from {cu_seqlens.min()} to {cu_seqlens.max()}; x has {len(x)} tokens")
    if cu_seqlens.device.type == "cpu" and (cu_seqlens[1:] < cu_seqlens[:-1]).any():
        raise IndexError(f"cu_seqlens {cu_seqlens.tolist()} falls: give where each sequence starts, in order")
    return reference.varlen_states(x, cu_seqlens.to(torch.int64), state_len).contiguous()


def causal_conv1d_varlen_states_ref(x: Tensor, cu_seqlens: Tensor, state_len: int) -> Tensor:
    """The same, one sequence at a time."""
    states = x.new_zeros(len(cu_seqlens) - 1, x.shape[1], state_len)
    for i, (start, end) in enumerate(zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist())):
        tail = x[max(start, end - state_len) : end]  # (at most state_len, D)
        states[i, :, state_len - len(tail) :] = tail.T
    return states
