"""Train, fine-tune and evaluate Vision Mamba: `python main.py --help`.

Exit codes: 0 done, 1 a fault that starting again may mend (a dead rank or loader process), 2 wrong flag,
3 a loss or gradient was not finite, 4 data or configuration that cannot work (a full disk and too little
memory among them), 75 stopped by a signal and saved, to be queued again.
"""

from __future__ import annotations

import sys
from pathlib import Path

import distributed
import failures
from arguments import parse_args, save_arguments
from augment import size_of
from build import build_model, build_run, describe
from checkpoint import latest_checkpoint, load_weights, read_checkpoint
from datasets import DataBundle, build_datasets
from distributed import EXIT_DONE, World, together
from engine import Run, build_val_loader, fit, restore
from evaluation import evaluate, in_words
from report import RunLog
from subsets import ClassSubset, check_valid_labels, evaluate_real, read_real_labels, valid_labels
from summary import summary


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code. What a user can mend is one line on stderr."""
    args = None
    try:
        args = parse_args(argv)
        return execute(args, distributed.start(args))
    except SystemExit as leaving:  # argparse has said why
        return leaving.code
    except Exception as error:
        found = failures.explain(error, args)
        if found is None:
            raise
        code, line = found
        print(f"error: {line}", file=sys.stderr)
        return code
    finally:
        distributed.finish()


def execute(args, world: World) -> int:
    """Data, model, then evaluation or training."""
    distributed.seed_everything(args.seed, args.deterministic)
    with together():
        log = RunLog(args, world.is_main)
        if args.summary:
            log.say(summarise(args, log))
            return EXIT_DONE
        if not args.data_path:
            log.say("no --data-path: training on scikit-learn's digits")
        data = build_datasets(args)
        log.say(data.description)
        model = build_model(args, data.num_classes, log.say).to(world.device)
        if args.finetune:
            checkpoint = read_checkpoint(args.finetune, args.trust_checkpoint)
            report = load_weights(model, checkpoint.weights(), "finetune", args.pos_embed_resize)
            log.say(f"fine-tuning {checkpoint.path} (SHA-256 {checkpoint.sha256[:16]}...): {report}")
    if args.eval:
        return evaluate_checkpoint(args, world, model, data, log)
    run = build_run(args, world, model, data, log.say)
    log.say(describe(run, data))
    resume(run, log)
    args.num_classes = data.num_classes
    with together():
        if log.dir:
            save_arguments(args, log.dir / "args.yaml")
        log.open(run.progress.epoch, run.progress.step)
    try:
        return fit(run, data, log)
    finally:
        run.writer.join()
        log.close()


def summarise(args, log: RunLog) -> str:
    """`--summary`: the model's parts, parameters and FLOPs."""
    model = build_model(args, args.num_classes or 1000, log.say)
    return f"{args.model}\n{summary(model, size_of(args.input_size), args.in_chans)}"


def resume(run: Run, log: RunLog) -> None:
    """Go on from the checkpoint of `--resume`, or begin where there is none to go on from."""
    path = run.args.resume
    if path == "auto":
        with together():
            path = newest(run, log) if run.world.is_main else None
        path = distributed.from_main(path)
        if path is None:
            log.say(f"--resume auto: no checkpoint in {run.args.output_dir} yet, beginning")
    with together():
        if path:
            known = restore(run, read_checkpoint(path, run.args.trust_checkpoint))
            restarts = f" (restart {count})" if (count := distributed.num_restarts()) else ""
            log.incident("resumed", run.progress.step, f"resuming{restarts} {known}")


def newest(run: Run, log: RunLog) -> Path | None:
    """The newest whole checkpoint in --output_dir; the damaged ones are said."""
    return latest_checkpoint(
        run.args.output_dir, on_rejected=lambda reason: log.incident("fallback", run.progress.step, reason)
    )


def evaluate_checkpoint(args, world: World, model, data: DataBundle, log: RunLog) -> int:
    """`--eval`: the raw and averaged weights of `--resume`, those of `--eval-weights` that it holds."""
    path = latest_checkpoint(args.output_dir) if args.resume == "auto" else args.resume
    checkpoint = read_checkpoint(path, args.trust_checkpoint)
    wanted = {"raw": ["model"], "ema": ["model_ema"], "both": ["model", "model_ema"]}[args.eval_weights]
    found = [which for which in wanted if getattr(checkpoint, which) is not None]
    if not found:
        checkpoint.weights(wanted[0])  # raises, saying what the file holds
    loader = build_val_loader(data.val, args, world)
    net, num_classes = model, data.num_classes
    if args.valid_labels:
        valid = valid_labels(args.valid_labels)
        check_valid_labels(valid, data.class_names, data.num_classes)
        net, num_classes = ClassSubset(model, valid).to(world.device), len(valid)
    real = read_real_labels(args.real_labels) if args.real_labels else None
    results, extra = {}, ""
    for which in found:
        load_weights(model, checkpoint.weights(which))
        name = "raw" if which == "model" else "ema"
        results[name] = evaluate(net, loader, args, world, num_classes)
        if real is not None:
            share, counted = evaluate_real(model, loader, data.val, args, world, real)
            extra += f"; {name} weights: ReaL top-1 {share:.2f} % of {counted:,} images"
    digest = f"(SHA-256 {checkpoint.sha256[:16]}...)"
    log.say(f"{checkpoint.path} {digest}: {len(data.val):,} images; {in_words(results)}{extra}")
    log.pictures(next(iter(results.values())), data)
    return EXIT_DONE


if __name__ == "__main__":
    sys.exit(distributed.leave(main()))
