"""COCO's annotation files: read, checked, and told what was left out of training and why.

    DIR/annotations/instances_train2017.json    DIR/train2017/*.jpg
    DIR/annotations/instances_val2017.json      DIR/val2017/*.jpg

What COCO's own tools do holds here too (https://cocodataset.org/#format-data): polygons or run lengths, category
numbers with gaps, crowd regions that evaluation ignores. All that can be known to be wrong before the first step
raises `DataError`, one line.
"""

from __future__ import annotations

import itertools
import json
import math
import os
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image
from pycocotools import mask as rle

from datasets import Packed, read_image
from det.coco_checks import check_content, check_entry, check_files, check_truth
from errors import DataError, raise_unless_of_file

SPLITS = {"train": "train2017", "val": "val2017"}
# Why an annotation is no training target, as the log says it.
CROWD = "crowd regions"
OUTSIDE = "boxes without a pixel of the image"
NO_MASK = "annotations without a usable mask"
# In pixels. One needs a view enlarged a hundred times to be seen; corners in a line make less, by rounding.
LEAST_AREA = 1e-4
IMAGE_KEYS = ("id", "file_name", "width", "height")


@dataclass(frozen=True)
class Instance:
    """One object of an image.

    label: from 1; segmentation: polygons [[x, y, x, y, ...], ...] in pixels, or run lengths {"size", "counts"}.
    """

    label: int
    segmentation: list | dict


class CocoSource:
    """Images and their objects, in the order of the file.

    Args:
        title: what a person calls the file. content: what it holds, as COCO writes it.
        read: from an entry of `content["images"]` to its image, RGB; raises BrokenImage.
        categories: category number -> name, by which labels are numbered from 1 in rising order of the numbers.
        held_out: keep what evaluation compares with, `truth`; for training it would be gigabytes for nothing.

    `left_out` counts the annotations that are no training targets, by reason, and `clipped` those that reach
    beyond their image.
    """

    def __init__(
        self,
        title: str,
        content: dict,
        read: Callable[[dict], Image.Image],
        categories: dict[int, str],
        held_out: bool,
    ):
        self.title = title
        self._read = read
        self.categories = categories
        self.category_ids = sorted(categories)
        self.class_names = [categories[number] for number in self.category_ids]
        self.labels = np.arange(len(content["images"]))  # which image it is: classes are the objects' own
        self.entries = Packed([{key: i[key] for key in IMAGE_KEYS} for i in content["images"]])
        self.left_out: Counter = Counter()
        self.clipped = 0
        self.objects = Packed(self._instances(content))
        self.truth = None
        if held_out:
            check_truth(title, content)
            self.truth = ground_truth(content)

    def __getstate__(self) -> dict:
        return self.__dict__ | {"truth": None}  # loader processes, to which it may be sent, evaluate nothing

    def _instances(self, content: dict) -> list[list[Instance]]:
        label_of = {category: label for label, category in enumerate(self.category_ids, start=1)}
        images = {image["id"]: (i, image) for i, image in enumerate(content["images"])}
        found: list[list[Instance]] = [[] for _ in images]
        for annotation in content["annotations"]:
            i, image = images[annotation["image_id"]]
            shape = usable_segmentation(annotation.get("segmentation"), image["height"], image["width"])
            reason = why_left_out(annotation, image, shape)
            if reason:
                self.left_out[reason] += 1
                continue
            self.clipped += reaches_beyond(annotation["bbox"], image)
            found[i].append(Instance(label_of[annotation["category_id"]], shape))
        return found

    def read(self, index: int) -> Image.Image:
        """The image, RGB. Raises BrokenImage; DataError if it has not the size that the annotations say."""
        entry = self.entries[index]
        image = self._read(entry)
        if image.size != (entry["width"], entry["height"]):
            raise DataError(
                f"{self.name(index)} has {image.width} x {image.height} pixels and its annotations are for "
                f"{entry['width']} x {entry['height']}: fetch the image or {self.title} again"
            )
        return image

    def name(self, index: int) -> str:
        return f"{self.entries[index]['file_name']} of {self.title}"

    def size(self, index: int) -> tuple[int, int]:
        """(height, width) of the file."""
        return self.entries[index]["height"], self.entries[index]["width"]

    def image_id(self, index: int) -> int:
        return self.entries[index]["id"]

    def instances(self, index: int) -> list[Instance]:
        """What the image holds to train on; an empty list makes it an example of background."""
        return self.objects[index]

    @property
    def remarks(self) -> str:
        """What was found that a person should know."""
        empty = sum(not self.objects[i] for i in range(len(self.objects)))
        kept = {
            "boxes clipped to their image": self.clipped,
            "images without objects, kept": empty,
        }
        if self.truth is not None:
            maskless = sum(one["segmentation"] is None for one in self.truth["annotations"])
            kept[f"{NO_MASK}, left out of mask AP"] = maskless
        said = [f"{what}: {count:,}" for what, count in kept.items() if count]
        said += [f"{why}, left out of training: {count:,}" for why, count in sorted(self.left_out.items())]
        return "; ".join(said)


