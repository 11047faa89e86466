"""How good a model is, counted exactly: accuracy, loss, confusion matrix, most confident mistakes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from distributed import World, gather_objects, sum_over_ranks
from precision import autocast

# A table of classes x classes; beyond this many classes it neither fits a picture nor is worth its memory.
LARGEST_CONFUSION = 2000


@dataclass
class Mistake:
    """One image that the model took for another class."""

    index: int
    label: int
    predicted: int
    confidence: float


@dataclass
class Evaluation:
    """Exact results over all images: percentages, mean loss, table of (label, predicted) counts, mistakes.

    real: top-1 by ReaL's labels and the number of images that have any, where it was asked for.
    not_finite: images with a logit that is not finite, which count as wrong and are in none of the tables.
    """

    images: int
    top1: float
    top5: float
    loss: float
    confusion: torch.Tensor | None
    mistakes: list[Mistake]
    real: tuple[float, int] | None = None
    not_finite: int = 0

    @property
    def score(self) -> float:
        return self.top1

    @property
    def words(self) -> str:
        real = f", ReaL top-1 {self.real[0]:.2f} % of {self.real[1]:,} images" if self.real else ""
        lost = f"; logits of {self.not_finite:,} images are not finite (damaged weights?)" if self.not_finite else ""
        return f"top-1 {self.top1:.2f} %, top-5 {self.top5:.2f} %, loss {self.loss:.4f}{real}{lost}"

    def row(self, prefix: str) -> dict[str, float]:
        return {f"{prefix}loss": self.loss, f"{prefix}acc1": self.top1, f"{prefix}acc5": self.top5}


@torch.no_grad()
def evaluate(model: nn.Module, loader, args, world: World, num_classes: int) -> Evaluation:
    """Evaluate `model` on the loader's images.

    With `--dist-eval` every rank holds another part of them and the counts are added up; no image counts
    twice. With fewer than five classes top-5 is top-C, 100 %.
    """
    model.eval()
    rows = [torch.empty(0, 6, device=world.device)]
    for images, labels in loader:
        labels = labels.to(world.device, non_blocking=True)
        with autocast(args, world.device):
            logits = model(images.to(world.device, non_blocking=True))
        logits = logits.float()
        best = logits.topk(min(5, logits.shape[1])).indices  # (B, C) -> (B, 5), the first choice first
        hit = (best == labels[:, None]).any(dim=1)
        confidence = logits.softmax(dim=1).amax(dim=1)
        loss = F.cross_entropy(logits, labels, reduction="none")
        finite = logits.isfinite().all(dim=1)
        rows.append(torch.stack([labels, best[:, 0], hit, confidence, loss, finite], dim=1))  # six of (B,) -> (B, 6)
    return summarise(torch.cat(rows).cpu(), list(loader.sampler), num_classes, world, args.dist_eval)


def summarise(rows: torch.Tensor, indices: list, num_classes: int, world: World, shared: bool) -> Evaluation:
    """Count what `evaluate` saw: rows (images, 6) of label, prediction, top-5 hit, confidence, loss, finite logits."""
    label, predicted, hit, confidence, loss, finite = rows.double().unbind(dim=1)
    finite = finite.bool()
    right, hit = (label == predicted) & finite, hit * finite
    sums = torch.stack([torch.tensor(len(rows)).double(), right.sum(), hit.sum(), loss.sum(), (~finite).sum()])
    pairs = (label * num_classes + predicted).long()[finite]
    wrong = (~right & finite).nonzero()[:, 0]
    mistakes = [
        Mistake(int(indices[i]), int(label[i]), int(predicted[i]), float(confidence[i])) for i in wrong.tolist()
    ]
    confusion = None
    if num_classes <= LARGEST_CONFUSION:
        confusion = torch.bincount(pairs, minlength=num_classes**2).view(num_classes, num_classes)
    if shared and world.size > 1:  # an Apple GPU, which has no second rank, takes no float64
        sums = sum_over_ranks(sums.to(world.device)).cpu()
        confusion = None if confusion is None else sum_over_ranks(confusion.to(world.device)).cpu()
        mistakes = list(itertools.chain(*gather_objects(most_confident(mistakes))))
    images, right, hits, loss, not_finite = sums.tolist()
    top1, top5 = 100 * right / images, 100 * hits / images
    mistakes = most_confident(mistakes)
    return Evaluation(int(images), top1, top5, loss / images, confusion, mistakes, not_finite=int(not_finite))


def most_confident(mistakes: list[Mistake], limit: int = 24) -> list[Mistake]:
    return sorted(mistakes, key=lambda mistake: (-mistake.confidence, mistake.index))[:limit]
