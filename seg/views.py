"""Views of a labelled image for training: resized, cropped, flipped, distorted in colour.

The recipe is that of the published segmentation runs. Every draw comes from Python's and torch's global
generators, which the data set seeds from counters.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from augment import channel_statistics

IGNORED = 255
CROP_TRIALS = 10


@dataclass(frozen=True)
class ViewSettings:
    """How a training view is drawn.

    size: (height, width) that comes out. sides: what the image's (shorter, longer) side is made to fit, times a
    ratio drawn from `ratios`. class_share: one class fills at most this share of a crop, if ten trials find such.
    """

    size: tuple[int, int]
    sides: tuple[int, int]
    ratios: tuple[float, float] = (0.5, 2.0)
    class_share: float = 0.75
    flip_prob: float = 0.5
    photometric: bool = True


def training_view(image: Image.Image, label: np.ndarray, settings: ViewSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """An image and its label (H, W) uint8 -> float32 (3, *size), normalised, and int64 (*size).

    What the image does not fill is zero, and ignored in the label.
    """
    size = fitting(image.size[::-1], settings.sides, random.uniform(*settings.ratios))
    label = resized(label, size)
    top, left = crop_corner(label, settings)
    height, width = (min(side, crop) for side, crop in zip(size, settings.size))
    image = image.resize(size[::-1], Image.Resampling.BILINEAR).crop((left, top, left + width, top + height))
    label = label[top : top + height, left : left + width]
    if random.random() < settings.flip_prob:
        image, label = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT), label[:, ::-1]
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
    if settings.photometric:
        pixels = distorted(pixels)
    padding = [0, 0, settings.size[1] - width, settings.size[0] - height]
    label = torch.from_numpy(np.array(label)).long()
    return F.pad(normalised(pixels), padding), F.pad(label[None], padding, fill=IGNORED)[0]


def fitting(size: tuple[int, int], sides: tuple[int, int], ratio: float = 1.0) -> tuple[int, int]:
    """The largest (height, width) of an image's proportions whose sides fit `ratio` times (shorter, longer)."""
    factor = ratio * min(sides[0] / min(size), sides[1] / max(size))
    return max(1, round(size[0] * factor)), max(1, round(size[1] * factor))


def resized(label: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A label (H, W) uint8 at another size, no values mixed."""
    return np.asarray(Image.fromarray(label).resize(size[::-1], Image.Resampling.NEAREST))


def crop_corner(label: np.ndarray, settings: ViewSettings) -> tuple[int, int]:
    """(top, left) of a crop in which no class is too large, or of the last one tried. A share of 1 takes any crop."""
    height, width = settings.size
    for _ in range(CROP_TRIALS):
        top = random.randint(0, max(0, label.shape[0] - height))
        left = random.randint(0, max(0, label.shape[1] - width))
        if settings.class_share >= 1:
            break
        counts = np.bincount(label[top : top + height, left : left + width].ravel(), minlength=256)[:IGNORED]
        if counts.max() < settings.class_share * counts.sum():
            break
    return top, left


def distorted(pixels: torch.Tensor) -> torch.Tensor:
    """Brightness, contrast, saturation and hue, each changed with probability 1/2; uint8 (3, H, W) both ways.

    Contrast comes before or after the two of colour (Liu et al., SSD, arXiv 1512.02325).
    """

    def chance() -> bool:
        return random.random() < 0.5

    if chance():
        pixels = (pixels.float() + random.uniform(-32, 32)).clamp(0, 255).byte()
    contrast_first = chance()
    if contrast_first and chance():
        pixels = (pixels.float() * random.uniform(0.5, 1.5)).clamp(0, 255).byte()
    if chance():
        pixels = F.adjust_saturation(pixels, random.uniform(0.5, 1.5))
    if chance():
        pixels = F.adjust_hue(pixels, random.uniform(-0.1, 0.1))
    if not contrast_first and chance():
        pixels = (pixels.float() * random.uniform(0.5, 1.5)).clamp(0, 255).byte()
    return pixels


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W) -> float32, ImageNet's mean 0 and deviation 1."""
    return F.normalize(v2.functional.to_dtype(pixels, torch.float32, scale=True), *channel_statistics(3))
