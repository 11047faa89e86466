"""Generated scenes: scikit-learn's handwritten digits, several a picture, on cluttered backgrounds.

Real handwriting with exact masks, boxes and labels and without a download: what the demonstrations of
segmentation and detection learn from. A scene is a function of (seed, split, number) alone. Training scenes are
composed of the digits that DIGITS trains on, held-out scenes of the others.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import numpy as np

from datasets import digits_sources
from errors import check_choice

CLASS_NAMES = [str(digit) for digit in range(10)]
SPLITS = ("train", "val")
INKS = ("any", "light")
# See samplers.ORDER_STREAM: one stream of random numbers per purpose.
SCENE_STREAM = 5

MOST_DIGITS = 5
SIDES = (0.24, 0.5)  # of a digit, as shares of the scene's
MOST_COVERED = 0.15  # of a digit's square, by all others; its ink is more than that, so some of it shows
LEAST_CONTRAST = 90.0  # between a digit's colour and the background around it, Euclidean in RGB
DIMMED = 0.5  # backgrounds behind light ink


@dataclass
class Scene:
    """One picture and what is in it: n digits, in the order in which they were drawn.

    image: uint8 (H, W, 3). masks: bool (n, H, W), what is seen of each. boxes: float32 (n, 4), left, top, right,
    bottom around the masks, right and bottom exclusive. labels: int64 (n,), 0 to 9.
    """

    image: np.ndarray
    masks: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray

    def __iter__(self):
        return iter((self.image, self.masks, self.boxes, self.labels))

    def classes(self, background: int = 0) -> np.ndarray:
        """The class of each pixel, uint8 (H, W): `background`, or the digit and one more."""
        found = np.full(self.image.shape[:2], background, np.uint8)
        for mask, label in zip(self.masks, self.labels):
            found[mask] = label + 1
        return found


class Scenes:
    """`count` square scenes of `size` pixels; `scenes[i]` is always the same one.

    Args:
        split: "train" or "val": which digits the scenes are composed of.
        count: the length; `at` gives any number of other scenes beyond it.
        ink: digits of "any" colour that stands out, or "light" ones on darker backgrounds, which a small model
            learns to read several times sooner.
    """

    def __init__(self, split: str, size: int = 96, count: int = 1000, seed: int = 0, ink: str = "any"):
        check_choice("split", split, SPLITS)
        check_choice("ink", ink, INKS)
        if size < 48:
            raise ValueError(f"size={size}: digits are not told apart in scenes below 48 pixels")
        self.split, self.size, self.count, self.seed, self.ink = split, size, count, seed, ink
        self.digits, self.labels = _digits(split)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Scene:
        if not 0 <= index < self.count:
            raise IndexError(f"scene {index} of {self.count}")
        return self.at(index)

    def at(self, number: int) -> Scene:
        """Scene `number`, from 0 on without an end."""
        key = (SCENE_STREAM, SPLITS.index(self.split))
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, number], spawn_key=key))
        canvas = background(rng, self.size) * (DIMMED if self.ink == "light" else 1)
        boxes = places(rng, self.size)
        chosen = rng.integers(len(self.labels), size=len(boxes))
        masks = np.zeros((len(boxes), self.size, self.size), bool)
        for i, (digit, (top, left, side)) in enumerate(zip(chosen, boxes)):
            window = slice(top, top + side), slice(left, left + side)
            alpha = ink(self.digits[digit], side)
            colour = light(rng) if self.ink == "light" else contrasting(rng, canvas[window])
            canvas[window] += alpha[:, :, None] * (colour - canvas[window])
            masks[:i][(slice(None), *window)] &= alpha < 0.5
            masks[i][window] = alpha >= 0.5
        canvas += rng.standard_normal(canvas.shape, dtype=np.float32) * rng.uniform(2, 10)
        image = canvas.clip(0, 255).astype(np.uint8)
        return Scene(image, masks, np.array([box_of(mask) for mask in masks], np.float32), self.labels[chosen])


@cache
def _digits(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Digits float32 (n, 8, 8) from 0 to 1, labels (n,): the split of the data set DIGITS."""
    sources = digits_sources(need_train=True)
    source = sources.train if split == "train" else sources.val
    return source.images.astype(np.float32) / 255, source.labels


