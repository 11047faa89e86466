"""Labelled images for segmentation: ADE20K, folders of images and label PNGs, generated scenes.

A source reads an image and its label; both are checked when they are read, and what can be known before the first
step is found by `build_datasets`. No image is left out: what is wrong ends in one `DataError` line.
"""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from arguments import size_of
from augment import counter_randomness
from datasets import DataBundle, read_image, walk
from errors import BrokenImage, ConfigError, DataError, one_line, raise_unless_of_file, some_of
from samplers import SampleKey
from scenes import CLASS_NAMES, Scenes
from seg.views import IGNORED, ViewSettings, normalised, training_view

DATA_SETS = ("ADE20K", "FOLDER", "SCENES")
IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp")
# Labels are kept in 8 bits, of which one value is `IGNORED`.
MOST_CLASSES = 255
# Folders of the two splits, the first that is there.
SPLITS = {"train": ("training", "train"), "val": ("validation", "val")}
SCENE_CLASSES = ["background", *CLASS_NAMES]
# What Pillow multiplies grey values of fewer than 8 bits by, to make them a picture.
GREY_STEPS = {"L;2": 85, "L;4": 17}


class Source(Protocol):
    """Where labelled images come from."""

    def __len__(self) -> int: ...

    def name(self, index: int) -> str:
        """The file or number by which a person finds the image."""

    def read(self, index: int, epoch: int) -> tuple[Image.Image, np.ndarray]:
        """The image, RGB, and its label, uint8 (H, W): classes from 0, `IGNORED` where none counts."""


class FolderSource:
    """Images below one folder, and for each a label PNG of the same name below another.

    Args:
        num_classes: labels at or above it are an error, except `IGNORED`.
        reduce_zero_label: 0 is ignored and every other value counts from 1, as in ADE20K.

    `without_image` lists the label files that belong to no image.
    """

    def __init__(self, images: Path, labels: Path, num_classes: int, reduce_zero_label: bool):
        self.images, self.labels = images, labels
        self.num_classes, self.reduce_zero_label = num_classes, reduce_zero_label
        files = image_files(images)
        missing = [file for file in files if not self._label_path(file).is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(files)} images have no label, the first is {images / missing[0]}: "
                f"{self._label_path(missing[0])} does not exist; add the labels or take the images away"
            )
        self.files = np.array([os.fsencode(file) for file in files])  # see datasets.FileSource
        used = Counter(self._label_path(file) for file in files)
        shared = [path for path, count in used.items() if count > 1]
        if shared:
            of = [str(images / file) for file in files if self._label_path(file) == shared[0]]
            raise DataError(f"{some_of(of)} have one label, {shared[0]}; give each a name of its own, and its label")
        self.without_image = [name for name in files_below(labels, (".png",)) if labels / name not in used]

    def __len__(self) -> int:
        return len(self.files)

    def _label_path(self, file: str) -> Path:
        return (self.labels / file).with_suffix(".png")

    def name(self, index: int) -> str:
        return str(self.images / os.fsdecode(bytes(self.files[index])))

    def read(self, index: int, epoch: int = 0) -> tuple[Image.Image, np.ndarray]:
        path = self.name(index)
        label_path = self._label_path(os.fsdecode(bytes(self.files[index])))
        try:
            image = read_image(path)
        except BrokenImage as error:
            raise DataError(f"{error}; repair the file, or take it and its label away") from error
        label = self._classes(read_label(label_path), label_path)
        if label.shape != image.size[::-1]:
            raise DataError(
                f"{label_path} is {label.shape[1]} x {label.shape[0]} and its image {path} {image.width} x "
                f"{image.height}; a label has a pixel for each of the image's"
            )
        return image, label

    def _classes(self, values: np.ndarray, path: Path) -> np.ndarray:
        """File values as classes. Raises DataError for those that no class has."""
        first = int(self.reduce_zero_label)
        wrong = ((values >= self.num_classes + first) & (values != IGNORED)) | (values < 0)
        if wrong.any():
            raise DataError(
                f"{path} has the label value {values[wrong].max()}: {self.num_classes} classes are numbered "
                f"{first} to {self.num_classes - 1 + first}, and {IGNORED} is ignored; repair it or give --num-classes"
            )
        if self.reduce_zero_label:
            values = np.where((values == 0) | (values == IGNORED), IGNORED, values - 1)
        return values.astype(np.uint8)


