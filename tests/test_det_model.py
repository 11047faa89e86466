"""The detector's parts: ours equal torchvision's where torchvision has them, and shapes, padding and gradients hold."""

import pytest
import torch
from timm.models import create_model
from torch import nn
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.ops import MultiScaleRoIAlign, box_iou

import models_mamba  # noqa: F401  (registers its models)
from dense import Backbone
from det.cascade import AgnosticPredictor, CascadeRoIHeads, PyramidRoIAlign, match, refine
from det.model import DETECTORS, Detector, DetectorSettings, build_roi_heads, build_rpn, in_original
from det.pyramid import SimpleFeaturePyramid

SMALL = DetectorSettings(
    pyramid_channels=8, pyramid_scales=(1.0, 0.5), anchor_sizes=(8, 16, 32), rpn_convs=1, box_convs=1, box_width=16,
    mask_convs=1, roi_samples=32, roi_side=24.0,
)  # fmt: skip


class OneConvolution(nn.Module):
    """In the place of `dense.Backbone`: stride 4, at no cost."""

    channels, strides = [8], [4]

    def __init__(self, channels=8):
        super().__init__()
        self.embed = nn.Conv2d(3, channels, 4, 4)

    def forward(self, x):
        return [self.embed(x)]


def small_detector(detector="cascade", num_classes=3, **settings):
    torch.manual_seed(0)
    settings = DetectorSettings(**{**vars(SMALL), "detector": detector, **settings})
    return Detector(OneConvolution(), num_classes, settings)


def scene(height, width, boxes, labels):
    """An image and its target; each object fills its box."""
    masks = torch.zeros(len(boxes), height, width, dtype=torch.uint8)
    for mask, (left, top, right, bottom) in zip(masks, boxes):
        mask[top:bottom, left:right] = 1
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    return torch.randn(3, height, width), {"boxes": boxes, "labels": torch.tensor(labels).long(), "masks": masks}


def two_scenes():
    """Two sizes; the second one is empty."""
    scenes = scene(40, 56, [[4, 4, 20, 24], [30, 10, 50, 36]], [1, 3]), scene(48, 32, [], [])
    return [list(items) for items in zip(*scenes)]


# --- pyramid


def test_the_pyramid_has_vitdets_levels():
    pyramid = SimpleFeaturePyramid(32, 16, stride=16)
    levels = pyramid(torch.randn(2, 32, 8, 6))
    assert {name: tuple(level.shape) for name, level in levels.items()} == {
        "p2": (2, 16, 32, 24), "p3": (2, 16, 16, 12), "p4": (2, 16, 8, 6), "p5": (2, 16, 4, 3), "pool": (2, 16, 2, 2),
    }  # fmt: skip
    assert pyramid.all_strides == [4, 8, 16, 32, 64]
    assert torch.equal(levels["pool"], levels["p5"][:, :, ::2, ::2])


def test_every_output_pixel_of_the_pyramid_is_normed_over_channels():
    levels = SimpleFeaturePyramid(16, 8, stride=16)(5 + 3 * torch.randn(1, 16, 4, 4))
    for level in levels.values():
        assert level.mean(dim=1).abs().max() < 1e-4
        assert (level.std(dim=1, unbiased=False) - 1).abs().max() < 1e-2


@pytest.mark.parametrize(
    ("stride", "scales", "said"),
    [
        (16, (1.0, 2.0), "the largest first"),
        (16, (3.0,), "pyramid_scales=3.0 is unknown: use one of 4.0"),
        (14, (1.0,), "stride 14"),
        (2, (4.0, 1.0), "4 times as large"),
        (16, (), "each once"),
    ],
)
def test_an_impossible_pyramid_is_refused(stride, scales, said):
    with pytest.raises(ValueError, match=said):
        SimpleFeaturePyramid(16, 8, stride, scales)


# --- pooling


def test_pooling_equals_torchvisions_where_torchvision_guesses_right():
    names, strides = ["p2", "p3"], [4, 8]
    features = {"p2": torch.randn(1, 5, 32, 32), "p3": torch.randn(1, 5, 16, 16), "pool": torch.randn(1, 5, 8, 8)}
    boxes = [torch.tensor([[3.0, 5.0, 20.0, 31.0], [0.0, 0.0, 120.0, 127.0], [60.0, 60.0, 90.0, 80.0]])]
    ours = PyramidRoIAlign(names, strides, 7, canonical_side=112)
    theirs = MultiScaleRoIAlign(names, 7, 2, canonical_scale=112)
    assert torch.equal(ours(features, boxes, [(128, 128)]), theirs(features, boxes, [(128, 128)]))


