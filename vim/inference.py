"""A trained model with its preprocessing and class names, from a weight file: what predictions and pictures need."""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from timm.data import ImageNetInfo
from torch import Tensor, nn
from torchvision.datasets.folder import IMG_EXTENSIONS

from arguments import automatic_device
from augment import build_transform
from checkpoint import read_checkpoint
from datasets import IMAGENET_CLASSES, read_image, walk
from errors import BrokenImage, CheckpointError, ConfigError, DataError, one_line
from identity import evaluation_settings, open_model


@dataclass
class Classifier:
    """A model in evaluation mode on its device, and how to feed and read it."""

    model: nn.Module
    transform: Callable
    class_names: list[str]
    description: str

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def load_image(self, path: str | Path) -> Tensor:
        """(C, H, W) float32, preprocessed as in evaluation. Raises DataError."""
        try:
            return self.transform(read_image(path))
        except BrokenImage as error:
            raise DataError(f"{error}; repair or remove the file") from error


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that `load_classifier` reads, but for the device."""
    add = parser.add_argument_group("model").add_argument
    add("--checkpoint", required=True, metavar="CKPT",
        help="a file, https://..., hf-hub:REPO[/FILE], or a folder that `checkpoint.py export` wrote")  # fmt: skip
    add("--model", metavar="NAME", help="name of the model, where the file does not tell it")
    add("--weights", default="auto", choices=("auto", "raw", "ema"),
        help="which weights to take; auto: raw, or averaged where those have the published accuracy")  # fmt: skip
    add("--class-names", metavar="FILE", help="class names, one per line or a JSON list; default: the checkpoint's own")
    add("--trust-checkpoint", action="store_true", help="unpickle without torch's safe loader: may run code")


def add_device_flag(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="auto", help="cpu, cuda, mps, or auto: cuda if there is one, else cpu")


def load_classifier(args: argparse.Namespace) -> Classifier:
    """Model, preprocessing and class names of `--checkpoint`. Raises CheckpointError, ConfigError, DataError."""
    device = choose_device(args.device)
    checkpoint = read_checkpoint(args.checkpoint, args.trust_checkpoint)
    if Path(args.checkpoint).expanduser().is_dir() and not checkpoint.exported:
        raise CheckpointError(
            f"{args.checkpoint}/config.json does not describe a model: export the folder again with `checkpoint.py "
            f"export`, or give {checkpoint.path} itself"
        )
    model, identity, entry = open_model(checkpoint, args.model, args.weights)
    names, settings = checkpoint.class_names, checkpoint.args or argparse.Namespace()
    held = "exported weights" if checkpoint.exported else entry
    description = f"{checkpoint.label}: {identity.name}, {held}"
    if not model.num_classes:
        raise CheckpointError(f"{args.checkpoint} has no classification head; fine-tune it first")
    if args.class_names:
        names = read_class_names(args.class_names)
        if len(names) != model.num_classes:
            raise DataError(
                f"--class-names {args.class_names} has {len(names)} names, the model {model.num_classes} classes; "
                "give one name for each class"
            )
    names = readable_names(names, model.num_classes)
    return Classifier(model.eval().to(device), evaluation_transform(model, settings), names, description)


def choose_device(name: str) -> torch.device:
    """The device called `name`, or the one that "auto" stands for. Raises ConfigError."""
    if name == "auto":
        name = automatic_device()
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"--device {name}: expected cpu, cuda, mps or auto") from error
    try:
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # each backend has its own way to say no
        raise ConfigError(f"--device {name}: this torch sees no such device; use --device cpu or auto") from error
    return device


def evaluation_transform(model: nn.Module, settings: argparse.Namespace) -> Callable:
    """PIL image -> tensor as `main.py --eval` makes it for this model; `settings` are its run's arguments."""
    args = evaluation_settings(model, settings)
    return build_transform(args, train=False, num_channels=getattr(model, "in_chans", 3))


def read_class_names(path: str) -> list[str]:
    """Names by class number, from a JSON list or from lines. Raises DataError."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # Windows' editors begin with a mark
        names = json.loads(text) if path.endswith(".json") else text.splitlines()
    except (OSError, ValueError) as error:
        raise DataError(f"--class-names {path}: {one_line(error)}") from error
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"--class-names {path}: expected a JSON list of names, or one name a line")
    return names


def readable_names(names: list[str], num_classes: int) -> list[str]:
    """A name for each class: the given ones, ImageNet-1k's for 1000 unnamed classes, else numbers.

    WordNet numbers (n01440764), which ImageNet's folders are called, become words. A model may have more classes
    than its data had names (`--num-classes`): the rest are numbers. Raises DataError for more names than classes.
    """
    if not names and num_classes == IMAGENET_CLASSES:
        return ImageNetInfo().label_descriptions()
    if len(names) > num_classes:
        raise DataError(f"{len(names)} class names for a model of {num_classes} classes; give --class-names")
    info = ImageNetInfo()
    synsets = set(info.label_names())
    known = [info.label_name_to_description(name) if name in synsets else name for name in names]
    return known + [f"class {number}" for number in range(len(names), num_classes)]


def find_images(paths: list[str]) -> list[Path]:
    """Image files: each path itself, or all images below a folder, linked folders too, sorted. Raises DataError."""
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            files = (Path(place, name) for place, names in walk(path) for name in names)
            images = sorted(file for file in files if file.name.lower().endswith(IMG_EXTENSIONS) and file.is_file())
            if not images:
                raise DataError(f"{path} holds no images (their names end in {' '.join(IMG_EXTENSIONS)})")
            found += images
        elif path.is_file():
            found.append(path)
        else:
            raise DataError(f"{path} does not exist; give images or folders of images")
    return found


def batches(items: list, size: int) -> Iterator[list]:
    """Consecutive parts of a list, `size` items each but the last."""
    for start in range(0, len(items), size):
        yield items[start : start + size]
