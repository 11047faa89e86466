"""Train, fine-tune and evaluate Vision Mamba: `python main.py --help`.

Exit codes: 0 done, 1 a fault that starting again may mend (a dead rank or loader process), 2 wrong flag,
3 a loss or gradient was not finite, 4 data or configuration that cannot work (a full disk and too little
memory among them), 75 stopped by a signal and saved, to be queued again, 130 interrupted at once by a second Ctrl-C.
"""

from __future__ import annotations

from argparse import Namespace

import distributed
from arguments import parse_args, size_of
from build import build_model, build_run
from checkpoint import read_checkpoint
from classification import Classification
from datasets import IMAGENET_CLASSES, DataBundle, build_datasets
from distributed import EXIT_DONE, World, together
from errors import some_of
from fitting import load_weights
from identity import grid_of
from lifecycle import evaluate_saved, run_program, say_own_data, train
from report import RunLog
from subsets import check_valid_labels, read_real_labels, real_labels_of, valid_labels
from summary import summary


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_program(argv, parse_args, execute)


def execute(args, world: World) -> int:
    """Data, model, then evaluation or training."""
    distributed.seed_everything(args.seed, args.deterministic)
    with together():
        log = RunLog(args, world.is_main)
        if args.summary:
            log.say(summarise(args, log))
            return EXIT_DONE
        if args.data_set == "DIGITS":
            say_own_data(args, log, "scikit-learn's digits")
        data = build_datasets(args)
        log.say(data.description)
        model = build_model(args, data.num_classes, log.say).to(world.device)
        if args.finetune and not args.eval:
            load_finetune(args, model, data, log)
    if args.eval:
        return evaluate_checkpoint(args, world, model, data, log)
    given = Namespace(**vars(args))
    args.num_classes = data.num_classes
    return train(build_run(args, world, model, data, log.say), data, log, given)


def load_finetune(args, model, data: DataBundle, log: RunLog) -> None:
    """Give `model` the weights of `--finetune`, fitted to it, and say what was done to them."""
    checkpoint = read_checkpoint(args.finetune, args.trust_checkpoint)
    grid, method, file = grid_of(checkpoint), args.pos_embed_resize, checkpoint.path
    report = load_weights(model, checkpoint.preferred_weights, "finetune", method, grid, source=file)
    averaged = ", averaged weights, it has no others" if checkpoint.model is None else ""
    log.say(f"fine-tuning {checkpoint.label}{averaged}: {report}")
    if not report.remade_head and checkpoint.class_names not in ([], data.class_names):
        log.say(f"its head was trained on other classes, {some_of(checkpoint.class_names)}, and starts from them")


def summarise(args, log: RunLog) -> str:
    """`--summary`: the model's parts, parameters and FLOPs."""
    model = build_model(args, args.num_classes or IMAGENET_CLASSES, log.say)
    return f"{args.model}\n{summary(model, size_of(args.input_size), args.in_chans)}"


def evaluate_checkpoint(args, world: World, model, data: DataBundle, log: RunLog) -> int:
    """`--eval`: the raw and averaged weights of `--resume`, those of `--eval-weights` that it holds."""
    task = Classification(None, None, data.num_classes)
    if args.valid_labels:
        task.valid = valid_labels(args.valid_labels)
        check_valid_labels(task.valid, data.class_names, data.num_classes)
    if args.real_labels:
        task.real = real_labels_of(data.val, read_real_labels(args.real_labels))
    return evaluate_saved(args, world, model, task, data, log, numbered_by_hand=bool(args.valid_labels))


if __name__ == "__main__":
    distributed.leave(main())
