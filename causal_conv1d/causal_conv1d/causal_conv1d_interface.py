"""Public functions and their registration with torch.library.

`torch.ops.causal_conv1d.forward` and `.backward` carry fake kernels, autograd and a FLOP formula, so that
`torch.compile(fullgraph=True)`, `torch.export` and `torch.utils.flop_counter` see through them. Which code
runs inside is decided in `backend.py`.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from causal_conv1d import backend, reference


@torch.library.custom_op("causal_conv1d::forward", mutates_args=())
def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, silu: bool) -> Tensor:
    kernels = backend.choose(x.device, x.dtype, weight.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        return kernels.conv_forward(x, weight, bias, initial_states, silu)


@_forward.register_fake
def _(x, weight, bias, initial_states, silu):
    return torch.empty_like(x)


@torch.library.custom_op("causal_conv1d::backward", mutates_args=())
def _backward(
    dout: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None, silu: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kernels = backend.choose(x.device, x.dtype, weight.shape[1])
    with torch.autocast(x.device.type, enabled=False):
        grads = kernels.conv_backward(dout, x, weight, bias, initial_states, silu)
    # An op returns tensors only: an input that was None has an empty gradient.
    return tuple(x.new_empty(0) if grad is None else grad for grad in grads)


@_backward.register_fake
def _(dout, x, weight, bias, initial_states, silu):
    return tuple(x.new_empty(0) if t is None else torch.empty_like(t) for t in (x, weight, bias, initial_states))


def _setup_context(ctx, inputs, output):
    x, weight, bias, initial_states, ctx.silu = inputs
    ctx.save_for_backward(x, weight, bias, initial_states)


def _autograd(ctx, dout):
    inputs = ctx.saved_tensors
    grads = _backward(dout, *inputs, ctx.silu)
    return *(None if t is None else grad for t, grad in zip(inputs, grads)), None


_forward.register_autograd(_autograd, setup_context=_setup_context)


@register_flop_formula(torch.ops.causal_conv1d.forward)
def _forward_flops(x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """Two operations a tap."""
    batch, channels, length = x_shape
    return 2 * batch * channels * length * weight_shape[1]


@register_flop_formula(torch.ops.causal_conv1d.backward)
def _backward_flops(dout_shape, x_shape, weight_shape, *args, out_shape=None, **kwargs) -> int:
    """One convolution for the input's gradient and one for the weight's."""
    return 2 * _forward_flops(x_shape, weight_shape)


def _silu(activation: str | None) -> bool:
    if activation not in (None, "silu", "swish"):
        raise NotImplementedError(f"activation={activation!r}: use None, 'silu' or 'swish'")
    return activation is not None


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, initial_states: Tensor | None = None) -> None:
    if x.dim() != 3 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"x must be (B, D, L) and weight (D, W) with the same D, not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.shape[-1] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"x {tuple(x.shape)} or weight {tuple(weight.shape)} is empty: length and width must be at least 1"
        )
    expected = {"bias": (bias, (x.shape[1],)), "initial_states": (initial_states, (*x.shape[:2], weight.shape[1] - 1))}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tuple(tensor.shape) != shape:
            raise ValueError(f"{name} must have shape {shape}, not {tuple(tensor.shape)}")
    for name, tensor in {"x": x, "weight": weight, "bias": bias, "initial_states": initial_states}.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: the convolution takes floating-point tensors")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")


def causal_conv1d_fn(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    seq_idx: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Causal depthwise convolution over tokens, with an optional SiLU (Mamba, arXiv 2312.00752, figure 3).

    Args:
        x: (B, D, L), any strides. weight: (D, W). bias: (D,).
        seq_idx: (B, L) integers: several sequences packed in a row, taps stay within each. Reference only.
        initial_states: (B, D, W-1), the tokens before the first; default zeros.
        return_final_states: also return the last W-1 tokens (B, D, W-1), the next call's `initial_states`.
        final_states_out: where to write them.
        activation: None, "silu" or "swish" (the same).

    Returns out (B, D, L) in x's dtype and memory layout, or (out, final_states).
    """
    silu = _silu(activation)
    _check_shapes(x, weight, bias, initial_states)
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out is written with return_final_states=True only: give both, or neither")
    if seq_idx is not None:
        if seq_idx.shape != (x.shape[0], x.shape[2]) or seq_idx.is_floating_point() or seq_idx.device != x.device:
            raise ValueError(
                f"seq_idx must be integers (B, L) = {(x.shape[0], x.shape[2])} on {x.device}, not {seq_idx.dtype} "
                f"{tuple(seq_idx.shape)} on {seq_idx.device}"
            )
        if initial_states is not None or return_final_states:
            raise NotImplementedError("seq_idx excludes initial_states and return_final_states: pass one of them")
        if backend.forced() not in (None, "reference"):
            raise NotImplementedError(
                f"seq_idx: {backend.ENVIRONMENT_VARIABLE}={backend.forced()} has no kernel for it"
            )
        return reference.causal_conv1d_packed(x, weight, bias, seq_idx, silu)
    run = reference.causal_conv1d if backend.differentiated_by_functorch() else _forward
    out = run(x, weight, bias, initial_states, silu)
    if not return_final_states:
        return out
    final_states = _final_states(x, initial_states, weight.shape[1])
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def _final_states(x: Tensor, initial_states: Tensor | None, width: int) -> Tensor:
    """The last W-1 tokens of the row, initial ones included: (B, D, W-1)."""
    if initial_states is None:
        initial_states = x.new_zeros(*x.shape[:2], width - 1)
    row = torch.cat([initial_states.to(x.dtype), x], dim=-1)
    return row[..., row.shape[-1] - (width - 1) :].clone()