def why_left_out(annotation: dict, image: dict, shape: list | dict | None) -> str:
    """The reason for which an annotation is no training target; "" if it is one. `shape`: its usable mask."""
    if annotation.get("iscrowd", 0):
        return CROWD
    left, top, width, height = annotation["bbox"]
    right, bottom = min(left + width, image["width"]), min(top + height, image["height"])
    if not (right - max(left, 0) > 0 and bottom - max(top, 0) > 0):  # so that NaN is outside too
        return OUTSIDE
    return "" if shape else NO_MASK


def reaches_beyond(box: list[float], image: dict) -> bool:
    """Whether a box (left, top, width, height) leaves its image by more than rounding."""
    left, top, width, height = box
    slack = 0.5
    return min(left, top) < -slack or left + width > image["width"] + slack or top + height > image["height"] + slack


def usable_segmentation(segmentation, height: int, width: int) -> list | dict | None:
    """Run lengths with a pixel of the object, or the polygons that have an area in the image. None if nothing is left.

    The rest would be counted as objects and never be trained on, because no view shows a pixel of it.
    """
    if isinstance(segmentation, dict):
        known = {"counts", "size"} <= segmentation.keys()
        return segmentation if known and rle.area(run_lengths(segmentation, height, width)) > 0 else None
    polygons = [p for p in segmentation or [] if len(p) >= 6 and len(p) % 2 == 0 and all(map(math.isfinite, p))]
    return [polygon for polygon in polygons if has_area(polygon, height, width)] or None


def has_area(polygon: list[float], height: int, width: int) -> bool:
    """Whether a polygon [x, y, x, y, ...] covers some of its image, be it less than a pixel: a view may enlarge it."""
    corners = list(zip(polygon[::2], polygon[1::2]))
    inside = min(polygon) >= 0 and max(polygon[::2]) <= width and max(polygon[1::2]) <= height
    borders = () if inside else ((0, 0, 1), (0, width, -1), (1, 0, 1), (1, height, -1))  # most are, of a million
    for axis, border, sign in borders:
        corners = clipped(corners, axis, border, sign)
    area = abs(sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(corners, corners[1:] + corners[:1]))) / 2
    # Lobes of a polygon that crosses itself may cancel each other out; pycocotools draws them all.
    return area >= LEAST_AREA or bool(rle.area(run_lengths([polygon], height, width)) > 0)


def clipped(corners: list[tuple[float, float]], axis: int, border: float, sign: int) -> list[tuple[float, float]]:
    """The part of a polygon whose coordinate `axis` is at least `border`; for `sign` -1 at most."""
    depths = [sign * (corner[axis] - border) for corner in corners]
    if min(depths, default=0) >= 0:
        return corners
    kept = []
    for (a, here), (b, there) in itertools.pairwise(zip([corners[-1], *corners], [depths[-1], *depths])):
        if (here < 0) != (there < 0):
            share = here / (here - there)
            kept.append((a[0] + share * (b[0] - a[0]), a[1] + share * (b[1] - a[1])))
        if there >= 0:
            kept.append(b)
    return kept


