"""The command line of the training program: every flag, its default and what it is for.

Names, meanings and defaults are those of DeiT's and Vim's `main.py`, so that their commands keep working.
`--config FILE.yaml` gives the same flags from a file (the command line wins), and `save_arguments` writes the
resolved ones in that very form, so that `--config RUN/args.yaml` repeats a run.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import math
import os
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml

from errors import ConfigError, one_line, unknown

INTERPOLATIONS = ("random", "bilinear", "bicubic")
DATA_SETS = ("IMNET", "CIFAR", "CIFAR10", "INAT", "INAT19", "DIGITS")
READERS = ("wds/", "hfds/", "hfids/")
INAT_CATEGORIES = ("kingdom", "phylum", "class", "order", "supercategory", "family", "genus", "name")
SCHEDULES = ("cosine", "tanh", "step", "multistep", "constant", "plateau", "poly", "wsd", "rsqrt", "none")
TRACKERS = ("tensorboard", "wandb", "mlflow")
NOT_SAVED = ("config",)
# Flags that do not change a run's numbers: a resumed run may differ in them.
CHANGES_NOTHING = {
    "bad_image_share", "checkpoint_steps", "config", "data_path", "device", "dist_eval", "dist_timeout", "dist_url",
    "distributed", "eval", "finetune", "if_continue_inf", "keep_checkpoints", "loader_timeout",
    "local_rank", "log_every", "model_ema_force_cpu", "nonfinite", "nonfinite_limit", "num_workers", "output_dir",
    "pin_mem", "pos_embed_resize", "real_labels", "report_to", "resume", "start_epoch", "summary", "trust_checkpoint",
    "valid_labels", "world_size",
}  # fmt: skip
# Options of the published program that no released weights were trained with.
PUBLISHED_RANDOM = ("random_cls_token_position", "random_token_rank")


class Unnamed(str):
    """A default, told apart from the same word given as a flag."""


UNNAMED_DEVICE = Unnamed("cuda")


class OneLineParser(argparse.ArgumentParser):
    """An argument parser whose complaints are one line, with the nearest flag for a misspelt one."""

    def error(self, message: str):
        prefix = "unrecognized arguments: "
        if message.startswith(prefix):
            flag = message.removeprefix(prefix).split()[0].split("=")[0]
            near = difflib.get_close_matches(flag, self._option_string_actions, n=3)
            message += f" (did you mean {' or '.join(near)}?)" if near else " (--help lists all flags)"
        self.exit(2, f"{self.prog}: error: {message}\n")


def number(kind: type, text: str, accepted: str) -> int | float:
    """`text` as int or float. What is neither is refused in words, where argparse would name a function of ours."""
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text} is not {accepted}") from None


def positive_int(text: str) -> int:
    value = number(int, text, "a positive whole number")
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive whole number")
    return value


def natural_int(text: str) -> int:
    value = number(int, text, "0 or a positive whole number")
    if value < 0:
        raise argparse.ArgumentTypeError(f"{text} is negative; give 0 or a positive whole number")
    return value


def seed_number(text: str) -> int:
    value = natural_int(text)
    if value >= 2**63:
        raise argparse.ArgumentTypeError(f"{text} has more than 63 bits; give a smaller seed")
    return value


def positive_float(text: str) -> float:
    value = number(float, text, "a positive number")
    if not 0.0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number; without the flag its default holds")
    return value


def natural_float(text: str) -> float:
    value = number(float, text, "0 or a positive number")
    if not 0.0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not 0 or a positive number")
    return value


def fraction(text: str) -> float:
    value = number(float, text, "a number between 0 and 1")
    if not 0.0 <= value <= 1.0:
        raise argparse.ArgumentTypeError(f"{text} is not between 0 and 1")
    return value


def at_least_two(text: str) -> int:
    value = number(int, text, "a whole number of at least 2")
    if value < 2:
        raise argparse.ArgumentTypeError(f"{text} is less than 2: a damaged newest file must leave another")
    return value


def image_size(text: str) -> int | tuple[int, int]:
    """`224` for squares, `192x256` for height x width."""
    try:
        sides = [positive_int(side) for side in text.split("x")]
    except argparse.ArgumentTypeError:
        raise argparse.ArgumentTypeError(f"{text} is not a size; give 224, or 192x256 (height x width)") from None
    if len(sides) > 2:
        raise argparse.ArgumentTypeError(f"{text} has {len(sides)} sides; give 224, or 192x256 (height x width)")
    return sides[0] if len(sides) == 1 else (sides[0], sides[1])


def size_of(input_size: int | tuple[int, int]) -> tuple[int, int]:
    """(height, width) of `--input-size`, which is one number for squares."""
    if isinstance(input_size, int):
        return input_size, input_size
    height, width = input_size
    return height, width


def data_set(text: str) -> str:
    if text not in DATA_SETS and not text.startswith(READERS):
        known = ", ".join((*DATA_SETS, *(f"{reader}..." for reader in READERS)))
        raise argparse.ArgumentTypeError(f"invalid choice: {text!r} (choose from {known})")
    return text


def tracker_list(text: str) -> str:
    strange = [name for name in text.split(",") if name and name not in TRACKERS]
    if strange:
        raise argparse.ArgumentTypeError(unknown(repr(strange[0]), TRACKERS))
    return text


class Switch(argparse.Action):
    """A boolean flag of two names: the first turns it on, the second off."""

    def __init__(self, option_strings, dest, default=False, help=None):
        super().__init__(option_strings, dest, nargs=0, default=default, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, option_string == self.option_strings[0])


class PublishedNonfinite(Switch):
    """Sets --nonfinite, so that of both names the last one given counts, on the command line after a file's."""

    def __call__(self, parser, namespace, values, option_string=None):
        super().__call__(parser, namespace, values, option_string)
        namespace.nonfinite = "skip" if getattr(namespace, self.dest) else "stop"


