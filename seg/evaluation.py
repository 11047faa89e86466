"""Predictions at the image's own size, and how good they are: one confusion matrix over all pixels."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from arguments import size_of
from dense import resize_maps
from distributed import World, sum_over_ranks
from errors import DataError
from precision import autocast
from seg.views import IGNORED, fitting


@dataclass(frozen=True)
class EvalSettings:
    """How an image is shown to the model.

    sides: what its (shorter, longer) side is made to fit, times each of `scales`; None for its own size.
    mode: "whole", or "slide": windows of `window` (height, width), `stride` pixels apart, logits averaged.
    flip: each view mirrored too. Several views' probabilities are averaged.
    """

    sides: tuple[int, int] | None
    mode: str
    window: tuple[int, int]
    stride: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False


def eval_settings(args) -> EvalSettings:
    """Those of the flags; scenes are shown as they are."""
    return EvalSettings(
        sides=None if args.data_set == "SCENES" else tuple(sorted(size_of(args.resize))),
        mode="whole" if args.data_set == "SCENES" else args.eval_mode,
        window=size_of(args.crop_size),
        stride=args.window_stride,
        scales=tuple(args.eval_scales),
        flip=args.eval_flip,
    )


def predict(model: nn.Module, images: Tensor, settings: EvalSettings) -> Tensor:
    """Classes of the pixels: images (B, 3, H, W), normalised -> int64 (B, H, W); K, which no class is, where the
    model's K logits are not finite."""
    size = tuple(images.shape[-2:])
    total = 0
    for scale in settings.scales:
        sides = settings.sides or (min(size), max(size))
        view = resize_images(images, fitting(size, sides, scale))
        for mirrored in (False, True) if settings.flip else (False,):
            logits = logits_of(model, view.flip(-1) if mirrored else view, settings)
            logits = resize_maps(logits.flip(-1) if mirrored else logits, size)
            total = total + logits.softmax(dim=1)
    return torch.where(total.isfinite().all(dim=1), total.argmax(dim=1), total.shape[1])


def resize_images(images: Tensor, size: tuple[int, int]) -> Tensor:
    if tuple(images.shape[-2:]) == tuple(size):
        return images
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)


def logits_of(model: nn.Module, images: Tensor, settings: EvalSettings) -> Tensor:
    """Logits (B, K, H, W) of images (B, 3, H, W), at once or by windows."""
    if settings.mode == "whole":
        return model(images).float()
    height, width = images.shape[-2:]
    total, seen = None, images.new_zeros(1, 1, height, width)
    for top in starts(height, settings.window[0], settings.stride):
        for left in starts(width, settings.window[1], settings.stride):
            window = (..., slice(top, top + settings.window[0]), slice(left, left + settings.window[1]))
            logits = model(images[window]).float()
            if total is None:
                total = logits.new_zeros(len(images), logits.shape[1], height, width)
            total[window] += logits
            seen[window] += 1
    return total / seen


def starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin along a side: `stride` apart, the last one at the end; one where the side is shorter."""
    last = max(0, length - window)
    return [*range(0, last, stride), last]


@dataclass
class Sample:
    """One evaluated image: its number, and what was labelled and predicted, uint8 (H, W), `IGNORED` where nothing."""

    index: int
    label: np.ndarray
    predicted: np.ndarray


@dataclass
class Segmented:
    """What evaluation counted: pixels by (label, prediction), int64 (K, K), over all ranks.

    lost: pixels of each label without a prediction, int64 (K,), which count as wrong; not_finite: images with such.
    """

    confusion: Tensor
    images: int
    samples: list[Sample] = field(default_factory=list)
    lost: Tensor | int = 0
    not_finite: int = 0

    @property
    def labelled(self) -> Tensor:
        """Pixels of each label, int64 (K,)."""
        return self.confusion.sum(1) + self.lost

    @property
    def iou(self) -> Tensor:
        """Intersection over union of each class in percent, float64 (K,); NaN where no pixel has to do with it."""
        right = self.confusion.diag().double()
        return 100 * right / (self.confusion.sum(0) + self.labelled - right)

    @property
    def accuracy(self) -> Tensor:
        """The share of each class's pixels that was found, in percent, float64 (K,); NaN where it has none."""
        return 100 * self.confusion.diag().double() / self.labelled

    @property
    def score(self) -> float:
        """mIoU: the mean over the classes that occur in labels or predictions."""
        return self.iou.nanmean().item()

    @property
    def mean_accuracy(self) -> float:
        return self.accuracy.nanmean().item()

    @property
    def all_accuracy(self) -> float:
        """aAcc: the share of all pixels that is right."""
        return 100 * self.confusion.diag().sum().item() / self.labelled.sum().item()

    @property
    def words(self) -> str:
        lost = f"; logits of {self.not_finite:,} images are not finite (damaged weights?)" if self.not_finite else ""
        return f"mIoU {self.score:.2f} %, mAcc {self.mean_accuracy:.2f} %, aAcc {self.all_accuracy:.2f} %{lost}"

    def row(self, prefix: str) -> dict[str, float]:
        return {
            f"{prefix}miou": self.score,
            f"{prefix}macc": self.mean_accuracy,
            f"{prefix}aacc": self.all_accuracy,
        }


@torch.no_grad()
def evaluate(model: nn.Module, loader, args, world: World, num_classes: int) -> Segmented:
    """Every pixel of the loader's images whose label counts; with `--dist-eval` over the parts of all ranks."""
    model.eval()
    settings = eval_settings(args)
    confusion = torch.zeros(num_classes * (num_classes + 1), dtype=torch.int64, device=world.device)
    not_finite = torch.zeros(1, dtype=torch.int64, device=world.device)
    samples, indices, images_seen = [], list(loader.sampler), 0
    for images, labels in loader:
        for image, label in batches(images, labels):
            with autocast(args, world.device):
                predicted = predict(model, image.to(world.device, non_blocking=True), settings)
            confusion += count(label.to(world.device, non_blocking=True), predicted, num_classes)
            lost = predicted == num_classes
            not_finite += lost.flatten(1).any(dim=1).sum()
            predicted = torch.where(lost, IGNORED, predicted)
            for truth, guess in zip(label, predicted):
                if len(samples) < args.pictures:
                    pair = (truth.byte().cpu().numpy(), guess.byte().cpu().numpy())
                    samples.append(Sample(indices[images_seen], *pair))
                images_seen += 1
    totals = torch.cat([confusion, not_finite, torch.tensor([images_seen], device=world.device)])
    if args.dist_eval:
        totals = sum_over_ranks(totals)
    *_, not_finite, images_seen = totals.tolist()
    if totals[:-2].sum() == 0:
        raise DataError(
            f"every pixel of {images_seen:,} val images is ignored ({IGNORED}): check the label files, "
            "--reduce-zero-label and --num-classes"
        )
    table = totals[:-2].cpu().view(num_classes, num_classes + 1)
    return Segmented(table[:, :-1], images_seen, samples, table[:, -1], not_finite)


def batches(images, labels):
    """(images (B, 3, H, W), labels (B, H, W)) of one size, from what `collate` made."""
    if isinstance(images, Tensor):
        return [(images, labels)]
    return [(image[None], label[None]) for image, label in zip(images, labels)]


def count(label: Tensor, predicted: Tensor, num_classes: int) -> Tensor:
    """Pixels by (label, prediction 0 to K), int64 (K * (K + 1),); `IGNORED` ones are left out."""
    counts, columns = label != IGNORED, num_classes + 1
    return torch.bincount(label[counts] * columns + predicted[counts], minlength=num_classes * columns)
