"""The command line of `seg/train.py`: the flags that every program shares, and those of segmentation."""

from __future__ import annotations

import argparse
import math

from arguments import (
    COMMON_FLAGS,
    Program,
    Switch,
    fraction,
    image_size,
    natural_float,
    natural_int,
    parse_args,
    positive_int,
    require_weights,
    size_of,
    switch,
)
from errors import ConfigError
from scenes import INKS
from seg.data import DATA_SETS
from seg.upernet import SCALES

MODES = ("slide", "whole")


def add_data_flags(parser) -> None:
    add = parser.add_argument_group("labelled images").add_argument
    add(
        "--data-set",
        default=None,
        choices=DATA_SETS,
        help="ADE20K as it unpacks, FOLDER with images/ and annotations/, or generated SCENES; default FOLDER, or "
        "SCENES if there is no --data-path",
    )
    add("--num-classes", default=None, type=positive_int, help="of FOLDER; default: as many as classes.txt names")
    add(
        "--reduce-zero-label",
        "--no-reduce-zero-label",
        action=Switch,
        default=None,
        help="labels count from 1 and 0 is ignored; default: ADE20K yes, FOLDER no",
    )
    add("--scene-size", default=96, type=positive_int, help="pixels of a scene's side")
    add("--scene-ink", default="light", choices=INKS, help="colours of the digits in scenes")
    add("--train-scenes", default=2000, type=positive_int, help="scenes of an epoch; each epoch has new ones")
    add("--val-scenes", default=200, type=positive_int, help="held-out scenes")


def add_view_flags(parser) -> None:
    add = parser.add_argument_group("augmentation").add_argument
    add("--resize", default="512x2048", type=image_size, help="an image's sides are made to fit these")
    add("--scale-range", default=[0.5, 2.0], type=float, nargs=2, metavar="RATIO", help="times a ratio of these")
    add("--crop-size", default=512, type=image_size, help="what the model is trained on, and the sliding window")
    add("--crop-class-share", default=0.75, type=fraction, help="most that one class fills of a crop")
    add("--flip-prob", default=0.5, type=fraction, metavar="P", help="of mirroring")
    switch(add, "photometric", True, "distort brightness, contrast, saturation and hue")


def add_head_flags(parser) -> None:
    add = parser.add_argument_group("UPerNet").add_argument
    add("--head-channels", default=None, type=positive_int, help="of the head; default: the backbone's width")
    add("--aux-channels", default=256, type=natural_int, help="of the auxiliary head; 0 for none")
    add("--aux-weight", default=0.4, type=natural_float, help="of the auxiliary head's loss")
    add(
        "--pyramid-scales",
        default=list(SCALES),
        type=float,
        nargs="+",
        metavar="SCALE",
        help="of a plain backbone's maps, the finest level first",
    )


def add_test_flags(parser) -> None:
    add = parser.add_argument_group("predictions").add_argument
    add("--eval-mode", default="slide", choices=MODES, help="windows of --crop-size, or the whole image at once")
    add(
        "--window-stride",
        default=None,
        type=positive_int,
        help="pixels between two windows; default: two thirds of --crop-size, 341 of 512",
    )
    add("--eval-scales", default=[1.0], type=float, nargs="+", metavar="RATIO", help="several: averaged")
    switch(add, "eval-flip", False, "average with the mirrored image")
    add("--pictures", default=12, type=natural_int, metavar="N", help="predictions drawn over their images")


def resolve(args: argparse.Namespace) -> None:
    if args.data_set is None:
        args.data_set = "FOLDER" if args.data_path else "SCENES"
    if args.window_stride is None:
        args.window_stride = max(1, min(size_of(args.crop_size)) * 2 // 3)


def check(args: argparse.Namespace) -> None:
    require_weights(args, "--crop-size")
    if args.data_set != "SCENES" and not args.data_path:
        raise ConfigError(
            f"--data-set {args.data_set} needs --data-path DIR; without --data-path only SCENES can be used"
        )
    low, high = args.scale_range
    if not 0 < low <= high < math.inf:
        raise ConfigError(f"--scale-range {low:g} {high:g}: expected two ratios above 0, the smaller one first")
    wrong = [scale for scale in args.eval_scales if not 0 < scale < math.inf]
    if wrong:
        raise ConfigError(f"--eval-scales {wrong[0]:g}: expected ratios above 0")
    side, stride = min(size_of(args.crop_size)), args.window_stride
    if stride > side:
        raise ConfigError(
            f"--window-stride {stride}: windows of {side} pixels every {stride} leave gaps; give {side} at most"
        )


PROGRAM = Program(
    prog="seg/train.py",
    description="Train and evaluate UPerNet on a Vision Mamba, or on any other backbone of timm.",
    epilog="Without --data-path it trains on generated scenes of handwritten digits, which need no download.",
    groups=(*COMMON_FLAGS, add_data_flags, add_view_flags, add_head_flags, add_test_flags),
    resolve=resolve,
    check=check,
    defaults={
        "model": "vim_tiny_patch16_224",
        "batch_size": 16,
        "epochs": 127,
        "lr": 6e-5,
        "unscale_lr": True,
        "weight_decay": 0.01,
        "sched": "poly",
        "sched_on_updates": True,
        "decay_rate": 1.0,
        "min_lr": 0.0,
        "warmup_epochs": 1,
        "model_ema": False,
    },
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """See `arguments.parse_args`."""
    return parse_args(argv, PROGRAM)