class WarmupEpochs(argparse.Action):
    """Takes --warmup-steps back, so that of both the last one given counts: the command line's after a file's or a
    script's. In a file, which has no order, --warmup-steps."""

    def __call__(self, parser, namespace, values, option_string=None):
        setattr(namespace, self.dest, values)
        namespace.warmup_steps = None


def switch(add, name: str, default: bool, text: str) -> None:
    """Add the boolean flag `--name` with its negation `--no-name`, as DeiT writes them."""
    add(f"--{name}", f"--no-{name}", action=Switch, default=default, help=text)


@dataclass(frozen=True)
class Program:
    """A command line of its own on the flags that all programs share.

    Args:
        prog, description, epilog: of its `--help`.
        groups: functions that add flags to a parser; `COMMON_FLAGS` are those that the loop reads.
        resolve: gives what only this program has its open defaults, in place.
        check: raises ConfigError for what this program alone refuses.
        defaults: flag's destination -> default, where this program's differs.
        notes: flag's destination -> what its help says of this program alone.
    """

    prog: str
    description: str
    epilog: str
    groups: tuple[Callable, ...]
    resolve: Callable[[argparse.Namespace], None]
    check: Callable[[argparse.Namespace], None]
    defaults: dict[str, object] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)


def build_parser(program: Program | None = None) -> argparse.ArgumentParser:
    """The parser with all flags of a program, by default the classifier's.

    Defaults of None are resolved by `parse_args`, which says how.
    """
    program = program or CLASSIFIER
    parser = OneLineParser(
        prog=program.prog,
        usage="%(prog)s [--config FILE.yaml] [--data-path DIR] [--model NAME] [flags]",
        allow_abbrev=False,
        description=program.description,
        epilog=program.epilog,
    )
    parser.add_argument("--config", default="", metavar="FILE.yaml", help="flags from a file; the command line wins")
    for add_group in program.groups:
        add_group(parser)
    parser.set_defaults(**program.defaults)
    for action in parser._actions:
        if action.dest in program.notes:
            action.help += f"; {program.notes[action.dest]}"
        if action.default not in (None, "", argparse.SUPPRESS) and not isinstance(action, Switch):
            action.help += " (default: %(default)s)"
        elif isinstance(action, Switch) and action.default:
            action.help += " (default: on)"
    return parser


def section(parser, title: str):
    """The group of flags under this title, begun if there is none."""
    found = next((group for group in parser._action_groups if group.title == title), None)
    return found or parser.add_argument_group(title)


def add_run_flags(parser) -> None:
    add = section(parser, "run").add_argument
    add("--batch-size", default=64, type=positive_int, help="images per rank and micro-batch")
    add("--epochs", default=300, type=positive_int, help="passes over the training images")
    add(
        "--accum-steps",
        default=1,
        type=positive_int,
        help="micro-batches per optimiser step: the whole batch is batch-size x ranks x accum-steps",
    )
    add(
        "--output_dir",
        "--output-dir",
        default="",
        metavar="DIR",
        help="folder for checkpoints, logs and pictures; default: nothing is saved",
    )
    add("--seed", default=0, type=seed_number, help="seed of all random numbers")
    add(
        "--report-to",
        default="tensorboard",
        type=tracker_list,
        metavar="NAMES",
        help="trackers, separated by commas: tensorboard, wandb, mlflow; log.txt and metrics.csv are always written",
    )
    add(
        "--log-every",
        default=50,
        type=positive_int,
        metavar="STEPS",
        help="steps between two points of the trackers and, outside a terminal, between two printed lines",
    )