def test_pooling_knows_the_strides_of_a_small_image_in_a_large_square():
    """torchvision would take an image of 32 pixels in a square of 128 for one whose maps have strides 1 and 2."""
    features = {"p2": torch.randn(1, 5, 32, 32), "p3": torch.randn(1, 5, 16, 16)}
    boxes = [torch.tensor([[3.0, 5.0, 20.0, 31.0]])]
    ours = PyramidRoIAlign(["p2", "p3"], [4, 8], 7)
    assert torch.equal(ours(features, boxes, [(32, 32)]), ours(features, boxes, [(128, 128)]))


def test_a_box_of_the_canonical_side_is_read_at_stride_16():
    pool = PyramidRoIAlign(["p2", "p3", "p4", "p5"], [4, 8, 16, 32], 7, canonical_side=100)
    boxes = torch.tensor([[0.0, 0.0, side, side] for side in (51, 101, 201)])
    assert pool.map_levels([boxes]).tolist() == [1, 2, 3]  # p3, p4, p5


# --- cascade


def torchvision_heads(num_classes=4, weights=(10.0, 10.0, 5.0, 5.0)):
    """torchvision's heads of one stage with a class-agnostic predictor."""
    torch.manual_seed(1)
    names, strides = ["p2", "p3"], [4, 8]
    return RoIHeads(
        PyramidRoIAlign(names, strides, 7),
        FastRCNNConvFCHead((8, 7, 7), [8], [16]),
        AgnosticPredictor(16, num_classes),
        0.5, 0.5, 16, 0.25, weights, 0.05, 0.5, 10,
        mask_roi_pool=PyramidRoIAlign(names, strides, 14),
        mask_head=MaskRCNNHeads(8, [8], 1),
        mask_predictor=MaskRCNNPredictor(8, 8, num_classes),
    )  # fmt: skip


def cascade_of(*stages):
    first = stages[0]
    return CascadeRoIHeads(list(stages), first.mask_roi_pool, first.mask_head, first.mask_predictor)


def heads_input():
    torch.manual_seed(2)
    features = {"p2": torch.randn(2, 8, 16, 16), "p3": torch.randn(2, 8, 8, 8)}
    corner = torch.rand(2, 30, 2) * 40
    proposals = torch.cat([corner, corner + 4 + torch.rand(2, 30, 2) * 20], dim=-1)
    _, target = scene(64, 64, [[4, 4, 20, 24], [30, 10, 50, 36]], [1, 3])
    _, other = scene(64, 64, [[20, 22, 40, 41]], [2])
    return features, list(proposals), [(64, 64), (64, 64)], [target, other]


def test_a_cascade_of_one_stage_has_torchvisions_losses():
    heads, (features, proposals, sizes, targets) = torchvision_heads(), heads_input()
    torch.manual_seed(3)
    _, wanted = heads(features, list(proposals), sizes, targets)
    torch.manual_seed(3)
    _, losses = cascade_of(heads)(features, list(proposals), sizes, targets)
    assert losses.keys() == {"loss_mask", "loss_classifier_0", "loss_box_reg_0"}
    for name, value in wanted.items():
        found = losses[name if name == "loss_mask" else f"{name}_0"]
        torch.testing.assert_close(found, value, rtol=1e-6, atol=0)
        assert value > 0


def test_a_cascade_of_one_stage_has_torchvisions_detections():
    heads, (features, proposals, sizes, _) = torchvision_heads().eval(), heads_input()
    wanted, _ = heads(features, proposals, sizes)
    found, losses = cascade_of(heads).eval()(features, proposals, sizes)
    assert losses == {} and sum(len(w["boxes"]) for w in wanted) > 5
    for one, other in zip(found, wanted):
        assert torch.equal(one["labels"], other["labels"])
        for name in ("boxes", "scores", "masks"):
            torch.testing.assert_close(one[name], other[name], rtol=1e-5, atol=1e-5)


