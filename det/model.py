"""Mask R-CNN and Cascade Mask R-CNN on a plain backbone: what ViTDet (arXiv 2203.16527) is made of.

Everything that torchvision has is torchvision's (proposals, pooling, matching, losses, non-maximum suppression).
Ours are the pyramid (`pyramid.py`), how cascade stages follow each other (`cascade.py`), and the settings.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from timm.layers import LayerNorm2d
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads, paste_masks_in_image
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.models.detection.transform import resize_boxes

from dense import SCALES, Backbone, DenseModel, are_falling
from det.cascade import AgnosticPredictor, CascadeRoIHeads, PyramidRoIAlign
from det.pyramid import SimpleFeaturePyramid
from errors import check_choice

# Of the boxes that train a head, at most this share are of objects.
POSITIVE_SHARE = 0.25
DETECTORS = ("cascade", "mask")
# Of the three stages: overlap from which a box counts as an object, and the weights of its coded deltas.
CASCADE_OVERLAPS = (0.5, 0.6, 0.7)
CASCADE_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))


@dataclass(frozen=True)
class DetectorSettings:
    """The sizes of a detector; the defaults are ViTDet's for images of 1024 pixels.

    Raises ValueError, "FIELD: " and what is wrong with it.
    """

    detector: str = "cascade"
    pyramid_channels: int = 256
    pyramid_scales: tuple[float, ...] = SCALES
    anchor_sizes: tuple[float, ...] = (32, 64, 128, 256, 512)  # one per level, the pooled last one included
    rpn_convs: int = 2
    box_convs: int = 4
    box_width: int = 1024  # of the fully connected layer
    mask_convs: int = 4
    proposals: int = 1000  # boxes of an image that the heads are shown
    roi_samples: int = 512  # boxes of an image that the heads are trained on
    roi_side: float = 224.0  # a box of this side is read from the level of stride 16
    score_threshold: float = 0.05
    # Height and width that images are filled up to; None: in training the batch's largest, else each by itself.
    pad: tuple[int, int] | None = None

    def __post_init__(self):
        check_choice("detector", self.detector, DETECTORS)
        scales = self.pyramid_scales
        if not scales or not set(scales) <= set(SCALES) or not are_falling(scales):
            known = " ".join(f"{scale:g}" for scale in SCALES)
            given = " ".join(f"{scale:g}" for scale in scales)
            raise ValueError(f"pyramid_scales: {given}: use some of {known}, each once, the largest first")
        levels = len(scales) + 1
        if len(self.anchor_sizes) != levels:
            raise ValueError(
                f"anchor_sizes: {len(self.anchor_sizes)} anchor sizes for {levels} levels ({len(scales)} pyramid "
                "scales and one more): give one size per level"
            )
        for name, sides in (("anchor_sizes", self.anchor_sizes), ("roi_side", (self.roi_side,))):
            wrong = [side for side in sides if not 0 < side < math.inf]
            if wrong:
                raise ValueError(f"{name}: {wrong[0]:g}: expected pixels above 0")
        if int(POSITIVE_SHARE * self.roi_samples) < 1:
            least = math.ceil(1 / POSITIVE_SHARE)
            raise ValueError(f"roi_samples: {self.roi_samples}: none would be of an object; give {least} at least")


class Detector(DenseModel):
    """Images to losses (training) or to detections (evaluation).

    Args:
        backbone: image (B, 3, height, width) -> maps, of which the last one counts, (B, E, H, W).
        num_classes: of objects, background not counted; labels run from 1 to `num_classes`.
    """

    def __init__(self, backbone: Backbone, num_classes: int, settings: DetectorSettings):
        super().__init__()
        channels, stride = backbone.channels[-1], backbone.strides[-1]
        self.size = settings.pad
        self.backbone = backbone
        self.pyramid = SimpleFeaturePyramid(channels, settings.pyramid_channels, stride, settings.pyramid_scales)
        self.divisor = max(stride, self.pyramid.all_strides[-1])  # so that every level has exactly its stride
        if self.size is not None and any(side % self.divisor for side in self.size):
            raise ValueError(f"images filled up to {self.size} pixels: take multiples of {self.divisor}")
        self.rpn = build_rpn(settings)
        self.roi_heads = build_roi_heads(settings, self.pyramid, num_classes + 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None):
        """Losses by name, or a detection for each image.

        Args:
            images: B of (3, height, width), normalised, of any sizes.
            targets: in training, B dicts of `boxes` (N, 4) float32, left, top, right, bottom in pixels of the
                image, `labels` (N,) int64 from 1, and `masks` (N, height, width) uint8. N may be 0.

        A detection has `boxes` (N, 4), `labels` (N,), `scores` (N,) and `masks` (N, 1, 28, 28), probabilities
        inside the box: `in_original` brings both to the size of the file.
        """
        if self.training and targets is None:
            raise ValueError("a detector in training needs targets: pass them, or call model.eval()")
        if not self.training and self.size is None and len(images) > 1:
            # What is detected must not depend on which images happen to share a batch.
            return [self([image])[0] for image in images]
        padded, sizes = self.pad(images), [tuple(image.shape[-2:]) for image in images]
        features = self.pyramid(self.backbone(padded)[-1])
        features = {name: level.float() for name, level in features.items()}
        proposals, losses = self.rpn(ImageList(padded, sizes), features, targets)
        detections, more = self.roi_heads(features, proposals, sizes, targets)
        return losses | more if self.training else detections

    def pad(self, images: list[Tensor]) -> Tensor:
        """B of (3, height, width) -> (B, 3, H, W), zeros to the right and below."""
        height, width = self.size or (
            -(-max(image.shape[side] for image in images) // self.divisor) * self.divisor for side in (-2, -1)
        )
        for image in images:
            if image.shape[-2] > height or image.shape[-1] > width:
                raise ValueError(f"an image of {tuple(image.shape[-2:])} does not fit {self.size}")
        room = [(0, width - image.shape[-1], 0, height - image.shape[-2]) for image in images]
        return torch.stack([F.pad(image, sides) for image, sides in zip(images, room)])


class InFloat32:
    """Mixed into a predictor: its results are float32 under autocast, too.

    torchvision gives boxes the dtype of what predicts them, and in 16 bits a box's sides are 4 pixels apart at 1024.
    """

    def forward(self, *inputs):
        return in_float32(super().forward(*inputs))


def in_float32(results):
    """A tensor, or lists of them, in float32."""
    return results.float() if isinstance(results, Tensor) else [in_float32(one) for one in results]


class RPNHeadInFloat32(InFloat32, RPNHead):
    pass


class BoxPredictorInFloat32(InFloat32, FastRCNNPredictor):
    pass


class MaskPredictorInFloat32(InFloat32, MaskRCNNPredictor):
    pass


def build_rpn(settings: DetectorSettings) -> RegionProposalNetwork:
    """torchvision's region proposal network, with torchvision's thresholds."""
    ratios = ((0.5, 1.0, 2.0),) * len(settings.anchor_sizes)
    anchors = AnchorGenerator(tuple((size,) for size in settings.anchor_sizes), ratios)
    head = RPNHeadInFloat32(settings.pyramid_channels, anchors.num_anchors_per_location()[0], settings.rpn_convs)
    return RegionProposalNetwork(
        anchors,
        head,
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2 * settings.proposals, "testing": settings.proposals},
        post_nms_top_n={"training": settings.proposals, "testing": settings.proposals},
        nms_thresh=0.7,
    )


def build_roi_heads(settings: DetectorSettings, pyramid: SimpleFeaturePyramid, num_classes: int) -> nn.Module:
    """Three stages, or torchvision's one. `num_classes` counts the background."""
    masks = mask_branch(settings, pyramid, num_classes)
    if settings.detector == "mask":
        return build_stage(settings, pyramid, num_classes, BoxPredictorInFloat32, 0.5, CASCADE_WEIGHTS[0], masks)
    stages = [
        build_stage(settings, pyramid, num_classes, AgnosticPredictor, overlap, weights)
        for overlap, weights in zip(CASCADE_OVERLAPS, CASCADE_WEIGHTS)
    ]
    return CascadeRoIHeads(stages, **masks)


