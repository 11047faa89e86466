"""What the programs do around their loop: a process's start and end, resuming, evaluating saved weights.

`main.py`, `seg/` and `det/` add their data, models and tasks.
"""

from __future__ import annotations

import io
import os
import signal
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path

import distributed
import failures
from arguments import save_arguments
from build import describe
from checkpoint import (
    ENTRIES,
    Checkpoint,
    compare_classes,
    fetch,
    keep_best,
    latest_checkpoint,
    own_checkpoint,
    read_checkpoint,
)
from datasets import DataBundle
from dense import grid_in_file
from distributed import EXIT_DONE, EXIT_FAILED, StopAtOnce, StopSignal, World, together
from engine import Run, build_val_loader, fit, restore, share_replaced
from errors import ConfigError
from fitting import LoadReport, load_weights
from identity import DENSE_BACKBONE, grid_of
from report import RunLog
from task import Task, in_words

CLASSES_WAY_OUT = "give data with all classes of that run, or, to main.py, their numbers as --valid-labels"
RESAMPLED = "--finetune instead of --resume resamples the position embeddings"
# What to do about weights that cannot be evaluated, as `load_weights` wants it.
EVAL_HINTS = {
    "head": "if the data's classes are the first of the model's, add --num-classes {classes}; if they are others of "
    "them, add --valid-labels",
    "pos_embed": RESAMPLED,
    f"{DENSE_BACKBONE}pos_embed": RESAMPLED,
}


def run_program(argv: list[str] | None, parse: Callable, execute: Callable) -> int:
    """Parse the flags, meet the other ranks, execute; what a user can mend is one line on stderr.

    Args:
        parse: from `argv` to arguments. execute: from arguments and a `World` to an exit code.
    """
    args, code = None, EXIT_FAILED
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # it was closed before the program began
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115 - open to the end
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")  # names of files need not be UTF-8
    with StopSignal():  # a run that has ended is not stopped any more
        try:
            with StopAtOnce():  # until training has a step to finish, and after it
                args = parse(argv)
                code = execute(args, distributed.start(args))
        except KeyboardInterrupt:  # a second Ctrl-C
            code = 128 + signal.SIGINT
            saved = args is not None and args.output_dir and not args.eval
            print(f"interrupted{': --resume auto goes on from the last checkpoint' if saved else ''}", file=sys.stderr)
        except SystemExit as leaving:  # argparse, or who was asked to stop, has said why
            code = leaving.code
        except Exception as error:
            found = failures.explain(error, args)
            if found is None:
                raise
            code, line = found
            print(f"error: {line}", file=sys.stderr)
        finally:
            distributed.tell(code)
            distributed.finish()
    return code


def say_own_data(args, log: RunLog, data: str) -> None:
    """Say that built-in data is used, and why."""
    why = f"--data-path {args.data_path} is not read" if args.data_path else "no --data-path"
    log.say(f"{why}: {'evaluating' if args.eval else 'training'} on {data}")


def train(run: Run, data: DataBundle, log: RunLog, given: Namespace | None = None) -> int:
    """Train from the checkpoint of `--resume`, or from the start, to the end; returns the exit code.

    given: the arguments as the user gave them. These are saved to args.yaml, without the class count read from the
        data, so that `--config args.yaml` works on other data. None: save `run.args`.
    """
    log.say(describe(run))
    resume(run, log)
    run.writer.check = log.folder.check_own
    with together():
        if log.dir:
            save_arguments(given or run.args, log.dir / "args.yaml")
        log.open(run.progress.epoch, run.progress.step)
    try:
        return fit(run, data, log)
    finally:
        run.writer.join()
        log.close()


def resume(run: Run, log: RunLog) -> None:
    """Go on from the checkpoint of `--resume`, or begin where there is none to go on from.

    Beginning once more, because a rank died before the first checkpoint, is an incident too.
    """
    count = distributed.num_restarts()
    with together():
        path = where_from(run, log, again=log.folder.claim() and count > 0) if run.world.is_main else None
        log.folder.own()
    path = distributed.from_main(path)
    with together():
        if path:
            checkpoint = read_checkpoint(path, run.args.trust_checkpoint)
            known = restore(run, checkpoint, grid_in_file(checkpoint, run.model))
            if run.world.is_main and own_checkpoint(run.args.output_dir, checkpoint.path):
                keep_best(checkpoint)
            restarts = f" (restart {count})" if count else ""
            log.incident("resumed", run.progress.step, f"resuming{restarts} {known}")
        elif count:
            log.incident("restarted", run.progress.step, f"restart {count}: no checkpoint to go on from")
        else:
            log.forget_incidents()