def test_the_stages_send_back_as_much_as_one_stage():
    """Three equal stages that move no box: the features get the gradient of one stage, not of three."""
    heads, (features, proposals, sizes, targets) = torchvision_heads(), heads_input()
    nn.init.zeros_(heads.box_predictor.bbox_pred.weight)
    nn.init.zeros_(heads.box_predictor.bbox_pred.bias)

    def gradient(cascade):
        level = features["p2"].clone().requires_grad_()
        torch.manual_seed(3)
        _, losses = cascade({**features, "p2": level}, list(proposals), sizes, targets)
        sum(value for name, value in losses.items() if name != "loss_mask").backward()
        return level.grad

    torch.testing.assert_close(gradient(cascade_of(heads, heads, heads)), gradient(cascade_of(heads)))


def test_refined_boxes_are_the_decoded_ones_inside_the_image():
    stage = torchvision_heads()
    boxes = [torch.tensor([[10.0, 10.0, 20.0, 30.0]]), torch.tensor([[50.0, 50.0, 62.0, 60.0]])]
    deltas = torch.tensor([[10.0, 0.0, 0.0, 0.0], [0.0, 20.0, 0.0, 0.0]], requires_grad=True).repeat(1, 4)
    moved = refine(stage, deltas, boxes, [(64, 64), (64, 64)])  # a delta of 10 is the width of the box
    assert moved[0].tolist() == [[20.0, 10.0, 30.0, 30.0]]
    assert moved[1].tolist() == [[50.0, 64.0, 62.0, 64.0]]
    assert not moved[0].requires_grad


def test_later_stages_ask_for_more_overlap():
    torch.manual_seed(0)
    heads = build_roi_heads(SMALL, SimpleFeaturePyramid(8, 8, 4, (1.0, 0.5)), 4)
    truth = {"boxes": torch.tensor([[0.0, 0.0, 10.0, 10.0]]), "labels": torch.tensor([2])}
    boxes = torch.tensor([[0.0, 0.0, 10.0, 10 * share] for share in (0.45, 0.55, 0.65, 0.75)])
    assert box_iou(truth["boxes"], boxes)[0].tolist() == pytest.approx([0.45, 0.55, 0.65, 0.75])
    labels = [match(stage, [boxes], [truth])[0][0].tolist() for stage in heads.stages]
    assert labels == [[0, 2, 2, 2], [0, 0, 2, 2], [0, 0, 0, 2]]
    # The same box is coded twice and three times as large by the later stages.
    coded = [match(stage, [boxes], [truth])[1][0][3] for stage in heads.stages]
    torch.testing.assert_close(coded[1], 2 * coded[0])
    torch.testing.assert_close(coded[2], 3 * coded[0])


def test_each_stage_is_trained_by_its_own_overlap():
    """No box but the truth's own overlaps enough for the second, and where none moves those are right."""
    stages, (features, proposals, sizes, targets) = (torchvision_heads(), torchvision_heads()), heads_input()
    for stage in stages:
        nn.init.zeros_(stage.box_predictor.bbox_pred.weight)
        nn.init.zeros_(stage.box_predictor.bbox_pred.bias)
    stages[1].proposal_matcher.high_threshold = stages[1].proposal_matcher.low_threshold = 0.99
    _, losses = cascade_of(*stages)(features, list(proposals), sizes, targets)
    assert losses["loss_box_reg_0"] > 0 and losses["loss_box_reg_1"] == 0


def test_scores_are_averaged_over_stages():
    """A second stage that is certain of the background halves every score."""
    first, second = torchvision_heads().eval(), torchvision_heads().eval()
    for predictor in (first.box_predictor, second.box_predictor):
        nn.init.zeros_(predictor.bbox_pred.weight)
        nn.init.zeros_(predictor.bbox_pred.bias)
    with torch.no_grad():
        second.box_predictor.cls_score.weight.zero_()
        second.box_predictor.cls_score.bias.copy_(torch.tensor([100.0, 0, 0, 0]))
    features, proposals, sizes, _ = heads_input()
    alone, _ = cascade_of(first).eval()(features, proposals, sizes)
    both, _ = cascade_of(first, second).eval()(features, proposals, sizes)
    torch.testing.assert_close(both[0]["scores"][:5], alone[0]["scores"][:5] / 2)


# --- the whole


