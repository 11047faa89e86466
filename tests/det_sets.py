"""Tiny COCO sets in exactly the published form, written by the tests."""

import json

import numpy as np
from PIL import Image
from pycocotools import mask as rle

# Numbers with gaps, not in order, as COCO's own have gaps.
CATEGORIES = [{"id": 17, "name": "cat"}, {"id": 3, "name": "car"}, {"id": 90, "name": "brush", "supercategory": "x"}]


def rectangle(left, top, right, bottom):
    """A polygon as COCO writes it."""
    return [[left, top, right, top, right, bottom, left, bottom]]


def annotation(image_id, category_id, box, **more):
    """An object that fills `box` (left, top, right, bottom)."""
    left, top, right, bottom = box
    width, height = right - left, bottom - top
    return {
        "id": 1, "image_id": image_id, "category_id": category_id, "bbox": [left, top, width, height],
        "area": width * height, "iscrowd": 0, "segmentation": rectangle(*box), **more,
    }  # fmt: skip


def run_length(mask):
    """Uncompressed run lengths {"size", "counts": [...]}, the form of COCO's crowd regions."""
    flat = np.asarray(mask, dtype=np.uint8).ravel(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes, len(flat)]).tolist()
    return {"size": list(mask.shape), "counts": counts if flat[0] == 0 else [0, *counts]}


def compressed(mask):
    shape = rle.encode(np.asfortranarray(mask, dtype=np.uint8))
    return {"size": shape["size"], "counts": shape["counts"].decode()}


def paint(folder, entry, annotations):
    """An image whose objects can be seen: bright rectangles on noise."""
    rng = np.random.default_rng(entry["id"])
    pixels = rng.integers(0, 60, (entry["height"], entry["width"], 3), dtype=np.uint8)
    for one in annotations:
        left, top, width, height = (int(v) for v in one["bbox"])
        pixels[max(top, 0) : top + height, max(left, 0) : left + width] = 200 + one["category_id"] % 50
    Image.fromarray(pixels).save(folder / entry["file_name"])


def write_half(root, split, images, annotations, categories=CATEGORIES):
    """Write images {id: (height, width)} and their annotations; returns the content of the JSON file."""
    entries = [
        {"id": i, "file_name": f"{i:012d}.png", "height": height, "width": width}
        for i, (height, width) in images.items()
    ]
    folder = root / f"{split}2017"
    folder.mkdir(parents=True, exist_ok=True)
    for entry in entries:
        paint(folder, entry, [one for one in annotations if one["image_id"] == entry["id"]])
    content = {"info": {}, "licenses": [], "images": entries, "annotations": annotations, "categories": categories}
    save_json(root, split, content)
    return content


def save_json(root, split, content):
    (root / "annotations").mkdir(parents=True, exist_ok=True)
    (root / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))


def write_tiny(root, train=4, val=3):
    """Images of several sizes, one of them empty, objects of two categories; the third is in no image."""
    for split, count in (("train", train), ("val", val)):
        sizes = {100 + i: [(48, 64), (64, 40), (56, 56)][i % 3] for i in range(count)}
        annotations = []
        for i in list(sizes)[1:]:
            annotations.append(annotation(i, 17, (4, 4, 20 + i % 7, 24)))
            annotations.append(annotation(i, 3, (22, 26, 38, 46)))
        write_half(root, split, sizes, annotations)
    return root
