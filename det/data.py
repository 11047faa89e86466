"""From annotated images to batches: the datasets of `det/train.py`."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from arguments import size_of
from augment import counter_randomness
from datasets import DataBundle, ImageDataset
from det.coco import CocoSource, coco_categories, coco_source
from det.digits import scene_source
from det.views import large_scale_jitter, pixels, targets, whole
from errors import BrokenImage, DataError
from samplers import SampleKey

Item = tuple[Tensor, dict]


class TrainDataset(ImageDataset):
    """Items (image (3, h, w) float32, targets of `views.targets`), by SampleKey; sizes differ from item to item.

    As in `ImageDataset`, a view depends on (seed, epoch, index, repeat) alone. An image that cannot be read stops
    the run, because in its place another one would count twice.

    Args:
        size: (height, width) that a view fits. scales, flip_prob: of `views.large_scale_jitter`.
    """

    def __init__(self, source: CocoSource, size: tuple[int, int], scales, flip_prob: float, seed: int):
        super().__init__(source, transform=None, seed=seed)
        self.size, self.scales, self.flip_prob = size, tuple(scales), flip_prob

    def __getitem__(self, key: SampleKey) -> Item:
        epoch, index, repeat = key
        with counter_randomness(self.seed, epoch, index, repeat):
            view = large_scale_jitter(self.source.size(index), self.size, self.scales, self.flip_prob)
        return pixels(view.image(read(self.source, index))), targets(view, self.source.instances(index))


class EvalDataset(ImageDataset):
    """Items (image (3, h, w) float32, {"index": its number, "original": (height, width) of the file})."""

    def __init__(self, source: CocoSource, size: tuple[int, int]):
        super().__init__(source, transform=None)
        self.size = size

    def __getitem__(self, index: int) -> Item:
        original = self.source.size(index)
        view = whole(original, self.size)
        return pixels(view.image(read(self.source, index))), {"index": index, "original": original}


def read(source: CocoSource, index: int):
    """The image, or DataError with the way out."""
    try:
        return source.read(index)
    except BrokenImage as error:
        raise DataError(f"{error}; repair the file, or take the image out of {source.title}") from error


def collate(items: list[Item]) -> tuple[list[Tensor], list[dict]]:
    """Images stay a list: their sizes differ, and the model pads."""
    images, described = zip(*items)
    return list(images), list(described)


def build_datasets(args) -> DataBundle:
    """The data of `--data-path`, or generated scenes, checked. With `args.eval` the held-out half alone is read."""
    train, val = coco_halves(args) if args.data_path else scene_halves(args)
    size = size_of(args.input_size)
    data_set = None
    if train is not None:
        if not any(len(train.instances(i)) for i in range(len(train.labels))):
            raise DataError(f"{train.title} has nothing to train on: {train.remarks}")
        data_set = TrainDataset(train, size, args.scale_range, args.flip_prob, args.seed)
    if all(one["iscrowd"] for one in val.truth["annotations"]):
        raise DataError(
            f"{val.title} has no object to evaluate with in {len(val.labels):,} images, crowds aside; annotate one"
        )
    return DataBundle(
        train=data_set,
        val=EvalDataset(val, size),
        num_classes=len(val.category_ids),
        class_names=val.class_names,
        description="\n".join(describe(half) for half in (train, val) if half is not None),
    )


def coco_halves(args) -> tuple[CocoSource | None, CocoSource]:
    root = Path(args.data_path).expanduser()
    if args.eval:  # classes are numbered as in training, where the held-out half may lack some
        return None, coco_source(root, "val", coco_categories(root, "train"))
    train = coco_source(root, "train")
    return train, coco_source(root, "val", train.categories)


def scene_halves(args) -> tuple[CocoSource | None, CocoSource]:
    side = max(size_of(args.input_size))
    train = None if args.eval else scene_source("train", side, args.train_scenes)
    return train, scene_source("val", side, args.val_scenes)


def describe(source: CocoSource) -> str:
    objects = sum(len(source.instances(i)) for i in range(len(source.labels)))
    counts = f"{len(source.labels):,} images, {objects:,} objects of {len(source.category_ids)} classes"
    return "; ".join(filter(None, [f"{source.title}: {counts}", source.remarks]))
