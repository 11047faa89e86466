"""The Mamba block of the paper, and the bidirectional mixers of Vision Mamba, as one module.

Symbols: E model width, D = expand * E inner width, N states per channel, R rank of the time-step projection,
W convolution width, B batch, L tokens.
"""

import functools
import logging
import math
from collections.abc import Iterable, Iterator
from numbers import Integral, Real
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mamba_ssm.modules.fusable import FUSED_MODULES, check_convolution, is_plain_linear, why_not_fusable
from mamba_ssm.ops import backend, reference
from mamba_ssm.ops.bimamba import DirectionParameters, bimamba, bimamba_block, negative_exp, negative_exps
from mamba_ssm.ops.selective_scan_interface import (
    bimamba_inner_fn,
    bimamba_inner_ref,
    mamba_inner_fn,
    mamba_inner_ref,
    scan_inputs,
    selective_scan_fn,
    selective_scan_ref,
)
from mamba_ssm.ops.triton.selective_state_update import selective_state_update

BIMAMBA_TYPES = ("none", "v1", "v2")
DT_INITS = ("random", "constant")
DT_INITS_BACKWARD = ("published", "same")

_logger = logging.getLogger("mamba_ssm")


def is_count(value, least: int = 1) -> bool:
    """Whether it is a whole number of at least `least`."""
    return isinstance(value, Integral) and value >= least


def check_values(table: Iterable[tuple[str, object, bool, str]]) -> None:
    """Raise ValueError at the first row (name, value, whether it is accepted, what is) that is not accepted."""
    for name, value, fits, accepted in table:
        if not fits:
            raise ValueError(f"{name}={value!r} is invalid: use {accepted}")


def _accepted(
    d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max, conv_bias, bias, init_layer_scale
) -> Iterator[tuple[str, object, bool, str]]:
    """Rows for `check_values`, each computed after those before it were accepted."""
    count, positive = "a whole number of at least 1", "a positive number"
    yield "d_model", d_model, is_count(d_model), count
    yield "d_state", d_state, is_count(d_state), count
    yield "d_conv", d_conv, is_count(d_conv), count
    yield "expand", expand, _is_positive(expand), positive
    yield "expand", expand, expand * d_model >= 1, f"a number with expand * d_model >= 1, where d_model={d_model}"
    yield "dt_rank", dt_rank, dt_rank == "auto" or is_count(dt_rank), f"'auto' or {count}"
    yield "dt_min", dt_min, _is_positive(dt_min), positive
    yield "dt_max", dt_max, _is_positive(dt_max) and dt_max >= dt_min, f"a number of at least dt_min={dt_min}"
    yield "conv_bias", conv_bias, conv_bias in (True, False), "True or False"
    yield "bias", bias, bias in (True, False), "True or False"
    scale = init_layer_scale
    yield "init_layer_scale", scale, scale is None or isinstance(scale, Real), "None or a number"


def _is_positive(value) -> bool:
    return isinstance(value, Real) and 0 < value < math.inf


@functools.cache
def _say_once(found: str) -> None:
    _logger.warning("%s: conv1d, x_proj and dt_proj are called one by one for it, slower than fused", found)


def _in_float32(module: nn.Module, x: Tensor) -> Tensor:
    """module(x), outside of autocast where its parameters are float32."""
    device = x.device.type
    autocast = backend.has_autocast(device) and torch.is_autocast_enabled(device)
    if not autocast or any(p.is_floating_point() and p.dtype != torch.float32 for p in module.parameters()):
        return module(x)
    with torch.autocast(device, enabled=False):
        return module(x.float())


class InferenceCache(NamedTuple):
    """What one layer remembers between tokens."""

    conv_state: Tensor  # (B, D, W), the latest inputs of the convolution
    ssm_state: Tensor  # (B, D, N)


