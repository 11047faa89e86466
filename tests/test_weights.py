"""Weights by name, from the Hub's cache, and as folders for timm: what a file is, and what it becomes."""

import argparse
import json
import re
import sys
from contextlib import nullcontext
from importlib.machinery import PathFinder
from pathlib import Path
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub.utils import EntryNotFoundError, LocalEntryNotFoundError, RepositoryNotFoundError
from safetensors.torch import save_file

import build
import hub
import identity
import main
import models_mamba
import predict
from checkpoint import compare_classes, read_checkpoint
from errors import CheckpointError, ConfigError
from fitting import load_weights
from helpers import random_image
from inference import load_classifier
from oracle_cases import fill
from processes import QUICK
from small_weights import CLASS_NAMES, TWO_BLOCKS, small_model, write_checkpoint
from vim_pretrained import PUBLISHED


def published_state(name: str, **arguments) -> dict:
    """A small model's weights in the form of a published file."""
    model = fill(timm.create_model(name, depth=1, embed_dim=32, **arguments))
    ema = {key: value + 1 for key, value in model.state_dict().items()}
    args = argparse.Namespace(model=name, input_size=224)
    return {"model": model.state_dict(), "model_ema": ema, "epoch": 299, "args": args}


SMALL = {"depth": 1, "embed_dim": 32}


def test_every_published_file_has_its_name_and_tag():
    names = set(timm.list_models("vim_*", pretrained=True))
    assert {f"{name}.hustvl_in1k" for name in PUBLISHED} <= names
    for name, weights in PUBLISHED.items():
        cfg = timm.get_pretrained_cfg(name)
        assert (cfg.hf_hub_id, cfg.hf_hub_filename) == (weights.repo, weights.file)
    assert PUBLISHED["vim_base_patch16_224"].entry == "model_ema", "its 81.9 % are those of the average"
    assert not timm.is_model_pretrained("vim_nano_patch4_32")


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vim_base_patch16_224"])
def test_pretrained_weights_from_the_hub(hub_cache, name):
    state = published_state(name)
    hub_cache(PUBLISHED[name].repo, PUBLISHED[name].file, state)
    model = timm.create_model(name, pretrained=True, **SMALL)
    expected = state[PUBLISHED[name].entry]
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())
    long = next(long for long in models_mamba.VARIANTS if long.startswith(f"{name}_bimambav2"))
    tagged = timm.create_model(f"{long}.hustvl_in1k", pretrained=True, **SMALL)
    assert torch.equal(tagged.head.weight, model.head.weight)


def test_pretrained_weights_adapt_to_classes_channels_and_size(hub_cache):
    name = "vim_tiny_patch16_224"
    state = published_state(name)["model"]
    hub_cache(PUBLISHED[name].repo, PUBLISHED[name].file, {"model": state})
    model = timm.create_model(name, pretrained=True, num_classes=7, in_chans=1, img_size=(64, 96), **SMALL)
    torch.testing.assert_close(model.patch_embed.proj.weight, state["patch_embed.proj.weight"].sum(1, keepdim=True))
    expected = models_mamba.resample_pos_embed(state["pos_embed"], (4, 6))
    assert torch.equal(model.pos_embed, expected) and torch.equal(model.norm_f.weight, state["norm_f.weight"])
    assert model(torch.randn(2, 1, 64, 96)).shape == (2, 7)
    wide = timm.create_model(name, pretrained=True, img_size=(112, 448), **SMALL)  # as many patches, another grid
    assert torch.equal(wide.pos_embed, models_mamba.resample_pos_embed(state["pos_embed"], (7, 28)))


def test_offline_says_what_to_do(hub_cache):
    with pytest.raises(FileNotFoundError, match=r"hf download hustvl/Vim-tiny-midclstok vim_t_"):
        timm.create_model("vim_tiny_patch16_224", pretrained=True, **SMALL)


