"""Backbones for dense prediction: where maps are taken, any image size, weights of classifiers, layer-wise decay."""

from argparse import Namespace
from copy import deepcopy

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import nn

import tiny  # noqa: F401  (registers the tests' model)
from arguments import COMMON_FLAGS, Program, parse_args
from checkpoint import read_checkpoint
from dense import (
    Backbone,
    DenseModel,
    build_backbone,
    choose_taps,
    grid_in_file,
    load_backbone,
    load_dense,
    moved_slots,
)
from errors import CheckpointError, ConfigError
from fitting import load_weights
from models_mamba import VisionMamba, resample_pos_embed, split_cls_tokens
from optim import build_optimizer

PROGRAM = Program("dense.py", "", "", COMMON_FLAGS, lambda args: None, lambda args: None)


def arguments(*flags):
    return parse_args(["--device", "cpu", *flags], PROGRAM)


def vim(depth=4, **changes):
    torch.manual_seed(0)
    return VisionMamba(**{"img_size": 32, "patch_size": 8, "embed_dim": 16, "depth": depth, "num_classes": 0,
                          "dynamic_img_size": True} | changes)  # fmt: skip


def images(height, width, batch=2):
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(height + width))


# --- where maps are taken


def test_four_taps_of_twenty_four_blocks_are_the_papers():
    assert choose_taps([16] * 24, 4) == [5, 11, 17, 23]
    assert choose_taps([16] * 24, 1) == [23]
    assert choose_taps([16] * 12, 4) == [2, 5, 8, 11]
    assert choose_taps([2, 4, 8, 16, 32], 4) == [1, 2, 3, 4]
    assert choose_taps([16] * 6, [1, 5]) == [1, 5]


def test_of_fewer_stages_than_taps_all_are_taken():
    assert choose_taps([8, 16, 32], 4) == [0, 1, 2]
    with pytest.raises(ValueError, match="taps=0: the backbone has 3 blocks or stages"):
        choose_taps([8, 16, 32], 0)


@pytest.mark.parametrize("taps", [0, 7, [3, 6]])
def test_more_taps_than_blocks_are_refused(taps):
    with pytest.raises(ValueError, match="the backbone has 6 blocks or stages"):
        choose_taps([16] * 6, taps)


@pytest.mark.parametrize("design", ["middle", "head", "double"])
def test_a_map_is_the_stream_and_the_mixers_output_without_class_tokens(design):
    """By the blocks' own definition: after block i, hidden + residual, at the patches' places."""
    model = vim(cls_token=design)
    x = images(40, 24)
    hidden, residual, expected = model._embed(x), None, []
    for block in model.layers:
        hidden, residual = block(hidden, residual)
        patches, _ = split_cls_tokens(hidden + residual, design)
        expected.append(patches.transpose(1, 2).reshape(2, 16, 5, 3))
    found = Backbone(model, 4)(x)
    assert len(found) == 4
    for a, b in zip(found, expected):
        torch.testing.assert_close(a, b)


def test_what_features_only_gives_is_what_the_backbone_gives():
    args = arguments("--model", "vim_nano_patch4_32")
    torch.manual_seed(0)
    ours = build_backbone(args, 32, [1, 3])
    torch.manual_seed(0)
    net = timm.create_model(args.model, features_only=True, out_indices=(1, 3), img_size=32, drop_path_rate=0.1)
    net.model.load_state_dict(ours.model.state_dict())
    for a, b in zip(ours.eval()(images(32, 32)), net.eval()(images(32, 32))):
        assert torch.equal(a, b)
    assert (ours.channels, ours.strides, ours.taps) == ([64, 64], [4, 4], [1, 3])


def test_blocks_after_the_last_map_are_gone():
    backbone = Backbone(vim(), [0, 1])
    assert len(backbone.model.layers) == 2
    assert {"layers.2.norm.weight", "norm_f.weight"} <= backbone.pruned


def test_every_parameter_of_a_backbone_learns():
    """Several ranks wait for each parameter's gradient."""
    backbone = Backbone(vim(), 4)
    sum(level.square().sum() for level in backbone(images(32, 32))).backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


# --- any timm model, any size