@pytest.mark.parametrize("detector", ["cascade", "mask"])
def test_a_step_on_mixed_sizes_and_an_empty_image_reaches_every_parameter(detector):
    model = small_detector(detector).train()
    images, targets = two_scenes()
    losses = model(images, targets)
    stages = 3 if detector == "cascade" else 1
    assert len(losses) == 2 + 1 + 2 * stages
    sum(losses.values()).backward()
    missing = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.isfinite().all()]
    assert missing == []


@pytest.mark.parametrize("detector", ["cascade", "mask"])
def test_a_batch_of_empty_images_trains_too(detector):
    model = small_detector(detector).train()
    images, targets = zip(scene(32, 32, [], []), scene(16, 48, [], []))
    losses = model(list(images), list(targets))
    sum(losses.values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    assert losses["loss_mask"] == 0


def detector_without_proposals(detector):
    model = small_detector(detector, score_threshold=0.0)
    model.rpn.forward = lambda images, features, targets: ([torch.zeros(0, 4) for _ in images.image_sizes], {})
    return model


@pytest.mark.parametrize("detector", ["cascade", "mask"])
@torch.no_grad()
def test_without_proposals_nothing_is_detected(detector):
    images, _ = two_scenes()
    for found in detector_without_proposals(detector).eval()(images):
        assert found["boxes"].shape == (0, 4) and found["masks"].shape == (0, 1, 28, 28)
        assert found["labels"].shape == found["scores"].shape == (0,)


@pytest.mark.parametrize("detector", ["cascade", "mask"])
def test_an_image_without_objects_and_proposals_trains_beside_another(detector):
    model = detector_without_proposals(detector).train()
    sum(model(*two_scenes()).values()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.roi_heads.parameters())


def test_a_cascade_trains_on_no_box_at_all():
    model = detector_without_proposals("cascade").train()
    images, targets = zip(scene(32, 32, [], []), scene(16, 48, [], []))
    losses = model(list(images), list(targets))
    assert len(losses) == 1 + 2 * 3 and all(value == 0 for value in losses.values())
    sum(losses.values()).backward()
    assert all(p.grad is not None and not p.grad.any() for p in model.roi_heads.parameters())


def test_objects_whose_boxes_have_all_gone_are_matched_with_none():
    """A stage may move all boxes of an image out of it."""
    _, target = scene(32, 32, [[4, 4, 20, 24]], [2])
    boxes = [torch.zeros(0, 4), torch.tensor([[4.0, 4.0, 20.0, 24.0]])]
    labels, deltas = match(torchvision_heads(), boxes, [target, target])
    assert [label.tolist() for label in labels] == [[], [2]]
    assert [tuple(d.shape) for d in deltas] == [(0, 4), (1, 4)]


class Pyramid(nn.Module):
    """Backbone and pyramid of a detector as torchvision wants them: one module, which knows its channels."""

    def __init__(self, detector):
        super().__init__()
        self.detector, self.out_channels = detector, detector.pyramid.out_channels

    def forward(self, x):
        return self.detector.pyramid(self.detector.backbone(x)[-1])


def as_torchvision(detector):
    """torchvision's own Mask R-CNN around the modules of `detector`."""
    heads = detector.roi_heads
    return MaskRCNN(
        Pyramid(detector), min_size=64, max_size=64, image_mean=[0] * 3, image_std=[1] * 3, size_divisible=16,
        _skip_resize=True,  # in training it would draw a random number
        rpn_anchor_generator=detector.rpn.anchor_generator, rpn_head=detector.rpn.head,
        rpn_pre_nms_top_n_train=2000, rpn_pre_nms_top_n_test=1000, rpn_post_nms_top_n_train=1000,
        rpn_post_nms_top_n_test=1000, box_roi_pool=heads.box_roi_pool, box_head=heads.box_head,
        box_predictor=heads.box_predictor, box_score_thresh=0.0, box_batch_size_per_image=SMALL.roi_samples,
        mask_roi_pool=heads.mask_roi_pool, mask_head=heads.mask_head, mask_predictor=heads.mask_predictor,
    )  # fmt: skip


def test_plain_mask_r_cnn_is_torchvisions():
    """The same losses and detections as `torchvision.models.detection.MaskRCNN` around the same modules."""
    ours = small_detector("mask", score_threshold=0.0)
    theirs = as_torchvision(ours)
    scenes = scene(64, 64, [[4, 4, 20, 24], [30, 10, 50, 36]], [1, 3]), scene(64, 64, [[20, 22, 40, 41]], [2])
    images, targets = (list(items) for items in zip(*scenes))
    losses = []
    for model in (ours.train(), theirs.train()):
        torch.manual_seed(5)
        losses.append(model(images, targets))
    assert losses[0].keys() == losses[1].keys()
    for name, value in losses[0].items():
        torch.testing.assert_close(value, losses[1][name], rtol=1e-5, atol=1e-7)
    with torch.no_grad():
        for mine, other in zip(ours.eval()(images), theirs.eval()(images)):
            mine = in_original(mine, (64, 64), (64, 64))
            assert len(mine["boxes"]) > 20 and torch.equal(mine["labels"], other["labels"])
            torch.testing.assert_close(mine["boxes"], other["boxes"], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(mine["scores"], other["scores"], rtol=1e-4, atol=1e-6)
            assert torch.equal(mine["masks"], other["masks"][:, 0] >= 0.5)


@torch.no_grad()
def test_a_batch_of_mixed_sizes_detects_inside_each_image():
    model = small_detector(score_threshold=0.0).eval()
    images, _ = two_scenes()
    for image, found in zip(images, model(images)):
        height, width = image.shape[-2:]
        assert len(found["boxes"]) == len(found["scores"]) == len(found["masks"]) > 10
        assert (found["boxes"] >= 0).all() and (found["boxes"] <= torch.tensor([width, height] * 2)).all()
        assert found["masks"].shape[1:] == (1, 28, 28) and found["labels"].min() >= 1


@torch.no_grad()
def test_an_image_is_detected_alike_whatever_stands_beside_it():
    model = small_detector(score_threshold=0.0, pad=(64, 64)).eval()
    images, _ = two_scenes()
    alone, beside = model(images[:1])[0], model(images)[0]
    torch.testing.assert_close(beside["boxes"], alone["boxes"], rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(beside["scores"], alone["scores"], rtol=1e-4, atol=1e-5)


def test_padding_is_zero_to_the_right_and_below_and_in_whole_strides():
    model = small_detector()
    images = [torch.ones(3, 40, 56), torch.ones(3, 17, 33)]
    padded = model.pad(images)
    assert padded.shape == (2, 3, 48, 64) and model.divisor == 16
    assert padded[1, :, :17, :33].min() == 1 and padded[1].sum() == 3 * 17 * 33
    assert small_detector(pad=(96, 96)).pad(images).shape == (2, 3, 96, 96)


def test_an_image_larger_than_the_square_is_refused():
    with pytest.raises(ValueError, match="fit"):
        small_detector(pad=(32, 32)).pad([torch.ones(3, 40, 20)])
    with pytest.raises(ValueError, match="multiples of 16"):
        small_detector(pad=(40, 32))


def test_anchors_stand_on_every_levels_stride_at_odd_grids():
    """torchvision derives strides from sizes, which only whole multiples give exactly."""
    model = small_detector()
    padded = model.pad([torch.zeros(3, 20, 40)])  # 32 x 48: the levels are 8 x 12, 4 x 6, 2 x 3
    levels = list(model.pyramid(model.backbone(padded)[-1]).values())
    (anchors,) = model.rpn.anchor_generator(ImageList(padded, [(20, 40)]), levels)
    last = anchors[-2 * 3 * 3 :].reshape(2, 3, 3, 4)  # rows, columns, shapes
    assert (last[0, 1] - last[0, 0])[:, 0].tolist() == [16, 16, 16]
    assert (last[1, 0] - last[0, 0])[:, 1].tolist() == [16, 16, 16]


@torch.no_grad()
def test_detections_do_not_depend_on_which_images_share_a_batch():
    """Padding to the largest of a batch would show an image among other zeros in another batch, or on another rank."""
    model = small_detector(score_threshold=0.0).eval()
    images, _ = two_scenes()
    for image, together in zip(images, model(images)):
        (alone,) = model([image])
        assert len(alone["boxes"]) > 10
        for name, value in alone.items():
            assert torch.equal(value, together[name]), name


def test_a_detection_in_the_file_has_the_files_size():
    detection = {"boxes": torch.tensor([[2.0, 4.0, 6.0, 8.0]]), "masks": torch.ones(1, 1, 28, 28)}
    found = in_original(detection, (10, 20), (30, 40))
    assert found["boxes"].tolist() == [[4.0, 12.0, 12.0, 24.0]]
    assert found["masks"].shape == (1, 30, 40) and found["masks"].dtype == torch.bool
    assert found["masks"][0, 13:23, 5:11].all() and found["masks"].sum() <= 14 * 10


def test_a_detection_of_nothing_in_the_file_is_nothing():
    detection = {"boxes": torch.zeros(0, 4), "masks": torch.zeros(0, 1, 28, 28)}
    assert in_original(detection, (10, 20), (30, 40))["masks"].shape == (0, 30, 40)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"detector": "yolo"}, "detector='yolo' is unknown: use one of 'cascade', 'mask'"),
        ({"anchor_sizes": (8, -5, 32)}, "anchor_sizes: -5: expected pixels above 0"),
        ({"anchor_sizes": (8, 16, float("inf"))}, "anchor_sizes: inf: expected"),
        ({"roi_side": 0}, "roi_side: 0: expected pixels above 0"),
        ({"roi_side": float("nan")}, "roi_side: nan: expected"),
        ({"roi_samples": 3}, "roi_samples: 3: none would be of an object; give 4 at least"),
        ({"anchor_sizes": (8, 16)}, r"2 anchor sizes for 3 levels .*: give one size per level"),
    ],
)
def test_settings_that_cannot_be_are_refused(wrong, said):
    with pytest.raises(ValueError, match=said):
        DetectorSettings(**{**vars(SMALL), **wrong})


