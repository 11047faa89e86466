"""The simple feature pyramid: all levels from one feature map (Li et al., "Exploring Plain Vision Transformer
Backbones for Object Detection", arXiv 2203.16527, section 3).

Symbols in the shape comments: B images, E channels of the backbone, C channels of the pyramid, H and W the
backbone's grid.
"""

from __future__ import annotations

from collections import OrderedDict

import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from dense import SCALES, are_falling
from errors import check_choice


def resample(channels: int, scale: float) -> tuple[nn.Sequential, int]:
    """Modules that bring a map (B, E, H, W) to `scale` of its size, and the channels they leave."""
    check_choice("pyramid_scales", scale, SCALES)
    half, quarter = channels // 2, channels // 4
    if scale == 4.0:
        first, second = nn.ConvTranspose2d(channels, half, 2, 2), nn.ConvTranspose2d(half, quarter, 2, 2)
        return nn.Sequential(first, LayerNorm2d(half), nn.GELU(), second), quarter
    if scale == 2.0:
        return nn.Sequential(nn.ConvTranspose2d(channels, half, 2, 2)), half
    return nn.Sequential(*([nn.MaxPool2d(2, 2)] if scale == 0.5 else [])), channels


def project(channels: int, out_channels: int) -> list[nn.Module]:
    """1 x 1 then 3 x 3 convolution, each with LayerNorm over channels in the place of a bias."""
    return [
        nn.Conv2d(channels, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    ]


class SimpleFeaturePyramid(nn.Module):
    """Map (B, E, H, W) -> {"p2": (B, C, 4H, 4W), "p3": (B, C, 2H, 2W), ...}, finest first, and one more level
    by keeping every second pixel of the coarsest.

    A level pN has stride 2^N, so the names follow from the backbone's stride.

    Args:
        channels: E. out_channels: C. stride: image pixels to a pixel of the map, a power of two.
        scales: sizes of the levels over the map's, falling.
    """

    def __init__(self, channels: int, out_channels: int = 256, stride: int = 16, scales: tuple = SCALES):
        super().__init__()
        if not scales or not are_falling(scales):
            raise ValueError(f"pyramid scales {scales}: use some of {SCALES}, each once, the largest first")
        if stride & (stride - 1):
            raise ValueError(f"a backbone of stride {stride}: the pyramid's levels need a power of two")
        if stride < max(scales):
            raise ValueError(f"a backbone of stride {stride} has no map {scales[0]:g} times as large as its own")
        self.out_channels = out_channels
        self.strides = [int(stride / scale) for scale in scales]
        self.levels = nn.ModuleDict()
        for scale, name in zip(scales, self.names):
            sampling, left = resample(channels, scale)
            self.levels[name] = nn.Sequential(*sampling, *project(left, out_channels))

    @property
    def names(self) -> list[str]:
        """Of the levels that boxes are pooled from; `forward` returns one more."""
        return [f"p{stride.bit_length() - 1}" for stride in self.strides]

    @property
    def all_strides(self) -> list[int]:
        """Of all levels that `forward` returns."""
        return [*self.strides, 2 * self.strides[-1]]

    def forward(self, x: Tensor) -> OrderedDict[str, Tensor]:
        levels = OrderedDict((name, level(x)) for name, level in self.levels.items())
        coarsest = next(reversed(levels.values()))
        levels["pool"] = F.max_pool2d(coarsest, kernel_size=1, stride=2)
        return levels