class Mamba(nn.Module):
    """Selective state space mixer (arXiv 2312.00752, figure 3), bidirectional as in Vision Mamba (arXiv 2401.09417).

    The fused operations take the parameters of `conv1d`, `x_proj` and `dt_proj` and do not call these modules. Where
    one of them is more than its parameters (hooks or a `forward` of its own, an adapter or another module in its place,
    a quantised weight, a bias of `x_proj`), all three are called, which is slower, and logged. `step` and
    `inference_params` raise TypeError for that, and every use does for a convolution of another stride, dilation,
    padding or grouping. torch's hooks of all modules are run for `in_proj` and `out_proj` alone.

    Args:
        d_model, d_state, d_conv, expand: E, N, W, and D / E.
        dt_rank: R, or "auto" for ceil(E / 16).
        dt_init: "random" (uniform) or "constant" weights of the time-step projection, times `dt_scale`.
        dt_min, dt_max, dt_init_floor: the range of the initial time step, log-uniform, and its lower bound.
        conv_bias, bias: biases of the convolution, and of the input and output projections.
        use_fast_path: True runs registered, fused operations, False the same function in plain torch operations.
        layer_idx: this layer's key in `inference_params.key_value_memory_dict`.
        bimamba_type: "none" one direction; "v1" a second scan of the same inputs over reversed time; "v2" a
            second direction with its own convolution and projections (all released Vim weights).
        if_divide_out: halve the sum of both directions of "v2"; without effect elsewhere, as published.
        init_layer_scale: initial value of a learned scale (E,) of the output; None for no such parameter.
        dt_init_backward: "published" leaves the backward time-step projection at torch's default weights and a
            zero bias, so that its time step starts at softplus(0) = 0.693; "same" initialises it as the forward; of
            "v2" alone.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        dt_init: str = "random",
        dt_scale: float = 1.0,
        dt_min: float = 0.001,
        dt_max: float = 0.1,
        dt_init_floor: float = 1e-4,
        conv_bias: bool = True,
        bias: bool = False,
        use_fast_path: bool = True,
        layer_idx: int | None = None,
        device=None,
        dtype=None,
        bimamba_type: str = "none",
        if_divide_out: bool = False,
        init_layer_scale: float | None = None,
        dt_init_backward: str = "published",
    ):
        super().__init__()
        for name, value, accepted in (
            ("bimamba_type", bimamba_type, BIMAMBA_TYPES),
            ("dt_init", dt_init, DT_INITS),
            ("dt_init_backward", dt_init_backward, DT_INITS_BACKWARD),
        ):
            if value not in accepted:
                raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, accepted))}")
        numbers = (d_model, d_state, d_conv, expand, dt_rank, dt_min, dt_max)
        check_values(_accepted(*numbers, conv_bias, bias, init_layer_scale))
        if dt_init_backward != "published" and bimamba_type != "v2":
            raise ValueError(
                f"dt_init_backward={dt_init_backward!r} means nothing with bimamba_type={bimamba_type!r}: "
                "leave it out, or use 'v2'"
            )
        factory = {"device": device, "dtype": dtype}
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = int(expand * d_model)
        self.dt_rank = math.ceil(d_model / 16) if dt_rank == "auto" else dt_rank
        self.use_fast_path, self.layer_idx = use_fast_path, layer_idx
        self.bimamba_type, self.if_divide_out = bimamba_type, if_divide_out
        self.init_layer_scale = init_layer_scale

        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), float(init_layer_scale), **factory))
        self.A_log, self.D = self._state_parameters(device)
        if bimamba_type != "none":
            self.A_b_log, D_b = self._state_parameters(device)
        if bimamba_type == "v2":
            self.D_b = D_b
        self.in_proj = nn.Linear(d_model, 2 * self.d_inner, bias=bias, **factory)
        self.conv1d, self.x_proj, self.dt_proj = self._direction_modules(conv_bias, factory)
        self._init_time_step(self.dt_proj, dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
        if bimamba_type == "v2":
            self.conv1d_b, self.x_proj_b, self.dt_proj_b = self._direction_modules(conv_bias, factory)
            if dt_init_backward == "same":
                self._init_time_step(self.dt_proj_b, dt_init, dt_scale, dt_min, dt_max, dt_init_floor)
            else:
                nn.init.zeros_(self.dt_proj_b.bias)
        self.out_proj = nn.Linear(self.d_inner, d_model, bias=bias, **factory)

    def _state_parameters(self, device) -> tuple[nn.Parameter, nn.Parameter]:
        """A_log = log(1..N) on every row (S4D-Real, arXiv 2206.11893) and D = 1, float32 always."""
        levels = torch.arange(1, self.d_state + 1, dtype=torch.float32, device=device)
        A_log = nn.Parameter(levels.log().repeat(self.d_inner, 1))  # (D, N)
        D = nn.Parameter(torch.ones(self.d_inner, dtype=torch.float32, device=device))
        return A_log, D

    def _direction_modules(self, conv_bias: bool, factory: dict) -> tuple[nn.Conv1d, nn.Linear, nn.Linear]:
        conv = nn.Conv1d(
            self.d_inner, self.d_inner, self.d_conv, groups=self.d_inner, padding=self.d_conv - 1,
            bias=conv_bias, **factory,
        )  # fmt: skip
        x_proj = nn.Linear(self.d_inner, self.dt_rank + 2 * self.d_state, bias=False, **factory)
        dt_proj = nn.Linear(self.dt_rank, self.d_inner, bias=True, **factory)
        return conv, x_proj, dt_proj

    @staticmethod
    @torch.no_grad()
    def _init_time_step(dt_proj: nn.Linear, dt_init, dt_scale, dt_min, dt_max, dt_init_floor) -> None:
        """Weights within ±R^-0.5 * dt_scale, and a bias whose softplus is log-uniform in [dt_min, dt_max]."""
        bound = dt_proj.in_features**-0.5 * dt_scale
        if dt_init == "constant":
            dt_proj.weight.fill_(bound)
        else:
            dt_proj.weight.uniform_(-bound, bound)
        uniform = torch.rand_like(dt_proj.bias, dtype=torch.float32)
        dt = torch.exp(uniform * (math.log(dt_max) - math.log(dt_min)) + math.log(dt_min)).clamp(min=dt_init_floor)
        dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # inverse softplus

    def _why_not_fusable(self) -> str | None:
        """What of conv1d, x_proj and dt_proj the fused operations would leave out, in words, or None."""
        directions = ("", "_b") if self.bimamba_type == "v2" else ("",)
        for suffix in directions:
            check_convolution("conv1d" + suffix, getattr(self, "conv1d" + suffix))
        for suffix in directions:
            for name, kind in FUSED_MODULES.items():
                found = why_not_fusable(getattr(self, name + suffix), kind)
                if found is not None:
                    return f"{name}{suffix} {found}"
            if getattr(self, "x_proj" + suffix).bias is not None:
                return f"x_proj{suffix} has a bias"
        return None

    def _fused_modules(self, suffix: str = "") -> tuple[nn.Module, nn.Module, nn.Module]:
        """conv1d, x_proj and dt_proj of a direction."""
        conv, x_proj, dt_proj = (getattr(self, name + suffix) for name in FUSED_MODULES)
        return conv, x_proj, dt_proj

    def _parameters_of(self, suffix: str, A: Tensor) -> DirectionParameters:
        """The parameters of the forward ("") or backward ("_b") direction of "v2"; A, or its logarithm."""
        conv, x_proj, dt_proj = self._fused_modules(suffix)
        return DirectionParameters(
            conv.weight.squeeze(1), conv.bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A,
            getattr(self, "D" + suffix),
        )  # fmt: skip

    def _mix_v2(self, hidden_states: Tensor) -> Tensor:
        """The mixer "v2" with its projections: (B, L, E) -> (B, L, E)."""
        scale = 0.5 if self.if_divide_out else 1.0
        if self.use_fast_path and is_plain_linear(self.in_proj) and is_plain_linear(self.out_proj):
            directions = self._parameters_of("", self.A_log), self._parameters_of("_b", self.A_b_log)
            weights = self.in_proj.weight, self.out_proj.weight
            return bimamba_block(hidden_states, *weights, *directions, scale, decay="log")
        A, A_b = negative_exps([self.A_log, self.A_b_log])
        directions = self._parameters_of("", A), self._parameters_of("_b", A_b)
        mixer = bimamba if self.use_fast_path else reference.bimamba
        return self.out_proj(mixer(self.in_proj(hidden_states), *directions, scale))

    def _mix_channels_first(self, xz: Tensor) -> Tensor:
        """The mixers "none" and "v1": (B, L, 2 D) -> (B, L, D)."""
        xz = xz.transpose(1, 2)  # (B, 2 D, L)
        conv, x_proj, dt_proj = self._fused_modules()
        no_projection = None, None  # out_proj is called as the module it is
        weights = conv.weight, conv.bias, x_proj.weight, dt_proj.weight, *no_projection, negative_exp(self.A_log)
        options = {"D": self.D, "delta_bias": dt_proj.bias, "delta_softplus": True}
        if self.bimamba_type == "v1":
            mixer = bimamba_inner_fn if self.use_fast_path else bimamba_inner_ref
            return mixer(xz, *weights, negative_exp(self.A_b_log), **options)
        mixer = mamba_inner_fn if self.use_fast_path else mamba_inner_ref
        return mixer(xz, *weights, **options)

    def _mix_by_modules(self, xz: Tensor) -> Tensor:
        """Any mixer by calls of conv1d, x_proj and dt_proj: (B, L, 2 D) -> (B, L, D)."""
        xz = xz.transpose(1, 2)  # (B, 2 D, L)
        ahead, bias = self._call_direction(xz, "")
        y = self._scan(*ahead, negative_exp(self.A_log), self.D, bias)
        if self.bimamba_type == "none":
            return y.transpose(1, 2)
        if self.bimamba_type == "v1":
            behind, D = [of_time.flip(-1) for of_time in ahead], self.D
        else:
            (behind, bias), D = self._call_direction(xz.flip(-1), "_b"), self.D_b
        y = y + self._scan(*behind, negative_exp(self.A_b_log), D, bias).flip(-1)
        return (y / 2 if self.bimamba_type == "v2" and self.if_divide_out else y).transpose(1, 2)

    def _call_direction(self, xz: Tensor, suffix: str) -> tuple[tuple[Tensor, ...], Tensor | None]:
        """What a scan takes, by calls: xz (B, 2 D, L) -> ((x (B, D, L), delta, B (B, N, L), C, z), delta's bias).

        The bias sets the time step, and 16 bits round -4.6 by up to 1.6 %: the scan adds it in float32, if it may.
        """
        conv, x_proj, dt_proj = self._fused_modules(suffix)
        x, z = xz.chunk(2, dim=1)
        x = F.silu(conv(x)[..., : x.shape[-1]])
        dt, B, C = x_proj(x.transpose(1, 2)).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        if why_not_fusable(dt_proj, nn.Linear) is None:
            delta, bias = F.linear(dt, dt_proj.weight.to(dt.dtype)), dt_proj.bias
        else:
            delta, bias = _in_float32(dt_proj, dt), None
        return (x, delta.transpose(1, 2), B.transpose(1, 2), C.transpose(1, 2), z), bias

    def _scan(self, x, delta, B, C, z, A, D, delta_bias) -> Tensor:
        if self.use_fast_path:
            return selective_scan_fn(x, delta, A, B, C, D, z, delta_bias, delta_softplus=True)
        return reference.selective_scan(x, delta, A, B, C, D, z, delta_bias, True)[0]

    def forward(self, hidden_states: Tensor, inference_params=None) -> Tensor:
        """Mix tokens: (B, L, E) -> (B, L, E).

        `inference_params` (with `key_value_memory_dict` and `seqlen_offset`) keeps the state of a one-directional
        layer: the first call fills it from a whole prompt, later ones go on token by token. Gradients reach the first
        call's output and nothing by way of the cache.
        """
        if hidden_states.dim() != 3 or hidden_states.shape[1] == 0 or hidden_states.shape[-1] != self.d_model:
            raise ValueError(
                f"hidden_states must be (B, L, {self.d_model}) with L >= 1, not {tuple(hidden_states.shape)}"
            )
        if inference_params is not None:
            return self._forward_cached(hidden_states, inference_params)
        if (found := self._why_not_fusable()) is not None:
            if self.use_fast_path and not torch.compiler.is_compiling():
                _say_once(found)
            out = self.out_proj(self._mix_by_modules(self.in_proj(hidden_states)))
        elif self.bimamba_type == "v2":
            out = self._mix_v2(hidden_states)
        else:
            out = self.out_proj(self._mix_channels_first(self.in_proj(hidden_states)))
        return self._layer_scaled(out)

    def _layer_scaled(self, out: Tensor) -> Tensor:
        return out if self.init_layer_scale is None else out * self.gamma

    def _forward_cached(self, hidden_states: Tensor, inference_params) -> Tensor:
        """A prompt at once and what follows it token by token, each layer's cache in `inference_params`.

        (B, L, E) -> (B, L, E).
        """
        if self.layer_idx is None:
            raise ValueError("layer_idx=None: inference_params keeps a layer's state under it; number the layers")
        memory = inference_params.key_value_memory_dict
        if self.layer_idx not in memory:
            memory[self.layer_idx] = self.allocate_inference_cache(hidden_states.shape[0], hidden_states.shape[1])
        conv_state, ssm_state = memory[self.layer_idx]
        if inference_params.seqlen_offset == 0:
            return self._prompt(hidden_states, conv_state, ssm_state)
        tokens = (self.step(token, conv_state, ssm_state)[0] for token in hidden_states.split(1, dim=1))
        return torch.cat(list(tokens), dim=1)

    def _prompt(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> Tensor:
        """`forward` of a prompt (B, L, E), which leaves its end in a cache, see `step`."""
        self._require_causal()
        self._check_cache(hidden_states, conv_state, ssm_state)
        conv, x_proj, dt_proj = self._fused_modules()
        xz, A = self.in_proj(hidden_states).transpose(1, 2), negative_exp(self.A_log)  # (B, 2 D, L)
        x, z, delta, B, C = scan_inputs(xz, conv.weight, conv.bias, x_proj.weight, dt_proj.weight, A)
        scan = selective_scan_fn if self.use_fast_path else selective_scan_ref
        y, last_state = scan(x, delta, A, B, C, self.D, z, dt_proj.bias, True, return_last_state=True)
        width = conv_state.shape[-1]
        conv_state.copy_(F.pad(xz[:, : self.d_inner], (width, 0))[..., -width:].detach())
        ssm_state.copy_(last_state.detach())
        return self._layer_scaled(self.out_proj(y.transpose(1, 2)))

    def step(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One token (B, 1, E) of a one-directional layer; conv_state (B, D, W) and ssm_state (B, D, N) in place.

        Returns (out (B, 1, E), conv_state, ssm_state). Gradients of out do not reach earlier tokens.
        """
        self._require_causal()
        if hidden_states.shape[1] != 1:
            raise ValueError(f"step takes one token, (B, 1, E), not {tuple(hidden_states.shape)}")
        self._check_cache(hidden_states, conv_state, ssm_state)
        conv, x_proj, dt_proj = self._fused_modules()
        x, z = self.in_proj(hidden_states.squeeze(1)).chunk(2, dim=-1)  # (B, D) each
        latest = torch.cat([conv_state[..., 1:], x.unsqueeze(-1).to(conv_state.dtype)], dim=-1)  # (B, D, W)
        conv_state.copy_(latest.detach())
        x = (latest * conv.weight.squeeze(1)).sum(-1)
        if conv.bias is not None:
            x = x + conv.bias
        x = F.silu(x).to(z.dtype)  # the cache's may be another
        dt, B, C = F.linear(x, x_proj.weight).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        y = selective_state_update(
            ssm_state.detach(), x, F.linear(dt, dt_proj.weight), negative_exp(self.A_log), B, C, self.D, z,
            dt_bias=dt_proj.bias, dt_softplus=True,
        )  # fmt: skip
        return self._layer_scaled(self.out_proj(y)).unsqueeze(1), conv_state, ssm_state

    def allocate_inference_cache(self, batch_size: int, max_seqlen: int, dtype=None) -> InferenceCache:
        """Zero states for `step`; their size does not depend on `max_seqlen`.

        dtype: of both; by default the weights' for the convolution's, float32 at least for the scan's, which add up.
        """
        self._require_causal()
        weight = self.conv1d.weight
        conv_state = weight.new_zeros(batch_size, self.d_inner, self.d_conv, dtype=dtype)
        wide = dtype or torch.promote_types(weight.dtype, torch.float32)
        ssm_state = weight.new_zeros(batch_size, self.d_inner, self.d_state, dtype=wide)
        return InferenceCache(conv_state, ssm_state)

    def _check_cache(self, hidden_states: Tensor, conv_state: Tensor, ssm_state: Tensor) -> None:
        """Raise ValueError for states that are not this batch's of this layer, before anything moves."""
        batch = hidden_states.shape[0]
        for name, state, size in (("conv_state", conv_state, self.d_conv), ("ssm_state", ssm_state, self.d_state)):
            needed = (batch, self.d_inner, size)
            if tuple(state.shape) != needed or not state.is_floating_point():
                raise ValueError(
                    f"{name} must be {needed}, floating point, beside hidden_states of batch {batch}, not "
                    f"{tuple(state.shape)} of {state.dtype}: start with a new cache, of "
                    f"allocate_inference_cache({batch}, ...), or with an empty key_value_memory_dict"
                )

    def _require_causal(self) -> None:
        if self.bimamba_type != "none":
            raise NotImplementedError(
                f"inference_params with bimamba_type={self.bimamba_type!r}: a bidirectional layer needs the whole "
                "sequence; call forward without a cache, or use bimamba_type='none'"
            )
        if (found := self._why_not_fusable()) is not None:
            raise TypeError(
                f"{found}, and a cache is kept by the parameters of conv1d, x_proj and dt_proj alone: adapt in_proj or "
                "out_proj instead, or merge the adapter (peft: merge_and_unload()), or take the hooks away"
            )
