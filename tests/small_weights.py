"""Small models, their weights and files of them, for tests of what reads them."""

import argparse
from pathlib import Path

import timm
import torch

from models_mamba import VisionMamba
from oracle_cases import fill

TWO_BLOCKS = {"img_size": 16, "embed_dim": 16, "depth": 2, "num_classes": 3}
CLASS_NAMES = ["ant", "bee", "cow"]


def small_model(**arguments):
    """A Vim of patch 4 with its test weights."""
    return fill(timm.create_model("vim_nano_patch4_32", **TWO_BLOCKS | arguments)).eval()


def write_checkpoint(folder: Path, name: str = "checkpoint.pth", **entries) -> Path:
    """A training checkpoint in the published form: `model`, `model_ema` (all weights doubled), `args` and so on."""
    model = small_model().state_dict()
    ema = {key: 2 * value for key, value in model.items()}
    args = argparse.Namespace(data_set="IMNET", eval_crop_ratio=0.875, in_chans=3)
    state = {"model": model, "model_ema": ema, "epoch": 4, "args": args, "class_names": CLASS_NAMES}
    torch.save(state | entries, folder / name)
    return folder / name


def vim(**options) -> VisionMamba:
    """One block of width 8 on 64 x 64 pixels: a grid of 4 x 4."""
    return VisionMamba(**{"img_size": 64, "num_classes": 10, "embed_dim": 8, "depth": 1, "d_state": 2} | options)


def filled(model: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(value.shape, generator=generator) for name, value in model.state_dict().items()}


def equal(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
