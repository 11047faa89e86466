"""Views of an annotated image: scaled, cropped, flipped, with boxes and masks to match.

A view is drawn first and applied afterwards, to pixels and to shapes alike, so that both go the same way.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image, ImageOps
from pycocotools import mask as rle
from torch import Tensor
from torchvision.transforms import functional as F

from augment import channel_statistics
from det.coco import Instance, run_lengths


@dataclass(frozen=True)
class View:
    """A window of `size` at `corner` of an image scaled from `original` to `scaled`, then perhaps mirrored.

    All are (height, width) and (top, left) in pixels.
    """

    original: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    flip: bool

    @property
    def source(self) -> tuple[float, float, float, float]:
        """The window in the original image: left, top, right, bottom."""
        y, x = (original / scaled for original, scaled in zip(self.original, self.scaled))
        (top, left), (height, width) = self.corner, self.size
        return left * x, top * y, (left + width) * x, (top + height) * y

    def image(self, image: Image.Image) -> Image.Image:
        """The window's pixels: bilinear, and averaged where the image shrinks."""
        seen = image.resize(self.size[::-1], Image.Resampling.BILINEAR, box=self.source)
        return ImageOps.mirror(seen) if self.flip else seen

    def shape(self, segmentation: list | dict) -> dict:
        """The part of an object that the window shows, as compressed run lengths of the window's size."""
        if isinstance(segmentation, list):
            return run_lengths([self.points(polygon) for polygon in segmentation], *self.size)
        pixels = rle.decode(run_lengths(segmentation, *self.original)) * np.uint8(255)
        return rle.encode(np.asfortranarray(np.asarray(self.image(Image.fromarray(pixels))) >= 128, dtype=np.uint8))

    def points(self, polygon: list[float]) -> list[float]:
        """A polygon [x, y, x, y, ...] of the original in the window; corners may lie outside."""
        y, x = (scaled / original for original, scaled in zip(self.original, self.scaled))
        points = np.asarray(polygon, dtype=np.float64).reshape(-1, 2) * (x, y) - self.corner[::-1]
        if self.flip:
            points[:, 0] = self.size[1] - points[:, 0]
        return points.ravel().tolist()


def scaled_size(original: tuple[int, int], size: tuple[int, int], scale: float) -> tuple[int, int]:
    """The largest size of the image's proportions inside `scale` times `size`; one pixel at least."""
    ratio = min(scale * side / own for side, own in zip(size, original))
    return tuple(max(1, round(own * ratio)) for own in original)


def whole(original: tuple[int, int], size: tuple[int, int]) -> View:
    """All of an image, as large as fits `size`: evaluation."""
    scaled = scaled_size(original, size, 1.0)
    return View(original, scaled, (0, 0), scaled, flip=False)


def large_scale_jitter(
    original: tuple[int, int], size: tuple[int, int], scales: tuple[float, float], flip_prob: float
) -> View:
    """A window of at most `size` of the image scaled by a factor out of `scales`, relative to fitting `size`.

    Ghiasi et al., "Simple Copy-Paste", arXiv 2012.07177, section 3. Draws from Python's generator, which the
    dataset has seeded.
    """
    scaled = scaled_size(original, size, random.uniform(*scales))
    window = tuple(map(min, scaled, size))
    corner = tuple(random.randint(0, own - side) for own, side in zip(scaled, window))
    return View(original, scaled, corner, window, flip=random.random() < flip_prob)


def pixels(image: Image.Image) -> Tensor:
    """RGB image -> (3, height, width) float32, normalised, so that padding with zeros is padding with the mean."""
    return F.normalize(F.to_tensor(image), *channel_statistics(3))


def targets(view: View, instances: list[Instance]) -> dict[str, Tensor]:
    """The objects that are visible in a view: `boxes` (N, 4) float32, `labels` (N,) int64, `masks` (N, h, w) uint8.

    Boxes are recomputed from the remaining masks; objects that are cut away entirely are dropped.
    """
    shapes = [view.shape(instance.segmentation) for instance in instances]
    shown = [i for i, shape in enumerate(shapes) if rle.area(shape) > 0]
    shapes = [shapes[i] for i in shown]
    boxes = rle.toBbox(shapes) if shapes else np.zeros((0, 4))  # left, top, width, height
    masks = rle.decode(shapes) if shapes else np.zeros((*view.size, 0), np.uint8)  # (h, w, N)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": torch.from_numpy(boxes).float(),
        "labels": torch.tensor([instances[i].label for i in shown], dtype=torch.int64),
        "masks": torch.from_numpy(np.ascontiguousarray(masks.transpose(2, 0, 1))),  # (N, h, w)
    }