def add_data_flags(parser) -> None:
    add = section(parser, "images and classes").add_argument
    add(
        "--data-set",
        default=None,
        type=data_set,
        metavar="NAME",
        help=f"{', '.join(DATA_SETS)}, wds/, hfds/NAME or hfids/NAME; IMNET is any image folder with train/ and "
        "val/; CIFAR has 100 classes; default: IMNET, or DIGITS without --data-path",
    )
    add("--data-path", default="", metavar="DIR", help="folder of the data set")
    add("--train-split", default="train", metavar="NAME", help="name of the training split in wds/, hfds/, hfids/")
    add("--val-split", default="validation", metavar="NAME", help="name of the held-out split in wds/, hfds/, hfids/")
    add("--image-key", default="image", metavar="NAME", help="column of the images in hfds/, hfids/")
    add(
        "--label-key",
        default="",
        metavar="NAME",
        help="column or JSON field of the class number in wds/, hfds/, hfids/; default: the reader's own",
    )
    add("--inat-category", default="name", choices=INAT_CATEGORIES, help="rank of INAT that is taken for a class")
    add(
        "--bad-image",
        default="raise",
        choices=("raise", "replace"),
        help="what to do with an unreadable image: stop, or replace it (in training by another, in evaluation by grey)",
    )
    add("--bad-image-share", default=0.01, type=fraction, help="fraction of replaced images that ends the run")
    add(
        "--input-size",
        default=224,
        type=image_size,
        help="size in pixels of the images that the model is given: 224, or 192x256 for height x width",
    )
    add("--in-chans", default=3, type=positive_int, help="channels of the images: 1 for grey, 3 for RGB")
    add("--num-classes", default=None, type=positive_int, help="classes of the model; default: as many as the data has")


def add_loader_flags(parser) -> None:
    add = section(parser, "data loading").add_argument
    add(
        "--num_workers",
        "--num-workers",
        default=10 if sys.platform == "linux" else 4,  # not forked, each takes 0.4 GB (datasets.START_METHOD)
        type=natural_int,
        help="loader processes per rank; outside Linux the default is 4",
    )
    add(
        "--loader-timeout",
        default=600.0,
        type=natural_float,
        metavar="SECONDS",
        help="longest wait for a batch from loader processes (--num_workers), after which the run ends; 0: for ever",
    )
    switch(add, "pin-mem", True, "load batches into page-locked memory, which is copied to a GPU faster")


def add_model_flags(parser) -> None:
    add = section(parser, "model").add_argument
    add(
        "--model",
        default="deit_base_patch16_224",
        metavar="NAME",
        help="one of this project's (vim_tiny_patch16_224, vim_nano_patch4_32, ...), of timm's models, or "
        "hf-hub:OWNER/REPO, which timm opens",
    )
    add(
        "--drop-path",
        default=0.1,
        type=fraction,
        metavar="P",
        help="probability of stochastic depth in the last block; it rises linearly from 0 in the first",
    )
    switch(add, "train-mode", True, "train in training mode; --no-train-mode: no dropout, running statistics frozen")
    add(
        "--dt-init-backward",
        default="published",
        choices=("published", "same"),
        help="how a Vim's backward time steps start: with a bias of zero, as published, or as the forward ones do",
    )
    switch(add, "compile", False, "run the model through torch.compile")
    switch(add, "grad-checkpointing", False, "save memory by recomputing activations in the backward pass")
    switch(add, "model-ema", True, "keep an exponential moving average of the weights")
    add("--model-ema-decay", default=0.99996, type=fraction, help="weight of the old average at each step")
    switch(add, "model-ema-force-cpu", False, "keep the average in main memory")


def add_weight_flags(parser) -> None:
    add = section(parser, "weights").add_argument
    add(
        "--resume",
        default="",
        metavar="CKPT",
        help="checkpoint to continue from: a file, https://..., hf-hub:..., or auto, the newest undamaged one in "
        "--output_dir",
    )
    add("--finetune", default="", metavar="CKPT", help="weights to start a new run from")
    add(
        "--pos-embed-resize",
        default="grid",
        choices=("grid", "published"),
        help="how --finetune fits position embeddings to another image size: resample their grid, or do as published, "
        "which shifts half of it by one patch",
    )
    switch(add, "trust-checkpoint", False, "unpickle checkpoints without torch's safe loader: they may run code")
    add(
        "--start_epoch",
        "--start-epoch",
        default=0,
        type=natural_int,
        help="number of the first epoch; a checkpoint of --resume that knows its own comes first",
    )


