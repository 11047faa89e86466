"""Public functions and their registration with torch.library.

`torch.ops.causal_conv1d.forward` and `.backward` carry fake kernels, autograd and a FLOP formula, so that
`torch.compile(fullgraph=True)`, `torch.export` and `torch.utils.flop_counter` see through them. Which code
runs inside is decided in `backend.py`.
"""

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from causal_conv1d import backend, reference

INTEGERS = (torch.int8, torch.int16, torch.int32, torch.int64)


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
        dx, *others = kernels.conv_backward(dout, x, weight, bias, initial_states, silu)
    # An op returns tensors only, of a known layout: dx has x's, and an input that was None an empty gradient.
    return dx, *(x.new_empty(0) if grad is None else grad.contiguous() for grad in others)


@_backward.register_fake
def _(dout, x, weight, bias, initial_states, silu):
    others = (x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (weight, bias, initial_states))
    return torch.empty_like(x), *others


def _refuse(ctx, *gradients):
    raise NotImplementedError(
        "causal_conv1d_fn has first derivatives alone; for second ones use causal_conv1d_ref, in plain torch"
    )


_backward.register_autograd(_refuse)


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
    """Two operations per tap."""
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


def _check_tensors(needed: dict[str, object], optional: dict[str, object]) -> None:
    for name, value in {**needed, **optional}.items():
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            accepted = "a tensor or None" if name in optional else "a tensor"
            raise TypeError(f"{name} must be {accepted}, not {'None' if value is None else type(value).__name__}")


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, **states: Tensor | None) -> None:
    """`states`: tensors (B, D, W-1) by name."""
    _check_tensors({"x": x, "weight": weight}, {"bias": bias, **states})
    if x.dim() != 3 or weight.dim() != 2 or x.shape[1] != weight.shape[0]:
        raise ValueError(
            f"x must be (B, D, L) and weight (D, W) with the same D, not {tuple(x.shape)} and {tuple(weight.shape)}"
        )
    if x.shape[-1] == 0 or weight.shape[1] == 0:
        raise ValueError(
            f"x {tuple(x.shape)} or weight {tuple(weight.shape)} is empty: length and width must be at least 1"
        )
    shapes = {"bias": (x.shape[1],)} | dict.fromkeys(states, (*x.shape[:2], weight.shape[1] - 1))
    for name, tensor in {"bias": bias, **states}.items():
        if tensor is not None and tuple(tensor.shape) != shapes[name]:
            raise ValueError(f"{name} must have shape {shapes[name]}, not {tuple(tensor.shape)}")
    _check_kinds(x, {"x": x, "weight": weight, "bias": bias, **states})


def _check_kinds(x: Tensor, tensors: dict[str, Tensor | None]) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and not tensor.is_floating_point():
            raise ValueError(f"{name} has dtype {tensor.dtype}: the convolution takes floating-point tensors")
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device} and x on {x.device}: move them to one device")


