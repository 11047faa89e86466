"""UPerNet: its heads equal transformers' with the weights copied, at any image size, on plain and staged backbones."""

import pytest
import timm
import torch
from torch import nn
from transformers import UperNetConfig
from transformers.models.upernet.modeling_upernet import UperNetFCNHead, UperNetHead

import models_mamba  # noqa: F401  (registers its models with timm)
from dense import Backbone
from distributed import World
from models_mamba import VisionMamba
from seg.upernet import FCNHead, Rescale, UPerHead, UPerNet, synchronised

WIDTHS = [8, 12, 16, 24]


def vim(**changes):
    torch.manual_seed(0)
    return VisionMamba(**{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": 4, "num_classes": 0,
                          "dynamic_img_size": True} | changes)  # fmt: skip


def upernet(**changes):
    return UPerNet(**{"backbone": Backbone(vim(), 4), "num_classes": 5, "auxiliary_channels": 8} | changes)


def levels(sides, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, width, *side, generator=generator) for width, side in zip(WIDTHS, sides)]


def shaken(module):
    """Weights and statistics away from where they began: all ones and zeros would hide a swapped pair."""
    generator = torch.Generator().manual_seed(1)
    for value in (*module.parameters(), *(b for b in module.buffers() if b.is_floating_point())):
        value.data = torch.rand(value.shape, generator=generator) * 0.2 + 0.05
    return module


def as_transformers(state):
    return {name.replace(".bn.", ".batch_norm.").replace("conv_seg", "classifier"): v for name, v in state.items()}


def config(channels):
    return UperNetConfig(hidden_size=channels, pool_scales=[1, 2, 3, 6], num_labels=7, auxiliary_channels=channels,
                         auxiliary_num_convs=1, auxiliary_concat_input=False, backbone_config={"model_type": "resnet"},
                         auxiliary_in_channels=None)  # fmt: skip


SIDES = {
    "halves": [(16, 16), (8, 8), (4, 4), (2, 2)],
    "rectangles": [(24, 12), (12, 6), (6, 3), (3, 2)],
    "odd": [(13, 17), (7, 9), (4, 5), (2, 3)],
}


@pytest.mark.parametrize("sides", SIDES.values(), ids=SIDES)
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_the_head_is_transformers(sides, mode):
    ours, theirs = shaken(UPerHead(WIDTHS, 10, 7)), UperNetHead(config(10), WIDTHS)
    theirs.load_state_dict(as_transformers(ours.state_dict()))
    for head in (ours, theirs):
        head.train(mode == "train")
    ours.dropout.p = 0.0  # which theirs has not
    maps = levels(sides)
    expected = theirs(maps)
    found = ours(maps)
    assert found.shape == (2, 7, *sides[0])
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_the_heads_gradients_are_transformers():
    ours, theirs = shaken(UPerHead(WIDTHS, 10, 7)).eval(), UperNetHead(config(10), WIDTHS).eval()
    theirs.load_state_dict(as_transformers(ours.state_dict()))
    for head in (ours, theirs):
        head(levels(SIDES["odd"])).square().mean().backward()
    expected = dict(theirs.named_parameters())
    for name, value in as_transformers(dict(ours.named_parameters())).items():
        torch.testing.assert_close(value.grad, expected[name].grad, rtol=1e-4, atol=1e-5)


def test_the_auxiliary_head_is_transformers():
    ours, theirs = shaken(FCNHead(16, 10, 7)).eval(), UperNetFCNHead(config(10), WIDTHS).eval()
    theirs.load_state_dict(as_transformers(ours.state_dict()))
    maps = levels(SIDES["halves"])
    torch.testing.assert_close(ours(maps[2]), theirs(maps), rtol=1e-5, atol=1e-5)


def test_the_heads_parameters_have_the_published_names():
    """mmsegmentation's, as published UPerNet checkpoints have them."""
    names = {name.rpartition(".")[0] for name in upernet().state_dict() if not name.startswith(("backbone", "neck"))}
    convs = [*(f"psp_modules.{i}.1" for i in range(4)), "bottleneck", "fpn_bottleneck"]
    convs += [f"{part}.{i}" for part in ("lateral_convs", "fpn_convs") for i in range(3)]
    expected = {f"decode_head.{conv}.{part}" for conv in convs for part in ("conv", "bn")} | {"decode_head.conv_seg"}
    auxiliary = {"auxiliary_head.convs.0.conv", "auxiliary_head.convs.0.bn", "auxiliary_head.conv_seg"}
    assert names == expected | auxiliary


# --- the whole model


@pytest.mark.parametrize("size", [(32, 32), (40, 24), (33, 61), (8, 8)])
def test_logits_have_the_images_size(size):
    images = torch.randn(2, 3, *size)
    model = upernet()
    logits, auxiliary = model.train()(images, with_auxiliary=True)
    assert logits.shape == auxiliary.shape == model.eval()(images).shape == (2, 5, *size)
    assert logits.dtype == torch.float32