@pytest.mark.parametrize("name", ["vim_tiny_patch16_224", "vim_base_patch16_224"])
def test_a_copied_file_serves_as_pretrained_weights(tmp_path, name):
    """With the weights that the Hub's file gives: timm's own reader would take the average of either."""
    state = published_state(name)
    torch.save(state, tmp_path / "copied.pth")
    save_file(state["model"], tmp_path / "copied.safetensors")
    for file, entry in (("copied.pth", PUBLISHED[name].entry), ("copied.safetensors", "model")):
        arguments = SMALL | {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / file)}}
        model = timm.create_model(name, **arguments)
        assert torch.equal(model.head.weight, state[entry]["head.weight"])
        extractor = timm.create_model(name, features_only=True, out_indices=(0,), **arguments).model
        assert torch.equal(extractor.cls_token, state[entry]["cls_token"])
        assert not model.pretrained_cfg.get("state_dict") and not extractor.pretrained_cfg.get("state_dict")


@pytest.mark.parametrize("img_size", [(16, 64), (32, 128), (32, 64), 32])
@pytest.mark.parametrize("form", ["state dict", "training checkpoint"])
def test_a_file_of_the_users_own_is_of_the_models_grid(tmp_path, form, img_size):
    """Also where as many patches would make a square, or are those of the registered size."""
    built = {"img_size": img_size, "num_classes": 10}
    model = timm.create_model("vim_nano_patch4_32", **built)
    content = model.state_dict()
    if form != "state dict":
        content = {"model": content, "args": argparse.Namespace(input_size=img_size)}
    torch.save(content, tmp_path / "own.pth")
    overlay = {"file": str(tmp_path / "own.pth")}
    again = timm.create_model("vim_nano_patch4_32", pretrained=True, pretrained_cfg_overlay=overlay, **built)
    assert torch.equal(again.pos_embed, model.pos_embed)


def test_a_file_of_another_grid_is_resampled_from_the_one_it_names(tmp_path):
    """Which its run's arguments do, or the caller; a rectangle that nobody names is told."""
    wide = timm.create_model("vim_nano_patch4_32", img_size=(32, 64))
    right = models_mamba.resample_pos_embed(wide.pos_embed.detach(), (16, 16), "middle", (8, 16))

    def load(content, **overlay):
        torch.save(content, tmp_path / "wide.pth")
        overlay = {"file": str(tmp_path / "wide.pth")} | overlay
        created = {"img_size": 64, "pretrained": True, "pretrained_cfg_overlay": overlay}
        return timm.create_model("vim_nano_patch4_32", **created).pos_embed

    named = {"model": wide.state_dict(), "args": argparse.Namespace(input_size=(32, 64))}
    assert torch.equal(load(named), right)
    assert torch.equal(load(wide.state_dict(), input_size=(3, 32, 64)), right)
    with pytest.raises(ValueError, match=r'holds 128 patches, .* "input_size": \(3, HEIGHT, WIDTH\)'):
        load(wide.state_dict())
    not_of_timm = models_mamba.VisionMamba(32, 4, embed_dim=64, depth=4)
    square = timm.create_model("vim_nano_patch4_32", img_size=64).state_dict()
    assert models_mamba.checkpoint_filter_fn(square, not_of_timm)["pos_embed"].shape[1] == 65


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_a_copied_file_of_a_wrapped_model_serves_too(tmp_path, prefix):
    """Otherwise timm would leave every weight random where the head is another, and only warn."""
    state = published_state("vim_tiny_patch16_224")["model"]
    torch.save({"model": {f"{prefix}{key}": value for key, value in state.items()}}, tmp_path / "wrapped.pth")
    copied = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(tmp_path / "wrapped.pth")}}
    for classes in (7, 1000):
        model = timm.create_model("vim_tiny_patch16_224", num_classes=classes, **SMALL, **copied)
        assert torch.equal(model.norm_f.weight, state["norm_f.weight"])
    assert torch.equal(model.head.weight, state["head.weight"])


@pytest.mark.parametrize("address", ["hf-hub:hustvl/Vim-small-midclstok", "hf-hub:someone/else/weights.pth"])
def test_the_program_reads_hub_addresses(hub_cache, address):
    state = published_state("vim_small_patch16_224")
    if "hustvl" in address:
        hub_cache("hustvl/Vim-small-midclstok", "vim_s_midclstok_80p5acc.pth", state)
    else:
        hub_cache("someone/else", "weights.pth", state)
    assert torch.equal(read_checkpoint(address).model["cls_token"], state["model"]["cls_token"])


