"""Weight files: published and own forms, hostile and damaged ones, loading, resampling, atomic saving."""

import argparse
import os
import pickle
import random
import re
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import checkpoint
from checkpoint import (
    Checkpoint,
    CheckpointError,
    compare_classes,
    file_digest,
    latest_checkpoint,
    load_weights,
    read_checkpoint,
    resize_pos_embed,
    save_checkpoint,
    store_checkpoint,
)
from errors import ConfigError
from models_mamba import VisionMamba


def vim(**options) -> VisionMamba:
    """One block of width 8 on 64 x 64 pixels: a grid of 4 x 4."""
    return VisionMamba(**{"img_size": 64, "num_classes": 10, "embed_dim": 8, "depth": 1, "d_state": 2} | options)


def filled(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def published(model: torch.nn.Module, **entries) -> dict:
    """A training checkpoint as the published ones are."""
    return {
        "model": filled(model, 1),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "lr_scheduler": {"base_values": [1e-3]},
        "epoch": 299,
        "model_ema": filled(model, 2),
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vim", lr=5e-4, opt_betas=None, aa="rand-m9"),
    } | entries


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def refused(path, **options) -> str:
    """The one line with which a file is refused; it begins with the path."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    return message


# Forms of files


def test_what_does_not_fit_is_told_as_it_is_in_the_file():
    file = timm.create_model("vim_nano_patch4_32", img_size=16, embed_dim=8)
    model = timm.create_model("vim_nano_patch4_32", img_size=8, embed_dim=16)
    with pytest.raises(CheckpointError, match=re.escape("pos_embed (file (1, 17, 8), model (1, 5, 16))")):
        load_weights(model, file.state_dict(), "finetune")


def test_none_in_words_is_none(tmp_path):
    """The published program writes its scaler so where it trained without mixed precision."""
    model = torch.nn.Linear(2, 2)
    torch.save(published(model, scaler="none", lr_scheduler="none", optimizer="none"), tmp_path / "x.pth")
    found = read_checkpoint(tmp_path / "x.pth")
    assert (found.scaler, found.lr_scheduler, found.optimizer) == (None, None, None)


def test_published_form(tmp_path):
    content = published(vim())
    torch.save(content, tmp_path / "vim.pth")
    found = read_checkpoint(tmp_path / "vim.pth")
    assert equal(found.weights(), content["model"]) and equal(found.weights("model_ema"), content["model_ema"])
    assert (found.epoch, found.step, found.best_metric) == (299, None, None)
    assert found.args == content["args"] and found.optimizer == content["optimizer"]
    assert found.lr_scheduler == content["lr_scheduler"] and found.scaler == content["scaler"]
    assert found.keys == list(content) and found.sha256 == file_digest(tmp_path / "vim.pth")


def test_legacy_torch_format(tmp_path):
    torch.save(published(vim()), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(read_checkpoint(tmp_path / "old.pth").weights(), filled(vim(), 1))


def test_bare_state_dict_and_safetensors(tmp_path):
    weights = filled(vim())
    torch.save(weights, tmp_path / "bare.pth")
    save_file(weights, tmp_path / "bare.safetensors")
    for name in ("bare.pth", "bare.safetensors"):
        found = read_checkpoint(tmp_path / name)
        assert equal(found.weights(), weights) and found.model_ema is None and found.keys == []


def test_timm_names(tmp_path):
    torch.save({"state_dict": filled(vim(), 1), "state_dict_ema": filled(vim(), 2)}, tmp_path / "timm.pth")
    found = read_checkpoint(tmp_path / "timm.pth")
    assert equal(found.weights(), filled(vim(), 1)) and equal(found.weights("model_ema"), filled(vim(), 2))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_taken_off(prefix, tmp_path):
    wrapped = {prefix + name: value for name, value in filled(vim()).items()}
    torch.save({"model": wrapped, "model_ema": wrapped}, tmp_path / "wrapped.pth")
    found = read_checkpoint(tmp_path / "wrapped.pth")
    assert equal(found.weights(), filled(vim())) and equal(found.weights("model_ema"), filled(vim()))
    model = vim()
    load_weights(model, wrapped)
    assert equal(model.state_dict(), filled(vim()))


def test_other_entries_are_kept(tmp_path):
    torch.save(published(vim(), progress={"samples": 12}, step=7), tmp_path / "own.pth")
    found = read_checkpoint(tmp_path / "own.pth")
    assert found.extra == {"progress": {"samples": 12}} and found.step == 7


def test_weights_that_are_not_there(tmp_path):
    torch.save({"model": filled(vim()), "epoch": 3}, tmp_path / "raw.pth")
    with pytest.raises(CheckpointError, match="holds no 'model_ema'; it holds: model, epoch"):
        read_checkpoint(tmp_path / "raw.pth").weights("model_ema")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3, "args": None}, "holds no weights under 'model' or 'model_ema', only: epoch, args"),
        ({}, "holds no weights under 'model' or 'model_ema', only: nothing"),
        ([torch.zeros(1)], "holds a list, expected a dict"),
        ({"model": {"weight": 3.0}}, "'model' is a dict, expected a dict of tensors"),
    ],
    ids=["no weights", "empty", "list", "numbers"],
)
def test_files_that_hold_something_else(content, said, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    assert said in refused(tmp_path / "other.pth")


# Files that cannot be had


def test_missing_file_and_folder(tmp_path):
    assert "does not exist; give a checkpoint file" in refused(tmp_path / "none.pth")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_file_cut_short(suffix, share, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    save_file(filled(vim()), path) if suffix == "safetensors" else torch.save(published(vim()), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "is damaged or no" in refused(path)


def test_text_file(tmp_path):
    (tmp_path / "page.pth").write_text("<!doctype html><title>404</title>")
    assert "is damaged or no checkpoint" in refused(tmp_path / "page.pth")


class RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def hostile_files(tmp_path) -> dict[str, Path]:
    content = {"model": filled(vim()), "args": RunsCode(tmp_path / "ran")}
    paths = {f"pickle protocol {number}": tmp_path / f"{number}.pth" for number in range(6)}
    for number, path in enumerate(paths.values()):
        path.write_bytes(pickle.dumps(content["args"], protocol=number))
    paths |= {"zip": tmp_path / "zip.pth", "legacy": tmp_path / "legacy.pth"}
    torch.save(content, paths["zip"])
    torch.save(content, paths["legacy"], _use_new_zipfile_serialization=False)
    return paths


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_does_not_and_its_name_is_said(tmp_path):
    for form, path in hostile_files(tmp_path).items():
        assert re.search(r"asks for \w+\.mkdir, .* --trust-checkpoint", refused(path)), form
    assert not (tmp_path / "ran").exists()


def test_trusting_a_file_runs_it(tmp_path):
    """The control: without the safe loader these files do what they say."""
    read_checkpoint(hostile_files(tmp_path)["zip"], trust=True)
    assert (tmp_path / "ran").is_dir()


def test_only_namespace_is_allowed_and_only_while_loading(tmp_path):
    torch.save(published(vim(), best=np.float64(3.0)), tmp_path / "numpy.pth")
    assert "numpy._core.multiarray.scalar" in refused(tmp_path / "numpy.pth")
    torch.save(published(vim()), tmp_path / "vim.pth")
    read_checkpoint(tmp_path / "vim.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "vim.pth", weights_only=True)


def test_hub_names(hub_cache):
    repo, fine_tuned = "hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"
    hub_cache(repo, "vim_t_midclstok_76p1acc.pth", {"model": filled(vim(), 1)})
    hub_cache(repo, fine_tuned, {"model": filled(vim(), 2)})
    assert equal(read_checkpoint(f"hf-hub:{repo}").weights(), filled(vim(), 1))
    assert equal(read_checkpoint(f"hf-hub:{repo}/{fine_tuned}").weights(), filled(vim(), 2))


def test_hub_without_a_network_says_what_to_do(hub_cache):
    message = refused("hf-hub:hustvl/Vim-small-midclstok")
    assert "hf download hustvl/Vim-small-midclstok vim_s_midclstok_80p5acc.pth" in message
    assert "expected hf-hub:OWNER/REPO" in refused("hf-hub:vim")


def test_web_addresses_are_fetched_once(tmp_path, monkeypatch):
    fetched = []

    def download(url, file, progress):
        fetched.append(url)
        torch.save(published(vim()), file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for _ in range(2):
        found = read_checkpoint("https://example.org/weights/vim.pth?download=true")
        assert equal(found.weights(), filled(vim(), 1))
    assert fetched == ["https://example.org/weights/vim.pth?download=true"]
    read_checkpoint("https://example.org/other/vim.pth")
    assert len(fetched) == 2, "another file of the same name"


def test_web_address_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "cannot be downloaded" in refused("https://127.0.0.1:9/vim.pth")


# Into the model


def test_classes_of_one_name_are_no_other_numbers():
    """ImageNet's words have two cranes. What differs is told, and a number that is another one's is refused."""
    names = ["crane", "dog", "crane", "cat"]
    file = Checkpoint(path=Path("a.pth"), sha256="", model={}, extra={"class_names": names})
    assert compare_classes(file, names, "") == ""
    assert "'bird' for 'dog'" in compare_classes(file, ["crane", "bird", "crane", "cat"], "")
    with pytest.raises(ConfigError, match=r"'cat' is 1 in the data and 3 there; or else"):
        compare_classes(file, ["crane", "cat", "crane", "dog"], "or else")


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
    with pytest.raises(ValueError, match="mode='loose': expected 'strict' or 'finetune'"):
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


def test_finetuning_is_strict_about_the_rest():
    weights = filled(vim())
    del weights["layers.0.mixer.A_b_log"]
    with pytest.raises(CheckpointError, match=r"1 missing: layers\.0\.mixer\.A_b_log$"):
        load_weights(vim(), weights, "finetune")


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
    with pytest.raises(ValueError, match="method='bicubic': expected 'grid' or 'published'"):
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


# Saving

PLAIN_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(max_size=5),
    st.sampled_from([torch.device("cpu"), torch.bfloat16, torch.Size([2, 3])]),
)
TENSORS = st.builds(
    lambda shape, dtype: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
)
STATES = st.recursive(
    PLAIN_VALUES | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=2).map(lambda d: argparse.Namespace(**d))
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict | argparse.Namespace):
        a, b = (value if isinstance(value, dict) else vars(value) for value in (a, b))
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(STATES)
def test_any_nested_state_comes_back(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "nested.pth"
    digest = save_checkpoint(path, {"model": {"weight": torch.ones(1)}, "state": state})
    found = read_checkpoint(path)
    assert same(found.extra["state"], state) and found.sha256 == digest == file_digest(path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"rng": [np.random.get_state()[1]]}, r"state\['rng'\]\[0\] is a ndarray"),
        ({"best": np.float64(1)}, r"state\['best'\] is a float64"),
        ({"args": argparse.Namespace(path=Path("x"))}, r"state\['args'\]\.path is a PosixPath"),
    ],
    ids=["array", "numpy number", "path"],
)
def test_what_the_safe_loader_would_refuse_is_not_written(entry, said, tmp_path):
    with pytest.raises(TypeError, match=said):
        save_checkpoint(tmp_path / "a.pth", entry)
    assert list(tmp_path.iterdir()) == []


def state_of(step: int, size: int = 1000) -> dict:
    return {"model": {"weight": torch.full((size,), float(step))}, "step": step}


def step_in(path: Path) -> int:
    found = read_checkpoint(path)
    assert (found.weights()["weight"] == found.step).all()
    return found.step


def test_digest_file_is_readable_by_sha256sum(tmp_path):
    for step in range(2):
        digest = save_checkpoint(tmp_path / "a.pth", state_of(step))
    assert (tmp_path / "a.pth.sha256").read_text() == f"{digest}  a.pth\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.pth.sha256"]


def test_overwriting_a_file_without_a_digest_never_makes_it_look_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save(state_of(1), path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", stop_before(path, os.replace))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, state_of(2))
    assert step_in(path) == 1
    save_checkpoint(path, state_of(3))
    assert step_in(path) == 3


def stop_before(path: Path, replace):
    """os.replace that is interrupted when it is about to write `path`."""

    def interrupted(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    return interrupted


def test_one_flipped_bit_is_found(tmp_path):
    save_checkpoint(tmp_path / "a.pth", state_of(1))
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.find(np.float32(1).tobytes() * 8)] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    assert "is damaged: its SHA-256 is not the one noted in a.pth.sha256" in refused(tmp_path / "a.pth")
    (tmp_path / "a.pth.sha256").unlink()
    read_checkpoint(tmp_path / "a.pth")  # the control: torch itself sees nothing


@pytest.fixture
def no_file_larger_than():
    """Sets a limit on the size of files, which is how a full disk looks to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_that_fails_half_way_leaves_the_old_file(tmp_path, no_file_larger_than):
    path = tmp_path / "a.pth"
    save_checkpoint(path, state_of(1))
    no_file_larger_than(100_000)
    with pytest.raises(CheckpointError, match=r"a\.pth was not written: .*; the last checkpoint is untouched"):
        save_checkpoint(path, state_of(2, size=1_000_000))
    assert step_in(path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.pth.sha256"]


def test_too_little_space_is_found_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: argparse.Namespace(free=1000))
    with pytest.raises(CheckpointError, match=r"takes 3\.8 MiB, 0\.0 MiB are free; .* another --output_dir"):
        save_checkpoint(tmp_path / "a.pth", state_of(1, size=1_000_000))
    assert list(tmp_path.iterdir()) == []


def killed_while_saving(save, delay: float) -> None:
    """Run `save(1)`, `save(2)`, ... in a child process and kill it some seconds after the first is done."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a forked process lacks OpenMP's other threads and would wait for them
        for step in range(1, 10_000):
            save(step)
            os.write(writer, b".")
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)


KILLS = [random.Random(number).uniform(0, 0.03) for number in range(20)]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.pth"
    for delay in KILLS:
        killed_while_saving(lambda step: save_checkpoint(path, state_of(step, size=100_000)), delay)
        assert step_in(path) >= 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path):
    last = 0
    for delay in KILLS:
        killed_while_saving(
            lambda step, last=last: store_checkpoint(tmp_path, state_of(last + step), best=step % 3 == 0),
            delay,
        )
        assert step_in(latest_checkpoint(tmp_path)) > last
        last = step_in(latest_checkpoint(tmp_path))
    store_checkpoint(tmp_path, state_of(10**6))
    assert not list(tmp_path.glob(".*")), "temporary files of killed writers are cleared away"


# A run's folder of checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*.pth"))


def test_the_best_one_is_pointed_at_first(tmp_path, monkeypatch):
    """Killed between the two links, a run repeats the epoch, but only if the newest one is still that before it."""
    pointed, point = [], checkpoint._point
    monkeypatch.setattr(checkpoint, "_point", lambda link, target: (pointed.append(link.name), point(link, target)))
    store_checkpoint(tmp_path, state_of(1), best=True)
    assert pointed == ["best_checkpoint.pth", "checkpoint.pth"]


def test_newest_two_and_best_stay(tmp_path):
    folder = tmp_path / "made" / "on demand"
    for step in range(1, 8):
        store_checkpoint(folder, state_of(step), best=step == 3)
    assert names(folder) == [f"checkpoint-0000000{step}.pth" for step in (3, 6, 7)]
    assert step_in(folder / "checkpoint.pth") == 7 and step_in(folder / "best_checkpoint.pth") == 3
    store_checkpoint(folder, state_of(8), best=True)
    assert names(folder) == [f"checkpoint-0000000{step}.pth" for step in (7, 8)]
    assert len(list(folder.glob("*.sha256"))) == 2


def test_keeping_fewer_than_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=1: at least 2"):
        store_checkpoint(tmp_path, state_of(1), keep=1)


def test_newest_by_step_where_nothing_points(tmp_path):
    for step in (99, 10**8):
        store_checkpoint(tmp_path, state_of(step), keep=3)
    (tmp_path / "checkpoint.pth").unlink()
    assert step_in(latest_checkpoint(tmp_path)) == 10**8


def test_run_resumed_from_further_back_abandons_later_steps(tmp_path):
    for step in (10, 20, 30, 40):
        store_checkpoint(tmp_path, state_of(step), keep=4, best=step == 40)
    store_checkpoint(tmp_path, state_of(15))
    assert names(tmp_path) == [f"checkpoint-000000{step}.pth" for step in (10, 15, 40)], "40 is the best one"
    assert step_in(latest_checkpoint(tmp_path)) == 15


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path: Path, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= bit
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: cut(path, 0),
    "cut at 30 %": lambda path: cut(path, 0.3),
    "cut at 90 %": lambda path: cut(path, 0.9),
    "cut at 99.9 %": lambda path: cut(path, 0.999),
    "one bit": flip,
    "deleted": lambda path: path.unlink(),
    "digest deleted": lambda path: path.with_name(path.name + ".sha256").unlink(),
    "the digest no longer text": lambda path: flip(path.with_name(path.name + ".sha256"), 0x80),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_newest_is_passed_over_aloud(damage, tmp_path):
    for step in (1, 2):
        path = store_checkpoint(tmp_path, state_of(step))
    damage(path)
    said = []
    assert step_in(latest_checkpoint(tmp_path, said.append)) == 1
    assert all(path.name in line for line in said) and len(said) == path.exists()


def test_warning_goes_to_stderr(tmp_path, capsys):
    for step in (1, 2):
        path = store_checkpoint(tmp_path, state_of(step))
    flip(path)
    latest_checkpoint(tmp_path)
    assert capsys.readouterr().err.startswith("warning: checkpoint passed over: ")


def test_nothing_usable_names_every_reason(tmp_path):
    for step in (1, 2):
        flip(store_checkpoint(tmp_path, state_of(step)))
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*00002\.pth is damaged.*00001\.pth is damaged"):
        latest_checkpoint(tmp_path, lambda message: None)


def test_no_checkpoint_at_all(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "none") is None