def add_optimizer_flags(parser) -> None:
    add = section(parser, "optimiser").add_argument
    add("--opt", default="adamw", metavar="NAME", help="optimiser: any of timm's")
    add("--opt-eps", default=1e-8, type=positive_float, metavar="EPS", help="epsilon in the optimiser's denominator")
    add(
        "--opt-betas",
        default=None,
        type=float,
        nargs="+",
        metavar="BETA",
        help="betas of the optimiser; default: its own",
    )
    add(
        "--clip-grad",
        default=None,
        type=positive_float,
        metavar="NORM",
        help="clip the total gradient norm to this; default: no clipping",
    )
    add("--momentum", default=0.9, type=natural_float, metavar="M", help="momentum of SGD and its relatives")
    add("--weight-decay", default=0.05, type=natural_float, help="weight decay; biases, norms and embeddings have none")
    add(
        "--no-decay-ssm",
        "--decay-ssm",
        action=Switch,
        help="no weight decay for A_log either, which the published runs decayed",
    )
    add(
        "--layer-decay",
        default=None,
        type=fraction,
        metavar="FACTOR",
        help="multiply the learning rate by this factor per block going down from the head; 1 for one rate everywhere",
    )


def add_schedule_flags(parser) -> None:
    add = section(parser, "learning rate").add_argument
    add(
        "--lr",
        default=5e-4,
        type=natural_float,
        help="peak learning rate; multiplied by whole batch / 512 unless --unscale-lr",
    )
    switch(add, "unscale-lr", False, "take --lr as it is, whatever the batch")
    add("--sched", default="cosine", metavar="NAME", help=f"schedule: {', '.join(SCHEDULES)}")
    switch(add, "sched-on-updates", False, "change the learning rate at every step instead of every epoch")
    add(
        "--lr-noise",
        default=None,
        type=fraction,
        nargs="+",
        metavar="FRACTION",
        help="vary the rate at random from this fraction of the run on; a second value ends it; default: no noise",
    )
    add(
        "--lr-noise-pct",
        default=0.67,
        type=natural_float,
        metavar="FRACTION",
        help="limit of the noise, as a fraction of the rate",
    )
    add(
        "--lr-noise-std",
        default=1.0,
        type=natural_float,
        metavar="STD",
        help="standard deviation of the noise, before it is limited",
    )
    add("--warmup-lr", default=1e-6, type=natural_float, help="rate at which the warm-up starts")
    add("--min-lr", default=1e-5, type=natural_float, help="lowest rate of the schedule")
    add(
        "--decay-epochs",
        default=30,
        type=positive_float,
        help="epochs between two cuts of the rate with --sched step; length of the last phase with wsd and rsqrt",
    )
    add(
        "--decay-milestones",
        default=[30.0, 60.0],
        type=positive_float,
        nargs="+",
        metavar="EPOCH",
        help="epochs at which --sched multistep cuts the rate",
    )
    add(
        "--warmup-epochs",
        default=5,
        type=natural_int,
        action=WarmupEpochs,
        help="epochs in which the rate rises linearly from --warmup-lr to --lr; 0 for none",
    )
    add(
        "--warmup-steps",
        default=None,
        type=natural_int,
        metavar="STEPS",
        help="length of the warm-up in steps, in place of --warmup-epochs; needs --sched-on-updates",
    )
    add("--cooldown-epochs", default=10, type=natural_int, help="accepted for old commands; no effect")
    add(
        "--patience-epochs",
        default=10,
        type=natural_int,
        help="epochs without improvement after which --sched plateau cuts the rate",
    )
    add(
        "--decay-rate",
        "--dr",
        default=0.1,
        type=positive_float,
        help="factor by which step, multistep and plateau cut the rate; exponent of poly",
    )


