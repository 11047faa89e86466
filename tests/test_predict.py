"""Predictions as users ask for them: what is printed, what it equals, and what a mistake reads like."""

import argparse
import csv
import io
import json
import os
import sys

import pytest
import torch
from PIL import Image

import hub
import inference
import predict
from errors import DataError
from helpers import random_image
from small_weights import CLASS_NAMES, small_model, write_checkpoint


@pytest.fixture
def photos(tmp_path):
    """A checkpoint beside a folder of four photos, one of them in a folder below."""
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i, name in enumerate(("a.jpg", "b.png", "more/c.JPEG", "d.webp")):
        random_image(i).save(tmp_path / "photos" / name)
    (tmp_path / "photos" / "notes.txt").write_text("no image")
    return tmp_path


def run(photos, *flags, checkpoint=None):
    checkpoint = checkpoint or write_checkpoint(photos)
    return predict.main([str(photos / "photos"), "--checkpoint", str(checkpoint), "--device", "cpu", *flags])


def test_json_holds_every_image_with_names_and_probabilities(photos, capsys):
    assert run(photos, "--format", "json", "--topk", "9") == 0
    results = json.loads(capsys.readouterr().out)
    assert [result["file"].rsplit("/", 1)[1] for result in results] == ["a.jpg", "b.png", "d.webp", "c.JPEG"]
    for result in results:
        shares = [guess["probability"] for guess in result["predictions"]]
        assert sum(shares) == pytest.approx(1) and shares == sorted(shares, reverse=True)
        assert {guess["name"] for guess in result["predictions"]} == set(CLASS_NAMES)


def test_probabilities_are_the_models_whatever_the_batch(photos, capsys):
    outputs = []
    for size in ("1", "3"):
        assert run(photos, "--format", "json", "--batch-size", size) == 0
        outputs.append(json.loads(capsys.readouterr().out))
    classifier = inference.load_classifier(arguments(write_checkpoint(photos)))
    image = classifier.load_image(photos / "photos" / "b.png")
    expected = small_model()(image[None]).softmax(1).max().item()
    for results in outputs:
        assert results[1]["predictions"][0]["probability"] == pytest.approx(expected, rel=1e-4)


def test_linked_folders_are_looked_into_as_in_training(photos, tmp_path):
    (photos / "elsewhere").mkdir()
    random_image(9).save(photos / "elsewhere" / "e.png")
    (photos / "photos" / "link").symlink_to(photos / "elsewhere")
    found = [path.name for path in inference.find_images([str(photos / "photos")])]
    assert found == ["a.jpg", "b.png", "d.webp", "e.png", "c.JPEG"], "link/e.png stands before more/c.JPEG"


@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_a_name_that_is_no_utf_8_is_written_as_it_is(photos, form, monkeypatch):
    name = os.fsdecode(b"caf\xe9.png")
    random_image(9).save(photos / "photos" / name)
    screen = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")  # as strict as a terminal in most languages
    monkeypatch.setattr(sys, "stdout", screen)
    assert run(photos, "--format", form) == 0
    assert run(photos, "--format", form, "--output", str(photos / "out")) == 0
    screen.flush()
    written = b"caf\\udce9.png" if form == "json" else b"caf\xe9.png"
    assert written in (photos / "out").read_bytes() and written in screen.buffer.getvalue()


def arguments(checkpoint, *flags):
    return predict.build_parser().parse_args(["x", "--checkpoint", str(checkpoint), "--device", "cpu", *flags])