def _check_integers(name: str, tensor: Tensor | None, form: str, shape: tuple[int, ...], x: Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be signed integers {form}, not {tensor!r}: pass it by its name")
    if tensor.dtype not in INTEGERS or tuple(tensor.shape) != shape or tensor.device != x.device:
        raise ValueError(
            f"{name} must be signed integers {form} = {shape} on {x.device}, not {tensor.dtype} {tuple(tensor.shape)} "
            f"on {tensor.device}"
        )


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

        out[t] = act(bias + sum_k weight[k] x[t - (W-1) + k])

    Args:
        x: (B, D, L), any strides; float32, bfloat16, float16 or float64. weight: (D, W). bias: (D,). Those and all
            states: floating point of any dtype.
        seq_idx: (B, L) signed integers: several sequences packed in a row, taps stay within each. Reference only.
        initial_states: (B, D, W-1), the tokens before the first; default zeros.
        return_final_states: also return the last W-1 tokens (B, D, W-1), the next call's `initial_states`.
        final_states_out: (B, D, W-1), where to write them.
        activation: None, "silu" or "swish" (the same).

    Returns out (B, D, L) in x's dtype and memory layout, or (out, final_states); computed in at least float32.

    Raises TypeError for what is no tensor, ValueError for shapes, dtypes or devices that do not fit,
    NotImplementedError for another activation, for seq_idx beside states, and for what a backend that
    CAUSAL_CONV1D_BACKEND forces does not serve.
    """
    silu = _silu(activation)
    _check_shapes(x, weight, bias, initial_states=initial_states, final_states_out=final_states_out)
    if final_states_out is not None and not return_final_states:
        raise ValueError("final_states_out is written with return_final_states=True only: give both, or neither")
    if seq_idx is not None:
        _check_integers("seq_idx", seq_idx, "(B, L)", (x.shape[0], x.shape[2]), x)
        if initial_states is not None or return_final_states:
            raise NotImplementedError("seq_idx excludes initial_states and return_final_states: pass one of them")
        if backend.forced() not in (None, "reference"):
            raise NotImplementedError(
                f"seq_idx: {backend.ENVIRONMENT_VARIABLE}={backend.forced()} has no kernel for it"
            )
        return reference.causal_conv1d_packed(x, weight, bias, seq_idx, silu)
    run = reference.causal_conv1d if backend.differentiated_beyond_autograd() else _forward
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

    `causal_conv1d_fn` (Mamba, arXiv 2312.00752, figure 3) token by token. Plain torch operations, whatever
    CAUSAL_CONV1D_BACKEND names: there is no kernel for it.

    Args:
        x: (B, D) one token, or (B, D, S); floating point, as weight (D, W), bias (D,) and conv_state.
        conv_state: (B, D, at least W-1), changed in place; the newest token last.
        activation: None, "silu" or "swish" (the same).
        cache_seqlens: (B,) signed integers: `conv_state` is a ring, of which that many tokens have been written.
        conv_state_indices: (B,) signed integers: row i of x continues row `conv_state_indices[i]` of conv_state.

    Returns out with x's shape and dtype, computed in at least float32. Gradients of it do not reach earlier tokens by
    way of the cache. Raises TypeError for what is no tensor, ValueError for shapes, dtypes or devices that do not fit,
    IndexError for an index that is no row (negative ones are not accepted), NotImplementedError for another activation.
    """
    silu = _silu(activation)
    _check_tensors({"x": x, "conv_state": conv_state}, {})
    tokens = x.unsqueeze(-1) if x.dim() == 2 else x
    _check_shapes(tokens, weight, bias)
    if conv_state.dim() != 3 or conv_state.shape[1] != weight.shape[0] or conv_state.shape[2] < weight.shape[1] - 1:
        raise ValueError(
            f"conv_state must be (B, {weight.shape[0]}, at least {weight.shape[1] - 1}), not {tuple(conv_state.shape)}"
        )
    _check_kinds(x, {"conv_state": conv_state})
    for name, integers in {"cache_seqlens": cache_seqlens, "conv_state_indices": conv_state_indices}.items():
        _check_integers(name, integers, "(B,)", (x.shape[0],), x)
    rows = conv_state_indices
    if rows is not None:  # without waiting for a GPU: a negative index becomes one that indexing refuses
        rows = torch.where(rows < 0, len(conv_state), rows.long())
    state = conv_state if rows is None else conv_state[rows]
    if state.shape[0] != x.shape[0]:
        raise ValueError(f"x has {x.shape[0]} rows, and there are states of {state.shape[0]}: give one for each row")
    if cache_seqlens is not None and tokens.shape[2] > conv_state.shape[2]:
        raise ValueError(
            f"cache_seqlens: a ring of {conv_state.shape[2]} tokens cannot take {tokens.shape[2]} at once; split them"
        )
    out = reference.causal_conv1d_update(tokens, state, weight, bias, silu, cache_seqlens)
    if rows is not None:
        conv_state[rows] = state
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
    _check_shapes(x, weight, bias, initial_states=initial_states, final_states_out=final_states_out)
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