def test_training_without_targets_is_refused():
    with pytest.raises(ValueError, match=r"in training needs targets: pass them, or call model\.eval\(\)"):
        small_detector().train()([torch.randn(3, 32, 32)])


def test_the_defaults_are_vitdets():
    settings = DetectorSettings()
    heads = build_roi_heads(settings, SimpleFeaturePyramid(192), 81)
    rpn = build_rpn(settings)
    assert [stage.proposal_matcher.high_threshold for stage in heads.stages] == [0.5, 0.6, 0.7]
    assert [stage.box_coder.weights for stage in heads.stages] == [
        (10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0),
    ]  # fmt: skip
    convs = [m for m in heads.stages[0].box_head.modules() if isinstance(m, nn.Conv2d)]
    assert [(conv.in_channels, conv.out_channels) for conv in convs] == [(256, 256)] * 4
    assert heads.stages[0].box_predictor.cls_score.in_features == 1024
    assert heads.stages[0].box_predictor.bbox_pred.out_features == 4
    assert len(rpn.head.conv) == 2 and heads.stages[-1].score_thresh == 0.05
    assert heads.stages[-1].detections_per_img == 100 and heads.stages[-1].nms_thresh == 0.5
    for training, (before, after) in ((True, (2000, 1000)), (False, (1000, 1000))):
        rpn.train(training)
        assert (rpn.pre_nms_top_n(), rpn.post_nms_top_n()) == (before, after)


