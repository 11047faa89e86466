"""UPerNet (Xiao et al., arXiv 1807.10221) on a plain or a staged backbone.

The heads' parameters are called as in the published segmentation weights of other models (mmsegmentation's
names), so that `decode_head` and `auxiliary_head` read them. B images, K classes, E_i channels of level i.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dense import SCALES, Backbone, DenseModel, are_falling, resize_maps
from errors import check_choice

# Sizes of the grids that the coarsest level is averaged over.
POOL_SIZES = (1, 2, 3, 6)
DROPOUT = 0.1


class ConvNormReLU(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, in_channels: int, channels: int, kernel_size: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, channels, kernel_size, padding=kernel_size // 2, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        nn.init.kaiming_normal_(self.conv.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv(x)).relu()


def classifier(channels: int, num_classes: int) -> nn.Conv2d:
    layer = nn.Conv2d(channels, num_classes, 1)
    nn.init.normal_(layer.weight, std=0.01)
    nn.init.zeros_(layer.bias)
    return layer


class Rescale(nn.Sequential):
    """A map (B, E, H, W) -> (B, E, s * H, s * W) for s = 4, 2, 1, 1/2, 1/4, as BEiT makes levels of a plain backbone
    (arXiv 2106.08254)."""

    def __init__(self, channels: int, scale: float):
        def twice():
            return nn.ConvTranspose2d(channels, channels, 2, 2)

        layers = {
            4.0: lambda: (twice(), nn.BatchNorm2d(channels), nn.GELU(), twice()),
            2.0: lambda: (twice(),),
            1.0: lambda: (),
            0.5: lambda: (nn.MaxPool2d(2, ceil_mode=True),),
            0.25: lambda: (nn.MaxPool2d(4, ceil_mode=True),),
        }
        check_choice("scale", scale, layers)
        super().__init__(*layers[scale]())


class UPerHead(nn.Module):
    """Levels [(B, E_i, H_i, W_i)], the finest first -> logits (B, K, H_0, W_0)."""

    def __init__(self, in_channels: list[int], channels: int, num_classes: int):
        super().__init__()
        *lateral, coarsest = in_channels
        self.psp_modules = nn.ModuleList(
            nn.Sequential(nn.AdaptiveAvgPool2d(size), ConvNormReLU(coarsest, channels, 1)) for size in POOL_SIZES
        )
        self.bottleneck = ConvNormReLU(coarsest + len(POOL_SIZES) * channels, channels, 3)
        self.lateral_convs = nn.ModuleList(ConvNormReLU(width, channels, 1) for width in lateral)
        self.fpn_convs = nn.ModuleList(ConvNormReLU(channels, channels, 3) for _ in lateral)
        self.fpn_bottleneck = ConvNormReLU(len(in_channels) * channels, channels, 3)
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, levels: list[Tensor]) -> Tensor:
        maps = [lateral(level) for lateral, level in zip(self.lateral_convs, levels)]
        maps.append(self.pool(levels[-1]))
        for i in range(len(maps) - 1, 0, -1):  # top down
            maps[i - 1] = maps[i - 1] + resize_maps(maps[i], maps[i - 1].shape[-2:]).to(maps[i].dtype)
        maps = [*(conv(level) for conv, level in zip(self.fpn_convs, maps)), maps[-1]]
        finest = maps[0].shape[-2:]
        maps = [maps[0], *(resize_maps(level, finest).to(level.dtype) for level in maps[1:])]
        fused = self.fpn_bottleneck(torch.cat(maps, dim=1))  # (B, 4 * channels, H_0, W_0) -> (B, channels, ...)
        return self.conv_seg(self.dropout(fused))

    def pool(self, x: Tensor) -> Tensor:
        """The coarsest level with its averages over grids of four sizes: (B, E, H, W) -> (B, channels, H, W)."""
        pooled = [resize_maps(module(x), x.shape[-2:]).to(x.dtype) for module in self.psp_modules]
        return self.bottleneck(torch.cat([x, *pooled], dim=1))


class FCNHead(nn.Module):
    """A level (B, E, H, W) -> logits (B, K, H, W): the auxiliary classifier, for training alone."""

    def __init__(self, in_channels: int, channels: int, num_classes: int):
        super().__init__()
        self.convs = nn.Sequential(ConvNormReLU(in_channels, channels, 3))
        self.dropout = nn.Dropout2d(DROPOUT)
        self.conv_seg = classifier(channels, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_seg(self.dropout(self.convs(x)))


class UPerNet(DenseModel):
    """Images (B, 3, height, width) of any size -> logits (B, K, height, width), float32.

    Args:
        backbone: a plain one's maps are rescaled by `scales`; a staged one's are levels as they are.
        channels: of the head; None for the width of the backbone's widest level.
        auxiliary_channels: of the auxiliary head, which sees the last level but one; 0 for none.
        scales: see `Rescale`; as many as the backbone has maps, falling, because the head takes the finest level first.
    """

    def __init__(
        self,
        backbone: Backbone,
        num_classes: int,
        channels: int | None = None,
        auxiliary_channels: int = 256,
        scales: tuple[float, ...] = SCALES,
    ):
        super().__init__()
        maps = len(backbone.channels)
        if backbone.plain and len(scales) != maps:
            raise ValueError(f"{len(scales)} scales for {maps} maps: give one scale per map")
        if backbone.plain and not are_falling(scales):
            given = " ".join(f"{scale:g}" for scale in scales)
            raise ValueError(f"{given}: give each scale once, the largest first")
        if maps < 2:
            raise ValueError(
                f"UPerNet needs at least two maps and the backbone gives {maps}: take one with more blocks or stages"
            )
        self.backbone = backbone
        widths = backbone.channels
        pairs = zip(widths, scales)
        self.neck = nn.ModuleList(Rescale(*pair) for pair in pairs) if backbone.plain else None
        self.decode_head = UPerHead(widths, channels or max(widths), num_classes)
        self.auxiliary_head = FCNHead(widths[-2], auxiliary_channels, num_classes) if auxiliary_channels else None

    def forward(self, images: Tensor, with_auxiliary: bool = False) -> Tensor | tuple[Tensor, Tensor | None]:
        """Logits, or with those of the auxiliary head, None where there is none: training asks for both.

        Not `self.training` decides, because --no-train-mode trains with that off.
        """
        size = images.shape[-2:]
        if self.backbone.only_size:
            images = filled(images, self.backbone.only_size)
        padded = tuple(side + -side % self.backbone.cell for side in images.shape[-2:])
        levels = self.backbone(images)
        if self.neck is not None:
            levels = [rescale(level) for rescale, level in zip(self.neck, levels)]
        logits = uncrop(self.decode_head(levels), padded, size)
        if not with_auxiliary:
            return logits
        auxiliary = None if self.auxiliary_head is None else self.auxiliary_head(levels[-2])
        return logits, None if auxiliary is None else uncrop(auxiliary, padded, size)


def filled(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Images (B, 3, height, width) with zeros to the right and below, as a training crop has them, up to `size`."""
    bottom, right = (max(0, full - side) for full, side in zip(size, images.shape[-2:]))
    return F.pad(images, (0, right, 0, bottom))


def uncrop(logits: Tensor, padded: tuple[int, int], size: tuple[int, int]) -> Tensor:
    """Logits of a padded image (B, K, h, w) at the resolution of the image: (B, K, *size)."""
    return resize_maps(logits, padded)[..., : size[0], : size[1]]


def synchronised(model: nn.Module, world) -> nn.Module:
    """Batch norm over the images of all ranks. Statistics of one rank's own on the CPU, where torch has no other."""
    if world.size == 1 or world.device.type != "cuda":
        return model
    return nn.SyncBatchNorm.convert_sync_batchnorm(model)
