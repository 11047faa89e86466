"""What a segmentation run adds to the loop: its loss, its measure, its pictures."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from datasets import DataBundle
from distributed import World
from report import RunLog
from seg import pictures
from seg.data import collate
from seg.evaluation import Segmented, evaluate
from seg.views import IGNORED


@dataclass
class Segmentation:
    """Batches (images (B, 3, H, W), labels (B, H, W) int64); see `task.Task`."""

    num_classes: int
    auxiliary_weight: float = 0.4

    score_name = "mIoU"
    score_column = "miou"
    collate = staticmethod(collate)

    def loss(self, run, batch, micro: int) -> Tensor:
        images, labels = (part.to(run.world.device, non_blocking=True) for part in batch)
        logits, auxiliary = run.net(images, with_auxiliary=True)
        loss = pixel_loss(logits, labels)
        return loss if auxiliary is None else loss + self.auxiliary_weight * pixel_loss(auxiliary, labels)

    def evaluate(self, model: nn.Module, loader, args, world: World) -> Segmented:
        return evaluate(model, loader, args, world, self.num_classes)

    def pictures(self, log: RunLog, result: Segmented, data: DataBundle) -> None:
        if log.dir:
            written = pictures.write(log.dir, result, data)
            log.say(f"pictures: {', '.join(str(path) for path in written)}")


def pixel_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy of the pixels whose label counts, 0 where there is none. (B, K, H, W), (B, H, W) -> ()."""
    total = F.cross_entropy(logits.float(), labels, ignore_index=IGNORED, reduction="sum")
    return total / torch.count_nonzero(labels != IGNORED).clamp_min(1)
