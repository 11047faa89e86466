"""The guide's examples, run in its order as a newcomer would, on files that this test writes."""

import argparse
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from sklearn.datasets import load_digits

import arguments
import models_mamba  # noqa: F401  (registers its models with timm)
from pretrained import PUBLISHED

ROOT = Path(__file__).resolve().parents[1]
GUIDE = (ROOT / "docs" / "GUIDE.md").read_text()
SNIPPETS = re.findall(r"^```(\w+)\n(.*?)^```", GUIDE, re.MULTILINE | re.DOTALL)


def is_of_big_data(line: str) -> bool:
    """Of data sets that no test has: its flags are read, and it is not run."""
    return "/data/" in line or "hfds/timm" in line


def write_hub_cache(folder: Path) -> None:
    """The published tiny file's name with fresh weights, as the Hub's cache keeps it."""
    weights = PUBLISHED["vim_tiny_patch16_224"]
    place = folder / "hub" / f"models--{weights.repo.replace('/', '--')}"
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text("0" * 40)
    (place / "snapshots" / ("0" * 40)).mkdir(parents=True)
    state = {"model": timm.create_model("vim_tiny_patch16_224").state_dict(), "args": argparse.Namespace()}
    torch.save(state, place / "snapshots" / ("0" * 40) / weights.file)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A folder like a clone in which `make demo` has run, with some photos of digits."""
    folder = tmp_path_factory.mktemp("clone")
    (folder / "vim").symlink_to(ROOT / "vim")
    demo = folder / "output" / "demo" / "vim_nano_patch4_32"
    demo.mkdir(parents=True)
    model = timm.create_model("vim_nano_patch4_32", num_classes=10).state_dict()
    args = argparse.Namespace(model="vim_nano_patch4_32", input_size=32, data_set="DIGITS")
    names = [str(digit) for digit in range(10)]
    state = {"model": model, "model_ema": model, "epoch": 13, "args": args, "class_names": names}
    torch.save(state, demo / "best_checkpoint.pth")
    (folder / "photos").mkdir()
    for i, digit in enumerate(load_digits().images[:3]):
        Image.fromarray((digit * 15).astype("uint8")).save(folder / "photos" / f"{i}.png")
    write_hub_cache(folder)
    return folder


def run(folder: Path, *command: str) -> str:
    environment = os.environ | {"HF_HOME": str(folder), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600, env=environment)
    assert result.returncode == 0, f"{shlex.join(command)}\n{result.stdout[-2000:]}\n{result.stderr[-3000:]}"
    return result.stdout


@pytest.mark.slow
def test_the_guide_from_top_to_bottom(clone):
    pytest.importorskip("onnxruntime")
    for language, text in SNIPPETS:
        if language == "python":
            run(clone, sys.executable, "-c", text)
            continue
        for line in filter(None, text.splitlines()):
            if not is_of_big_data(line):
                words = shlex.split(line)
                assert words[0] == "python", line
                run(clone, sys.executable, *words[1:])
    written = ("guesses.csv", "model.onnx", "my-vim/config.json", "finetuned/checkpoint.pth")
    assert [name for name in written if not (clone / "output" / name).exists()] == []
    assert len(list((clone / "output" / "pictures").glob("*.png"))) == 2


def test_commands_of_big_data_have_flags_that_exist():
    lines = [line for language, text in SNIPPETS if language == "sh" for line in text.splitlines()]
    lines = [line for line in lines if is_of_big_data(line)]
    assert len(lines) >= 4
    for line in lines:
        args = arguments.parse_args(shlex.split(line)[2:])
        assert args.model == "vim_tiny_patch16_224"


def test_every_language_of_a_snippet_is_run():
    assert {language for language, _ in SNIPPETS} == {"python", "sh"}
