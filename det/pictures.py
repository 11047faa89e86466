"""Pictures of detections beside the truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.font_manager import findfont
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor, resize, to_pil_image
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from det.coco import CocoSource
from det.views import targets, whole

SMALLEST_SIDE = 320  # images below this are enlarged, so that names can be read
LARGEST_SIDE = 1024  # of a picture: thin images are enlarged up to here, larger ones shrunk
LEAST_SCORE = 0.5  # of what is drawn
GAP = 4  # pixels between a picture and its truth


def colour(label: int) -> tuple[int, int, int]:
    """Colour of a class (labels count from 1): ten distinct colours, repeated."""
    return tuple(round(255 * part) for part in colormaps["tab10"]((label - 1) % 10)[:3])


def drawn_size(width: int, height: int) -> tuple[int, int]:
    """(width, height) at which an image is drawn: a whole multiple of its own, or `LARGEST_SIDE` long."""
    short, long = sorted((width, height))
    scale = min(-(-SMALLEST_SIDE // short), LARGEST_SIDE // long) or LARGEST_SIDE / long
    return tuple(max(1, round(side * scale)) for side in (width, height))


def nearest(masks: Tensor, width: int, height: int) -> Tensor:
    """(N, h, w) -> (N, height, width)."""
    rows, columns = (
        (2 * torch.arange(new) + 1) * old // (2 * new) for new, old in zip((height, width), masks.shape[1:])
    )
    return masks[:, rows[:, None], columns]


def draw(image: Image.Image, boxes: Tensor, labels: list[int], masks: Tensor, names: list[str]) -> Tensor:
    """Image with outlined objects (3, H, W) uint8, of `drawn_size`.

    Args:
        boxes: (N, 4), left, top, right, bottom. labels: from 1. masks: (N, h, w) bool.
        names: a caption each.
    """
    width, height = drawn_size(*image.size)
    shrunk = width < image.width or height < image.height
    resampling = Image.Resampling.BILINEAR if shrunk else Image.Resampling.NEAREST
    picture = pil_to_tensor(image.resize((width, height), resampling))
    if not labels:
        return picture
    colours = [colour(label) for label in labels]
    picture = draw_segmentation_masks(picture, nearest(masks, width, height), alpha=0.45, colors=colours)
    x, y = width / image.width, height / image.height
    boxes = (boxes * boxes.new_tensor([x, y, x, y])).round()
    boxes[:, 2:] = torch.maximum(boxes[:, 2:], boxes[:, :2] + 1)
    return draw_bounding_boxes(
        picture,
        boxes,
        names,
        colours,
        width=2,
        font=findfont("DejaVu Sans"),  # matplotlib brings it along
        font_size=16,
        label_colors="white",
        label_background_colors=colours,
        fill_labels=True,
    )


def draw_found(image: Image.Image, found: list[dict], source: CocoSource) -> Tensor:
    """Detections of at least `LEAST_SCORE`."""
    found = [one for one in found if one["score"] >= LEAST_SCORE]
    labels = [source.category_ids.index(one["category_id"]) + 1 for one in found]
    boxes = torch.tensor([one["bbox"] for one in found]).reshape(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [rle.decode(one["segmentation"]) for one in found] or [np.zeros(image.size[::-1])]
    names = [f"{source.class_names[label - 1]} {one['score']:.2f}" for label, one in zip(labels, found)]
    return draw(image, boxes, labels, torch.from_numpy(np.stack(masks)).bool(), names)


def draw_truth(image: Image.Image, index: int, source: CocoSource) -> Tensor:
    """What the annotations say."""
    size = source.size(index)
    truth = targets(whole(size, size), source.instances(index))
    labels = truth["labels"].tolist()
    return draw(image, truth["boxes"], labels, truth["masks"].bool(), [source.class_names[i - 1] for i in labels])


def save_pictures(shown: dict[int, list[dict]], source: CocoSource, path: Path, columns: int = 3) -> None:
    """A sheet of pairs: on the left what was found, on the right what is true."""
    pairs = []
    for index, found in sorted(shown.items()):
        image = source.read(index)
        left, right = draw_found(image, found, source), draw_truth(image, index, source)
        gap = left.new_full((3, left.shape[1], GAP), 255)
        pairs.append(torch.cat([left, gap, right], dim=2))
    height, width = (max(pair.shape[side] for pair in pairs) for side in (1, 2))
    padded = [fit(pair, height, width) for pair in pairs]
    to_pil_image(make_grid(padded, nrow=columns, padding=4 * GAP, pad_value=255)).save(path)


def fit(picture: Tensor, height: int, width: int) -> Tensor:
    """(3, h, w) -> (3, height, width): as large as it goes, white around."""
    scale = min(height / picture.shape[1], width / picture.shape[2])
    picture = resize(picture, [round(picture.shape[1] * scale), round(picture.shape[2] * scale)])
    sheet = picture.new_full((3, height, width), 255)
    sheet[:, : picture.shape[1], : picture.shape[2]] = picture
    return sheet