def add_augmentation_flags(parser) -> None:
    add = section(parser, "augmentation").add_argument
    switch(add, "repeated-aug", True, "show each image three times per pass, each time augmented differently")
    add(
        "--color-jitter",
        default=0.3,
        type=natural_float,
        metavar="STRENGTH",
        help="strength of colour jitter, which is applied with --aa none and with --ThreeAugment",
    )
    add("--aa", default="rand-m9-mstd0.5-inc1", metavar="POLICY", help="timm's automatic augmentation; none for off")
    add(
        "--train-interpolation",
        default="bicubic",
        choices=INTERPOLATIONS,
        help="interpolation of the random resized crop",
    )
    add("--reprob", default=0.25, type=fraction, metavar="P", help="probability of random erasing")
    add("--remode", default="pixel", choices=("pixel", "rand", "const"), help="what an erased box is filled with")
    add("--recount", default=1, type=positive_int, help="largest number of erased boxes per image")
    switch(add, "resplit", False, "refused: it belongs to timm's augmentation splits, which this program does not have")
    switch(add, "ThreeAugment", False, "DeiT III's augmentation: one of grey, solarise, blur; then colour jitter")
    switch(add, "src", False, "with --ThreeAugment: simple random crop in place of the random resized crop")


def add_mixup_flags(parser) -> None:
    add = section(parser, "mixup and cutmix").add_argument
    add("--mixup", default=0.8, type=natural_float, metavar="ALPHA", help="alpha of mixup; 0 for off")
    add("--cutmix", default=1.0, type=natural_float, metavar="ALPHA", help="alpha of cutmix; 0 for off")
    add(
        "--cutmix-minmax",
        default=None,
        type=fraction,
        nargs=2,
        metavar="FRACTION",
        help="smallest and largest side of cutmix's box, as fractions of the image's; default: drawn by --cutmix",
    )
    add("--mixup-prob", default=1.0, type=fraction, metavar="P", help="probability that images are mixed at all")
    add(
        "--mixup-switch-prob",
        default=0.5,
        type=fraction,
        metavar="P",
        help="probability of cutmix instead of mixup where both are on",
    )
    add(
        "--mixup-mode",
        default="batch",
        choices=("batch", "pair", "elem"),
        help="draw one mixing ratio per batch, per pair or per image",
    )


def add_classifier_flags(parser) -> None:
    add = section(parser, "model").add_argument
    add("--drop", default=0.0, type=fraction, metavar="P", help="dropout probability")
    switch(add, "attn-only", False, "train the attention layers and the head alone (vision transformers)")
    for flag in PUBLISHED_RANDOM:
        add(f"--if_{flag}", f"--no_{flag}", action=Switch, help="refused: no published weights were trained with it")
    switch(add, "summary", False, "print the parameters and FLOPs of --model and exit")


def add_loss_flags(parser) -> None:
    add = section(parser, "loss and distillation").add_argument
    add("--if_nan2num", "--no_nan2num", action=Switch, help="replace NaN and infinite logits before the loss")
    add("--smoothing", default=0.1, type=fraction, help="label smoothing")
    switch(add, "bce-loss", False, "binary cross-entropy of each class (DeiT III)")
    switch(add, "cosub", False, "let two sub-models teach each other on the same batch (DeiT III)")
    add(
        "--distillation-type",
        default="none",
        choices=("none", "soft", "hard"),
        help="what a teacher gives: nothing, probabilities (soft) or one label (hard)",
    )
    add("--teacher-model", default="regnety_160", metavar="NAME", help="the teacher: any of timm's or ours, as --model")
    add("--teacher-path", default="", metavar="CKPT", help="weights of the teacher")
    add("--distillation-alpha", default=0.5, type=fraction, help="share of the teacher in the loss")
    add("--distillation-tau", default=1.0, type=positive_float, help="temperature of soft distillation")


def add_evaluation_flags(parser) -> None:
    add = section(parser, "evaluation").add_argument
    switch(add, "eval", False, "evaluate the weights of --resume, or of --finetune, and exit")
    add(
        "--eval-weights",
        default="both",
        choices=("raw", "ema", "both"),
        help="which weights to evaluate, if there are such; with both, the best checkpoint is chosen by the raw ones",
    )
    switch(add, "dist-eval", False, "share the evaluation among the ranks; the result is the same")


def add_accuracy_flags(parser) -> None:
    add = section(parser, "evaluation").add_argument
    add(
        "--eval-crop-ratio",
        default=0.875,
        type=float,
        help="fraction of the resized image that the central crop keeps; small images and digits are kept whole",
    )
    add(
        "--valid-labels",
        default="",
        metavar="NAME",
        help="with --eval, for data that has only some of the model's classes: imagenet-a, imagenet-r, imagenet-v2, or "
        "a file of their numbers",
    )
    add(
        "--real-labels",
        default="",
        metavar="NAME",
        help="with --eval, report ReaL accuracy as well: imagenet, or ReaL's JSON file",
    )


