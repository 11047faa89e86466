"""An exponential moving average of a model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from errors import some_of


class WeightsEma:
    """average = decay * average + (1 - decay) * weights, after every optimiser step.

    The decay is constant, as in DeiT, and the average starts at the initial weights. It covers the whole
    state dict, whose keys it keeps; entries that are not floating point are copied. It lives on `device`, by
    default the model's.
    """

    def __init__(self, model: nn.Module, decay: float, device: str | None = None):
        self.decay = decay
        self.shadow = {key: value.detach().to(device, copy=True) for key, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the model's weights."""
        floating, targets = [], []
        for key, value in model.state_dict().items():
            average = self.shadow[key]
            if average.is_floating_point():
                floating.append(average)
                # Towards the host nothing would wait for the copy before it is read.
                targets.append(value.detach().to(average.device, non_blocking=average.is_cuda))
            else:
                average.copy_(value)
        torch._foreach_lerp_(floating, targets, 1.0 - self.decay)

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.shadow

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Take over an average of the same keys and shapes. Raises ValueError for others."""
        if state.keys() != self.shadow.keys():
            differing = sorted(state.keys() ^ self.shadow.keys())
            raise ValueError(f"the average in it is another model's: {some_of(differing)} differ")
        for key, value in state.items():
            if value.shape != self.shadow[key].shape:
                raise ValueError(f"its average of {key} is {tuple(value.shape)}, not {tuple(self.shadow[key].shape)}")
            self.shadow[key].copy_(value)

    @contextmanager
    def applied_to(self, model: nn.Module) -> Iterator[None]:
        """Let `model` hold the averaged weights for a while; the raw ones come back bit for bit."""
        raw = {key: value.detach().clone() for key, value in model.state_dict().items()}
        model.load_state_dict(self.shadow)
        try:
            yield
        finally:
            model.load_state_dict(raw)
