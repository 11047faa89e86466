"""Weights given to a model: strictly, fitted to another head or grid, and what is said of it."""

import re

import pytest
import timm
import torch
import torch.nn.functional as F

from errors import CheckpointError
from fitting import load_weights, resize_pos_embed
from small_weights import equal, filled, vim


def test_what_does_not_fit_is_told_as_it_is_in_the_file():
    file = timm.create_model("vim_nano_patch4_32", img_size=16, embed_dim=8)
    model = timm.create_model("vim_nano_patch4_32", img_size=8, embed_dim=16)
    with pytest.raises(CheckpointError, match=re.escape("pos_embed (file (1, 17, 8), model (1, 5, 16))")):
        load_weights(model, file.state_dict(), "finetune")


def test_strict_loading_loads_everything():
    model = vim()
    assert str(load_weights(model, filled(model))) == "every weight loaded"
    assert equal(model.state_dict(), filled(model))


def test_strict_loading_lists_what_does_not_fit_and_changes_nothing():
    model = vim()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    weights = filled(model)
    weights["layers.0.mixer.extra"] = weights.pop("layers.0.mixer.D")
    weights["head.weight"] = torch.zeros(7, 8)
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, weights)
    message = str(caught.value)
    assert "1 missing: layers.0.mixer.D" in message
    assert "1 unexpected: layers.0.mixer.extra" in message
    assert "1 mismatched: head.weight (file (7, 8), model (10, 8))" in message
    assert "\n" not in message and equal(model.state_dict(), before)


HINTS = {"head": "a head of {classes} classes", "pos_embed": "another grid"}


@pytest.mark.parametrize(
    ("file", "advice"),
    [
        ({"num_classes": 7}, " (a head of 7 classes)"),
        ({"img_size": 96}, " (another grid)"),
        ({"img_size": 96, "num_classes": 7}, " (another grid; a head of 7 classes)"),
        ({"embed_dim": 16}, ""),
        ({"num_classes": 0}, ""),
        ({"norm": "layer", "num_classes": 7}, ""),
    ],
    ids=str,
)
def test_a_mend_is_named_where_it_is_enough(file, advice):
    """Neither a missing name nor another width goes away by re-making the head."""
    with pytest.raises(CheckpointError) as caught:
        load_weights(vim(), filled(vim(**file)), hints=HINTS)
    assert str(caught.value).endswith(advice) and (bool(advice) or "(another" not in str(caught.value))


def test_strict_loading_wants_the_grid_where_it_is_known():
    """As many patches have the same shapes, whichever way they lie."""
    weights = filled(vim(img_size=(32, 128)))
    with pytest.raises(CheckpointError, match=r"pos_embed \(file 2 x 8 patches, model 8 x 2\) \(another grid\)$"):
        load_weights(vim(img_size=(128, 32)), weights, old_grid=(2, 8), hints=HINTS)
    assert str(load_weights(vim(img_size=(128, 32)), weights)) == "every weight loaded"
    assert str(load_weights(vim(img_size=(32, 128)), weights, old_grid=(2, 8))) == "every weight loaded"
    without = vim(img_size=(128, 32), pos_embed=False)
    assert str(load_weights(without, filled(without), old_grid=(2, 8))) == "every weight loaded"


@pytest.mark.parametrize("mode", ["strict", "finetune"])
def test_weights_of_another_width_are_refused_in_one_short_line(mode):
    with pytest.raises(CheckpointError, match=r"mismatched: .* and \d+ more") as caught:
        load_weights(vim(), filled(vim(embed_dim=16)), mode)
    assert len(str(caught.value)) < 500


def test_unknown_mode():
    with pytest.raises(ValueError, match="mode='loose' is unknown: use one of 'strict', 'finetune'"):
        load_weights(vim(), filled(vim()), "loose")


def test_finetuning_to_fewer_classes_remakes_the_head_and_says_so():
    model = vim(num_classes=7)
    head = model.head.weight.clone()
    report = load_weights(model, filled(vim()), "finetune")
    assert "head re-made: 10 classes in the file, 7 classes in the model" in str(report)
    assert report.pos_embed == "" and report.missing == [] and report.unexpected == []
    assert torch.equal(model.head.weight, head)
    assert torch.equal(model.norm_f.weight, filled(vim())["norm_f.weight"])


def test_finetuning_to_the_same_classes_keeps_the_head():
    model = vim()
    assert load_weights(model, filled(model), "finetune").remade_head == ""
    assert equal(model.state_dict(), filled(model))