def test_levels_are_four_two_one_and_a_half():
    seen = []
    model = upernet().eval()
    model.decode_head.register_forward_pre_hook(lambda module, inputs: seen.extend(inputs[0]))
    model(torch.randn(1, 3, 64, 32))
    assert [tuple(level.shape) for level in seen] == [(1, 16, 32, 16), (1, 16, 16, 8), (1, 16, 8, 4), (1, 16, 4, 2)]


def test_the_finest_level_is_made_of_two_transposed_convolutions():
    kinds = [type(layer) for layer in Rescale(8, 4.0)]
    assert kinds == [nn.ConvTranspose2d, nn.BatchNorm2d, nn.GELU, nn.ConvTranspose2d]
    with pytest.raises(ValueError, match=r"scale=3\.0 is unknown: use one of 4\.0, 2\.0, 1\.0, 0\.5, 0\.25"):
        Rescale(8, 3.0)


def test_the_auxiliary_head_sees_the_third_level_and_can_be_left_out():
    assert upernet().auxiliary_head.convs[0].conv.in_channels == 16
    model = upernet(auxiliary_channels=0)
    assert model.auxiliary_head is None and model(torch.randn(2, 3, 32, 32), with_auxiliary=True)[1] is None


def test_the_head_is_as_wide_as_the_backbone_unless_told():
    assert upernet().decode_head.conv_seg.in_channels == 16
    assert upernet(channels=6).decode_head.conv_seg.in_channels == 6


def test_a_staged_backbone_needs_no_rescaling():
    backbone = Backbone(timm.create_model("resnet10t", num_classes=0), 4)
    model = UPerNet(backbone, 5, channels=16, auxiliary_channels=8)
    assert model.neck is None and model.decode_head.lateral_convs[0].conv.in_channels == backbone.channels[0]
    assert model.eval()(torch.randn(1, 3, 70, 64)).shape == (1, 5, 70, 64)


def test_three_stages_are_three_levels():
    """PiT's maps are a row short of the image's whole cells: 7 x 11 of 64 x 96 pixels at stride 8."""
    model = UPerNet(Backbone(timm.create_model("pit_ti_224", img_size=(64, 96)), 4), 5, 16, 8).train()
    assert model.backbone.strides == [8, 16, 32] and len(model.decode_head.lateral_convs) == 2
    for logits in model(torch.randn(2, 3, 64, 96), with_auxiliary=True):
        assert logits.shape == (2, 5, 64, 96)


@pytest.mark.parametrize("size", [(64, 96), (40, 96), (33, 61)])
def test_a_backbone_of_one_image_size_is_shown_that(size):
    """As a training crop is filled up: with zeros to the right and below, where no logits are wanted."""
    model = upernet(backbone=Backbone(timm.create_model("test_vit_relpos", img_size=(64, 96)), 4)).eval()
    model.backbone.only_size = (64, 96)
    images = torch.randn(2, 3, *size)
    full = torch.zeros(2, 3, 64, 96)
    full[..., : size[0], : size[1]] = images
    assert torch.equal(model(images), model(full)[..., : size[0], : size[1]])


@pytest.mark.parametrize("train_mode", [True, False])
def test_every_parameter_learns(train_mode):
    """With --no-train-mode too, where several ranks would wait for the auxiliary head's gradients."""
    model = upernet().train(train_mode)
    logits, auxiliary = model(torch.randn(2, 3, 32, 32), with_auxiliary=True)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


def test_padding_does_not_move_the_image():
    """An image that fills its patches and the same with a pixel more: the shared pixels' logits are near."""
    model = upernet().eval()
    images = torch.randn(1, 3, 32, 33)
    padded = torch.nn.functional.pad(images, (0, 7, 0, 0))
    for found, expected in zip(*(model(each, with_auxiliary=True) for each in (images, padded))):
        torch.testing.assert_close(found, expected[..., :33])


def test_scales_and_maps_must_agree():
    with pytest.raises(ValueError, match="3 scales for 4 maps: give one scale per map"):
        upernet(scales=(2.0, 1.0, 0.5))
    with pytest.raises(ValueError, match="two maps and the backbone gives 1: take one with more blocks or stages"):
        UPerNet(Backbone(vim(), taps=1), 5, scales=(1.0,))


@pytest.mark.parametrize("scales", [(0.5, 1.0, 2.0, 4.0), (2.0, 1.0, 1.0, 0.5)])
def test_scales_fall_because_the_head_takes_the_finest_level_first(scales):
    with pytest.raises(ValueError, match="give each scale once, the largest first"):
        upernet(scales=scales)
    staged = Backbone(timm.create_model("resnet10t", num_classes=0), 4)
    assert upernet(backbone=staged, scales=scales).neck is None, "which has levels of its own"


@pytest.mark.parametrize(("size", "device", "expected"), [(1, "cuda", False), (2, "cpu", False), (2, "cuda", True)])
def test_batch_norm_is_shared_among_the_ranks_of_gpus_alone(size, device, expected):
    model = upernet()
    names = list(model.state_dict())
    model = synchronised(model, World(0, size, torch.device(device)))
    shared = [isinstance(module, nn.SyncBatchNorm) for module in model.modules() if hasattr(module, "running_mean")]
    assert len(shared) > 10 and set(shared) == {expected}
    assert list(model.state_dict()) == names
