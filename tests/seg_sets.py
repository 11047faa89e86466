"""Tiny labelled data sets in the formats of the real ones."""

import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image


def picture(seed: int, width: int, height: int) -> tuple[Image.Image, np.ndarray]:
    """An image of rectangles in the colours of their classes, and the classes from 0 to 3, (height, width)."""
    rng = np.random.default_rng(seed)
    classes = np.zeros((height, width), np.uint8)
    for label in (1, 2, 3):
        top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
        classes[top : top + height // 3, left : left + width // 3] = label
    colours = np.array([[40, 40, 40], [200, 60, 60], [60, 200, 60], [60, 60, 200]], np.uint8)
    return Image.fromarray(colours[classes]), classes


def write_grey(path: Path, values: np.ndarray, bits: int) -> None:
    """A grey PNG of 1, 2, 4 or 8 bits a pixel, as labelling tools write them and Pillow does not."""
    height, width = values.shape
    digits = np.unpackbits(values[:, :, None], axis=2)[:, :, 8 - bits :].reshape(height, -1)
    lines = b"".join(b"\0" + line.tobytes() for line in np.packbits(digits, axis=1))
    chunks = ((b"IHDR", struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)),
              (b"IDAT", zlib.compress(lines)), (b"IEND", b""))  # fmt: skip
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in chunks)  # fmt: skip
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(packed))


def write_ade20k(root: Path, train: int = 6, val: int = 3, width: int = 40, height: int = 32) -> Path:
    """ADEChallengeData2016: JPEG images, grey PNG labels from 1 to 150 with 0 for no class, and the list of names."""
    for split, count, first in (("training", train, 0), ("validation", val, 100)):
        for kind in ("images", "annotations"):
            (root / kind / split).mkdir(parents=True)
        name = {"training": "ADE_train", "validation": "ADE_val"}[split]
        for i in range(count):
            image, classes = picture(first + i, width + 2 * i, height)
            image.save(root / "images" / split / f"{name}_{i + 1:08d}.jpg", quality=95)
            values = np.array([0, 1, 2, 150], np.uint8)[classes]
            Image.fromarray(values).save(root / "annotations" / split / f"{name}_{i + 1:08d}.png")
    lines = ["Idx\tRatio\tTrain\tVal\tStuff\tName"]
    lines += [f"{i}\t0.1\t10\t1\t0\tthing {i}, object {i}" for i in range(1, 151)]
    (root / "objectInfo150.txt").write_text("\n".join(lines) + "\n")
    return root


def write_folder(root: Path, names=("ground", "red", "green", "blue"), train: int = 6, val: int = 3) -> Path:
    """images/{train,val}/**.png, annotations of the same names in palette PNGs from 0, classes.txt."""
    for split, count, first in (("train", train, 0), ("val", val, 100)):
        for i in range(count):
            place = Path(split) / ("north" if i % 2 else "south")
            for kind in ("images", "annotations"):
                (root / kind / place).mkdir(parents=True, exist_ok=True)
            image, classes = picture(first + i, 36, 30)
            image.save(root / "images" / place / f"{i}.png")
            label = Image.fromarray(classes, mode="P")
            label.putpalette([c for colour in ((0, 0, 0), (255, 0, 0), (0, 255, 0), (0, 0, 255)) for c in colour])
            label.save(root / "annotations" / place / f"{i}.png")
    if names:
        (root / "classes.txt").write_text("\n".join(names) + "\n")
    return root