def test_finetuning_from_weights_without_a_head():
    weights = {name: value for name, value in filled(vim()).items() if not name.startswith("head.")}
    assert "head re-made: none in the file" in str(load_weights(vim(), weights, "finetune"))


@pytest.mark.parametrize(("name", "conv"), [("vim_nano_patch4_32", "patch_embed.proj"), ("resnet10t", "conv1.0")])
def test_finetuning_to_other_channels_fits_the_first_convolution(name, conv):
    """As timm does for pretrained weights; only from RGB, other channels being whatever they are."""
    weights = filled(timm.create_model(name))
    grey = timm.create_model(name, in_chans=1)
    assert str(load_weights(grey, weights, "finetune")) == f"{conv}.weight adapted from 3 channels to 1"
    torch.testing.assert_close(grey.state_dict()[f"{conv}.weight"], weights[f"{conv}.weight"].sum(1, keepdim=True))
    with pytest.raises(CheckpointError, match=f"1 mismatched: {conv}.weight"):
        load_weights(grey, weights)
    with pytest.raises(CheckpointError, match=f"1 mismatched: {conv}.weight"):
        load_weights(timm.create_model(name), filled(grey), "finetune")


@pytest.mark.parametrize("num_classes", [10, 7])
def test_finetuning_is_strict_about_the_rest(num_classes):
    """Beside a head that is made anew, too."""
    weights = filled(vim())
    del weights["layers.0.mixer.A_b_log"]
    with pytest.raises(CheckpointError, match=r"1 missing: layers\.0\.mixer\.A_b_log$"):
        load_weights(vim(num_classes=num_classes), weights, "finetune")


# Position embeddings at another grid