def causal_conv1d_update(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
    conv_state_indices: Tensor | None = None,
) -> Tensor:
    """Convolve the next token or tokens, given the cached ones, and update the cache in place.

    Args:
        x: (B, D) one token, or (B, D, S).
        conv_state: (B, D, at least W-1), changed in place; the newest token last.
        cache_seqlens: (B,) int: `conv_state` is a ring, of which that many tokens have been written.
        conv_state_indices: (B,) int: row i of x continues row `conv_state_indices[i]` of conv_state.

    Returns out with x's shape and dtype.
    """
    silu = _silu(activation)
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    _check_shapes(tokens, weight, bias)
    if conv_state.dim() != 3 or conv_state.shape[1] != weight.shape[0] or conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state must be (B, {weight.shape[0]}, at least {weight.shape[1] - 1}), not {tuple(conv_state.shape)}"
        )
    state = conv_state if conv_state_indices is None else conv_state[conv_state_indices]
    if state.shape[0] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows, and there are states of {state.shape[0]}: give one for each row")
    if cache_seqlens is not None and tokens.shape[2] > conv_state.shape[2]:
        raise ValueError(
            f"cache_seqlens: a ring of {conv_state.shape[2]} tokens cannot take {tokens.shape[2]} at once; split them"
        )
    out = reference.causal_conv1d_update(tokens, state, weight, bias, silu, cache_seqlens)
    if conv_state_indices is not None:
        conv_state[conv_state_indices] = state
    return out.squeeze(-1) if x.dim() == 2 else out


def causal_conv1d_ref(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_states: Tensor | None = None,
    return_final_states: bool = False,
    final_states_out: Tensor | None = None,
    activation: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`causal_conv1d_fn` in plain torch operations, for comparison."""
    out = reference.causal_conv1d(x, weight, bias, initial_states, _silu(activation))
    if not return_final_states:
        return out
    final_states = _final_states(x, initial_states, weight.shape[1])
    return out, final_states if final_states_out is None else final_states_out.copy_(final_states)


def causal_conv1d_update_ref(
    x: Tensor,
    conv_state: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    activation: str | None = None,
    cache_seqlens: Tensor | None = None,
) -> Tensor:
    """`causal_conv1d_update` in plain torch operations, for comparison."""
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    out = reference.causal_conv1d_update(tokens, conv_state, weight, bias, _silu(activation), cache_seqlens)
    return out.squeeze(-1) if x.dim() == 2 else out
