"""ImageNet's relatives: data sets of a part of its classes, and ReaL, a second set of labels.

ImageNet-A (arXiv 1907.07174), ImageNet-R (arXiv 2006.16241), ImageNetV2 (arXiv 1902.10811) and ReaL
(arXiv 2006.07159) are evaluated with a classifier of ImageNet's 1000 classes. ImageNet-Sketch has all of them
in ImageNet's own order and needs nothing.
"""

import json
import pkgutil
import re
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor, nn

from datasets import IMAGENET_CLASSES, ImageDataset
from distributed import World, sum_over_ranks
from errors import DataError, one_line
from precision import autocast

NAMED_SUBSETS = ("imagenet-a", "imagenet-r", "imagenet-v2")
BUILT_IN = "imagenet"
VAL_IMAGE = re.compile(r"ILSVRC2012_val_(\d{8})")


class ClassSubset(nn.Module):
    """A classifier that may only answer with some classes: logits (B, C) -> (B, len(valid))."""

    def __init__(self, model: nn.Module, valid: list[int]):
        super().__init__()
        self.model = model
        self.register_buffer("valid", torch.tensor(valid), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        return self.model(images)[:, self.valid]


def valid_labels(which: str) -> list[int]:
    """Numbers of the model's classes that the data's classes are, in the order of the data's class folders.

    `which` is one of `NAMED_SUBSETS` or a file of numbers. ImageNetV2's folders are called by the numbers
    themselves, so that they sort as text: 0, 1, 10, 100, ... Raises DataError.
    """
    if which == "imagenet-v2":
        return sorted(range(IMAGENET_CLASSES), key=str)
    if which in NAMED_SUBSETS:
        text = pkgutil.get_data("timm.data", f"_info/{which.replace('-', '_')}_indices.txt").decode()
    else:
        try:
            text = Path(which).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            reason, names = getattr(error, "strerror", "is no text"), ", ".join(NAMED_SUBSETS)
            raise DataError(f"--valid-labels {which}: {reason}; give one of {names} or a file of numbers") from error
    try:
        return [int(word) for word in text.replace(",", " ").split()]
    except ValueError as error:
        raise DataError(f"--valid-labels {which}: {error}; expected class numbers") from error


def check_valid_labels(valid: list[int], class_names: list[str], num_classes: int) -> None:
    """Raises DataError unless there is one number for every class of the data, all of them the model's."""
    if len(valid) != len(class_names):
        raise DataError(
            f"--valid-labels has {len(valid)} classes and the data {len(class_names)}; "
            "give one number for each class folder"
        )
    wrong = [number for number in valid if not 0 <= number < num_classes]
    if wrong:
        raise DataError(
            f"--valid-labels: {wrong[0]} is not a class of the model; its classes are 0 to {num_classes - 1}"
        )
    twice = [number for number, count in Counter(valid).items() if count > 1]
    if twice:
        raise DataError(f"--valid-labels: class {twice[0]} stands there twice; each class folder has its own")


def read_real_labels(which: str) -> list[set[int]]:
    """ReaL's labels by number of the validation image: "imagenet" for timm's copy, or a JSON file. Raises DataError."""
    try:
        if which == BUILT_IN:
            text = pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json").decode()
        else:
            text = Path(which).read_text(encoding="utf-8-sig")
        content = json.loads(text)
        if not isinstance(content, list):
            kind = type(content).__name__
            raise ValueError(f"expected a list with an entry for each validation image, found a {kind}")
        return [_as_classes(number, labels) for number, labels in enumerate(content)]
    except (OSError, ValueError) as error:
        reason = one_line(error)
        raise DataError(f"--real-labels {which}: {reason}; give {BUILT_IN!r} or ReaL's real.json") from error


def _as_classes(number: int, labels) -> set[int]:
    """One image's labels. Raises ValueError unless they are a list of ImageNet's classes."""
    if not isinstance(labels, list) or not all(type(one) is int and 0 <= one < IMAGENET_CLASSES for one in labels):
        raise ValueError(f"entry {number} is {labels!r}, not a list of class numbers from 0 to {IMAGENET_CLASSES - 1}")
    return set(labels)


def real_labels_of(dataset: ImageDataset, real: list[set[int]]) -> list[set[int]]:
    """The ReaL labels of every image of `dataset`.

    The images are known by their names, ILSVRC2012_val_00000001 onwards. Raises DataError for others.
    """
    return [real[_val_number(dataset.name(index), len(real))] for index in range(len(dataset))]


@torch.no_grad()
def evaluate_real(model: nn.Module, loader, args, world: World, real: list[set[int]]) -> tuple[float, int]:
    """Share of images (percent) whose first choice is one of their ReaL labels, and how many images have any.

    `real` are the labels of the loader's images by index, see `real_labels_of`.
    """
    model.eval()
    answers = []
    for images, _ in loader:
        with autocast(args, world.device):
            logits = model(images.to(world.device, non_blocking=True))
        none = torch.tensor(-1, device=logits.device)  # of images whose logits are no numbers
        answers.append(logits.argmax(dim=1).where(logits.isfinite().all(dim=1), none).cpu())
    right = counted = 0
    for index, answer in zip(loader.sampler, torch.cat(answers).tolist() if answers else []):
        right += answer in real[index]
        counted += bool(real[index])
    sums = torch.tensor([right, counted], device=world.device)
    right, counted = (sum_over_ranks(sums) if args.dist_eval else sums).tolist()
    return 100 * right / max(counted, 1), int(counted)


def _val_number(name: str, images: int) -> int:
    match = VAL_IMAGE.search(Path(name).name)
    if match is None or not 1 <= int(match[1]) <= images:
        raise DataError(f"{name}: --real-labels go by the names ILSVRC2012_val_00000001 to {images:08d}")
    return int(match[1]) - 1