def run_lengths(segmentation: list | dict, height: int, width: int) -> dict:
    """Polygons or run lengths, compressed or not, as compressed run lengths of one (height, width) mask."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def ground_truth(content: dict) -> dict:
    """What pycocotools evaluates against: the file as it is, crowds and all, its annotations numbered from 1.

    pycocotools takes the number 0 for "not found" and needs `iscrowd` and `area`. Where there is no usable mask,
    `segmentation` is None: such an annotation counts for boxes alone.
    """
    sizes = {image["id"]: (image["height"], image["width"]) for image in content["images"]}
    annotations = []
    for number, annotation in enumerate(content["annotations"], start=1):
        height, width = sizes[annotation["image_id"]]
        shape = usable_segmentation(annotation.get("segmentation"), height, width)
        annotation = {"iscrowd": 0, **annotation, "id": number, "segmentation": shape}
        if "area" not in annotation:
            annotation["area"] = area(annotation, height, width)
        annotations.append(annotation)
    return {"images": content["images"], "annotations": annotations, "categories": content["categories"]}


def area(annotation: dict, height: int, width: int) -> float:
    """Pixels of the mask, or of the box where there is none."""
    shape = annotation["segmentation"]
    if shape is None:
        return float(annotation["bbox"][2] * annotation["bbox"][3])
    return float(rle.area(run_lengths(shape, height, width)))


def coco_categories(root: Path, split: str) -> dict[int, str] | None:
    """Category number -> name of one half of a COCO folder, or None if its file is not there.

    Raises DataError for a file that is not a COCO instances file.
    """
    file = annotation_file(root, split)
    if not file.exists():
        return None
    categories = read_content(root, file)["categories"]
    for i, category in enumerate(categories):
        check_entry(f"{file}: categories[{i}]", "categories", category)
    return names_of(categories)


def annotation_file(root: Path, split: str) -> Path:
    return root / "annotations" / f"instances_{SPLITS[split]}.json"


def names_of(categories: list[dict]) -> dict[int, str]:
    return {category["id"]: str(category["name"]) for category in categories}


def coco_source(root: Path, split: str, categories: dict[int, str] | None = None) -> CocoSource:
    """One half of a COCO folder. `categories` are the training half's, which the other's must be among.

    Raises DataError for files that are missing or do not fit together.
    """
    folder, file = root / SPLITS[split], annotation_file(root, split)
    content = read_content(root, file)
    check_content(file, content)
    own = names_of(content["categories"])
    if categories is not None and not own.items() <= categories.items():
        strange = next(f"{number} {name!r}" for number, name in own.items() if categories.get(number) != name)
        raise DataError(f"{file}: category {strange} is not one of the training file's; the two must agree")
    check_files(file, folder, [image["file_name"] for image in content["images"]])

    return CocoSource(str(file), content, partial(read_entry, folder), categories or own, held_out=split == "val")


def read_entry(folder: Path, entry: dict) -> Image.Image:
    return read_image(folder / entry["file_name"])


def read_content(root: Path, file: Path) -> dict:
    layout = "--data-path takes COCO's folder: annotations/instances_{train,val}2017.json, train2017/, val2017/"
    try:
        content = json.loads(file.read_bytes())
    except OSError as error:
        raise_unless_of_file(error, file)
        held = ", ".join(sorted(entry.name for entry in os.scandir(root))[:5]) if root.is_dir() else "no folder"
        raise DataError(f"{file} cannot be read ({error.strerror}); {layout}; {root} holds: {held}") from error
    except ValueError as error:
        raise DataError(f"{file} is not valid JSON ({error}); fetch it again") from error
    lists = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(key), list) for key in lists):
        raise DataError(f"{file} is not a COCO instances file: it must hold the lists {', '.join(lists)}")
    return content