class SceneSource:
    """Generated scenes; each training epoch has new ones. The label is 0, or the digit and one more."""

    def __init__(self, scenes: Scenes):
        self.scenes = scenes

    def __len__(self) -> int:
        return len(self.scenes)

    def name(self, index: int) -> str:
        return f"{self.scenes.split} scene {index}"

    def read(self, index: int, epoch: int = 0) -> tuple[Image.Image, np.ndarray]:
        scene = self.scenes.at(epoch * len(self) + index)
        return Image.fromarray(scene.image), scene.classes()


def read_label(path: Path) -> np.ndarray:
    """The values of a grey or palette PNG, (H, W)."""
    try:
        with Image.open(path) as image:
            stored = image.tile[0][3] if image.tile else ""  # gone once it is loaded
            image.load()
    except Exception as error:  # decoders raise what they like
        raise_unless_of_file(error, path)
        raise DataError(f"{path} cannot be read: {one_line(error)}; write it again") from error
    values = np.asarray(image)
    if values.ndim != 2:
        raise DataError(f"{path} is a colour picture ({image.mode}): a label is a grey or palette PNG of class numbers")
    if values.dtype.kind == "f":
        raise DataError(f"{path} holds fractions (mode F): a label is a grey or palette PNG of class numbers")
    return values.astype(np.int64) // GREY_STEPS.get(stored, 1)


def files_below(folder: Path, endings: tuple[str, ...]) -> list[str]:
    """Files below `folder` that end so, in capitals or not, relative to it, sorted."""
    return sorted(
        os.path.relpath(os.path.join(directory, file), folder)
        for directory, files in walk(folder)
        for file in files
        if file.lower().endswith(endings)
    )


def image_files(folder: Path) -> list[str]:
    """Images below `folder`, relative to it, sorted. Raises DataError if there is none."""
    if not folder.is_dir():
        raise DataError(f"{folder} does not exist; --data-path holds images/ and annotations/")
    found = files_below(folder, IMAGES)
    if not found:
        raise DataError(f"{folder} holds no images (they end in {' '.join(IMAGES)}); unpack the data set there")
    return found


class SegmentationDataset(Dataset):
    """Items (image float32 (3, h, w), label int64 (h, w)).

    For training by SampleKey: views of one size, which depend on (seed, epoch, index, repeat) alone. For
    evaluation by index: images and labels as they are.

    Args:
        view: how a training view is drawn; None for images as they are.
    """

    on_broken = "raise"  # see datasets.Items: an unreadable image is never replaced
    num_replaced = 0

    def __init__(self, source: Source, view: ViewSettings | None, seed: int = 0):
        self.source, self.view, self.seed = source, view, seed
        self.replaced = torch.zeros(len(source), dtype=torch.bool)

    def __len__(self) -> int:
        return len(self.source)

    def __getitem__(self, key: SampleKey | int) -> tuple[torch.Tensor, torch.Tensor]:
        epoch, index, repeat = key if isinstance(key, tuple) else SampleKey(0, key, 0)
        image, label = self.source.read(index, epoch)
        if self.view is None:
            pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)
            return normalised(pixels), torch.from_numpy(label).long()
        with counter_randomness(self.seed, epoch, index, repeat):
            return training_view(image, label, self.view)

    def raw(self, index: int) -> Image.Image:
        return self.source.read(index, 0)[0]

    def name(self, index: int) -> str:
        return self.source.name(index)


def collate(items: list[tuple[torch.Tensor, torch.Tensor]]):
    """Images and labels: (B, 3, h, w) and (B, h, w) where all have one size, else lists."""
    images, labels = zip(*items)
    if len({image.shape for image in images}) == 1:
        return torch.stack(images), torch.stack(labels)
    return list(images), list(labels)


@dataclass
class Layout:
    """What a data set is made of, before transforms."""

    train: Source | None
    val: Source
    class_names: list[str]
    remark: str = ""


def build_datasets(args) -> DataBundle:
    """The data of `args.data_set`, checked. With `args.eval` the training images are not needed.

    Raises DataError, one line that names the path.
    """
    layout = LAYOUTS[args.data_set](args)
    view = None if args.data_set == "SCENES" else view_settings(args)
    train = None if layout.train is None else SegmentationDataset(layout.train, view, args.seed)
    counts = "" if train is None else f"{len(train):,} train images and "
    where = "" if args.data_set == "SCENES" else f" {args.data_path}"
    return DataBundle(
        train=train,
        val=SegmentationDataset(layout.val, None),
        num_classes=len(layout.class_names),
        class_names=layout.class_names,
        description=f"{args.data_set}{where}: {counts}{len(layout.val):,} val images in "
        f"{len(layout.class_names):,} classes{layout.remark}",
    )