def test_table_and_csv(photos, capsys):
    assert run(photos, "--topk", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8 and all("%" in line for line in lines)
    assert run(photos, "--format", "csv", "--topk", "1", "--output", str(photos / "out.csv")) == 0
    rows = list(csv.DictReader(io.StringIO((photos / "out.csv").read_text())))
    assert len(rows) == 4 and rows[0]["rank"] == "1" and rows[0]["name"] in CLASS_NAMES
    assert capsys.readouterr().out == ""


def test_averaged_weights_on_demand(photos):
    checkpoint = write_checkpoint(photos)
    for flag, factor in (("auto", 1), ("raw", 1), ("ema", 2)):
        model = inference.load_classifier(arguments(checkpoint, "--weights", flag)).model
        assert torch.equal(model.head.weight, factor * small_model().head.weight)


def test_class_names():
    """ImageNet's own for 1000 classes, words for WordNet numbers, numbers where nothing is known."""
    assert "goldfish" in inference.readable_names([], 1000)[1]
    assert inference.readable_names(["n01443537", "my class"], 2) == ["goldfish, Carassius auratus", "my class"]
    assert inference.readable_names([], 2) == ["class 0", "class 1"]


def test_classes_beyond_the_datas_are_numbers():
    """As of a run with --num-classes above the number of class folders."""
    assert inference.readable_names(["cat", "dog"], 3) == ["cat", "dog", "class 2"]
    with pytest.raises(DataError, match="3 class names for a model of 2 classes"):
        inference.readable_names(["cat", "dog", "cow"], 2)


@pytest.mark.parametrize(("ends", "mark"), [("\n", ""), ("\r\n", "\ufeff")], ids=["Unix", "Windows"])
def test_class_names_from_a_file(ends, mark, photos, capsys):
    (photos / "names.txt").write_bytes((mark + "".join(f"{name}{ends}" for name in "xyz")).encode())
    (photos / "few.json").write_text('["x"]')
    assert run(photos, "--class-names", str(photos / "names.txt"), "--format", "csv", "--topk", "3") == 0
    assert {row["name"] for row in csv.DictReader(io.StringIO(capsys.readouterr().out))} == set("xyz")
    assert run(photos, "--class-names", str(photos / "few.json")) == 4
    assert "few.json has 1 names, the model 3 classes; give one name for each class" in capsys.readouterr().err


def test_preprocessing_is_that_of_the_evaluation(photos):
    """Resize to int(size / 0.875), crop the centre, normalise."""
    classifier = inference.load_classifier(arguments(write_checkpoint(photos)))
    flat = Image.new("RGB", (50, 30), (255, 255, 255))
    flat.save(photos / "flat.png")
    image = classifier.load_image(photos / "flat.png")
    assert image.shape == (3, 16, 16)
    torch.testing.assert_close(image[:, 3, 3], (1 - torch.tensor([0.485, 0.456, 0.406])) / torch.tensor(
        [0.229, 0.224, 0.225]))  # fmt: skip


def test_a_model_of_grey_images_is_given_such():
    transform = inference.evaluation_transform(small_model(in_chans=1), argparse.Namespace())
    assert transform(random_image(0)).shape == (1, 16, 16)


def test_a_place_for_the_output_that_is_not_there_is_said_before_the_work(photos, capsys):
    assert run(photos, "--output", str(photos / "absent" / "out.csv")) == 4
    expected = f"error: --output {photos}/absent/out.csv: its folder does not exist; make it first\n"
    assert capsys.readouterr().err == expected


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "nonsense"), "the model 'nonsense' is not registered with timm"),
        (("--model", "vim_small_patch16_224"), "is no vim_small_patch16_224: its embed_dim is 16"),
        (("--model", "resnet18"), "is no resnet18: "),
        (("--weights", "ema"), "holds one set of weights, the exported one: ema cannot be chosen, leave it out"),
        (("--weights", "raw"), "raw cannot be chosen, leave it out"),
    ],
)
def test_flags_that_do_not_fit_an_exported_folder_are_refused(flags, said, photos, capsys):
    assert hub.main(["export", str(write_checkpoint(photos)), "--ema", str(photos / "folder")]) == 0
    capsys.readouterr()
    assert run(photos, *flags, checkpoint=photos / "folder") == 4
    error = capsys.readouterr().err
    assert said in error and str(photos / "folder") in error and error.count("\n") == 1
    fitting = ("--weights", "auto", "--trust-checkpoint")
    assert run(photos, *fitting, checkpoint=photos / "folder") == 0
    assert "vim_nano_patch4_32, exported weights; 4 images" in capsys.readouterr().err


NANO = '"architecture": "vim_nano_patch4_32"'
DESCRIBED = '"num_classes": 3, "pretrained_cfg": {"input_size": [3, 16, 16]}'


@pytest.mark.parametrize(
    "file, content, expected",
    [
        ("model.safetensors", "", "header too small"),
        ("config.json", "{}", "config.json does not describe a model: export the folder again"),
        ("config.json", "{", "config.json is damaged"),
        ("config.json", '{"architecture": "vim_of_mine"}', "config.json does not describe a model"),
        ("config.json", f'{{"architecture": "vim_of_mine", {DESCRIBED}}}', "its model 'vim_of_mine' is not registered"),
        ("config.json", f'{{{NANO}, "model_args": {{"a": 3}}, {DESCRIBED}}}', "'a'"),
        ("config.json", f'{{{NANO}, "model_args": {{"norm": 3}}, {DESCRIBED}}}', "norm=3"),
    ],
    ids=str,
)
def test_a_damaged_folder_is_one_line(photos, capsys, file, content, expected):
    assert hub.main(["export", str(write_checkpoint(photos)), str(photos / "folder")]) == 0
    assert run(photos, checkpoint=photos / "folder") == 0
    assert f"{photos}/folder/model.safetensors (SHA-256 " in capsys.readouterr().err
    (photos / "folder" / file).write_text(content)
    assert run(photos, checkpoint=photos / "folder") == 4
    error = capsys.readouterr().err
    assert expected in error and str(photos / "folder") in error and error.count("\n") == 1