def build_stage(
    settings: DetectorSettings,
    pyramid: SimpleFeaturePyramid,
    num_classes: int,
    predictor: Callable[[int, int], nn.Module],
    overlap: float,
    weights: tuple[float, ...],
    masks: dict[str, nn.Module] | None = None,
) -> RoIHeads:
    """A stage; `masks` are its `mask_branch`, if it has one."""
    channels = settings.pyramid_channels
    return RoIHeads(
        PyramidRoIAlign(pyramid.names, pyramid.strides, 7, settings.roi_side),
        FastRCNNConvFCHead((channels, 7, 7), [channels] * settings.box_convs, [settings.box_width], LayerNorm2d),
        predictor(settings.box_width, num_classes),
        fg_iou_thresh=overlap,
        bg_iou_thresh=overlap,
        batch_size_per_image=settings.roi_samples,
        positive_fraction=POSITIVE_SHARE,
        bbox_reg_weights=weights,
        score_thresh=settings.score_threshold,
        nms_thresh=0.5,
        detections_per_img=100,
        **(masks or {}),
    )


def mask_branch(settings: DetectorSettings, pyramid: SimpleFeaturePyramid, num_classes: int) -> dict[str, nn.Module]:
    """Pooling, convolutions and predictor of one 28 x 28 mask per class, called as `RoIHeads` calls them."""
    channels = settings.pyramid_channels
    return {
        "mask_roi_pool": PyramidRoIAlign(pyramid.names, pyramid.strides, 14, settings.roi_side),
        "mask_head": MaskRCNNHeads(channels, [channels] * settings.mask_convs, 1, LayerNorm2d),
        "mask_predictor": MaskPredictorInFloat32(channels, channels, num_classes),
    }


def in_original(detection: dict[str, Tensor], size: tuple[int, int], original: tuple[int, int]) -> dict[str, Tensor]:
    """A detection in an image of `size` (height, width) as one in the file of size `original`.

    `masks` become (N, height, width) bool, the pixels of the object.
    """
    boxes = resize_boxes(detection["boxes"], list(size), list(original))
    masks = paste_masks_in_image(detection["masks"], boxes, original)[:, 0] >= 0.5  # (N, 1, h, w) -> (N, h, w)
    return detection | {"boxes": boxes, "masks": masks}