def view_settings(args) -> ViewSettings:
    return ViewSettings(
        size=size_of(args.crop_size),
        sides=tuple(sorted(size_of(args.resize))),
        ratios=tuple(args.scale_range),
        class_share=args.crop_class_share,
        flip_prob=args.flip_prob,
        photometric=args.photometric,
    )


def data_folder(args) -> Path:
    root = Path(args.data_path).expanduser()
    if not root.is_dir():
        raise DataError(f"{root} does not exist; --data-path takes the folder that holds images/ and annotations/")
    return root


def ade20k_layout(args) -> Layout:
    """ADEChallengeData2016 as it unpacks: 150 classes; label 0 means no class."""
    root = data_folder(args)
    names = ade20k_names(root / "objectInfo150.txt", args.num_classes or 150)
    reduce_zero = True if args.reduce_zero_label is None else args.reduce_zero_label
    return layout_of(args, root, names, reduce_zero)


def ade20k_names(path: Path, count: int) -> list[str]:
    """The last column of the list that comes with the data set, where that is there."""
    lines = names_in(path)[1:] if path.is_file() else []
    names = [line.split("\t")[-1].split(",")[0].strip() for line in lines]
    return names if len(names) == count else [f"class {i + 1}" for i in range(count)]


def folder_layout(args) -> Layout:
    """images/{train,val} and annotations/{train,val}; names in classes.txt, one per line, or --num-classes."""
    root = data_folder(args)
    listed = root / "classes.txt"
    names = names_in(listed) if listed.is_file() else []
    if args.num_classes and names and args.num_classes != len(names):
        raise DataError(f"--num-classes {args.num_classes}: {listed} names {len(names)} classes; drop one of them")
    if not names and not args.num_classes:
        state = "names no class" if listed.is_file() else "does not exist"
        raise DataError(f"{listed} {state}: write the classes' names there, one per line, or give --num-classes")
    names = names or [f"class {i}" for i in range(args.num_classes)]
    return layout_of(args, root, names, bool(args.reduce_zero_label))


def names_in(path: Path) -> list[str]:
    """The lines of a UTF-8 file that are not empty; a byte-order mark before them, as Windows writes it, is none's."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except ValueError as error:
        raise DataError(f"{path} is not UTF-8 text ({error}); save it as such") from error
    return [line.strip() for line in lines if line.strip()]


def layout_of(args, root: Path, names: list[str], reduce_zero: bool) -> Layout:
    """Classes `names` in images/ and annotations/ below `root`; the labels are checked as they are read."""
    most = MOST_CLASSES - int(reduce_zero)  # the file's 0 is taken as well
    if len(names) > most:
        raise DataError(f"{root}: {len(names)} classes; labels have 8 bits and {IGNORED} is ignored, so {most} at most")
    sources: dict[str, FolderSource] = {}
    remarks = ["label 0 is ignored, the others count from 1"] if reduce_zero else []
    for split in ("val",) if args.eval else ("train", "val"):
        name = split_folder(root / "images", split)
        source = FolderSource(root / "images" / name, root / "annotations" / name, len(names), reduce_zero)
        sources[split], extra = source, source.without_image
        if extra:
            remarks.append(f"{len(extra):,} labels in {source.labels} have no image, the first is {extra[0]}")
    return Layout(sources.get("train"), sources["val"], names, "".join(f"; {remark}" for remark in remarks))


def split_folder(images: Path, split: str) -> str:
    """What this data set calls a split. Raises DataError."""
    found = next((name for name in SPLITS[split] if (images / name).is_dir()), None)
    if found is None:
        there = sorted(entry.name for entry in images.iterdir()) if images.is_dir() else []
        raise DataError(
            f"{images} has neither {' nor '.join(SPLITS[split])}; it holds: {', '.join(there[:5]) or 'nothing'}"
        )
    return found


def scene_layout(args) -> Layout:
    """Training scenes are taken as they are, whatever the flags of augmentation say: no two are the same."""
    if args.num_classes not in (None, len(SCENE_CLASSES)):
        raise ConfigError(f"--num-classes {args.num_classes}: scenes have {len(SCENE_CLASSES)}; leave it out")
    try:
        train = Scenes("train", args.scene_size, args.train_scenes, args.seed, args.scene_ink)
        val = Scenes("val", args.scene_size, args.val_scenes, 0, args.scene_ink)
    except ValueError as error:
        raise ConfigError(f"--scene-size: {error}") from None
    remark = "; every epoch has new training scenes, and the flags of augmentation mean nothing"
    return Layout(None if args.eval else SceneSource(train), SceneSource(val), SCENE_CLASSES, remark)


LAYOUTS = {"ADE20K": ade20k_layout, "FOLDER": folder_layout, "SCENES": scene_layout}