def where_from(run: Run, log: RunLog, again: bool) -> Path | str | None:
    """The checkpoint to go on from, if any; the output folder is made ready for what this run will write.

    What another run has left there is moved aside, unless `--resume` names it. A process that was started `again`
    goes on from its own checkpoints, whatever `--resume` the first one had.
    """
    named = None if run.args.resume == "auto" else run.args.resume
    if again or named is None:
        path = newest(run, log)
        if path is None and not again:
            log.say(f"--resume auto: no checkpoint in {run.args.output_dir} yet, beginning")
        return path or named
    file = fetch(named) if named else None
    if file and own_checkpoint(run.args.output_dir, file):
        log.folder.set_back(file.resolve())
    else:
        log.folder.make_room(f"--resume {named} is not of it" if named else "there is no --resume")
    return named


def newest(run: Run, log: RunLog) -> Path | None:
    """The newest whole checkpoint in --output_dir; damaged ones are reported."""
    return latest_checkpoint(
        run.args.output_dir, on_rejected=lambda reason: log.incident("fallback", run.progress.step, reason)
    )


def load_resized(args, model, checkpoint: Checkpoint, weights: dict) -> LoadReport:
    """Weights of `--finetune` that are evaluated. Raises ConfigError if the head does not fit."""
    grid = grid_of(checkpoint)
    report = load_weights(model, weights, "finetune", args.pos_embed_resize, grid, source=checkpoint.path)
    if report.remade_head:
        classes = report.head_classes
        why = f"its head is of other classes than the data's: {EVAL_HINTS['head']}" if classes else "it has no head"
        raise ConfigError(f"--eval --finetune {args.finetune}: {why.format(classes=classes)}")
    return report


def evaluate_saved(
    args,
    world: World,
    model,
    task: Task,
    data: DataBundle,
    log: RunLog,
    load: Callable = load_resized,
    numbered_by_hand: bool = False,
) -> int:
    """`--eval` of any task; returns the exit code.

    Args:
        load: gives `model` the weights of `--finetune`.
        numbered_by_hand: a flag said which of the model's classes the data's are, so their names may be others.
    """
    loader = build_val_loader(data.val, args, world, task.collate)
    with together():
        checkpoint = saved_checkpoint(args)
        other_names = "" if numbered_by_hand else compare_classes(checkpoint, data.class_names, CLASSES_WAY_OUT)
        if other_names:
            log.say(other_names)
    results, reports = {}, []
    hints = EVAL_HINTS | ({"head": "add the model's --num-classes {classes}"} if numbered_by_hand else {})
    for name, report in saved_weights(args, model, checkpoint, load, hints):
        results[name] = task.evaluate(model, loader, args, world)
        reports.append(str(report))
    if not args.resume:
        log.say("; ".join(dict.fromkeys(reports)))
    share_replaced(data.val, world)
    broken = f", {data.val.num_replaced} of them unreadable" if data.val.num_replaced else ""
    log.say(f"{checkpoint.label}: {len(data.val):,} images{broken}; {in_words(results)}")
    task.pictures(log, next(iter(results.values())), data)
    return EXIT_DONE


def saved_checkpoint(args) -> Checkpoint:
    """The file that `--eval` evaluates: of `--resume`, else of `--finetune`."""
    path = latest_checkpoint(args.output_dir) if args.resume == "auto" else args.resume or args.finetune
    if path is None:
        raise ConfigError(f"--resume auto: there is no checkpoint in --output_dir {args.output_dir} to evaluate")
    return read_checkpoint(path, args.trust_checkpoint)


def saved_weights(
    args, model, checkpoint: Checkpoint, load: Callable, hints: dict[str, str]
) -> Iterator[tuple[str, LoadReport]]:
    """Give `model` the weights of a file, one set of `--eval-weights` that it holds after the other.

    Those of `--finetune` may be of another image size: `load` resamples position embeddings. Yields "raw" or "ema",
    and what was done to them. Raises CheckpointError if there is no such set.
    """
    wanted = list(ENTRIES) if args.eval_weights == "both" else [args.eval_weights]
    found = [name for name in wanted if getattr(checkpoint, ENTRIES[name]) is not None]
    for name in found or wanted[:1]:  # `weights` raises where there is none, saying what the file holds
        weights = checkpoint.weights(ENTRIES[name])
        if args.resume:
            grid, file = grid_in_file(checkpoint, model), checkpoint.path
            yield name, load_weights(model, weights, old_grid=grid, hints=hints, source=file)
        else:
            yield name, load(args, model, checkpoint, weights)