@cache
def enlarging(side: int, small: int) -> np.ndarray:
    """The matrix (side, small) that interpolates `small` samples linearly at `side` places."""
    at = ((np.arange(side) + 0.5) * small / side - 0.5).clip(0, small - 1)
    return np.maximum(0, 1 - np.abs(at[:, None] - np.arange(small))).astype(np.float32)


def ink(digit: np.ndarray, side: int) -> np.ndarray:
    """A digit (8, 8) as opacity (side, side): enlarged, its edges about two pixels wide."""
    large = enlarging(side, 8) @ digit @ enlarging(side, 8).T
    return ((large - 0.5) * (side / 16) + 0.5).clip(0, 1)


def places(rng: np.random.Generator, size: int) -> list[tuple[int, int, int]]:
    """(top, left, side) of one to five digits that hardly cover each other."""
    found: list[tuple[int, int, int]] = []
    for _ in range(int(rng.integers(1, MOST_DIGITS + 1))):
        for _ in range(20):
            side = int(rng.uniform(*SIDES) * size)
            place = (*rng.integers(0, size - side + 1, 2).tolist(), side)
            if max(covered([*found, place])) <= MOST_COVERED:
                found.append(place)
                break
    return found


def covered(squares: list[tuple[int, int, int]]) -> list[float]:
    """The share of each square (top, left, side) that lies in others."""
    return [
        sum(shared(square, other) for other in squares if other is not square) / square[2] ** 2 for square in squares
    ]


def shared(a: tuple[int, int, int], b: tuple[int, int, int]) -> int:
    """Pixels that two squares share."""
    height, width = (max(0, min(a[i] + a[2], b[i] + b[2]) - max(a[i], b[i])) for i in (0, 1))
    return height * width


def contrasting(rng: np.random.Generator, window: np.ndarray) -> np.ndarray:
    """A colour (3,) that stands out from a window (h, w, 3)."""
    around = window.mean(axis=(0, 1))
    while True:
        colour = rng.uniform(0, 255, 3).astype(np.float32)
        if np.linalg.norm(colour - around) >= LEAST_CONTRAST:
            return colour


def light(rng: np.random.Generator) -> np.ndarray:
    """A light colour (3,)."""
    return rng.uniform(190, 255, 3).astype(np.float32)


def background(rng: np.random.Generator, size: int) -> np.ndarray:
    """Clutter without digits, float32 (size, size, 3): a smooth field of colours, blobs and thin lines."""
    cells = int(rng.integers(2, 6))
    field = rng.uniform(-1, 1, (3, cells, cells)).astype(np.float32) * rng.uniform(15, 60)
    field = enlarging(size, cells) @ field @ enlarging(size, cells).T  # (3, size, size)
    canvas = rng.uniform(40, 215, 3).astype(np.float32) + field.transpose(1, 2, 0)
    y, x = np.ogrid[:size, :size]
    for _ in range(int(rng.integers(0, 5))):
        (top, left), radius = rng.uniform(0, size, 2), rng.uniform(0.03, 0.2) * size
        stretch = rng.uniform(0.5, 2)
        near = ((y - top) ** 2 * stretch + (x - left) ** 2 / stretch) < radius**2
        canvas[near] += rng.uniform(-50, 50, 3).astype(np.float32)
    for _ in range(int(rng.integers(0, 4))):
        angle, (top, left) = rng.uniform(0, np.pi), rng.uniform(0, size, 2)
        near = np.abs((y - top) * np.cos(angle) - (x - left) * np.sin(angle)) < rng.uniform(0.4, 1.0)
        canvas[near] += rng.uniform(-80, 80, 3).astype(np.float32)
    return canvas


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    """Left, top, right and bottom of a mask (H, W) that is not empty."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1] + 1, rows[-1] + 1