@pytest.mark.parametrize(
    "name", [name for name in models_mamba.VARIANTS if "_bimambav2" not in name and "base" not in name]
)
def test_a_state_dict_alone_tells_its_registered_name(tmp_path, name):
    with torch.device("meta"):
        shapes = timm.create_model(name, depth=2).state_dict()
    state = {key: torch.empty(value.shape) for key, value in shapes.items()}
    torch.save(state, tmp_path / "weights.pth")
    found = identity.identify(read_checkpoint(tmp_path / "weights.pth"))
    assert (found.name, found.arguments) == (name, {"depth": 2})


ODD = [
    {"img_size": 24}, {"img_size": (16, 24)}, {"in_chans": 1, "num_classes": 0}, {"norm": "layer"},
    {"cls_token": "none", "global_pool": "mean"}, {"cls_token": "double"}, {"bidirectional": "none"},
    {"bidirectional": "v1"}, {"d_state": 8, "d_conv": 3, "expand": 1, "dt_rank": 5}, {"pos_embed": False},
    {"layer_scale": 0.1, "bias": True, "conv_bias": False}, {"stride": 2},
]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_an_unusual_model_is_rebuilt_from_its_file(tmp_path, odd):
    model = small_model(**odd)
    args = argparse.Namespace(input_size=odd.get("img_size", TWO_BLOCKS["img_size"]))
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "odd.pth")
    checkpoint = read_checkpoint(tmp_path / "odd.pth")
    rebuilt = identity.identify(checkpoint).create()
    load_weights(rebuilt, checkpoint.weights())
    assert rebuilt.patch_embed.img_size == model.patch_embed.img_size
    images = torch.randn(1, model.in_chans, *model.patch_embed.img_size)
    with torch.no_grad():
        torch.testing.assert_close(rebuilt.eval()(images), model(images))


def test_inspect_says_what_is_in_a_file(tmp_path, capsys):
    path = write_checkpoint(tmp_path, best_metric=71.25)
    assert hub.main(["inspect", str(path)]) == 0
    text = capsys.readouterr().out
    for fact in ("sha256", "model, model_ema, epoch, args, class_names", "best top-1 71.25 % of the run's epochs, raw",
                 "vim_nano_patch4_32", "embed_dim=16", "img_size=16", "num_classes=3"):  # fmt: skip
        assert fact in text
    command = next(line for line in text.splitlines() if line.startswith("model      timm"))
    model = eval(command.removeprefix("model      "), {"timm": timm})
    load_weights(model, read_checkpoint(path).weights())


def test_an_exported_folder_loads_in_timm(tmp_path, capsys):
    path, out = write_checkpoint(tmp_path), tmp_path / "folder"
    assert hub.main(["export", str(path), "--ema", str(out)]) == 0
    assert sorted(file.name for file in out.iterdir()) == ["README.md", "config.json", "model.safetensors"]
    model = timm.create_model(f"local-dir:{out}", pretrained=True).eval()
    expected = small_model()
    expected.load_state_dict(read_checkpoint(path).model_ema)
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected(images), rtol=0, atol=0)
    assert model.pretrained_cfg["label_names"] == CLASS_NAMES
    assert timm.data.resolve_model_data_config(model, use_test_size=True)["input_size"] == (3, 16, 16)
    assert json.loads((out / "config.json").read_text())["model_args"]["embed_dim"] == 16
    card = (out / "README.md").read_text()
    assert read_checkpoint(path).sha256 in card and "local-dir:" in card
    adapted = timm.create_model(f"local-dir:{out}", pretrained=True, num_classes=5, img_size=(16, 32))
    assert adapted(torch.randn(1, 3, 16, 32)).shape == (1, 5)


@pytest.mark.parametrize("of_folder", [lambda folder: folder, lambda folder: folder / "model.safetensors"])
def test_an_exported_folder_is_a_checkpoint_that_knows_its_size_and_classes(of_folder, tmp_path):
    """Position embeddings of a rectangle cannot be resampled without its size, labels not compared without names."""
    model = small_model(img_size=(16, 32))
    args = argparse.Namespace(model="vim_nano_patch4_32", data_set="IMNET", input_size=(16, 32), eval_crop_ratio=0.9)
    path = write_checkpoint(tmp_path, model=model.state_dict(), args=args)
    assert hub.main(["export", str(path), "--raw", str(tmp_path / "folder")]) == 0
    exported = read_checkpoint(of_folder(tmp_path / "folder"))
    assert exported.class_names == CLASS_NAMES and exported.args.input_size == (16, 32)
    assert identity.grid_of(exported) == identity.grid_of(read_checkpoint(path)) == model.patch_embed.grid_size
    assert identity.identify(exported) == identity.identify(read_checkpoint(path))
    with pytest.raises(ConfigError, match="was trained with other numbers of classes"):
        compare_classes(exported, CLASS_NAMES[::-1], "")
    larger = small_model(img_size=(32, 64))
    report = load_weights(larger, exported.preferred_weights, "finetune", old_grid=identity.grid_of(exported))
    assert report.pos_embed.startswith("pos_embed resampled from 4 x 8 to 8 x 16")


