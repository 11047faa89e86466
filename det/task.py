"""What a detector's run adds to the loop: its loss, its measure, its pictures."""

from __future__ import annotations

import torch
from torch import nn

from datasets import DataBundle
from det.data import collate
from det.evaluation import DetectionResult, evaluate
from det.pictures import save_pictures
from distributed import World
from engine import Run
from report import RunLog


class Detection:
    """Batches (images, targets), both lists; see `task.Task`."""

    score_name, score_column = "box AP", "box_AP"
    collate = staticmethod(collate)

    def loss(self, run: Run, batch, micro: int) -> torch.Tensor:
        """The sum of all stages' losses."""
        device = run.world.device
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        targets = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in batch[1]]
        return sum(run.net(images, targets).values())

    def evaluate(self, model: nn.Module, loader, args, world: World) -> DetectionResult:
        return evaluate(model, loader, args, world)

    def pictures(self, log: RunLog, result: DetectionResult, data: DataBundle) -> None:
        """`detections.png`: what was found in the first held-out images, and the truth."""
        if log.dir:
            save_pictures(result.shown, data.val.source, log.dir / "detections.png")
