"""Images and their classes: the task of `main.py`."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from augment import CountedMixup
from datasets import DataBundle
from distributed import World
from evaluation import Evaluation, evaluate
from losses import DistillationLoss
from report import RunLog


@dataclass
class Classification:
    """Batches (images (B, C, H, W), labels (B,)); see `task.Task`."""

    criterion: DistillationLoss
    mixup: CountedMixup | None
    num_classes: int

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
        return evaluate(model, loader, args, world, self.num_classes)

    def pictures(self, log: RunLog, result: Evaluation, data: DataBundle) -> None:
        log.pictures(result, data)