@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "resnet10t", "convnext_atto", "poolformer_s12"])
def test_other_models_are_backbones_too(name, capsys):
    backbone = build_backbone(arguments("--model", name, "--drop-path", "0"), 32, 4).eval()
    levels = backbone(images(64, 96))
    assert [level.shape[1] for level in levels] == backbone.channels
    for level, stride in zip(levels, backbone.strides):
        assert level.shape[-2:] == (64 // stride, 96 // stride)
    assert backbone.plain == name.startswith("deit")


@pytest.mark.parametrize(("height", "width"), [(32, 32), (33, 47), (8, 70), (5, 9)])
def test_any_image_size_is_padded_to_whole_patches(height, width):
    backbone = Backbone(vim(), 2).eval()
    x = images(height, width)
    padded = torch.nn.functional.pad(x, (0, -width % 8, 0, -height % 8))
    for a, b in zip(backbone(x), backbone(padded)):
        assert a.shape[-2:] == (-(-height // 8), -(-width // 8))
        assert torch.equal(a, b)


def test_overlapping_patches_give_one_vector_a_stride():
    backbone = Backbone(vim(patch_size=8, stride=4), 1).eval()
    assert backbone.padding(32, 30) == (2, 4, 2, 2)
    assert backbone(images(32, 30))[0].shape == (2, 16, 8, 8)


def test_overlapping_patches_have_position_embeddings_of_the_padded_grid():
    backbone = build_backbone(arguments("--model", "vim_tiny_patch16_stride8_224"), 64, [0])
    assert backbone.model.patch_embed.grid_size == (8, 8)


def test_recomputed_activations_give_the_same_gradients():
    found = []
    for flags in ((), ("--grad-checkpointing",)):
        torch.manual_seed(0)
        backbone = build_backbone(arguments("--model", "vim_two_blocks", "--drop-path", "0", *flags), 16, 2).train()
        assert backbone.model.grad_checkpointing == bool(flags)
        sum(level.square().mean() for level in backbone(images(16, 24))).backward()
        found.append([p.grad for p in backbone.parameters()])
    for a, b in zip(*found):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize(("name", "expected"), [
    ("test_vit_relpos", (64, 96)),
    ("pit_ti_224", (64, 96)),
    ("halonet26t", (256, 512)),  # of which timm says nothing: its maps are multiples of a block
    ("xcit_nano_12_p16_224", None),  # of which timm says so too
    ("deit_nano_patch4_32", None),
    ("resnet10t", None),
])  # fmt: skip
def test_a_backbone_of_one_image_size_is_known(name, expected):
    size = expected or (64, 96)
    backbone = build_backbone(arguments("--model", name), size, 4)
    assert backbone.only_size == expected and backbone.training
    for height, width in [size, *([] if expected else [(64, 64), (128, 96)])]:
        assert len(backbone(images(height, width))) == len(backbone.strides)


def test_an_image_size_that_a_backbone_cannot_have_is_refused():
    """Three stages, the last of stride 64: its attention has a bias for each pair of places, and no others."""
    assert build_backbone(arguments("--model", "levit_128s"), 64, 4).strides == [16, 32, 64]
    line = "--model levit_128s takes no images of 96x64: take another size, in multiples of 64, or another backbone"
    with pytest.raises(ConfigError, match=line):
        build_backbone(arguments("--model", "levit_128s"), (96, 64), 4)


def test_a_model_that_is_none_is_refused():
    with pytest.raises(ConfigError, match="--model vim_mini is not registered"):
        build_backbone(arguments("--model", "vim_mini"), 32, 4)
    with pytest.raises(ConfigError, match="--model vim_two_blocks: taps=4: the backbone has 2 blocks"):
        build_backbone(arguments("--model", "vim_two_blocks"), 32, 4)
    with pytest.raises(ConfigError, match="--model efficientvit_m0: it cannot tell its head from the rest"):
        build_backbone(arguments("--model", "efficientvit_m0"), 64, 4)
    with pytest.raises(ConfigError, match="--dt-init-backward is for a Vim; deit_nano_patch4_32 is not one"):
        build_backbone(arguments("--model", "deit_nano_patch4_32", "--dt-init-backward", "same"), 32, 4)


# --- weights of a classifier


def saved_classifier(folder, img_size=16):
    torch.manual_seed(1)
    model = timm.create_model("vim_two_blocks", img_size=img_size, num_classes=7)
    torch.save({"model": model.state_dict()}, folder / "weights.pth")
    return model, folder / "weights.pth"


def load(path, size, taps=2, *flags):
    said = []
    backbone = build_backbone(arguments("--model", "vim_two_blocks", "--finetune", str(path), *flags), size, taps)
    load_backbone(arguments("--model", "vim_two_blocks", "--finetune", str(path), *flags), backbone, said.append)
    return backbone, said[0]


def test_a_classifiers_weights_fit_at_another_size(tmp_path):
    """The class token's slot stands in the middle of 16 patches before and of 48 after."""
    model, path = saved_classifier(tmp_path)
    backbone, said = load(path, (32, 24))
    expected = resample_pos_embed(model.pos_embed, (8, 6), "middle", (4, 4))
    assert torch.equal(backbone.model.pos_embed, expected)
    assert torch.equal(backbone.model.pos_embed[:, 24], model.pos_embed[:, 8])
    for name, value in backbone.model.state_dict().items():
        assert name == "pos_embed" or torch.equal(value, model.state_dict()[name]), name
    assert "pos_embed resampled from 4 x 4 to 8 x 6 (grid)" in said
    assert "(grid); class token's slot 8 of 17 taken out, now 24 of 49; left out" in said
    assert said.endswith("left out: head, norm_f") and "SHA-256" in said


def test_at_the_same_size_maps_are_the_classifiers(tmp_path):
    model, path = saved_classifier(tmp_path)
    backbone, _ = load(path, 16)
    expected = model.eval().forward_intermediates(images(16, 16), intermediates_only=True)
    for a, b in zip(backbone.eval()(images(16, 16)), expected):
        assert torch.equal(a, b)


def test_later_blocks_are_left_out_and_said(tmp_path):
    _, path = saved_classifier(tmp_path)
    _, said = load(path, 16, [0])
    assert "layers.1.norm" in said


def test_a_dense_models_backbone_can_be_taken(tmp_path):
    source = Backbone(vim(2, patch_size=4, img_size=16), 2)
    state = {f"backbone.{name}": value for name, value in source.state_dict().items()} | {"head.w": torch.ones(2)}
    torch.save({"model": state}, tmp_path / "dense.pth")
    backbone, said = load(tmp_path / "dense.pth", 16)
    assert all(torch.equal(a, b) for a, b in zip(backbone.state_dict().values(), source.state_dict().values()))
    assert said.endswith("left out: head")


@pytest.mark.parametrize(("design", "said"), [
    ("double", "class token's slot 0 and 17 of 18 taken out, now 0 and 49 of 50"),
    ("head", "class token's slot 0 of 17 taken out, now 0 of 49"),
    ("none", ""),
])  # fmt: skip
def test_the_log_says_which_slots_are_the_class_tokens(design, said):
    model = vim(cls_token=design, img_size=(64, 48), global_pool="mean" if design == "none" else "token")
    before = vim(cls_token=design, global_pool="mean" if design == "none" else "token").pos_embed
    assert moved_slots(model, before) == said


def test_a_rectangles_grid_comes_from_its_file(tmp_path):
    """36 patches that are 4 x 9, not 6 x 6: of a classifier and of a dense model."""
    size, small = (16, 36), (16, 16)
    model = timm.create_model("vim_two_blocks", img_size=size, num_classes=7)
    expected = resample_pos_embed(model.pos_embed, (4, 4), "middle", (4, 9))
    args = Namespace(model="vim_two_blocks", input_size=size, num_classes=7)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "classifier.pth")
    state = {f"backbone.model.{name}": value for name, value in model.state_dict().items() if "head" not in name}
    state = {name: value for name, value in state.items() if "norm_f" not in name}
    for key in ("crop_size", "input_size"):
        torch.save({"model": state, "args": Namespace(**{key: size})}, tmp_path / f"{key}.pth")
    for file in ("classifier", "crop_size", "input_size"):
        backbone, said = load(tmp_path / f"{file}.pth", small)
        assert torch.equal(backbone.model.pos_embed, expected), file
        assert "from 4 x 9 to 4 x 4" in said


@pytest.mark.parametrize("dense", [False, True])
def test_a_file_of_averaged_weights_alone_is_taken_and_said(dense, tmp_path):
    model, _ = saved_classifier(tmp_path)
    state = {name: value for name, value in model.state_dict().items() if not dense or "head" not in name}
    state = {f"backbone.model.{name}" if dense else name: v for name, v in state.items() if "norm_f" not in name}
    torch.save({"model_ema": state}, tmp_path / "average.pth")
    backbone, said = load(tmp_path / "average.pth", 16)
    assert torch.equal(backbone.model.pos_embed, model.pos_embed)
    assert "...): averaged weights, it has no others; every weight loaded" in said


def test_another_models_weights_are_refused(tmp_path):
    torch.save({"model": timm.create_model("deit_nano_patch4_32").state_dict()}, tmp_path / "deit.pth")
    with pytest.raises(CheckpointError, match=r"deit\.pth: the weights do not fit.*is it of --model vim_two_blocks\?"):
        load(tmp_path / "deit.pth", 16)


# --- all weights of a dense model


def saved_segmenter(folder, **entries):
    torch.manual_seed(1)
    model = Segmenter(Backbone(vim(), 4))
    torch.save({"model": model.state_dict()} | entries, folder / "dense.pth")
    return model, read_checkpoint(folder / "dense.pth")


def load_all(checkpoint, model):
    args = arguments("--finetune", str(checkpoint.path), "--eval")
    load_dense(args, model, checkpoint, checkpoint.weights())
    return model


@pytest.mark.parametrize("size", [32, (48, 24)])
def test_a_dense_model_has_its_weights_at_another_image_size(size, tmp_path):
    saved, checkpoint = saved_segmenter(tmp_path)
    model = load_all(checkpoint, Segmenter(Backbone(vim(img_size=size), 4)))
    grid = model.backbone.model.patch_embed.grid_size
    assert torch.equal(model.backbone.model.pos_embed, resample_pos_embed(saved.backbone.model.pos_embed, grid))
    for name, value in model.state_dict().items():
        assert name == "backbone.model.pos_embed" or torch.equal(value, saved.state_dict()[name]), name


def test_a_dense_models_rectangle_is_known_from_its_run(tmp_path):
    saved, checkpoint = saved_segmenter(tmp_path, args=Namespace(crop_size=(16, 64)))  # 2 x 8 patches, not 4 x 4
    model = load_all(checkpoint, Segmenter(Backbone(vim(img_size=48), 4)))
    expected = resample_pos_embed(saved.backbone.model.pos_embed, (6, 6), "middle", (2, 8))
    assert torch.equal(model.backbone.model.pos_embed, expected)


@pytest.mark.parametrize(
    ("name", "slots"),
    [("deit3_small_patch16_224", 0), ("deit_tiny_distilled_patch16_224", 2), ("deit_tiny_patch16_224", 1)],
)
def test_slots_are_those_of_the_model_whatever_its_tokens_are_called(name, slots, tmp_path):
    """DeiT III's class token has no position, the distilled DeiT two tokens have one each."""

    def segmenter(size):
        small = {"img_size": size, "embed_dim": 12, "num_heads": 3, "depth": 2, "num_classes": 0}
        return Segmenter(Backbone(timm.create_model(name, **small, dynamic_img_size=True), 2))

    saved = segmenter((32, 128))  # 2 x 8 patches, not 4 x 4
    torch.save({"model": saved.state_dict(), "args": Namespace(crop_size=(32, 128))}, tmp_path / "dense.pth")
    model = load_all(read_checkpoint(tmp_path / "dense.pth"), segmenter(64))
    before = saved.backbone.model.pos_embed
    assert before.shape[1] == slots + 16
    expected = resample_abs_pos_embed(before, (4, 4), (2, 8), slots, interpolation="bicubic", antialias=False)
    assert torch.equal(model.backbone.model.pos_embed, expected)


@pytest.mark.parametrize(("stride", "grid"), [(8, (2, 8)), (4, (5, 17))])
def test_a_size_of_no_whole_patches_has_the_grid_that_the_model_was_built_for(stride, grid, tmp_path):
    """18 x 66: patches beside each other are rounded down, overlapping ones padded."""
    size = (18, 66)

    def segmenter(height, width):
        padding = Backbone(vim(stride=stride), 2).padding(height, width) if stride == 4 else (0, 0, 0, 0)
        padded = height + sum(padding[2:]), width + sum(padding[:2])
        return Segmenter(Backbone(vim(stride=stride, img_size=padded), 2))

    saved = segmenter(*size)
    assert saved.backbone.model.patch_embed.grid_size == grid
    torch.save({"model": saved.state_dict(), "args": Namespace(crop_size=size)}, tmp_path / "dense.pth")
    model = load_all(read_checkpoint(tmp_path / "dense.pth"), segmenter(32, 32))
    new = model.backbone.model.patch_embed.grid_size
    expected = resample_pos_embed(saved.backbone.model.pos_embed, new, "middle", grid)
    assert torch.equal(model.backbone.model.pos_embed, expected)


def test_a_rectangle_that_its_embeddings_do_not_fit_is_no_square(tmp_path):
    _, checkpoint = saved_segmenter(tmp_path, args=Namespace(crop_size=(24, 41)))  # 16 patches, no 3 x 5
    line = r"dense\.pth: its pos_embed has 16 patches, which images of 24x41, .* --model\?$"
    with pytest.raises(CheckpointError, match=line):
        load_all(checkpoint, Segmenter(Backbone(vim(img_size=48), 4)))


def test_scenes_are_of_their_own_size_not_the_crops(tmp_path):
    """Generated scenes are shown whole, squares all of them."""
    args = Namespace(data_set="SCENES", scene_size=32, crop_size=(16, 64))
    _, checkpoint = saved_segmenter(tmp_path, args=args)
    assert grid_in_file(checkpoint, Segmenter(Backbone(vim(), 4))) == (4, 4)


@pytest.mark.parametrize(("size", "other"), [((16, 64), (32, 32)), (32, (64, 16))])
def test_another_grid_of_as_many_patches_is_not_taken_for_the_own_one(size, other, tmp_path):
    """Without resampling, as --resume loads: the shapes are the same and every position would be another one's."""
    saved = Segmenter(Backbone(vim(img_size=size), 4))
    torch.save({"model": saved.state_dict(), "args": Namespace(crop_size=size)}, tmp_path / "dense.pth")
    checkpoint = read_checkpoint(tmp_path / "dense.pth")
    for own in (size, other):
        model = Segmenter(Backbone(vim(img_size=own), 4))
        grid = grid_in_file(checkpoint, model)
        if own == size:
            load_weights(model, checkpoint.weights(), old_grid=grid)
        else:
            line = r"1 mismatched: backbone\.model\.pos_embed \(file \d x \d patches, model \d x \d\)$"
            with pytest.raises(CheckpointError, match=line):
                load_weights(model, checkpoint.weights(), old_grid=grid)


def test_weights_that_are_not_all_of_a_dense_model_are_refused(tmp_path):
    _, checkpoint = saved_segmenter(tmp_path)
    model = Segmenter(Backbone(vim(), 4))
    model.head = nn.Linear(8, 3)
    with pytest.raises(CheckpointError, match=r"2 mismatched: head\.weight.*head\.bias \(file \(2,\), model \(3,\)\)$"):
        load_all(checkpoint, model)
    _, path = saved_classifier(tmp_path)
    with pytest.raises(ConfigError, match=r"--eval --finetune .*weights\.pth is of a classifier"):
        load_all(read_checkpoint(path), model)


# --- what optimisers ask


class Segmenter(DenseModel):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.neck, self.head = backbone, nn.Linear(16, 8), nn.Linear(8, 2)


@pytest.mark.parametrize("factor", ["0.5", "0.92"])
def test_layer_decay_matches_every_block_inside_a_dense_model(factor):
    model = Segmenter(Backbone(vim(), 4))
    optimizer = build_optimizer(arguments("--layer-decay", factor), model, 1.0)
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    assert found.keys() == set(names.values())
    for name, scale in found.items():
        inner = name.removeprefix("backbone.model.")
        place = 5 if inner == name else int(inner.split(".")[1]) + 1 if inner.startswith("layers") else 0
        assert scale == pytest.approx(float(factor) ** (5 - place)), name


@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "resnet10t", "cait_xxs24_224"])
def test_layer_decay_matches_other_backbones(name):
    model = Segmenter(build_backbone(arguments("--model", name, "--drop-path", "0"), 32, 4))
    optimizer = build_optimizer(arguments("--layer-decay", "0.5"), model, 1.0)
    scales = {p: group["lr_scale"] for group in optimizer.param_groups for p in group["params"]}
    inside = {scales[p] for p in model.backbone.parameters()}
    assert len(inside) >= 4 and max(inside) < 1.0
    assert {scales[p] for part in (model.neck, model.head) for p in part.parameters()} == {1.0}


def test_embeddings_inside_a_dense_model_are_not_decayed():
    model = Segmenter(Backbone(vim(), 4))
    optimizer = build_optimizer(arguments("--weight-decay", "0.1"), model, 1.0)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[model.backbone.model.pos_embed] == decay[model.backbone.model.cls_token] == 0
    assert decay[model.backbone.model.layers[0].mixer.in_proj.weight] == 0.1
    assert decay[model.head.weight] == 0.1 and decay[model.head.bias] == 0


def test_a_copy_of_a_backbone_is_one():
    backbone = Backbone(vim(), 4).eval()
    for a, b in zip(backbone(images(32, 32)), deepcopy(backbone)(images(32, 32))):
        assert torch.equal(a, b)