def add_device_flags(parser) -> None:
    add = section(parser, "device and precision").add_argument
    add(
        "--device",
        default=UNNAMED_DEVICE,
        help="cuda (ROCm's GPUs too), cpu, auto (cuda if there is one, else cpu), or mps, where Vim has no kernels; "
        "if not given and there is no GPU: cpu",
    )
    add(
        "--if_amp",
        "--no_amp",
        action=Switch,
        default=None,
        help="mixed precision; default: on with a GPU, off without, as published",
    )
    add(
        "--amp-dtype",
        default="bfloat16",
        choices=("bfloat16", "float16"),
        help="type of mixed precision; float16 scales the loss as well; the scan's state stays float32",
    )
    slower = "the same bits in every run; some operations are slower, and segmentation and detection may refuse it"
    switch(add, "deterministic", False, slower)


def add_reliability_flags(parser) -> None:
    add = section(parser, "reliability").add_argument
    add(
        "--checkpoint-steps",
        default=0,
        type=natural_int,
        metavar="STEPS",
        help="save every so many steps as well as after each epoch; 0 for after each epoch alone",
    )
    add("--keep-checkpoints", default=2, type=at_least_two, metavar="K", help="newest checkpoints that are kept")
    add(
        "--nonfinite",
        default=None,
        choices=("stop", "skip"),
        help="on a loss or gradient that is not finite: end the run with exit code 3, or skip the step; default: stop",
    )
    add("--nonfinite-limit", default=10, type=positive_int, help="skipped steps in a row after which the run ends")
    names = "--nonfinite skip and --nonfinite stop, as the published program calls them"
    add("--if_continue_inf", "--no_continue_inf", action=PublishedNonfinite, help=names)


def add_distributed_flags(parser) -> None:
    add = section(parser, "several processes (torchrun sets these)").add_argument
    switch(add, "distributed", False, "refuse to run without torchrun")
    add("--world_size", "--world-size", default=1, type=positive_int, help="processes in all; above 1 needs torchrun")
    add("--dist_url", "--dist-url", default="env://", help="address where the processes meet")
    add(
        "--dist-timeout",
        default=1800.0,
        type=positive_float,
        metavar="SECONDS",
        help="longest wait for another process, after which it is taken for dead",
    )
    add(
        "--local-rank",
        "--local_rank",
        default=0,
        type=natural_int,
        help="number of this process on its machine, as old launchers pass it",
    )


def parse_args(argv: list[str] | None = None, program: Program | None = None) -> argparse.Namespace:
    """Read flags from `--config` and the command line, the latter winning, and resolve open defaults.

    Exits with 2 on what argparse refuses; raises ConfigError for combinations that cannot work.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    program = program or CLASSIFIER
    parser = build_parser(program)
    finder = OneLineParser(prog=program.prog, add_help=False, allow_abbrev=False)
    finder.add_argument("--config", action="append")
    finder.set_defaults(config=[])
    *others, path = ["", *finder.parse_known_args(argv)[0].config]
    if others[1:]:
        raise ConfigError(f"--config {others[1]} and --config {path}: give one file")
    tokens = yaml_tokens(path, parser) if path else []
    args = parser.parse_args(tokens + argv)
    args.output_dir = os.path.expanduser(args.output_dir)
    resolve_defaults(args)
    program.resolve(args)
    check_arguments(args)
    program.check(args)
    return args


def yaml_tokens(path: str, parser: argparse.ArgumentParser) -> list[str]:
    """Turn a YAML mapping into command-line tokens, so that the same checks read both.

    Keys are flag names without the leading dashes; `-` and `_` are the same. Raises ConfigError for a file
    that is not such a mapping and for unknown keys, naming near ones.
    """
    known = yaml_keys(parser)
    tokens = []
    for key, value in sorted(read_mapping(path).items(), key=lambda item: normalised(item[0]) == "warmup_steps"):
        action = known.get(normalised(key))
        if action is None:
            near = difflib.get_close_matches(normalised(key), known, n=3)
            hint = f"did you mean {' or '.join(near)}?" if near else f"`{parser.prog} --help` lists all flags"
            raise ConfigError(f"--config {path} has the unknown key {key!r}; {hint}")
        tokens += value_tokens(path, action, value)
    return tokens


def normalised(key) -> str:
    return str(key).lstrip("-").replace("-", "_")


def yaml_keys(parser: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """What a configuration file may set: every flag's names, negations left out."""
    known = {}
    for action in parser._actions:
        if action.dest in ("help", *NOT_SAVED):
            continue
        names = action.option_strings[:1] if isinstance(action, Switch) else action.option_strings
        known.update({normalised(name): action for name in (*names, action.dest)})
    return known


