"""The generated scenes of `vim/scenes.py` in COCO's form: real handwriting to detect without a download."""

from __future__ import annotations

import sys
from functools import partial

import numpy as np
from PIL import Image
from pycocotools import mask as rle
from tqdm import tqdm

from det.coco import CocoSource
from scenes import CLASS_NAMES, Scene, Scenes


def scene_source(split: str, size: int, count: int) -> CocoSource:
    """`count` square scenes of `size` pixels, "train" or "val"; the digits 0 to 9 are the categories 1 to 10."""
    scenes = Scenes(split, size, count)
    quiet = not sys.stderr.isatty()
    progress = tqdm(scenes, f"drawing {split} scenes", unit="scene", delay=5, leave=False, disable=quiet)
    categories = dict(enumerate(CLASS_NAMES, start=1))
    images = [{"id": i, "file_name": f"{split} #{i}", "width": size, "height": size} for i in range(count)]
    content = {
        "images": images,
        "annotations": [one for i, scene in enumerate(progress) for one in annotations(scene, i)],
        "categories": [{"id": number, "name": name} for number, name in categories.items()],
    }

    return CocoSource("generated scenes", content, partial(draw_again, scenes), categories, held_out=split == "val")


def draw_again(scenes: Scenes, entry: dict) -> Image.Image:
    """2,000 scenes of 1024 pixels would fill 6 GB."""
    return Image.fromarray(scenes[entry["id"]].image)


def annotations(scene: Scene, image_id: int) -> list[dict]:
    """A scene's digits as COCO writes objects."""
    shapes = [rle.encode(np.asfortranarray(mask, dtype=np.uint8)) for mask in scene.masks]
    return [
        {
            "image_id": image_id,
            "category_id": int(label) + 1,
            "bbox": rle.toBbox(shape).tolist(),
            "segmentation": shape,
        }
        for shape, label in zip(shapes, scene.labels)
    ]