@pytest.mark.parametrize("size", ["1", "32"])
@pytest.mark.parametrize("form", ["table", "csv", "json"])
def test_what_was_predicted_before_an_unreadable_image_is_written(photos, capsys, form, size):
    (photos / "photos" / "b.png").write_bytes(b"no picture")
    for flags in ((), ("--output", str(photos / "out"))):
        assert run(photos, "--format", form, "--topk", "1", "--batch-size", size, *flags) == 4
        captured = capsys.readouterr()
        (line,) = [line for line in captured.err.splitlines() if line.startswith("error:")]
        assert "b.png: " in line and line.endswith("; repair or remove the file, or use --bad-image skip")
        text = (photos / "out").read_text() if flags else captured.out
        assert text.count("a.jpg") == 1 and "d.webp" not in text
        assert form != "json" or len(json.loads(text)) == 1


def test_unreadable_images_may_be_skipped(photos, capsys):
    assert run(photos, "--format", "json") == 0
    everything = json.loads(capsys.readouterr().out)
    (photos / "photos" / "b.png").write_bytes(b"no picture")
    assert run(photos, "--format", "json", "--bad-image", "skip") == 0
    captured = capsys.readouterr()
    found = json.loads(captured.out)
    assert [result["file"] for result in found] == [everything[i]["file"] for i in (0, 2, 3)]
    for result, i in zip(found, (0, 2, 3)):
        shares = [guess["probability"] for guess in everything[i]["predictions"]]
        assert [guess["probability"] for guess in result["predictions"]] == pytest.approx(shares, rel=1e-4)
    _, named, total = captured.err.splitlines()
    assert named.startswith("unreadable image skipped: ") and "b.png: " in named
    assert total == "1 of 4 images skipped: they cannot be read"


def test_no_readable_image_at_all_is_an_error(photos, capsys):
    for path in find_all(photos):
        path.write_bytes(b"no picture")
    assert run(photos, "--bad-image", "skip") == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error == f"error: none of 4 images can be read, the first is {photos}/photos/a.jpg"


def test_results_are_written_as_they_come(photos):
    """Not at the end: a process that is killed leaves what it found."""

    def results():
        for path in find_all(photos):
            yield {"file": str(path), "predictions": [{"class": 0, "name": "ant", "probability": 1.0}]}
            assert path.name in (photos / "out").read_text()

    with open(photos / "out", "w") as file:
        assert predict.write(results(), predict.form("csv", []), file) == 4


def find_all(photos):
    return inference.find_images([str(photos / "photos")])


FAULTS = ["no such image", "empty folder", "broken image", "no checkpoint", "no such device", "no such GPU"]


@pytest.mark.parametrize("fault", FAULTS)
def test_mistakes_are_one_line(tmp_path, capsys, fault):
    (tmp_path / "photos").mkdir()
    if fault == "broken image":
        (tmp_path / "photos" / "bad.jpg").write_bytes(b"no picture")
    elif fault == "empty folder":
        (tmp_path / "photos" / "a.jpg").mkdir()
    else:
        random_image(0).save(tmp_path / "photos" / "a.jpg")
    checkpoint = tmp_path / "absent.pth" if fault == "no checkpoint" else write_checkpoint(tmp_path)
    images = tmp_path / ("absent" if fault == "no such image" else "photos")
    device = {"no such device": "tpu-v9", "no such GPU": "cuda:99"}.get(fault, "cpu")
    assert predict.main([str(images), "--checkpoint", str(checkpoint), "--device", device]) == 4
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error:")]
    assert {
        "no such image": "does not exist", "empty folder": "holds no images", "broken image": "bad.jpg",
        "no checkpoint": "absent.pth does not exist", "no such device": "--device tpu-v9",
        "no such GPU": "--device cuda:99: this torch sees no such device",
    }[fault] in line  # fmt: skip
