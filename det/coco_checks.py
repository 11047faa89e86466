"""What must hold of COCO's annotation files before the first step; what does not raises `DataError`, one line.

pycocotools checks little: it fails late, and on some masks reads or writes memory that is not its own.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path

from errors import DataError

NUMBER, NAME = (int, float), (str, int)
# What the entries of a file's lists must have, and what they may have, and of which types.
NEEDED = {
    "images": {"id": NAME, "file_name": str, "width": int, "height": int},
    "annotations": {"image_id": NAME, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": NAME},
}
ALLOWED = {"images": {}, "annotations": {"iscrowd": int, "area": NUMBER}, "categories": {}}
# In longer sides of its image; no object reaches so far. pycocotools takes memory in proportion to how far a polygon
# reaches, and views enlarge it with its image.
FARTHEST = 100


def check_content(file: Path, content: dict) -> None:
    """Raise DataError for entries that lack something or that nothing in the file belongs to."""
    for kind in NEEDED:
        for i, entry in enumerate(content[kind]):
            check_entry(f"{file}: {kind}[{i}]", kind, entry)
        if not content[kind] and kind != "annotations":
            raise DataError(f"{file} lists no {kind}; fetch it again")
    for kind in ("images", "categories"):
        number, count = Counter(entry["id"] for entry in content[kind]).most_common(1)[0]
        if count > 1:
            raise DataError(f"{file}: {count} {kind} have the id {number}; ids must differ")
    first = content["images"][0]["id"]
    for i, image in enumerate(content["images"]):  # pycocotools sorts them
        if isinstance(image["id"], str) != isinstance(first, str):
            raise DataError(
                f"{file}: images[{i}] has the id {shortened(image['id'])} and images[0] {shortened(first)}: expected "
                "ids of one type; write all as numbers, or all as text"
            )
    for i, image in enumerate(content["images"]):
        if not (image["width"] > 0 and image["height"] > 0):
            raise DataError(f"{file}: images[{i}] is {image['width']} x {image['height']}: expected a pixel at least")
    check_annotations(file, content)


def check_entry(where: str, kind: str, entry) -> None:
    """Raise DataError if `entry` is not a valid entry of `kind` (a key of NEEDED)."""
    if not isinstance(entry, dict):
        raise DataError(f"{where} is {shortened(entry)}; it needs {', '.join(NEEDED[kind])}")
    lacking = [key for key in NEEDED[kind] if key not in entry]
    if lacking:
        raise DataError(f"{where} has no {lacking[0]!r}; it needs {', '.join(NEEDED[kind])}")
    for key, types in (NEEDED[kind] | ALLOWED[kind]).items():
        if key in entry and not isinstance(entry[key], types):
            raise DataError(f"{where} has {key} {shortened(entry[key])}: expected {expected(types)}")


def expected(types: type | tuple[type, ...]) -> str:
    """Types in words."""
    words = {int: "a whole number", float: "a number", str: "text", list: "a list"}
    types = types if isinstance(types, tuple) else (types,)
    return " or ".join(words[one] for one in types if not (one is int and float in types))


def shortened(value, length: int = 60) -> str:
    """A value as Python writes it, cut."""
    text = repr(value)
    return text if len(text) <= length else f"{text[:length]}..."


def check_annotations(file: Path, content: dict) -> None:
    images = {image["id"]: image for image in content["images"]}
    categories = {category["id"] for category in content["categories"]}
    for i, annotation in enumerate(content["annotations"]):
        image, where = images.get(annotation["image_id"]), f"{file}: annotations[{i}]"
        if image is None:
            raise DataError(
                f"{where} is of image {annotation['image_id']}, which is not listed; add the image, or remove the "
                "annotation"
            )
        if annotation["category_id"] not in categories:
            raise DataError(
                f"{where} has category {annotation['category_id']}; the file lists {len(categories)} "
                f"from {min(categories)} to {max(categories)}; add the category, or remove the annotation"
            )
        box, farthest = annotation["bbox"], FARTHEST * max(image["height"], image["width"])
        if not (len(box) == 4 and all(isinstance(v, NUMBER) for v in box)):
            raise DataError(f"{where} has bbox {shortened(box)}: expected [x, y, width, height]")
        if max(map(abs, box)) > farthest:
            raise DataError(f"{where} has bbox {shortened(box)}: expected numbers of {farthest:,} pixels at most")
        area = annotation.get("area", 0)
        if not 0 <= area < math.inf:
            raise DataError(f"{where} has area {area}: expected 0 or a positive number; without one the mask's counts")
        check_segmentation(where, annotation.get("segmentation"), (image["height"], image["width"]))


def check_truth(file: str, content: dict) -> None:
    """Raise DataError for a box that nothing can be compared with: pycocotools lets NaN overlap with everything."""
    for i, annotation in enumerate(content["annotations"]):
        if any(map(math.isnan, annotation["bbox"])):
            raise DataError(f"{file}: annotations[{i}] has bbox {shortened(annotation['bbox'])}: expected numbers")


def check_segmentation(where: str, shape, size: tuple[int, int]) -> None:
    """Raise DataError if `shape` is not a mask for an image of `size` (height, width); a missing mask is allowed."""
    if isinstance(shape, list):
        check_polygons(where, shape, size)
    elif isinstance(shape, dict):
        check_run_lengths(where, shape, size)
    elif shape is not None:
        raise DataError(f"{where} has segmentation {shortened(shape)}: expected polygons or run lengths")


def check_polygons(where: str, polygons: list, size: tuple[int, int]) -> None:
    farthest = FARTHEST * max(size)
    for polygon in polygons:
        if not (isinstance(polygon, list) and all(isinstance(value, NUMBER) for value in polygon)):
            found = "a flat list" if isinstance(polygon, NUMBER) else shortened(polygon)
            raise DataError(f"{where} has {found} for a mask: expected polygons [[x, y, x, y, ...], ...]")
        if polygon and max(map(abs, polygon)) > farthest:
            raise DataError(
                f"{where} has a corner at {shortened(max(polygon, key=abs))}: expected pixels of the image of "
                f"{size[1]} x {size[0]}, {farthest:,} at most"
            )


def check_run_lengths(where: str, shape: dict, size: tuple[int, int]) -> None:
    """They must fill the image: pycocotools leaves the rest of a mask as the memory was, or writes beyond it.

    A mask without size or counts is treated as missing.
    """
    if not {"size", "counts"} <= shape.keys():
        return
    counts, pixels = shape["counts"], size[0] * size[1]
    if shape["size"] != list(size):
        raise DataError(
            f"{where} has a mask of {shortened(shape['size'])} for an image of {list(size)}; write the mask at the "
            "image's size, or remove it"
        )
    if isinstance(counts, str):
        try:
            counts = decompressed(counts)
        except ValueError as error:
            raise DataError(f"{where} has run lengths {shortened(counts)} that cannot be decoded ({error})") from error
    if not (isinstance(counts, list) and all(isinstance(run, int) and run >= 0 for run in counts)):
        raise DataError(
            f"{where} has run lengths {shortened(counts)}: expected whole numbers, or COCO's compressed text"
        )
    if sum(counts) != pixels:
        raise DataError(
            f"{where} has run lengths of {sum(counts)} pixels for an image of {pixels}; write the mask again, or "
            "remove it"
        )


def decompressed(text: str) -> list[int]:
    """The run lengths in COCO's compressed text. Raises ValueError if the text is not valid.

    A character holds 5 bits of a number, the lowest first, and whether more follow; the last one's highest bit is the
    sign. From the fourth number on, what stands there is the difference from the number two before.
    """
    counts, value, bits = [], 0, 0
    for character in text:
        digit = ord(character) - ord("0")
        if not 0 <= digit < 64:
            raise ValueError(f"{character!r} is not one of its characters")
        value |= (digit & 31) << bits
        bits += 5
        if digit & 32:
            continue
        if digit & 16:
            value -= 1 << bits
        counts.append(value + counts[-2] if len(counts) > 2 else value)
        value = bits = 0
    if bits:
        raise ValueError("it ends within a number")
    if min(counts, default=0) < 0:
        raise ValueError(f"a run of {min(counts)} pixels")
    return counts


def check_files(file: Path, folder: Path, names: list[str]) -> None:
    """Raise DataError if an image is not there. Lists folders once: a million calls of stat take minutes."""
    there: dict[str, set[str]] = {}
    missing = []
    for name in names:
        parent, _, base = name.rpartition("/")
        if parent not in there:
            path = folder / parent
            there[parent] = {entry.name for entry in os.scandir(path)} if path.is_dir() else set()
        if base not in there[parent]:
            missing.append(name)
    if missing:
        raise DataError(
            f"{len(missing):,} of {len(names):,} images of {file} are not in {folder}, the first is {missing[0]}; "
            "unpack them there"
        )