def plain_resample(grid: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """(H, W, E) -> (H', W', E), channel by channel."""
    channels = [
        F.interpolate(grid[None, None, :, :, e], size=size, mode="bicubic", antialias=False)[0, 0]
        for e in range(grid.shape[2])
    ]
    return torch.stack(channels, dim=-1)


CLASS_SLOTS = {
    "middle": lambda patches: [patches // 2],
    "head": lambda patches: [0],
    "double": lambda patches: [0, patches + 1],
    "none": lambda patches: [],
}
GRIDS = {
    "stride 16 to 8": ((14, 14), (27, 27)),
    "224 to 384 px": ((14, 14), (24, 24)),
    "to a rectangle": ((4, 4), (3, 7)),
    "from a rectangle": ((6, 3), (5, 5)),
}


@pytest.mark.parametrize(("old", "new"), GRIDS.values(), ids=GRIDS)
@pytest.mark.parametrize("cls_token", CLASS_SLOTS)
def test_class_slots_move_untouched_and_the_grid_is_a_plain_resample(cls_token, old, new):
    old_slots, new_slots = (CLASS_SLOTS[cls_token](h * w) for h, w in (old, new))
    before = torch.randn(1, old[0] * old[1] + len(old_slots), 6)
    after = resize_pos_embed(before, old, new, cls_token)[0]
    assert after.shape == (new[0] * new[1] + len(new_slots), 6)
    assert torch.equal(after[new_slots], before[0, old_slots])
    old_patches = [i for i in range(before.shape[1]) if i not in old_slots]
    new_patches = [i for i in range(len(after)) if i not in new_slots]
    expected = plain_resample(before[0, old_patches].reshape(*old, 6), new)
    assert torch.allclose(after[new_patches].reshape(*new, 6), expected, atol=1e-6)


@pytest.mark.parametrize("method", ["grid", "published"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_grid_is_the_identity(method, dtype):
    before = torch.randn(1, 17, 8).to(dtype)
    assert torch.equal(resize_pos_embed(before, (4, 4), (4, 4), "middle", method), before)


def test_published_resize_takes_slot_0_for_the_class_token():
    before = torch.randn(1, 197, 4)
    after = resize_pos_embed(before, (14, 14), (27, 27), "middle", "published")[0]
    expected = plain_resample(before[0, 1:].reshape(14, 14, 4), (27, 27)).reshape(-1, 4)
    assert torch.equal(after[0], before[0, 0])
    assert torch.allclose(after[1:], expected, atol=1e-6)
    assert not torch.equal(after, resize_pos_embed(before, (14, 14), (27, 27))[0])


def test_half_precision_keeps_its_type():
    assert resize_pos_embed(torch.randn(1, 17, 8).half(), (4, 4), (6, 6)).dtype == torch.float16


def test_unknown_method_and_wrong_grid():
    with pytest.raises(ValueError, match="method='bicubic' is unknown: use one of 'grid', 'published'"):
        resize_pos_embed(torch.zeros(1, 17, 8), (4, 4), (6, 6), method="bicubic")
    with pytest.raises(ValueError, match="16 patches"):
        resize_pos_embed(torch.zeros(1, 17, 8), (4, 5), (6, 6))


def test_finetuning_to_stride_8_resamples_the_grid_around_the_class_token():
    weights = filled(vim(img_size=224))
    model = vim(img_size=224, stride=8)
    report = load_weights(model, weights, "finetune")
    assert str(report) == "pos_embed resampled from 14 x 14 to 27 x 27 (grid)"
    before, after = weights["pos_embed"][0], model.pos_embed[0]
    assert torch.equal(after[364], before[98])
    expected = plain_resample(torch.cat((before[:98], before[99:])).reshape(14, 14, 8), (27, 27))
    assert torch.allclose(torch.cat((after[:364], after[365:])).reshape(27, 27, 8), expected, atol=1e-6)
    assert torch.equal(model.head.weight, weights["head.weight"])


def test_finetuning_between_rectangles_wants_the_old_grid():
    weights = filled(vim(img_size=(96, 32)))
    with pytest.raises(CheckpointError, match="pos_embed has 13 slots, 1 of them for class tokens"):
        load_weights(vim(img_size=(64, 96)), weights, "finetune")
    model = vim(img_size=(64, 96))
    report = load_weights(model, weights, "finetune", old_grid=(6, 2))
    assert report.pos_embed == "pos_embed resampled from 6 x 2 to 4 x 6 (grid)"
    expected = resize_pos_embed(weights["pos_embed"], (6, 2), (4, 6))
    assert torch.equal(model.pos_embed, expected)


@pytest.mark.parametrize("options", [{"cls_token": "none", "global_pool": "mean"}, {"cls_token": "double"}], ids=str)
def test_finetuning_other_class_token_designs(options):
    model = vim(img_size=96, **options)
    load_weights(model, filled(vim(**options)), "finetune")
    slots = CLASS_SLOTS[options["cls_token"]]
    before = filled(vim(**options))["pos_embed"]
    assert torch.equal(model.pos_embed[0, slots(36)], before[0, slots(16)])


def test_a_vision_transformer_finetunes_through_the_same_function():
    options = {"embed_dim": 12, "depth": 1, "num_heads": 2}
    small = timm.create_model("deit_tiny_patch16_224", img_size=64, num_classes=10, **options)
    large = timm.create_model("deit_tiny_patch16_224", img_size=96, num_classes=3, **options)
    weights = filled(small)
    report = load_weights(large, weights, "finetune")
    assert "head re-made" in str(report) and "from 4 x 4 to 6 x 6" in str(report)
    assert torch.equal(large.pos_embed[:, 0], weights["pos_embed"][:, 0])
    expected = plain_resample(weights["pos_embed"][0, 1:].reshape(4, 4, 12), (6, 6))
    assert torch.allclose(large.pos_embed[0, 1:].reshape(6, 6, 12), expected, atol=1e-6)


def test_position_embeddings_of_no_known_grid_are_taken_as_they_are():
    """Hiera's patches overlap and tell no grid."""
    options = {"embed_dim": 8, "num_heads": 1, "stages": (1, 1, 1, 1)}
    model = timm.create_model("hiera_tiny_224", img_size=64, num_classes=3, **options)
    weights = filled(timm.create_model("hiera_tiny_224", img_size=64, num_classes=5, **options))
    assert "head re-made" in str(load_weights(model, weights, "finetune"))
    assert torch.equal(model.pos_embed, weights["pos_embed"])
    larger = timm.create_model("hiera_tiny_224", img_size=96, num_classes=5, **options)
    with pytest.raises(CheckpointError, match="1 mismatched: pos_embed"):
        load_weights(larger, weights, "finetune")


@pytest.mark.parametrize("name", ["resnet10t", "convnext_atto"])
def test_models_whose_classifier_has_another_name(name):
    report = load_weights(
        timm.create_model(name, num_classes=3), filled(timm.create_model(name, num_classes=5)), "finetune"
    )
    assert report.remade_head == "head re-made: 5 classes in the file, 3 classes in the model"
