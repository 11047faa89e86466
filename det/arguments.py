"""The command line of `det/train.py`: the shared flags of `vim/arguments.py` and a detector's own.

Defaults are ViTDet's for COCO, as Vim's authors used them: images of 1024 pixels, 100 epochs of batches of 64.
"""

from __future__ import annotations

import argparse

from arguments import (
    COMMON_FLAGS,
    Program,
    check_scale_range,
    decay_rate_of,
    fraction,
    image_size,
    natural_int,
    parse_args,
    positive_int,
    require_weights,
    size_of,
)
from dense import SCALES
from det.model import DETECTORS, DetectorSettings
from errors import ConfigError

PADS = ("square", "batch")
WARMUP_STEPS = 250
MILESTONES = (0.8889, 0.9630)  # of the epochs
WARMUP_EPOCHS = 5  # as in the other programs, for a rate that changes once an epoch


def add_data_flags(parser) -> None:
    add = parser.add_argument_group("labelled images").add_argument
    add("--data-path", default="", metavar="DIR", help="COCO's folder; default: generated scenes")
    add("--train-scenes", default=2000, type=positive_int, help="training scenes where there is no --data-path")
    add("--val-scenes", default=200, type=positive_int, help="held-out scenes, of digits that no training scene has")


def add_view_flags(parser) -> None:
    add = parser.add_argument_group("what the model sees").add_argument
    add(
        "--input-size",
        default=1024,
        type=image_size,
        help="size in pixels into which images are fitted: 1024, or 768x1024 for height x width",
    )
    add(
        "--scale-range",
        default=[0.1, 2.0],
        type=float,
        nargs=2,
        metavar="SCALE",
        help="large-scale jitter: training images, fitted to --input-size, are scaled by a random factor between these "
        "two, then cut to --input-size",
    )
    add(
        "--flip-prob",
        default=None,
        type=fraction,
        metavar="P",
        help="probability of mirroring a training image; default: 0.5, or 0 for generated scenes",
    )
    add(
        "--pad",
        default="square",
        choices=PADS,
        help="fill images up to --input-size, or to the largest of the batch, which keeps rectangles; in evaluation "
        "batch leaves each image as it is",
    )


def add_detector_flags(parser) -> None:
    add, default = parser.add_argument_group("detector").add_argument, DetectorSettings()
    add("--detector", default="cascade", choices=DETECTORS, help="Cascade Mask R-CNN (cascade) or Mask R-CNN (mask)")
    add("--pyramid-channels", default=default.pyramid_channels, type=positive_int, help="channels of each level")
    add(
        "--pyramid-scales",
        default=list(SCALES),
        type=float,
        nargs="+",
        metavar="SCALE",
        help="sizes of the levels over the backbone's map, the largest first; one more level is added after them",
    )
    add(
        "--anchor-sizes",
        default=list(default.anchor_sizes),
        type=float,
        nargs="+",
        metavar="PIXELS",
        help="sides of the boxes that proposals start from, one per level, the added one included",
    )
    add("--rpn-convs", default=default.rpn_convs, type=positive_int, help="convolutions of the proposal network")
    add("--box-convs", default=default.box_convs, type=natural_int, help="convolutions of each box head")
    add("--box-width", default=default.box_width, type=positive_int, help="width of a box head's fully connected layer")
    add("--mask-convs", default=default.mask_convs, type=positive_int, help="convolutions of the mask head")
    add("--proposals", default=default.proposals, type=positive_int, help="boxes per image that the heads are given")
    add("--roi-samples", default=default.roi_samples, type=positive_int, help="boxes per image that train the heads")
    add(
        "--roi-side",
        default=default.roi_side,
        type=float,
        metavar="PIXELS",
        help="boxes of this side are read from the level of stride 16, boxes of half the side from the level before",
    )
    add("--score-threshold", default=default.score_threshold, type=fraction, help="lowest score of a detection")


def settings_of(args: argparse.Namespace) -> DetectorSettings:
    """The detector that the flags describe. Raises ConfigError for one that cannot work."""
    names = ("detector", "pyramid_channels", "rpn_convs", "box_convs", "box_width", "mask_convs", "proposals",
             "roi_samples", "roi_side", "score_threshold")  # fmt: skip
    lists = {name: tuple(getattr(args, name)) for name in ("pyramid_scales", "anchor_sizes")}
    pad = size_of(args.input_size) if args.pad == "square" else None
    try:
        return DetectorSettings(**{name: getattr(args, name) for name in names}, **lists, pad=pad)
    except ValueError as error:
        name, _, said = str(error).partition(": ")
        known = name in (*names, *lists)
        raise ConfigError(f"--{name.replace('_', '-')} {said}" if known else str(error)) from None


def resolve(args: argparse.Namespace) -> None:
    if args.flip_prob is None:
        args.flip_prob = 0.5 if args.data_path else 0.0
    if args.decay_rate is None:
        args.decay_rate = decay_rate_of(args.sched)
    if args.decay_milestones is None:
        args.decay_milestones = [round(share * args.epochs, 4) for share in MILESTONES]
    if args.warmup_epochs is None:
        args.warmup_epochs = WARMUP_EPOCHS
        if args.warmup_steps is None and args.sched_on_updates:
            args.warmup_steps = WARMUP_STEPS


def check(args: argparse.Namespace) -> None:
    require_weights(args)
    check_scale_range(args)
    if args.compile:
        raise ConfigError("--compile: a detector's boxes change in number at every step; leave it out")
    if not args.train_mode:
        raise ConfigError("--no-train-mode: torchvision's heads have losses in training mode alone; leave it out")
    if args.flip_prob and not args.data_path:
        raise ConfigError(
            f"--flip-prob {args.flip_prob:g}: the digits of generated scenes must not be mirrored; leave it out or "
            "give 0, or --data-path DIR for other images"
        )
    settings_of(args)


PROGRAM = Program(
    prog="det/train.py",
    description="Train and evaluate Cascade Mask R-CNN or Mask R-CNN on a Vim, or on any plain timm backbone.",
    epilog="--data-path takes COCO's folder. Without it, scenes are composed from scikit-learn's digits.",
    groups=(add_data_flags, *COMMON_FLAGS, add_view_flags, add_detector_flags),
    resolve=resolve,
    check=check,
    defaults={
        "model": "vim_tiny_patch16_224",
        "epochs": 100,
        "lr": 1e-4,
        "unscale_lr": True,
        "weight_decay": 0.1,
        "layer_decay": 0.837,
        "sched": "multistep",
        "sched_on_updates": True,
        "decay_milestones": None,
        "decay_rate": None,
        "warmup_epochs": None,
        "warmup_lr": 1e-7,
        "model_ema": False,
        "dist_eval": True,
    },
    notes={
        "finetune": "only those of the backbone, but all with --eval",
        "decay_milestones": f"default: {MILESTONES[0]:.2%} and {MILESTONES[1]:.2%} of --epochs".replace("%", "%%"),
        "decay_rate": "default: 1 for poly, else 0.1",
        "train_mode": "this program refuses that",
        "compile": "this program refuses that",
        "warmup_epochs": f"default: {WARMUP_EPOCHS} with --no-sched-on-updates, else --warmup-steps {WARMUP_STEPS}",
    },
)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """As `arguments.parse_args`, for this program."""
    return parse_args(argv, PROGRAM)
