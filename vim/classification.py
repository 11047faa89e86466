"""Images and their classes: the task of `main.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import nn

from augment import CountedMixup
from datasets import DataBundle
from distributed import World
from evaluation import Evaluation, evaluate
from losses import DistillationLoss
from report import RunLog
from subsets import ClassSubset, evaluate_real


@dataclass
class Classification:
    """Batches (images (B, C, H, W), labels (B,)); see `task.Task`.

    criterion, mixup: of training; None where nothing is trained, mixup also where nothing is mixed.
    valid: the numbers of the model's classes that the data's are, where they are not the first ones.
    real: the ReaL labels of the images that are evaluated, see `subsets.real_labels_of`.
    """

    criterion: DistillationLoss | None
    mixup: CountedMixup | None
    num_classes: int
    valid: list[int] | None = None
    real: list[set[int]] | None = None

    score_name = "top-1"
    score_column = "acc1"
    collate = None

    def loss(self, run, batch, micro: int) -> torch.Tensor:
        """With `--cosub` the images pass twice, through two random sub-models."""
        images, labels = batch
        images = images.to(run.world.device, non_blocking=True)
        targets = labels.to(run.world.device, non_blocking=True)
        if self.mixup is not None:
            images, targets = self.mixup(images, targets, micro, run.world.rank)
        if run.args.cosub:
            images = torch.cat([images, images])  # (B, C, H, W) -> (2B, C, H, W)
        outputs = run.net(images)
        if run.args.if_nan2num:
            both = isinstance(outputs, tuple)
            outputs = tuple(map(torch.nan_to_num, outputs)) if both else outputs.nan_to_num()
        return self.criterion(images, outputs, targets)

    def evaluate(self, model: nn.Module, loader, args, world: World) -> Evaluation:
        net, num_classes = model, self.num_classes
        if self.valid is not None:
            net, num_classes = ClassSubset(model, self.valid).to(world.device), len(self.valid)
        result = evaluate(net, loader, args, world, num_classes)
        if self.real is None:
            return result
        return replace(result, real=evaluate_real(model, loader, args, world, self.real))

    def pictures(self, log: RunLog, result: Evaluation, data: DataBundle) -> None:
        log.pictures(result, data)
