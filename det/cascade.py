"""Heads that turn proposals into objects: torchvision's for one stage, ours for a cascade of them.

Cai and Vasconcelos, "Cascade R-CNN", arXiv 1906.09756: each stage classifies and refines the boxes of the one
before it, and is trained on what overlaps the truth by more. A stage here is torchvision's `RoIHeads` (matching,
sampling, box coding, losses, non-maximum suppression); this module adds how stages follow each other.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import MultiScaleRoIAlign, clip_boxes_to_image, remove_small_boxes
from torchvision.ops.poolers import initLevelMapper


class PyramidRoIAlign(MultiScaleRoIAlign):
    """torchvision's pooling with the levels' strides given, not inferred.

    torchvision infers them once, from the first batch's feature maps and image sizes *before* padding. A small
    image in a large padded square would make every later box be read at the wrong place.

    Args:
        names, strides: of the pyramid's levels, finest first. output_size: side of a pooled box, in cells.
        canonical_side: a box of this side is read from the level of stride 16 (Lin et al., arXiv 1612.03144).
    """

    def __init__(self, names: list[str], strides: list[int], output_size: int, canonical_side: float = 224):
        super().__init__(names, output_size, sampling_ratio=2, canonical_scale=canonical_side)
        self.scales = [1 / stride for stride in strides]
        exponents = [stride.bit_length() - 1 for stride in strides]
        self.map_levels = initLevelMapper(exponents[0], exponents[-1], canonical_side, canonical_level=4)


class AgnosticPredictor(FastRCNNPredictor):
    """Class scores and one box for all classes: (N, width) -> logits (N, classes), deltas (N, 4 x classes).

    The deltas are the same four numbers for each class, in the form that torchvision's losses take.
    """

    def __init__(self, width: int, num_classes: int):
        super().__init__(width, num_classes)
        self.bbox_pred = nn.Linear(width, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.cls_score(x)
        return logits, self.bbox_pred(x).repeat(1, logits.shape[1])  # (N, 4) -> (N, 4 x classes)


class CascadeRoIHeads(nn.Module):
    """Stages of `RoIHeads`, one after the other, and one mask branch on the first stage's samples.

    Called as `RoIHeads` is. In training the losses of stage k carry its number; what the stages send back into
    the shared feature maps is divided by their number, so that the pyramid learns as with one stage.

    Args:
        stages: `RoIHeads` with class-agnostic predictors and no mask branch. The last one's thresholds of
            score, overlap and number of detections count.
        mask_roi_pool, mask_head, mask_predictor: torchvision's, the same for all stages.
    """

    def __init__(self, stages: list[RoIHeads], mask_roi_pool, mask_head: nn.Module, mask_predictor: nn.Module):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.mask_roi_pool, self.mask_head, self.mask_predictor = mask_roi_pool, mask_head, mask_predictor

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Per image: features by level, proposals (N, 4); returns (detections, losses), one of them empty."""
        if self.training:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detections(features, proposals, image_shapes), {}

    def _losses(self, features, proposals, image_shapes, targets) -> dict[str, Tensor]:
        sampled, matched, labels, wanted = self.stages[0].select_training_samples(proposals, targets)
        losses = self._mask_loss(features, sampled, matched, labels, image_shapes, targets)
        for number, (stage, boxes, logits, deltas) in enumerate(self._run(features, sampled, image_shapes)):
            if number:
                labels, wanted = match(stage, boxes, targets)
            if len(logits):
                classifier, box = fastrcnn_loss(logits, deltas, labels, wanted)
            else:  # torchvision's mean over no boxes is NaN; the sum keeps every parameter in the graph
                classifier, box = logits.sum(), deltas.sum()
            losses |= {f"loss_classifier_{number}": classifier, f"loss_box_reg_{number}": box}
        return losses

    def _run(self, features, boxes, image_shapes) -> Iterator[tuple[RoIHeads, list[Tensor], Tensor, Tensor]]:
        """Each stage with the boxes it was shown and its logits and deltas."""
        for stage in self.stages:
            logits, deltas = self._predict(stage, features, boxes, image_shapes)
            yield stage, boxes, logits, deltas
            boxes = refine(stage, deltas, boxes, image_shapes)
            if self.training:  # evaluation averages the scores of each box over stages, so all have to stay
                boxes = [b[remove_small_boxes(b, 1e-2)] for b in boxes]

    def _predict(self, stage: RoIHeads, features, boxes, image_shapes) -> tuple[Tensor, Tensor]:
        """Boxes -> logits (N, classes) and deltas (N, 4 x classes), float32, of all images together."""
        pooled = stage.box_roi_pool(features, boxes, image_shapes)  # (N, C, 7, 7)
        if pooled.requires_grad:
            pooled.register_hook(lambda gradient: gradient / len(self.stages))
        logits, deltas = stage.box_predictor(stage.box_head(pooled))
        return logits.float(), deltas.float()

    def _mask_loss(self, features, boxes, matched, labels, image_shapes, targets) -> dict[str, Tensor]:
        found = [label > 0 for label in labels]
        boxes = [b[keep] for b, keep in zip(boxes, found)]
        matched = [m[keep] for m, keep in zip(matched, found)]
        logits = self._mask_logits(features, boxes, image_shapes)
        masks, classes = [t["masks"] for t in targets], [t["labels"] for t in targets]
        return {"loss_mask": maskrcnn_loss(logits, boxes, masks, classes, matched)}

    def _mask_logits(self, features, boxes, image_shapes) -> Tensor:
        """Boxes -> (N, classes, side, side), float32."""
        return self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, image_shapes))).float()

    def _detections(self, features, boxes, image_shapes) -> list[dict[str, Tensor]]:
        """Scores are the mean of all stages', boxes the last stage's."""
        steps = list(self._run(features, boxes, image_shapes))
        scores = [logits.softmax(-1) for _, _, logits, _ in steps]
        stage, boxes, _, deltas = steps[-1]
        mean = torch.stack(scores).mean(0).log()  # its softmax is the mean again
        found = stage.postprocess_detections(mean, deltas, boxes, image_shapes)
        results = [dict(zip(("boxes", "scores", "labels"), one)) for one in zip(*found)]
        logits = self._mask_logits(features, [r["boxes"] for r in results], image_shapes)
        for result, masks in zip(results, maskrcnn_inference(logits, [r["labels"] for r in results])):
            result["masks"] = masks  # (N, 1, side, side), in [0, 1]
        return results