@pytest.mark.slow
def test_a_vim_of_4096_tokens_detects():
    """1024 pixels and patches of 16: one forward and backward pass through the fused block."""
    torch.manual_seed(0)
    vim = create_model("vim_nano_patch4_32", num_classes=0, img_size=1024, patch_size=16, depth=1)
    settings = DetectorSettings(**{
        **vars(SMALL), "pyramid_scales": (1.0, 0.5), "anchor_sizes": (64, 128, 256), "pad": (1024, 1024)
    })  # fmt: skip
    model = Detector(Backbone(vim, 1), 3, settings).train()
    image, target = scene(700, 1000, [[40, 40, 200, 240]], [1])
    sum(model([image], [target]).values()).backward()
    assert all(p.grad.isfinite().all() for p in model.pyramid.parameters())


@pytest.mark.parametrize("detector", DETECTORS)
def test_boxes_are_float32_in_mixed_precision(detector):
    """In bfloat16 two coordinates of an image of 1024 pixels would be at least 4 apart."""
    images, targets = two_scenes()
    model, proposals = small_detector(detector), []
    model.rpn.register_forward_hook(lambda rpn, given, found: proposals.extend(found[0]))
    with torch.autocast("cpu", torch.bfloat16):
        losses = model(images, targets)
        (found,) = model.eval()(images[:1])
    assert {one.dtype for one in (*proposals, *losses.values())} == {torch.float32}
    assert {found[name].dtype for name in ("boxes", "scores", "masks")} == {torch.float32}
