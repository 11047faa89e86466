"""The command line of `seg/train.py`: the flags that every program shares, and those of segmentation."""

from __future__ import annotations

import argparse
import math

from arguments import (
    COMMON_FLAGS,
    Program,
    Switch,
    check_scale_range,
    decay_rate_of,
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
from dense import SCALES
from errors import ConfigError
from scenes import INKS
from seg.data import DATA_SETS

MODES = ("slide", "whole")


def add_data_flags(parser) -> None:
    add = parser.add_argument_group("labelled images").add_argument
    add(
        "--data-set",
        default=None,
        choices=DATA_SETS,
        help="ADE20K as it unpacks, FOLDER with images/ and annotations/, or generated SCENES; default: FOLDER, or "
        "SCENES without --data-path",
    )
    add("--data-path", default="", metavar="DIR", help="folder of ADE20K or FOLDER")
    add("--num-classes", default=None, type=positive_int, help="classes of FOLDER; default: those of its classes.txt")
    add(
        "--reduce-zero-label",
        "--no-reduce-zero-label",
        action=Switch,
        default=None,
        help="labels count from 1, and 0 is ignored; default: on for ADE20K, off for FOLDER",
    )
    add("--scene-size", default=96, type=positive_int, help="side of a scene in pixels")
    add("--scene-ink", default="light", choices=INKS, help="colours of the digits in scenes")
    add("--train-scenes", default=2000, type=positive_int, help="training scenes per epoch, new ones in each")
    add("--val-scenes", default=200, type=positive_int, help="held-out scenes")


def add_view_flags(parser) -> None:
    add = parser.add_argument_group("augmentation (scenes have none)").add_argument
    add(
        "--resize",
        default="512x2048",
        type=image_size,
        help="resize images, proportions kept, until the shorter and the longer side fit these two, in either order",
    )
    add(
        "--scale-range",
        default=[0.5, 2.0],
        type=float,
        nargs=2,
        metavar="SCALE",
        help="then scale training images by a random factor between these two",
    )
    add(
        "--crop-size",
        default=512,
        type=image_size,
        help="size of training crops and of the sliding window: 512, or 384x512 for height x width",
    )
    add(
        "--crop-class-share",
        default=0.75,
        type=fraction,
        help="largest share of a crop that one class should fill; 1 takes any crop",
    )
    add("--flip-prob", default=0.5, type=fraction, metavar="P", help="probability of mirroring a training image")
    switch(add, "photometric", True, "distort brightness, contrast, saturation and hue of training images")


def add_head_flags(parser) -> None:
    add = parser.add_argument_group("UPerNet").add_argument
    add("--head-channels", default=None, type=positive_int, help="channels of the head; default: the backbone's width")
    add("--aux-channels", default=256, type=natural_int, help="channels of the auxiliary head; 0 for none")
    add("--aux-weight", default=0.4, type=natural_float, help="weight of the auxiliary head's loss")
    add(
        "--pyramid-scales",
        default=list(SCALES),
        type=float,
        nargs="+",
        metavar="SCALE",
        help="sizes of the levels over a plain backbone's maps, the largest first; a staged backbone ignores them",
    )


def add_test_flags(parser) -> None:
    add = parser.add_argument_group("predictions").add_argument
    add("--eval-mode", default="slide", choices=MODES, help="predict windows of --crop-size, or each image as a whole")
    add(
        "--window-stride",
        default=None,
        type=positive_int,
        help="pixels from one window to the next; default: two thirds of --crop-size, 341 of 512",
    )
    add(
        "--eval-scales",
        default=[1.0],
        type=float,
        nargs="+",
        metavar="SCALE",
        help="scales at which an image is predicted; the predictions are averaged",
    )
    switch(add, "eval-flip", False, "average each prediction with that of the mirrored image")
    add("--pictures", default=12, type=natural_int, metavar="N", help="how many held-out images to draw predictions of")


def resolve(args: argparse.Namespace) -> None:
    if args.data_set is None:
        args.data_set = "FOLDER" if args.data_path else "SCENES"
    if args.window_stride is None:
        args.window_stride = max(1, min(size_of(args.crop_size)) * 2 // 3)
    if args.decay_rate is None:
        args.decay_rate = decay_rate_of(args.sched)


def check(args: argparse.Namespace) -> None:
    require_weights(args, "--crop-size")
    if args.data_set != "SCENES" and not args.data_path:
        raise ConfigError(
            f"--data-set {args.data_set} needs --data-path DIR; without --data-path only SCENES can be used"
        )
    check_scale_range(args)
    wrong = [scale for scale in args.eval_scales if not 0 < scale < math.inf]
    if wrong:
        raise ConfigError(f"--eval-scales {wrong[0]:g}: expected scales above 0")
    side, stride = min(size_of(args.crop_size)), args.window_stride
    if stride > side:
        raise ConfigError(
            f"--window-stride {stride}: windows of {side} pixels every {stride} leave gaps; give {side} at most"
        )


PROGRAM = Program(
    prog="seg/train.py",
    description="Train and evaluate UPerNet on a Vision Mamba, or on any other backbone of timm.",
    epilog="Without --data-path it trains on generated scenes of handwritten digits, which need no download.",
    groups=(add_data_flags, *COMMON_FLAGS, add_view_flags, add_head_flags, add_test_flags),
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
        "decay_rate": None,
        "min_lr": 0.0,
        "warmup_epochs": 1,
        "model_ema": False,
    },
    notes={
        "finetune": "only those of the backbone, but all with --eval",
        "decay_rate": "default: 1 for poly, else 0.1",
    },
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """See `arguments.parse_args`."""
    return parse_args(argv, PROGRAM)
