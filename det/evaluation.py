"""Average precision of boxes and masks, by pycocotools, exact over any number of ranks."""

from __future__ import annotations

import contextlib
import copy
import io
import itertools
from dataclasses import dataclass

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from det.coco import CocoSource
from det.model import in_original
from distributed import World, from_main, gather_objects, together
from precision import autocast

# The first of the numbers that pycocotools summarises.
MEASURES = ("AP", "AP50", "AP75", "APs", "APm", "APl")
SHOWN = 12  # images whose detections are kept for pictures


@dataclass
class DetectionResult:
    """Average precisions in percent by `MEASURES`, of boxes and of masks; NaN where there is nothing of a size."""

    images: int
    box: dict[str, float]
    mask: dict[str, float]
    shown: dict[int, list[dict]]  # number of an image -> its detections, as pycocotools takes them

    @property
    def score(self) -> float:
        return self.box["AP"]

    @property
    def words(self) -> str:
        kinds = {"box": self.box, "mask": self.mask}
        return "; ".join(
            f"{kind} " + " ".join(f"{name} {in_percent(values[name])}" for name in MEASURES)
            for kind, values in kinds.items()
        )

    def row(self, prefix: str) -> dict[str, float]:
        values = {f"box_{k}": v for k, v in self.box.items()} | {f"mask_{k}": v for k, v in self.mask.items()}
        return {f"{prefix}{name}": value for name, value in values.items() if not np.isnan(value)}


def in_percent(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"


@torch.no_grad()
def evaluate(model: nn.Module, loader, args, world: World) -> DetectionResult:
    """Evaluate `model` on all of the loader's dataset.

    With `--dist-eval` every rank detects in another part of the images, and the detections come together; no image
    counts twice. Only the first rank computes the precisions, from which all take them.
    """
    model.eval()
    source = loader.dataset.source
    found = list(itertools.chain.from_iterable(detect(model, batch, source, args, world) for batch in loader))
    if args.dist_eval:
        found = list(itertools.chain(*gather_objects(found)))
    with together():
        result = summarise(found, source) if world.is_main else None
    return from_main(result)


def detect(model: nn.Module, batch, source: CocoSource, args, world: World) -> list[dict]:
    """A batch's detections, as pycocotools takes them."""
    images, described = batch
    with autocast(args, world.device):
        found = model([image.to(world.device, non_blocking=True) for image in images])
    results = []
    for image, detection, about in zip(images, found, described):
        detection = in_original(detection, tuple(image.shape[-2:]), about["original"])
        results += as_results(detection, source.image_id(about["index"]), source.category_ids)
    return results


def as_results(detection: dict[str, Tensor], image_id, category_ids: list[int]) -> list[dict]:
    """One image's `boxes` (N, 4), `scores`, `labels` (N,) and `masks` (N, h, w) as pycocotools' results."""
    boxes, scores = detection["boxes"].float().cpu(), detection["scores"].float().cpu().tolist()
    boxes[:, 2:] -= boxes[:, :2]  # right, bottom -> width, height
    masks = detection["masks"].cpu().numpy().astype(np.uint8).transpose(1, 2, 0)  # (N, h, w) -> (h, w, N)
    shapes = rle.encode(np.asfortranarray(masks))
    labels = detection["labels"].cpu().tolist()
    return [
        {
            "image_id": image_id,
            "category_id": category_ids[label - 1],
            "bbox": box,
            "score": score,
            "segmentation": shape,
        }
        for label, box, score, shape in zip(labels, boxes.tolist(), scores, shapes)
    ]


def summarise(found: list[dict], source: CocoSource) -> DetectionResult:
    """Precisions of detections `found` in all images of `source`."""
    shown = {source.image_id(i): i for i in range(min(SHOWN, len(source.labels)))}
    kept: dict[int, list[dict]] = {number: [] for number in shown.values()}
    for one in found:
        if one["image_id"] in shown:
            kept[shown[one["image_id"]]].append(one)
    precisions = (average_precisions(source.truth, found, kind) for kind in ("bbox", "segm"))
    return DetectionResult(len(source.labels), *precisions, kept)


def average_precisions(truth: dict, found: list[dict], kind: str) -> dict[str, float]:
    """COCO's average precisions in percent, of "bbox" or "segm"; NaN where the truth has nothing of a size."""
    # A result with both would have its mask judged as small, medium or large by the area of its box.
    shape = {"bbox": "bbox", "segm": "segmentation"}[kind]
    found = [{key: one[key] for key in ("image_id", "category_id", "score", shape)} for one in found]
    with contextlib.redirect_stdout(io.StringIO()):  # its tables; the numbers come back
        api = COCO()
        annotations = [one for one in truth["annotations"] if one[shape]]
        api.dataset = copy.deepcopy(truth | {"annotations": annotations})  # pycocotools writes into it
        api.createIndex()
        results = api.loadRes(found) if found else COCO()  # loadRes reads the first one
        evaluator = COCOeval(api, results, kind)
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return {name: float("nan") if value < 0 else 100 * float(value) for name, value in zip(MEASURES, evaluator.stats)}