def read_mapping(path: str) -> dict:
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path} is not YAML: {one_line(error)}") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path} holds a {type(content).__name__}; it takes lines of `flag: value`")
    return content


def value_tokens(path: str, action: argparse.Action, value) -> list[str]:
    """Write one `key: value` of a configuration file as the command line would."""
    flag = action.option_strings[0]
    if value is None and action.default is None:
        return []
    if isinstance(value, bool) != isinstance(action, Switch) or value is None or isinstance(value, dict):
        wanted = "true or false" if isinstance(action, Switch) else "a value, not true, false, null or a mapping"
        raise ConfigError(f"--config {path}: {action.dest}: {value!r} is not accepted; {flag} takes {wanted}")
    if isinstance(value, bool):
        return [action.option_strings[0 if value else 1]]
    if isinstance(value, list):
        return [flag, *map(str, value)]
    return [f"{flag}={value}"]


def resolve_defaults(args: argparse.Namespace) -> None:
    """Give the open defaults of all programs their values, in place: device, mixed precision, policy."""
    if isinstance(args.device, Unnamed):
        # Of several machines one may have lost its GPUs: ranks of two kinds would wait for each other.
        ranks, here = (os.environ.get(name) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
        one_machine = "SLURM_PROCID" not in os.environ and (ranks == here or "RANK" not in os.environ)
        args.device = "cpu" if one_machine and not torch.cuda.is_available() else str(args.device)
        if args.device == "cpu" and not getattr(args, "summary", False) and os.environ.get("RANK", "0") == "0":
            print("no GPU and no --device: on the CPU", file=sys.stderr)
    if args.device == "auto":
        args.device = automatic_device()
    if args.if_amp is None:
        args.if_amp = args.device.startswith("cuda")
    if args.nonfinite is None:
        args.nonfinite = "stop"


def automatic_device() -> str:
    """What "auto" stands for: the GPU that there are kernels for, if there is one, else the CPU, which has some too."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def resolve_classifier(args: argparse.Namespace) -> None:
    if args.summary:
        args.device = "cpu"  # counting needs no other
    if args.data_set is None:
        args.data_set = "IMNET" if args.data_path else "DIGITS"


def check_arguments(args: argparse.Namespace) -> None:
    """Refuse what no program can do, before anything is loaded. Raises ConfigError, one line each."""
    if re.fullmatch(r"(cuda|cpu|mps)(:\d+)?", args.device) is None:
        raise ConfigError(unknown(f"--device {args.device}", ("cuda", "cuda:N", "cpu", "mps", "auto")))
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        raise ConfigError(f"--device {args.device}: this torch sees no GPU; use --device cpu or --device auto")
    if args.device.startswith("mps") and not torch.backends.mps.is_available():
        raise ConfigError(f"--device {args.device}: this torch sees no Apple GPU; use --device cpu or --device auto")
    if args.resume == "auto" and not args.output_dir:
        raise ConfigError("--resume auto looks into --output_dir, which is not given")
    if args.resume not in ("", "auto") and args.finetune:
        raise ConfigError(
            f"--resume {args.resume} continues a run, --finetune {args.finetune} starts one from weights; give one of "
            "them, or --finetune with --resume auto, which continues as soon as there is a checkpoint"
        )
    if args.start_epoch >= args.epochs and not args.eval and not args.resume:
        raise ConfigError(
            f"--start_epoch {args.start_epoch} of --epochs {args.epochs} leaves nothing to train; give more --epochs"
        )
    if args.report_to not in ("", "tensorboard") and not args.output_dir:
        raise ConfigError(f"--report-to {args.report_to} keeps its files in --output_dir, which is not given")
    if args.sched == "plateau" and args.sched_on_updates:
        raise ConfigError("--sched plateau follows the evaluations, not the steps; give --no-sched-on-updates")
    if args.sched in ("step", "multistep", "plateau") and args.decay_rate >= 1:
        raise ConfigError(f"--decay-rate {args.decay_rate:g}: --sched {args.sched} cuts the rate by a factor below 1")
    if args.sched == "multistep" and not args.eval:
        check_milestones(args.decay_milestones, args.epochs)
    if args.layer_decay is not None and args.sched == "none":
        raise ConfigError("--layer-decay is applied by the schedule; take --sched constant instead of none")
    if args.lr_noise and (len(args.lr_noise) > 2 or sorted(set(args.lr_noise)) != args.lr_noise):
        given = " ".join(f"{one:g}" for one in args.lr_noise)
        raise ConfigError(f"--lr-noise {given}: expected where the noise begins, and where it ends if that is earlier")
    if args.warmup_steps is not None and not args.sched_on_updates:
        raise ConfigError(f"--warmup-steps {args.warmup_steps} needs --sched-on-updates; or give --warmup-epochs")


def check_milestones(milestones: list[float], epochs: int) -> None:
    """Raise ConfigError for those of `--sched multistep` that do not rise, or of which the run reaches none."""
    given = f"--decay-milestones {' '.join(f'{one:g}' for one in milestones)}"
    if any(later <= earlier for earlier, later in itertools.pairwise(milestones)):
        raise ConfigError(f"{given}: expected rising numbers of epochs")
    if milestones[0] >= epochs:
        raise ConfigError(f"{given}: --epochs {epochs} ends before the rate is first cut; give earlier ones")


def decay_rate_of(sched: str) -> float:
    """The default of `--decay-rate` where it is not DeiT's for all schedules: poly's exponent, or a factor."""
    return 1.0 if sched == "poly" else 0.1


def check_scale_range(args: argparse.Namespace) -> None:
    """Raise ConfigError for a `--scale-range`, segmentation's and detection's, that is none."""
    low, high = args.scale_range
    if not 0 < low <= high < math.inf:
        raise ConfigError(f"--scale-range {low:g} {high:g}: expected two scales above 0, the smaller one first")


def require_weights(args: argparse.Namespace, size: str = "--input-size") -> None:
    """`--eval` needs some; `size` is the program's flag for that of images. Raises ConfigError."""
    if args.eval and not (args.resume or args.finetune):
        raise ConfigError(f"--eval needs --resume CKPT to evaluate, or --finetune CKPT at another {size}")


def check_classifier(args: argparse.Namespace) -> None:
    require_weights(args)
    if args.data_set != "DIGITS" and not args.data_set.startswith(("hfds/", "hfids/")) and not args.data_path:
        raise ConfigError(
            f"--data-set {args.data_set} needs --data-path DIR; without it only DIGITS, hfds/NAME and hfids/NAME "
            "can be used"
        )
    for flag in PUBLISHED_RANDOM:
        if getattr(args, f"if_{flag}"):
            raise ConfigError(
                f"--if_{flag}: no published weights were trained with it, and this program does not implement it; "
                "leave it out"
            )
    if args.resplit:
        raise ConfigError("--resplit belongs to augmentation splits, which this program does not have; leave it out")
    if args.distillation_type != "none" and not args.teacher_path:
        raise ConfigError(f"--distillation-type {args.distillation_type} needs --teacher-path CKPT")
    if args.distillation_type != "none" and args.cosub:
        raise ConfigError("--cosub is its own teacher; take it or --distillation-type, not both")
    if args.cutmix_minmax is not None:
        low, high = args.cutmix_minmax
        if any(int(side * low) >= int(side * high) for side in size_of(args.input_size)):
            raise ConfigError(f"--cutmix-minmax {low:g} {high:g}: the second must be larger, by a pixel at least")
    if (args.valid_labels or args.real_labels) and not args.eval:
        raise ConfigError("--valid-labels and --real-labels are for --eval")


# What the loop and the shared parts of a model read.
COMMON_FLAGS = (
    add_run_flags,
    add_loader_flags,
    add_model_flags,
    add_weight_flags,
    add_optimizer_flags,
    add_schedule_flags,
    add_evaluation_flags,
    add_device_flags,
    add_reliability_flags,
    add_distributed_flags,
)
CLASSIFIER = Program(
    prog="main.py",
    description="Train, fine-tune and evaluate Vision Mamba, or any timm model, on images.",
    epilog="Without --data-path it trains on scikit-learn's digits, which need no download.",
    groups=(
        add_data_flags,
        *COMMON_FLAGS,
        add_classifier_flags,
        add_augmentation_flags,
        add_mixup_flags,
        add_loss_flags,
        add_accuracy_flags,
    ),
    resolve=resolve_classifier,
    check=check_classifier,
    notes={
        "model": "the default is DeiT's, whose commands this program takes",
        "finetune": "a head of another number of classes begins anew",
    },
)


def save_arguments(args: argparse.Namespace, path: Path) -> None:
    """Write the resolved arguments as YAML that `--config` reads back to the same namespace."""
    values = {key: value for key, value in vars(args).items() if key not in NOT_SAVED}
    for key, value in values.items():
        if isinstance(value, tuple):  # an image's height and width
            values[key] = "x".join(map(str, value))
    Path(path).write_text(yaml.safe_dump(values, sort_keys=True), encoding="utf-8")