@pytest.mark.parametrize("config, said", [("{}", None), ("[1]", None), ("{", "config.json is damaged")])
def test_another_config_beside_weights_is_left_alone(config, said, tmp_path):
    save_file(small_model().state_dict(), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(CheckpointError, match=said) if said else nullcontext():
        checkpoint = read_checkpoint(tmp_path)
        assert checkpoint.args is None and checkpoint.class_names == []


@pytest.mark.parametrize("evaluated, kind", [("both", "raw"), ("ema", "averaged")])
def test_the_card_says_whose_accuracy_it_states(tmp_path, evaluated, kind):
    """The run's best may be of other weights and of another epoch than those in the folder."""
    args = argparse.Namespace(eval_weights=evaluated)
    path = write_checkpoint(tmp_path, best_metric=71.25, args=args)
    assert hub.main(["export", str(path), "--ema", str(tmp_path / "folder")]) == 0
    card = (tmp_path / "folder" / "README.md").read_text()
    assert f"Best top-1:** 71.25 % of the run's epochs, {kind} weights, held-out images" in card


@pytest.mark.parametrize("settings", [{"data_set": "DIGITS"}, {"data_set": "IMNET", "eval_crop_ratio": 0.6}], ids=str)
def test_an_exported_folder_has_the_preprocessing_of_its_run(settings, tmp_path):
    model = small_model(img_size=40, in_chans=1)
    args = argparse.Namespace(**settings, input_size=40, in_chans=1)
    path = write_checkpoint(tmp_path, model=model.state_dict(), args=args)
    assert hub.main(["export", str(path), "--raw", str(tmp_path / "folder")]) == 0
    random_image(0, 70, 50).save(tmp_path / "photo.png")
    images = []
    for checkpoint in (path, tmp_path / "folder"):
        flags = ["x", "--checkpoint", str(checkpoint), "--device", "cpu"]
        images.append(load_classifier(predict.build_parser().parse_args(flags)).load_image(tmp_path / "photo.png"))
    assert torch.equal(*images) and images[0].shape == (1, 40, 40)
    data = timm.data.resolve_model_data_config(timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True))
    assert data["input_size"] == (1, 40, 40) and data["crop_pct"] == settings.get("eval_crop_ratio", 1.0)
    assert len(data["mean"]) == 1


@pytest.mark.parametrize("name", ["test_resnet", "test_vit_relpos", "test_maxvit"])
def test_another_models_images_have_the_size_of_its_run(name, tmp_path):
    """Whether it takes any size, or is built for one with position embeddings or without."""
    model = build.create_model("--model", name, num_classes=3, img_size=64)
    args = argparse.Namespace(model=name, data_set="IMNET", input_size=64, num_classes=3)
    path = write_checkpoint(tmp_path, model=model.state_dict(), args=args)
    assert hub.main(["export", str(path), "--raw", str(tmp_path / "folder")]) == 0
    random_image(0, 70, 50).save(tmp_path / "photo.png")
    logits = []
    for checkpoint in (path, tmp_path / "folder"):
        flags = ["x", "--checkpoint", str(checkpoint), "--device", "cpu"]
        classifier = load_classifier(predict.build_parser().parse_args(flags))
        image = classifier.load_image(tmp_path / "photo.png")
        assert image.shape == (3, 64, 64) and classifier.model.pretrained_cfg["input_size"] == (3, 64, 64)
        logits.append(classifier.model(image[None]))
    assert torch.equal(logits[0], model.eval()(image[None])) and torch.equal(*logits)


