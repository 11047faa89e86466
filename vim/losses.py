"""What training minimises: cross-entropies, distillation (DeiT) and cosub (DeiT III).

All losses are computed in float32, whatever the precision of the logits.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

Logits = torch.Tensor | tuple[torch.Tensor, torch.Tensor]


class CrossEntropy(nn.Module):
    """Cross-entropy for labels (B,) or class probabilities (B, C), smoothed by `smoothing`."""

    def __init__(self, smoothing: float = 0.0):
        super().__init__()
        self.smoothing = smoothing

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(logits.float(), targets, label_smoothing=self.smoothing)


class BinaryCrossEntropy(nn.Module):
    """One yes-or-no question per class (DeiT III, arXiv 2204.07118): mean over batch and classes.

    Probabilities (B, C) above `floor` count as yes. Mixup gives every class at least smoothing / C; with that
    as the floor, smoothing does not turn all answers into yes. Labels (B,) become one-hot.
    """

    def __init__(self, floor: float = 0.0):
        super().__init__()
        self.floor = floor

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1])  # (B,) -> (B, C)
        # Mixing adds the floor up of two parts, which rounding may leave above it.
        answers = targets.gt(self.floor * (1 + 1e-4)).float()
        return F.binary_cross_entropy_with_logits(logits.float(), answers)


class CosubLoss(nn.Module):
    """Two sub-models, drawn by stochastic depth, answer the same images and teach each other.

    Touvron et al., *Co-training 2^L Submodels for Visual Recognition* (arXiv 2212.04884): a quarter each for
    both against the labels and both against the other's answer, which takes no gradient. Targets: labels (B,)
    or probabilities (B, C); logits: both halves after each other (2B, C).
    """

    def forward(self, logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        first, second = logits.float().chunk(2)  # (2B, C) -> two of (B, C)
        if targets.ndim == 1:
            targets = F.one_hot(targets, logits.shape[1])  # (B,) -> (B, C)
        bce = F.binary_cross_entropy_with_logits
        to_labels = bce(first, targets.float()) + bce(second, targets.float())
        to_each_other = bce(first, second.detach().sigmoid()) + bce(second, first.detach().sigmoid())
        return 0.25 * (to_labels + to_each_other)


class DistillationLoss(nn.Module):
    """The labels' loss mixed with a teacher's answers (DeiT, arXiv 2012.12877, section 4).

    Any model teaches any other. A student with a distillation token gives (class logits, distillation
    logits), and the teacher speaks to the second; a Vim has one class token alone, so the same logits hear
    both.

    `kind`: "none", "soft" (Kullback-Leibler divergence at temperature `tau`, eq. 2) or "hard" (the teacher's
    first choice as a label, eq. 3). `alpha` is the teacher's share.
    """

    def __init__(self, base: nn.Module, teacher: nn.Module | None, kind: str, alpha: float, tau: float):
        super().__init__()
        if kind not in ("none", "soft", "hard"):
            raise ValueError(f"distillation {kind!r} is unknown; take none, soft or hard")
        self.base = base
        self.teacher = teacher
        self.kind = kind
        self.alpha = alpha
        self.tau = tau

    def forward(self, images: torch.Tensor, outputs: Logits, targets: torch.Tensor) -> torch.Tensor:
        logits, distilled = outputs if isinstance(outputs, tuple) else (outputs, outputs)
        loss = self.base(logits, targets)
        if self.kind == "none":
            return loss
        with torch.no_grad():
            taught = self.teacher(images)
        return (1 - self.alpha) * loss + self.alpha * self.teaching(distilled.float(), taught.float())

    def teaching(self, student: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
        """How far the student's logits (B, C) are from the teacher's (B, C)."""
        if self.kind == "hard":
            return F.cross_entropy(student, teacher.argmax(dim=1))
        divergence = F.kl_div(
            F.log_softmax(student / self.tau, dim=1),
            F.log_softmax(teacher / self.tau, dim=1),
            reduction="sum",
            log_target=True,
        )
        # DeiT divides by batch times classes, not by the batch; its alphas were tuned with that.
        return divergence * self.tau**2 / student.numel()


def build_criterion(args, mixup_active: bool, num_classes: int, teacher: nn.Module | None = None) -> DistillationLoss:
    """The training loss `args` asks for: called with images, outputs and targets.

    Mixup has smoothed its targets already; labels are smoothed here.
    """
    if args.cosub:
        base = CosubLoss()
    elif args.bce_loss:
        base = BinaryCrossEntropy(floor=args.smoothing / num_classes if mixup_active else 0.0)
    else:
        base = CrossEntropy(0.0 if mixup_active else args.smoothing)
    return DistillationLoss(base, teacher, args.distillation_type, args.distillation_alpha, args.distillation_tau)
