"""Weight files of a Vim of two blocks, for tests of what reads them."""

import argparse
from pathlib import Path

import timm
import torch

import models_mamba  # noqa: F401  (registers its models with timm)
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
