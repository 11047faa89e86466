"""Where images come from: folders, CIFAR, iNaturalist, digits (other formats: readers.py).

A *source* knows names, labels and how to read one image; an `ImageDataset` adds the transform, the counted
randomness and the policy for images that cannot be read. All that can be known to be wrong before the first
step is found by `build_datasets` and raised as one `DataError` line that names the path and what to do.
"""

import json
import multiprocessing
import os
import pickle
import signal
import sys
import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset, Sampler
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets.folder import IMG_EXTENSIONS

from augment import build_transform, counter_randomness
from errors import BrokenImage, DataError, one_line, raise_unless_of_file, some_of
from samplers import SampleKey

IMAGENET_CLASSES = 1000
# How loader processes are started; None: as Python does, which does not fork on macOS and Windows. On Linux Python 3.14
# would start them from a fork server, which dies of a signal to the run, and they with it.
START_METHOD = "fork" if sys.platform == "linux" else None
DIGITS_HELD_OUT = 0.2


class Source(Protocol):
    """What an ImageDataset asks of a place that images come from. `labels` is an int64 array (size,)."""

    labels: np.ndarray

    def read(self, index: int) -> Image.Image:
        """The image, RGB and upright. Raises BrokenImage."""

    def name(self, index: int) -> str:
        """Path or number by which a person finds the image."""


class Items(Protocol):
    """What the loop asks of a data set, whatever the task. Pictures may ask for more, such as `ImageDataset.raw`.

    on_broken: "raise" if nothing that cannot be read is ever replaced; only otherwise is `check_share` called.
    replaced: bool (size,), which items could not be read. num_replaced: how many.
    """

    on_broken: str
    replaced: torch.Tensor
    num_replaced: int

    def __len__(self) -> int: ...

    def __getitem__(self, key: SampleKey | int):
        """A training item by SampleKey(epoch, index, repeat), one for evaluation by index."""

    def check_share(self) -> None:
        """Raises DataError if too many could not be read."""


@dataclass
class Sources:
    """A data set before transforms. `train` is None when only evaluation was asked for."""

    train: Source | None
    val: Source
    class_names: list[str]
    remark: str = ""


@dataclass
class DataBundle:
    """Data of one run. `train` is None when only evaluation was asked for."""

    train: Items | None
    val: Items
    num_classes: int
    class_names: list[str]
    description: str


class ImageDataset(Dataset):
    """Items (float32 tensor (C, H, W), int label) by SampleKey(epoch, index, repeat), or by index (epoch 0).

    The augmentation's randomness comes from (seed, epoch, index, repeat) and the global generators are put
    back, so the number of loader workers never changes a run.

    Args:
        source: where the images come from.
        transform: PIL image -> tensor.
        seed: the run's seed.
        on_broken: what an image that cannot be read does: "raise" stops; "next" takes the next readable
            one with its label (training); "grey" shows flat grey under the image's own label, so that an
            accuracy still counts every image (evaluation).
        max_bad_share: share of distinct unreadable images above which "next" and "grey" stop as well.
    """

    def __init__(self, source: Source, transform, seed: int = 0, on_broken="raise", max_bad_share=0.01):
        if on_broken not in ("raise", "next", "grey"):
            raise ValueError(f"on_broken={on_broken!r}: expected 'raise', 'next' or 'grey'")
        self.source = source
        self.transform = transform
        self.seed = seed
        self.on_broken = on_broken
        self.max_bad_share = max_bad_share
        # Which images could not be read. In shared memory, so that what a worker process finds is counted here.
        self.replaced = torch.zeros(len(source.labels), dtype=torch.bool).share_memory_()

    def __len__(self) -> int:
        return len(self.source.labels)

    def __getitem__(self, key: SampleKey | int) -> tuple[torch.Tensor, int]:
        epoch, index, repeat = key if isinstance(key, tuple) else SampleKey(0, key, 0)
        image, label = self._readable(index)
        with counter_randomness(self.seed, epoch, index, repeat):
            return self.transform(image), label

    def raw(self, index: int) -> Image.Image:
        """The image before any transform, RGB and upright; its replacement if it cannot be read."""
        return self._readable(index)[0]

    def name(self, index: int) -> str:
        """The image's path, or its number where there are no files."""
        return self.source.name(index)

    @property
    def num_replaced(self) -> int:
        """Distinct unreadable images met so far."""
        return int(self.replaced.sum())

    def _readable(self, index: int) -> tuple[Image.Image, int]:
        for offset in range(len(self)):
            candidate = (index + offset) % len(self)
            try:
                return self.source.read(candidate), int(self.source.labels[candidate])
            except BrokenImage as error:
                self._count_broken(candidate, error)
            if self.on_broken == "grey":
                return Image.new("RGB", (256, 256), (124, 116, 104)), int(self.source.labels[index])
        raise DataError(f"none of {len(self)} images can be read, the first is {self.name(0)}")

    def _count_broken(self, index: int, error: BrokenImage) -> None:
        """Say a broken image once; raise if the policy or the share of broken ones says so."""
        if self.on_broken == "raise":
            raise DataError(f"{error}; repair or remove the file, or use --bad-image replace") from error
        if self.replaced[index]:
            return
        self.replaced[index] = True
        print(f"unreadable image replaced: {error}", file=sys.stderr, flush=True)
        self.check_share()

    def check_share(self) -> None:
        """Raises DataError if more images than `max_bad_share` allows could not be read."""
        if self.num_replaced > self.max_bad_share * len(self):
            last = self.name(int(self.replaced.nonzero()[-1]))
            raise DataError(
                f"{self.num_replaced} of {len(self)} images cannot be read, more than --bad-image-share "
                f"{self.max_bad_share}; one is {last}"
            )