def test_arguments_that_no_shape_tells_are_those_of_the_exported_folder(tmp_path):
    """Predictions of a folder are those of timm's local-dir:, whatever config.json names."""
    model = small_model(cls_token="none", global_pool="mean")
    assert hub.main(["export", str(write_checkpoint(tmp_path, model=model.state_dict())), str(tmp_path / "out")]) == 0
    file = tmp_path / "out" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"model_args": config["model_args"] | {"global_pool": "max"}}))
    expected = timm.create_model(f"local-dir:{tmp_path / 'out'}", pretrained=True).eval()
    flags = ["x", "--checkpoint", str(tmp_path / "out"), "--device", "cpu"]
    images = torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        found = load_classifier(predict.build_parser().parse_args(flags)).model(images)
        assert torch.equal(found, expected(images)) and not torch.equal(found, model(images))
    assert hub.main(["export", str(tmp_path / "out"), str(tmp_path / "again")]) == 0
    assert json.loads((tmp_path / "again" / "config.json").read_text())["model_args"]["global_pool"] == "max"


@pytest.mark.parametrize(("channels", "mode"), [(3, "RGB"), (1, "L")])
def test_the_cards_example_runs_in_a_clone(channels, mode, tmp_path, monkeypatch):
    model = small_model(in_chans=channels)
    assert hub.main(["export", str(write_checkpoint(tmp_path, model=model.state_dict())), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    for fact in ("**Classes:** 3", f"{channels} channels, 16 x 16 pixels", "central 100 % of each side", "mean (0.4",
                 "standard deviation (0.2", "pip install -e causal_conv1d -e mamba-1p1p1 -r vim/vim_requirements.txt",
                 f'.convert("{mode}")'):  # fmt: skip
        assert fact in card
    random_image(0, 16, 16).save(tmp_path / "photo.jpg")
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)
    code = code.replace("FOLDER", str(tmp_path / "out")).replace("photo.jpg", str(tmp_path / "photo.jpg"))
    monkeypatch.chdir(Path(hub.__file__).parents[1])
    monkeypatch.setattr(sys, "path", list(sys.path))
    ran = {}
    exec(code, ran)
    assert PathFinder.find_spec("models_mamba", sys.path[:1]), "by the path that the example gives"
    assert torch.equal(ran["logits"], model(ran["image"][None]).detach())


def test_the_card_of_a_model_of_timm_needs_no_clone(tmp_path):
    args = argparse.Namespace(model="test_resnet", input_size=64, num_classes=3)
    model = timm.create_model("test_resnet", num_classes=3).state_dict()
    path = write_checkpoint(tmp_path, model=model, args=args)
    assert hub.main(["export", str(path), str(tmp_path / "out")]) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "clone" not in card and "sys.path" not in card and "3 channels, 64 x 64 pixels" in card


def test_the_baseline_exports_as_a_vim_does(tmp_path):
    model = timm.create_model("deit_nano_patch4_32", img_size=16, num_classes=3).eval()
    args = argparse.Namespace(model="deit_nano_patch4_32", input_size=16, num_classes=3)
    path = write_checkpoint(tmp_path, model=model.state_dict(), args=args)
    assert hub.main(["export", str(path), "--raw", str(tmp_path / "folder")]) == 0
    again = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True).eval()
    images = torch.randn(2, 3, 16, 16)
    assert torch.equal(again(images), model(images))


def test_a_size_without_a_grid_needs_no_telling(tmp_path):
    """Hiera has position embeddings, and patches that overlap and tell no grid."""
    args = argparse.Namespace(model="hiera_tiny_224", input_size=(64, 96))
    path = write_checkpoint(tmp_path, model={"pos_embed": torch.zeros(1, 384, 96)}, args=args)
    assert identity.grid_of(read_checkpoint(path)) is None


def test_an_export_into_a_file_is_one_line(tmp_path, capsys):
    path = write_checkpoint(tmp_path)
    assert hub.main(["export", str(path), str(path)]) == 4
    assert capsys.readouterr().err == f"error: {path} cannot be created: File exists\n"


