"""The order of things in `seg/train.py`: data, model, then evaluation or training."""

from __future__ import annotations

from argparse import Namespace

import distributed
from build import assemble
from dense import Backbone, build_backbone, load_backbone, load_dense
from distributed import World, together
from errors import ConfigError, as_config_error
from lifecycle import evaluate_saved, run_program, say_own_data, train
from report import RunLog
from seg.arguments import parse
from seg.data import build_datasets
from seg.task import Segmentation
from seg.upernet import UPerNet, synchronised

NUM_MAPS = 4  # fewer where the backbone has fewer stages


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_program(argv, parse, execute)


def execute(args, world: World) -> int:
    """Data, model, then evaluation or training."""
    distributed.seed_everything(args.seed, args.deterministic)
    with together():
        log = RunLog(args, world.is_main, (Segmentation.score_name, Segmentation.score_column))
        if args.data_set == "SCENES":
            say_own_data(args, log, "generated scenes of scikit-learn's digits")
        data = build_datasets(args)
        log.say(data.description)
        check_batch(args, world)
        check_deterministic(args, world)
        model = build_model(args, data.num_classes, log.say)
        if args.finetune and not args.eval:
            load_backbone(args, model.backbone, log.say)
    model = synchronised(model, world).to(world.device)
    task = Segmentation(data.num_classes, args.aux_weight)
    if args.eval:
        return evaluate_saved(args, world, model, task, data, log, load=load_dense)
    given = Namespace(**vars(args))
    args.num_classes = data.num_classes
    return train(assemble(args, world, model, data, task), data, log, given)


def build_model(args, num_classes: int, say=print) -> UPerNet:
    """UPerNet on `--model`. Raises ConfigError, one line each, for flags that cannot work."""
    size = args.scene_size if args.data_set == "SCENES" else args.crop_size
    backbone = build_backbone(args, size, NUM_MAPS, say)
    check_views(args, backbone)
    with as_config_error("--pyramid-scales: "):
        return UPerNet(backbone, num_classes, args.head_channels, args.aux_channels, tuple(args.pyramid_scales))


def check_views(args, backbone: Backbone) -> None:
    """A backbone that takes images of one size alone is shown nothing larger."""
    scenes = args.data_set == "SCENES"  # which are shown whole
    larger = max(args.eval_scales) > 1 if scenes else args.eval_mode == "whole"
    if backbone.only_size and larger:
        flag = f"--eval-scales {max(args.eval_scales):g}" if scenes else "--eval-mode whole"
        height, width = backbone.only_size
        raise ConfigError(f"{flag}: --model {args.model} takes images of {height}x{width} alone; leave it out")


def check_batch(args, world: World) -> None:
    """Batch norm after pooling to one pixel has nothing to average over in a batch of one."""
    shared = world.size > 1 and world.device.type == "cuda"
    if args.batch_size == 1 and not shared and not args.eval and args.train_mode:
        raise ConfigError("--batch-size 1: the head's batch norm needs at least 2 images; --accum-steps does not help")


def check_deterministic(args, world: World) -> None:
    """torch would end the first step: neither the loss nor the pooling's gradient is deterministic on a GPU."""
    if args.deterministic and world.device.type == "cuda" and not args.eval:
        raise ConfigError(
            f"--deterministic: torch has no deterministic loss of pixels on {world.device}; leave it out, or take "
            "--device cpu"
        )