@contextmanager
def as_broken_image(name: str | Path) -> Iterator[None]:
    """Whatever is wrong with an image leaves as BrokenImage: decoders raise what they like.

    Raises LostDataError, MemoryError and OSError for what is not the image's fault, see `raise_unless_of_file`.
    """
    try:
        yield
    except Exception as error:
        raise_unless_of_file(error, name)
        reason = one_line(error) or type(error).__name__
        raise BrokenImage(f"{name}: {reason}") from error


def decode_image(file: str | Path | BinaryIO) -> Image.Image:
    """The image in a file, RGB and upright (EXIF orientation applied)."""
    with Image.open(file) as image:
        image.load()
        return to_rgb(ImageOps.exif_transpose(image))


def read_image(path: str | Path) -> Image.Image:
    """`decode_image`; raises BrokenImage."""
    with as_broken_image(path):
        return decode_image(path)


def to_rgb(image: Image.Image) -> Image.Image:
    """Any PIL mode as RGB. 16-bit greys keep their upper byte: PIL's own conversion clips them to white.

    32-bit ones are taken for 16-bit if they have a value that 8 bits do not hold, as they were in old Pillow's files.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if image.mode != "I" or values.max() > 255:
            values = values >> 8
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range; save the image with 8 or 16 bits")
    return image.convert("RGB")


class FileSource:
    """Files below `root` with their labels."""

    def __init__(self, root: Path, files: list[str], labels: list[int]):
        self.root = root
        # One block of bytes: a list of a million strings would be copied page by page into every worker,
        # because reading an object touches its reference count.
        self.files = np.array([os.fsencode(file) for file in files])
        self.labels = np.array(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return read_image(self.name(index))

    def name(self, index: int) -> str:
        return os.path.join(self.root, os.fsdecode(bytes(self.files[index])))


class Packed:
    """A list of picklable items in one block of bytes.

    Half a million small objects would be copied page by page into every loader process, because reading an object
    touches its reference count. A tensor's memory is shared even by processes that are not forked, to which anything
    else is sent.
    """

    def __init__(self, items: Iterable):
        block, ends = bytearray(), [0]
        for item in items:
            block += pickle.dumps(item, protocol=pickle.HIGHEST_PROTOCOL)
            ends.append(len(block))
        self.ends = np.array(ends)
        self.bytes = torch.frombuffer(block or bytearray(1), dtype=torch.uint8)  # torch takes no empty one

    def __len__(self) -> int:
        return len(self.ends) - 1

    def __getitem__(self, index: int):
        return pickle.loads(self.bytes.numpy()[self.ends[index] : self.ends[index + 1]])


class ArraySource:
    """Images in memory: uint8 array (size, H, W) grey or (size, H, W, 3), labels (size,)."""

    def __init__(self, title: str, images: np.ndarray, labels):
        self.title = title
        self.images = images
        self.labels = np.asarray(labels, dtype=np.int64)

    def read(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index]).convert("RGB")

    def name(self, index: int) -> str:
        return f"{self.title} #{index}"


def class_folders(folder: Path) -> list[str]:
    """Names of the class folders in `folder`, sorted: their numbers. Raises DataError if there is none."""
    names = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    if not names:
        raise DataError(f"{folder} holds no class folders; sort its images into one folder per class")
    return names


def scan_classes(folder: Path) -> dict[str, list[str]]:
    """Class name -> image files relative to `folder`, both sorted. Raises DataError for an empty class."""
    classes = {name: _images_below(folder, name) for name in class_folders(folder)}
    empty = [name for name, files in classes.items() if not files]
    if empty:
        raise DataError(
            f"{folder}: no images in class folder {some_of(empty)}; fill or remove it "
            f"(images end in {' '.join(IMG_EXTENSIONS)})"
        )
    return classes


def walk(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """(directory, names of its files) of all directories below a folder, linked ones too, each once.

    Raises DataError for one that cannot be read: its images would be missing without a word.
    """

    def refuse(error: OSError):
        raise_unless_of_file(error, error.filename)
        raise DataError(f"{error.filename} cannot be read: {error.strerror}") from error

    seen = set()
    for directory, inner, files in os.walk(folder, onerror=refuse, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:  # a link to a folder above it
            inner.clear()
        else:
            seen.add(real)
            yield directory, files


def _images_below(folder: Path, name: str) -> list[str]:
    found = []
    for directory, files in sorted(walk(folder / name)):
        relative = os.path.relpath(directory, folder)
        images = sorted(file for file in files if file.lower().endswith(IMG_EXTENSIONS))
        found += [os.path.join(relative, file) for file in images]
    return found


def _existing_folder(path: Path, hint: str) -> Path:
    if not path.is_dir():
        what = "is not a folder" if path.exists() else "does not exist"
        raise DataError(f"{path} {what}; {hint}")
    return path


def image_folder_sources(root: Path, need_train: bool) -> Sources:
    """`root`/train/CLASS/* and `root`/val/CLASS/*.

    Classes are train's, and val's images are labelled by class name. Without training, a missing train
    folder leaves val to define the classes.
    """
    hint = "--data-path takes the folder that holds train/ and val/"
    _existing_folder(root, hint)
    there = sorted(entry.name for entry in os.scandir(root))
    if not need_train and not {"train", "val"} & set(there) and any((root / name).is_dir() for name in there):
        classes = scan_classes(root)  # as ImageNet-A, -R, -V2 and -Sketch unpack
        names, remark = list(classes), "; no val/, its folders are classes"
        return Sources(None, _labelled(root, classes, names), names, remark)
    hint = f"{hint}, and {root} holds: {some_of(there) or 'nothing'}"
    val = scan_classes(_existing_folder(root / "val", hint))
    train = scan_classes(_existing_folder(root / "train", hint)) if need_train else None
    names = list(train or val)
    if not need_train and (root / "train").is_dir():
        names = class_folders(root / "train")
    unknown = sorted(set(val) - set(names))
    if unknown:
        raise DataError(
            f"{root / 'val'} has {len(unknown)} class folder(s) that {root / 'train'} lacks: "
            f"{some_of(unknown)}; remove or rename them"
        )
    absent = [name for name in names if name not in val]
    return Sources(
        train=_labelled(root / "train", train, names) if need_train else None,
        val=_labelled(root / "val", val, names),
        class_names=names,
        remark=f"; val has no images of {len(absent)} classes: {some_of(absent)}" if absent else "",
    )


def _labelled(folder: Path, classes: dict[str, list[str]], names: list[str]) -> FileSource:
    label_of = {name: label for label, name in enumerate(names)}
    pairs = [(file, label_of[name]) for name, files in classes.items() for file in files]
    return FileSource(folder, [file for file, _ in pairs], [label for _, label in pairs])


def cifar_sources(root: Path, kind: type[CIFAR10], need_train: bool) -> Sources:
    """CIFAR-10 or CIFAR-100 (Krizhevsky 2009) as torchvision unpacks it below `root`."""
    name = kind.__name__
    call = f"torchvision.datasets.{name}('{root}', download=True)"
    hint = f'fetch it with python -c "import torchvision; {call}"'
    _existing_folder(root / kind.base_folder, hint)
    try:
        sets = [kind(str(root), train=train) for train in ((True, False) if need_train else (False,))]
    except RuntimeError as error:  # torchvision compared the files' digests
        raise DataError(f"{root / kind.base_folder}: a file is missing or damaged; {hint}") from error
    sources = [ArraySource(f"{name} {'train' if s.train else 'test'}", s.data, s.targets) for s in sets]
    return Sources(sources[0] if need_train else None, sources[-1], list(sets[-1].classes))


def inat_sources(root: Path, year: int, category: str, need_train: bool) -> Sources:
    """iNaturalist 2018 or 2019 as DeiT lays it out: `root` holds train{year}.json, val{year}.json,
    categories.json and the image folders that the JSON files name.

    The label of an image is its category's entry `category` (such as "name" or "genus"); labels are numbered
    in the order in which train's annotations first show them, so evaluation needs train's JSON too.
    """
    _existing_folder(root, f"--data-path takes the folder that holds train{year}.json and val{year}.json")
    entries = _read_json(root / "categories.json")
    train_json, val_json = _read_json(root / f"train{year}.json"), _read_json(root / f"val{year}.json")
    try:
        title_of = {int(entry["id"]): str(entry[category]) for entry in entries}
        names = list(dict.fromkeys(title_of[int(a["category_id"])] for a in train_json["annotations"]))
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root}: categories.json and train{year}.json do not fit: no {error}") from error
    train = _inat_split(root, f"train{year}.json", train_json, title_of, names) if need_train else None
    return Sources(train, _inat_split(root, f"val{year}.json", val_json, title_of, names), names)


def _read_json(path: Path):
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise_unless_of_file(error, path)
        hint = "--data-path takes the folder with iNaturalist's JSON files"
        raise DataError(f"{path} cannot be read ({error.strerror}); {hint}") from error
    except ValueError as error:
        raise DataError(f"{path} is not valid JSON ({error}); fetch it again") from error


def _inat_split(root: Path, file: str, content: dict, title_of: dict[int, str], names: list[str]) -> FileSource:
    label_of = {name: label for label, name in enumerate(names)}
    try:
        title_by_image = {a["image_id"]: title_of[int(a["category_id"])] for a in content["annotations"]}
        ids = [image["id"] for image in content["images"]]
        files = [image["file_name"] for image in content["images"]]
    except (KeyError, TypeError, ValueError) as error:
        raise DataError(f"{root / file}: unreadable labels: an entry lacks {error}; fetch it again") from error
    unlabelled = [name for name, image in zip(files, ids) if image not in title_by_image]
    if unlabelled:
        raise DataError(f"{root / file} has no annotation for {some_of(unlabelled)}; fetch it again")
    titles = [title_by_image[image] for image in ids]
    unknown = sorted(set(titles) - set(names))
    if unknown:
        raise DataError(f"{root / file} has categories that train lacks: {some_of(unknown)}; remove them")
    if not files:
        raise DataError(f"{root / file} lists no images; fetch it again")
    return FileSource(root, _inat_layout(root, file, files), [label_of[title] for title in titles])


def _inat_layout(root: Path, file: str, files: list[str]) -> list[str]:
    """The files as named, or without the super-category folder (2nd of 4 parts), as some archives lie."""
    if (root / files[0]).exists():
        return files
    short = [os.path.join(*(part for i, part in enumerate(name.split("/")) if i != 1)) for name in files]
    if (root / short[0]).exists():
        return short
    raise DataError(f"{root / file} names {files[0]}, which is not below {root}; unpack the images there")


def digits_sources(need_train: bool) -> Sources:
    """scikit-learn's 1797 grey digits of 8 x 8; a fixed, stratified fifth is held out as val."""
    from sklearn.datasets import load_digits  # half a second, for this data set alone
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * (255 / 16)).round().astype(np.uint8)
    train, val = train_test_split(
        np.arange(len(images)), test_size=DIGITS_HELD_OUT, random_state=0, stratify=digits.target
    )
    return Sources(
        train=ArraySource("digits train", images[train], digits.target[train]) if need_train else None,
        val=ArraySource("digits val", images[val], digits.target[val]),
        class_names=[str(name) for name in digits.target_names],
        remark="; small shifts are the only augmentation, whatever the flags say" if need_train else "",
    )


def build_datasets(args) -> DataBundle:
    """The data of `args.data_set` at `args.data_path`, checked.

    Reads `data_set, data_path, inat_category, eval, seed, num_classes, valid_labels, in_chans, bad_image,
    bad_image_share` and what `augment.build_transform` reads. With `args.eval` only val is needed. Raises DataError.
    """
    sources = _sources(args, need_train=not args.eval)
    asked = args.num_classes or (IMAGENET_CLASSES if args.valid_labels else None)  # of which the data has some
    num_classes = _checked_num_classes(asked, sources.class_names)
    for source in filter(None, (sources.train, sources.val)):
        _check_labels(args, source, sources.class_names)
    return DataBundle(
        train=None if sources.train is None else _dataset(args, sources.train, train=True),
        val=_dataset(args, sources.val, train=False),
        num_classes=num_classes,
        class_names=sources.class_names,
        description=_describe(args, sources),
    )


def _sources(args, need_train: bool) -> Sources:
    root = Path(args.data_path or "").expanduser()
    if args.data_set == "DIGITS":
        return digits_sources(need_train)
    if args.data_set == "IMNET":
        return image_folder_sources(root, need_train)
    if args.data_set in ("CIFAR", "CIFAR10"):
        return cifar_sources(root, CIFAR100 if args.data_set == "CIFAR" else CIFAR10, need_train)
    if args.data_set in ("INAT", "INAT19"):
        return inat_sources(root, 2018 if args.data_set == "INAT" else 2019, args.inat_category, need_train)
    from readers import reader_sources  # it imports this module

    return reader_sources(args, need_train)


def _dataset(args, source: Source, train: bool) -> ImageDataset:
    policy = "raise" if args.bad_image == "raise" else "next" if train else "grey"
    transform = build_transform(args, train, args.in_chans)
    return ImageDataset(source, transform, args.seed, policy, args.bad_image_share)


def _checked_num_classes(asked: int | None, names: list[str]) -> int:
    if asked is None:
        return len(names)
    if asked < len(names):
        raise DataError(f"--num-classes {asked}: the data has {len(names)} classes; drop it or raise it")
    return asked


def _check_labels(args, source: Source, names: list[str]) -> None:
    if len(source.labels) == 0:
        raise DataError(f"--data-set {args.data_set} --data-path {args.data_path}: a split has no images; fill it")
    low, high = source.labels.min(), source.labels.max()
    if low < 0 or high >= len(names):
        worst = int(source.labels.argmin() if low < 0 else source.labels.argmax())
        label, last = source.labels[worst], len(names) - 1
        raise DataError(f"{source.name(worst)}: label {label} is outside 0..{last}; correct it")


def _describe(args, sources: Sources) -> str:
    where = "" if args.data_set == "DIGITS" else f" {args.data_path}"
    counts = f"{len(sources.val.labels):,} val images in {len(sources.class_names):,} classes"
    if sources.train is not None:
        per_class = Counter(sources.train.labels.tolist()).values()
        spread = f"{' to '.join(f'{count:,}' for count in sorted({min(per_class), max(per_class)}))} a class"
        if len(sources.class_names) == 1:
            spread = f"all of class {sources.class_names[0]!r}: nothing to tell apart"
        counts = f"{len(sources.train.labels):,} train images ({spread}) and {counts}"
    grey = f"; images become grey, {args.in_chans} channel(s)" if args.in_chans != 3 else ""
    return f"{args.data_set}{where}: {counts}{sources.remark}{grey}"


def build_loader(dataset: Dataset, sampler: Sampler, args, train: bool, collate=None) -> DataLoader:
    """Batches in the sampler's order: (images (B, C, H, W) float32, labels (B,) int64), or what `collate` makes.

    Reads `batch_size, num_workers, pin_mem, loader_timeout`. Training leaves out an incomplete batch,
    evaluation keeps it. Workers stay alive between epochs; RuntimeError if one gives no batch for
    `loader_timeout` seconds.
    """
    workers = args.num_workers
    return DataLoader(
        dataset,
        batch_size=args.batch_size,
        sampler=sampler,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=args.pin_mem and torch.cuda.is_available(),
        drop_last=train,
        timeout=args.loader_timeout if workers else 0,
        persistent_workers=workers > 0,
        generator=torch.Generator(),  # else each epoch would draw its workers' seeds from the global one
        worker_init_fn=_outlive_signals,
        multiprocessing_context=START_METHOD if workers else None,
    )


def _outlive_signals(worker: int) -> None:
    """Let signals that stop the training process pass a loader's worker by: those to its group, such as torchrun's,
    and a SIGTERM to every process of a job, such as systemd's and SLURM's.

    It has to live on while the training process finishes its step and saves.
    """
    if hasattr(os, "setpgid"):  # not on Windows
        os.setpgid(0, 0)
    if hasattr(signal, "sigwaitinfo"):  # not on macOS
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # torch's handler would end the worker
        threading.Thread(target=_end_when_asked_to, daemon=True).start()


def _end_when_asked_to() -> None:
    """The training process itself sends SIGTERM to a worker that hangs when the run ends."""
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != multiprocessing.parent_process().pid:
        pass
    os._exit(0)