@pytest.mark.slow
def test_fine_tuning_from_a_rectangle_on_the_hub_finds_its_grid_in_the_file(tmp_path, hub_cache, capsys):
    model = timm.create_model("vim_two_blocks", img_size=(8, 12), num_classes=10)
    args = argparse.Namespace(model="vim_two_blocks", input_size=(8, 12), num_classes=10)
    file = hub_cache("someone/else", "rectangle.pth", {"model": model.state_dict(), "args": args})
    assert identity.grid_of(read_checkpoint(file)) == (2, 3)
    assert identity.grid_of(read_checkpoint(write_checkpoint(tmp_path))) is None
    resnet = {"model": timm.create_model("resnet18").state_dict(), "args": argparse.Namespace(
        model="resnet18", input_size=(64, 96))}  # fmt: skip
    torch.save(resnet, tmp_path / "resnet.pth")
    assert identity.grid_of(read_checkpoint(tmp_path / "resnet.pth")) is None, "it has no position embeddings"
    flags = f"{QUICK} --epochs 1 --input-size 16x8 --no-model-ema --finetune hf-hub:someone/else/rectangle.pth"
    assert main.main(flags.split()) == 0
    text = capsys.readouterr().out
    assert "pos_embed resampled from 2 x 3 to 4 x 2" in text
    assert f"rectangle.pth (SHA-256 {read_checkpoint(file).sha256[:16]}...)" in text


@pytest.mark.parametrize("name", ["vim_nano_patch4_32", "deit_nano_patch4_32"])
def test_a_rectangle_that_nobody_names_is_told_with_a_way_out_that_works(name, tmp_path, capsys):
    """What the line asks for, written as it says, is read by all programs."""
    weights = timm.create_model(name, img_size=(8, 12), num_classes=10).state_dict()
    flags = f"{QUICK} --model {name} --epochs 1 --batch-size 512 --input-size 16 --no-model-ema --finetune".split()
    torch.save(weights, tmp_path / "bare.pth")
    assert main.main([*flags, str(tmp_path / "bare.pth")]) == 4
    error = capsys.readouterr().err
    (way_out,) = re.findall(r"save it again as (\{.*\}) with the size of its images in pixels\n$", error)
    random_image(0).save(tmp_path / "photo.png")
    command = [str(tmp_path / "photo.png"), "--device", "cpu", "--checkpoint"]
    if name.startswith("vim"):
        assert predict.main([*command, str(tmp_path / "bare.pth")]) == 4
        assert way_out in capsys.readouterr().err
    named = {"weights": weights, "argparse": argparse, "NAME": name, "HEIGHT": 8, "WIDTH": 12}
    torch.save(eval(way_out, named), tmp_path / "told.pth")
    assert main.main([*flags, str(tmp_path / "told.pth")]) == 0
    assert "pos_embed resampled from 2 x 3 to 4 x 4" in capsys.readouterr().out
    assert predict.main([*command, str(tmp_path / "told.pth")]) == 0


@pytest.mark.parametrize("name", ["resnet18", "convnext_atto", "efficientnet_b0", "deit_nano_patch4_32"])
def test_a_bare_state_dict_tells_its_classes_whatever_its_classifier_is_called(name, tmp_path):
    """`fc`, `head.fc`, `classifier`, `head`"""
    torch.save(timm.create_model(name, num_classes=10).state_dict(), tmp_path / "bare.pth")
    found, _, _ = identity.open_model(read_checkpoint(tmp_path / "bare.pth"), name)
    assert found.num_classes == 10


