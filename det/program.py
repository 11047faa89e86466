"""The program of `det/train.py`: a detector's task on the loop, checkpoints and flags of `vim/`."""

from __future__ import annotations

import torch
from torch import nn

import distributed
from build import as_config_error, assemble
from datasets import DataBundle
from dense import build_backbone, load_backbone, load_dense
from det.arguments import parse, settings_of
from det.data import build_datasets, collate
from det.drawing import save_pictures
from det.evaluation import DetectionResult, evaluate
from det.model import Detector
from distributed import World, together
from engine import Run
from main import evaluate_saved, run_program, say_own_data, train
from report import RunLog


class Detection:
    """Batches (images, targets), both lists; see `task.Task`."""

    score_name, score_column = "box AP", "box_AP"
    collate = staticmethod(collate)

    def loss(self, run: Run, batch, micro: int) -> torch.Tensor:
        """The sum of all stages' losses."""
        device = run.world.device
        images = [image.to(device, non_blocking=True) for image in batch[0]]
        targets = [{name: value.to(device, non_blocking=True) for name, value in t.items()} for t in batch[1]]
        return sum(run.net(images, targets).values())

    def evaluate(self, model: nn.Module, loader, args, world: World) -> DetectionResult:
        return evaluate(model, loader, args, world)

    def pictures(self, log: RunLog, result: DetectionResult, data: DataBundle) -> None:
        """`detections.png`: what was found in the first held-out images, and the truth."""
        if log.dir:
            save_pictures(result.shown, data.val.source, log.dir / "detections.png")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_program(argv, parse, execute)


def execute(args, world: World) -> int:
    """Data, model, then evaluation or training."""
    distributed.seed_everything(args.seed, args.deterministic)
    task = Detection()
    with together():
        log = RunLog(args, world.is_main, (task.score_name, task.score_column))
        say_own_data(args, log, "generated scenes of scikit-learn's digits")
        data = build_datasets(args)
        log.say(data.description)
        model = build_detector(args, data.num_classes, log.say).to(world.device)
    if args.eval:
        return evaluate_saved(args, world, model, task, data, log, load=load_dense)
    return train(assemble(args, world, model, data, task), data, log)


def build_detector(args, num_classes: int, say) -> Detector:
    """The detector of the flags, its backbone with the weights of `--finetune`."""
    backbone = build_backbone(args, args.input_size, taps=1, say=say)
    with as_config_error():
        detector = Detector(backbone, num_classes, settings_of(args))
    if args.finetune and not args.eval:
        load_backbone(args, backbone, say)
    return detector