def refine(stage: RoIHeads, deltas: Tensor, boxes: list[Tensor], image_shapes) -> list[Tensor]:
    """Per image (N, 4): the boxes moved as the stage says, clipped to the image; no gradient passes."""
    moved = stage.box_coder.decode(deltas.detach(), boxes)[:, 0]  # (N, classes, 4), all classes alike -> (N, 4)
    moved = moved.reshape(-1, 4)  # without a box torchvision decodes to (0, 4 x classes)
    moved = moved.split([len(b) for b in boxes])
    return [clip_boxes_to_image(b, shape) for b, shape in zip(moved, image_shapes)]


def match(stage: RoIHeads, boxes: list[Tensor], targets: list[dict]) -> tuple[list[Tensor], list[Tensor]]:
    """Per image: the class (0 for background) and the deltas (N, 4) that a stage should answer to boxes (N, 4)."""
    # An image whose boxes have all gone is matched with nothing: torchvision refuses objects without boxes.
    truth = [t["boxes"] if len(b) else t["boxes"][:0] for t, b in zip(targets, boxes)]
    matched, labels = stage.assign_targets_to_proposals(boxes, truth, [t["labels"] for t in targets])
    truth = [t if len(t) else t.new_zeros(1, 4) for t in truth]  # all is background there
    return labels, list(stage.box_coder.encode([t[m] for t, m in zip(truth, matched)], boxes))
