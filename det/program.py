"""The order of things in `det/train.py`: data, model, then evaluation or training."""

from __future__ import annotations

import distributed
from build import assemble
from dense import build_backbone, load_backbone, load_dense
from det.arguments import parse, settings_of
from det.data import build_datasets
from det.model import Detector
from det.task import Detection
from distributed import World, together
from errors import ConfigError, as_config_error
from lifecycle import evaluate_saved, run_program, say_own_data, train
from report import RunLog


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_program(argv, parse, execute)


def execute(args, world: World) -> int:
    """Data, model, then evaluation or training."""
    distributed.seed_everything(args.seed, args.deterministic)
    task = Detection()
    with together():
        log = RunLog(args, world.is_main, (task.score_name, task.score_column))
        if not args.data_path:
            say_own_data(args, log, "generated scenes of scikit-learn's digits")
        data = build_datasets(args)
        log.say(data.description)
        model = build_detector(args, data.num_classes, log.say).to(world.device)
        check_deterministic(args, world, model)
    if args.eval:
        return evaluate_saved(args, world, model, task, data, log, load=load_dense)
    return train(assemble(args, world, model, data, task), data, log)


def build_detector(args, num_classes: int, say) -> Detector:
    """The detector of the flags, its backbone with the weights of `--finetune`."""
    backbone = build_backbone(args, args.input_size, taps=1, say=say)
    if args.pad == "batch" and backbone.only_size:
        height, width = backbone.only_size
        raise ConfigError(
            f"--pad batch: --model {args.model} takes images of {height}x{width} alone; take --pad square"
        )
    with as_config_error(f"--model {args.model} at --input-size {args.input_size}: "):
        detector = Detector(backbone, num_classes, settings_of(args))
    if args.finetune and not args.eval:
        load_backbone(args, backbone, say)
    return detector


def check_deterministic(args, world: World, model: Detector) -> None:
    """torch would end the first step: resampling has no deterministic gradient on a GPU. RoI pooling has one."""
    resampled = args.pad == "batch" and getattr(model.backbone.model, "pos_embed", None) is not None
    if args.deterministic and world.device.type == "cuda" and resampled and not args.eval:
        raise ConfigError(
            "--deterministic --pad batch: position embeddings resampled to each batch cannot be trained so on a GPU; "
            "take --pad square"
        )