def test_a_run_of_a_model_of_the_hub_is_identified(tmp_path, monkeypatch, capsys):
    """timm opens hf-hub:OWNER/REPO by the config.json that is there."""
    described = timm.create_model("test_resnet", num_classes=3)
    hub_folder = tmp_path / "repo"
    timm.models.save_for_hf(described, str(hub_folder), safe_serialization=True)
    given = []

    def download(repo, filename, **_):
        given.append(repo)
        return str(hub_folder / filename)

    monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
    name = "hf-hub:someone/resnet"
    args = argparse.Namespace(model=name, data_set="IMNET", input_size=64, num_classes=3, in_chans=3)
    path = write_checkpoint(tmp_path, model=described.state_dict(), model_ema=None, args=args)
    assert hub.main(["inspect", str(path)]) == 0
    assert f"fits       {name}" in capsys.readouterr().out
    assert hub.main(["export", str(path), str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architecture"] == "test_resnet"
    assert set(given) == {"someone/resnet"}


@pytest.mark.parametrize("theirs", ["README.md", "config.json", "model.safetensors"])
def test_an_export_takes_no_other_files_place(theirs, tmp_path, capsys):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / theirs).write_text('{"model_type": "bert"}')
    path = write_checkpoint(tmp_path)
    assert hub.main(["export", str(path), str(tmp_path / "out")]) == 4
    said = f"error: {tmp_path / 'out'} has {theirs} that no export wrote; give another folder, or remove that\n"
    assert capsys.readouterr().err == said
    assert [file.name for file in (tmp_path / "out").iterdir()] == [theirs]


@pytest.mark.parametrize(("flags", "licence"), [([], "unknown"), (["--license", "cc-by-4.0"], "cc-by-4.0")])
def test_the_model_card_claims_the_licence_that_is_given(flags, licence, tmp_path):
    assert hub.main(["export", str(write_checkpoint(tmp_path)), str(tmp_path / "out"), *flags]) == 0
    assert f"\nlicense: {licence}\n" in (tmp_path / "out" / "README.md").read_text()


def test_a_text_file_is_no_checkpoint(tmp_path, capsys):
    (tmp_path / "text.pth").write_text("hello\n")
    assert hub.main(["inspect", str(tmp_path / "text.pth")]) == 4
    error = capsys.readouterr().err
    assert "text.pth is damaged or no checkpoint (cut short?): KeyError: " in error and error.count("\n") == 1


def test_push_uploads_the_same_folder(tmp_path, monkeypatch, capsys):
    """Everything but the network: what would be uploaded loads back."""
    from huggingface_hub import HfApi, RepoUrl

    uploaded = {}

    def upload_folder(self, repo_id, folder_path, **_):
        uploaded[repo_id] = {path.name: path.read_bytes() for path in Path(folder_path).iterdir()}

    monkeypatch.setattr(HfApi, "create_repo", lambda *_, **__: RepoUrl("https://huggingface.co/me/my-vim"))
    monkeypatch.setattr(HfApi, "file_exists", lambda *_, **__: False)
    monkeypatch.setattr(HfApi, "upload_folder", upload_folder)
    path = write_checkpoint(tmp_path)
    assert hub.main(["export", str(path), str(tmp_path / "out"), "--push", "me/my-vim"]) == 0
    files = uploaded["me/my-vim"]
    assert files["model.safetensors"] == (tmp_path / "out" / "model.safetensors").read_bytes()
    assert json.loads(files["config.json"]) == json.loads((tmp_path / "out" / "config.json").read_text())
    assert "https://huggingface.co/me/my-vim" in capsys.readouterr().out


def test_push_without_a_network_is_one_line(tmp_path, hub_cache, capsys):
    path = write_checkpoint(tmp_path)
    assert hub.main(["export", str(path), str(tmp_path / "out"), "--push", "me/my-vim"]) == 4
    assert "needs a network" in capsys.readouterr().err
    assert hub.main(["export", str(path), str(tmp_path / "out"), "--push", "me/my/vim"]) == 4
    error = capsys.readouterr().err
    assert error == "error: --push me/my/vim: expected OWNER/REPO, the name of a repository on the Hub\n"


@pytest.mark.parametrize(
    "name, expected",
    [
        ("resnet18", "the weights do not fit the model"),
        ("vim_nano_patch4_32", "the weights do not fit the model"),
        ("vim_small_patch16_224", "its embed_dim is 64, not 384; without --model it is taken for vim_nano_patch4_32"),
    ],
)
def test_a_file_of_another_model_than_told_is_one_line(tmp_path, capsys, name, expected):
    model = timm.create_model("vim_nano_patch4_32", img_size=16, num_classes=3).state_dict()
    del model["norm_f.weight"]
    path = write_checkpoint(tmp_path, model=model, args=argparse.Namespace(input_size=16))
    assert hub.main(["export", str(path), str(tmp_path / "out"), "--model", name]) == 4
    error = capsys.readouterr().err
    assert f"{path} is no {name}: " in error and expected in error
    assert error.count("\n") == 1 and "--finetune" not in error


@pytest.mark.parametrize(
    "change",
    [{"pretrained_cfg": None}, {"pretrained_cfg": {"input_size": None}}, {"model_args": [1]}, {"num_classes": "many"},
     {"model_args": {"img_size": "big"}}],
    ids=str,
)  # fmt: skip
def test_a_damaged_description_of_an_exported_folder_is_one_line(change, tmp_path):
    assert hub.main(["export", str(write_checkpoint(tmp_path)), str(tmp_path / "out")]) == 0
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert read_checkpoint(tmp_path / "out").args.num_classes == 3
    named = config | {"label_names": dict(enumerate(CLASS_NAMES))}
    (tmp_path / "out" / "config.json").write_text(json.dumps(named), encoding="utf-8-sig")
    assert read_checkpoint(tmp_path / "out").extra["class_names"] == CLASS_NAMES
    (tmp_path / "out" / "config.json").write_text(json.dumps(config | change))
    with pytest.raises(CheckpointError, match=r"config\.json is damaged: .*; export the folder again"):
        read_checkpoint(tmp_path / "out")


@pytest.mark.parametrize(
    "content, expected",
    [
        ({"head.weight": torch.zeros(2, 3)}, r"holds no Vim \(1 tensors\); give --model NAME"),
        ({"model.patch_embed.proj.weight": torch.zeros(2, 3)}, "names begin with 'model.': save it again without"),
        ({"model": {"a": torch.zeros(1)}, "args": argparse.Namespace(model="vit_of_mine")}, "'vit_of_mine' is not r"),
    ],
)
def test_a_file_of_something_else_is_one_line(tmp_path, capsys, content, expected):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(CheckpointError, match=expected):
        identity.identify(read_checkpoint(tmp_path / "other.pth"))
    assert hub.main(["inspect", str(tmp_path / "other.pth")]) == 4
    assert capsys.readouterr().err.count("\n") == 1
    assert hub.main(["inspect", str(tmp_path / "other.pth"), "--model", "vim_tny_patch16_224"]) == 4
    assert "not registered with timm; did you mean vim_tiny_patch16_224" in capsys.readouterr().err


@pytest.mark.parametrize("given", ["vim_tiny", "VIM_TINY_PATCH16_224", "Vim-tiny-midclstok", "vim_tiny_patch-16"])
def test_near_names_are_first_those_that_begin_so(given):
    assert identity.near_names(given)[0] == "vim_tiny_patch16_224"


@pytest.mark.parametrize(
    ("name", "tags"), [("vim_tiny_patch16_224", "hustvl_in1k"), ("vim_nano_patch4_32", "none, leave it out")]
)
def test_an_unknown_tag_is_one_line_with_the_known_ones(name, tags, tmp_path, capsys):
    path = write_checkpoint(tmp_path)
    command = ["--device", "cpu", "--checkpoint", str(path), "--model", f"{name}.foo", str(tmp_path)]
    random_image(0).save(tmp_path / "photo.png")
    assert predict.main(command) == 4
    words = f"{path}: the model '{name}.foo' has the unknown tag 'foo'; {name} has {tags}\n"
    assert capsys.readouterr().err == f"error: {words}"
    for known in (name, "vim_tiny_patch16_224.hustvl_in1k", "resnet18", "resnet18.a1_in1k"):
        assert identity.name_problem(known) == ""


def test_the_grid_of_a_square_is_known_from_the_runs_arguments(tmp_path):
    for size, grid in ((16, (4, 4)), ((8, 32), (2, 8)), (None, None)):
        model = small_model(img_size=size or 16).state_dict()
        path = write_checkpoint(tmp_path, model=model, args=argparse.Namespace(input_size=size))
        assert identity.grid_of(read_checkpoint(path)) == grid


def test_a_model_that_the_hub_does_not_give_is_one_line(monkeypatch):
    def refusal(error):
        def download(*_, **__):
            raise error

        monkeypatch.setattr(timm.models._hub, "hf_hub_download", download)
        with pytest.raises(ConfigError) as caught:
            build.create_model("--model", "hf-hub:foo/bar@v2", num_classes=3)
        return str(caught.value)

    response = SimpleNamespace(headers={}, request=None)
    text = "401 Client Error. (Request ID: 1)\n\nRepository Not Found for url: https://..."
    assert refusal(LocalEntryNotFoundError("An error happened")) == (
        "--model hf-hub:foo/bar@v2 is not in the local cache and the Hub cannot be reached; where there is a network "
        "run `hf download foo/bar --revision v2 config.json`, then copy that cache (HF_HOME)"
    )
    assert "--model hf-hub:foo/bar@v2: the Hub shows you no such repository; check OWNER/REPO" in refusal(
        RepositoryNotFoundError(text, response=response)
    )
    missing = EntryNotFoundError("404 Client Error.\n\nEntry Not Found for url")
    said = "--model hf-hub:foo/bar@v2 cannot be downloaded: 404 Client Error. Entry Not Found for url"
    assert refusal(missing) == said
