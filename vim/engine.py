"""The visible loop: one training step, one epoch, one evaluation.

A run's randomness is a function of counters (seed, epoch, step, rank), and all that changes while it runs is
in `Progress` and the state dicts beside it. A run that is stopped anywhere and resumed gives the same bits as
one that was never stopped.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field, fields

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import faults
from arguments import CHANGES_NOTHING
from checkpoint import Checkpoint, CheckpointWriter, compare_classes
from datasets import DataBundle, Items, build_loader
from distributed import (
    EXIT_DONE,
    EXIT_REQUEUE,
    StopSignal,
    World,
    any_rank,
    from_main,
    seed_step,
    share_buffers,
    sum_over_ranks,
    together,
)
from ema import WeightsEma
from errors import ConfigError, NonFiniteError, as_config_error, some_of
from fitting import load_weights
from identity import DENSE_BACKBONE
from optim import Schedule, whole_batch
from precision import autocast
from report import RunLog
from samplers import EvalSampler, TrainSampler
from task import Result, Task, in_words

# An optimiser's settings that flags give; its groups may hold others that are state.
OF_FLAGS = {"betas", "eps", "lr_scale", "momentum", "weight_decay"}
# An optimiser's state that has its parameter's shape.
MOMENTS = ("exp_avg", "exp_avg_sq", "momentum_buffer", "square_avg")


@dataclass
class Progress:
    """Where a run stands. All of it is saved; a resumed run starts from it, in mid-epoch too."""

    epoch: int = 0  # the one under way
    samples: int = 0  # of it that were seen, over all ranks
    step: int = 0  # optimiser steps of the whole run, skipped ones included
    loss_sum: float = 0.0  # over this epoch's steps
    loss_steps: int = 0
    skipped: int = 0  # steps left out in the whole run because something was not finite
    skipped_in_row: int = 0
    best: float | None = None  # highest score so far
    best_epoch: int | None = None

    def record_step(self, loss: float, finite: bool) -> None:
        """Count one step; the loss of one that was left out is not averaged."""
        self.step += 1
        if finite:
            self.loss_sum += loss
            self.loss_steps += 1
            self.skipped_in_row = 0
        else:
            self.skipped += 1
            self.skipped_in_row += 1

    def next_epoch(self) -> None:
        self.epoch += 1
        self.samples = self.loss_steps = 0
        self.loss_sum = 0.0

    def state_dict(self) -> dict:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def load_state_dict(self, state: dict) -> None:
        for f in fields(self):
            setattr(self, f.name, state.get(f.name, f.default))

    @property
    def position(self) -> str:
        return f"epoch {self.epoch + 1}, image {self.samples:,} of it, step {self.step:,}"

    @property
    def mean_loss(self) -> float:
        return self.loss_sum / self.loss_steps if self.loss_steps else math.nan


@dataclass
class Run:
    """All that a training step touches."""

    args: object
    world: World
    model: nn.Module  # the plain one: its state dict has the published keys
    net: nn.Module  # what is called: the model, compiled and wrapped for several ranks where need be
    task: Task
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    sampler: TrainSampler
    dataset: Items
    ema: WeightsEma | None = None
    stop: StopSignal = field(default_factory=StopSignal)
    writer: CheckpointWriter = field(default_factory=CheckpointWriter)
    class_names: list[str] = field(default_factory=list)  # saved, so that predictions can name them
    progress: Progress = field(default_factory=Progress)

    @property
    def steps_per_epoch(self) -> int:
        return self.sampler.num_batches // self.args.accum_steps

    @property
    def batches_done(self) -> int:
        """Batches of the current epoch that this rank has seen, in whole steps even if they were of another size."""
        return self.progress.samples // whole_batch(self.args, self.world.size) * self.args.accum_steps

    @property
    def steps_done(self) -> int:
        """Steps of a run that has always had this one's whole batch: `progress.step`, unless it was changed."""
        return self.progress.epoch * self.steps_per_epoch + self.batches_done // self.args.accum_steps


@dataclass
class StepResult:
    """What one step had to say, the same on all ranks."""

    loss: float  # mean over ranks and micro-batches
    grad_norm: float
    lr: float
    finite: bool  # False: the step was left out
    stop: bool  # some rank was asked to stop


def training_step(run: Run, batches: list, first_micro: int) -> StepResult:
    """One optimiser step over micro-batches, as the task's loader gives them, numbered from `first_micro`.

    The ranks agree on whether loss and gradient are finite before the optimiser moves; if they are not, all
    of them leave the step out or raise NonFiniteError.
    """
    args, world, progress = run.args, run.world, run.progress
    lr = run.schedule.set(progress.epoch, run.steps_done)
    buffers = [(buffer, buffer.clone()) for buffer in run.model.buffers()]  # forward moves batch norm's statistics
    total = torch.zeros((), device=world.device)
    for i, batch in enumerate(batches):
        seed_step(args.seed, first_micro + i, world.rank)
        with gradient_exchange(run.net, enabled=i == len(batches) - 1):
            with autocast(args, world.device):
                loss = run.task.loss(run, batch, first_micro + i) / len(batches)
            loss = faults.before_exchange(progress.step, world.rank, loss)
            run.scaler.scale(loss).backward()
        total += loss.detach()

    run.scaler.unscale_(run.optimizer)
    norm = clip_gradients(run.model, args.clip_grad)
    loss, norm, stop, failed = agree(total, norm, run.stop.received is not None, run.writer.failed, world)
    if failed:
        settle(run)
    faults.after_exchange(progress.step, world.rank)
    finite = math.isfinite(loss) and math.isfinite(norm)
    if finite:
        run.scaler.step(run.optimizer)
        if run.ema is not None:
            run.ema.update(run.model)
    run.scaler.update()
    run.optimizer.zero_grad()
    progress.record_step(loss, finite)
    if not finite:
        for buffer, before in buffers:
            buffer.copy_(before)
        check_tolerated(run, loss, norm)
    return StepResult(loss, norm, lr, finite, stop)


def gradient_exchange(net: nn.Module, enabled: bool):
    """Whether the backward pass inside exchanges gradients between ranks: that of a step's last micro-batch alone."""
    return net.no_sync() if isinstance(net, DistributedDataParallel) and not enabled else nullcontext()


def clip_gradients(model: nn.Module, limit: float | None) -> torch.Tensor:
    """The gradients' total norm, before they are scaled down to `limit` in place."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters])
    if limit is not None:
        torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
    return norm


def agree(
    loss: torch.Tensor, norm: torch.Tensor, stop: bool, failed: bool, world: World
) -> tuple[float, float, bool, bool]:
    """Mean loss and gradient norm over ranks; whether any rank was asked to stop, or could not save.

    One exchange and one read of the device per step, which the decision before the optimiser moves cannot do
    without. A value that is not finite on one rank is not finite in the sum.
    """
    flags = torch.tensor([float(stop), float(failed)], device=loss.device)
    numbers = torch.cat([torch.stack([loss.float(), norm.float()]), flags])
    loss_sum, norm_sum, stops, failures = sum_over_ranks(numbers).tolist()
    return loss_sum / world.size, norm_sum / world.size, stops > 0, failures > 0


def check_tolerated(run: Run, loss: float, norm: float) -> None:
    """Raise NonFiniteError unless leaving this step out is what `--nonfinite` allows.

    An infinite gradient of a finite loss is how float16 finds its scale: it counts, but only a row of them
    ends the run.
    """
    args, progress = run.args, run.progress
    overflow = run.scaler.is_enabled() and math.isfinite(loss)
    if (args.nonfinite == "skip" or overflow) and progress.skipped_in_row <= args.nonfinite_limit:
        return
    allow = "a larger --nonfinite-limit" if args.nonfinite == "skip" or overflow else "--nonfinite skip"
    raise NonFiniteError(
        f"step {progress.step - 1} of epoch {progress.epoch + 1}: loss {loss}, gradient norm {norm}, "
        f"{progress.skipped_in_row} such step(s) in a row; the weights are unchanged. "
        f"Lower --lr, set --clip-grad, use --amp-dtype bfloat16 or --no_amp, or allow it with {allow}"
    )


def training_steps(run: Run, loader) -> Iterator[StepResult]:
    """What is left of the current epoch, one optimiser step at a time, from where `run.progress` stands."""
    progress, sampler = run.progress, run.sampler
    sampler.set_epoch(progress.epoch, run.batches_done)
    run.net.train(run.args.train_mode)
    micro = progress.epoch * sampler.num_batches + run.batches_done
    for batches in groups_of(run.args.accum_steps, loader):
        result = training_step(run, batches, micro)
        micro += len(batches)
        progress.samples += len(batches) * run.args.batch_size * run.world.size
        yield result


def groups_of(size: int, items: Iterable) -> Iterator[list]:
    """Lists of `size` items; the last one may be shorter."""
    iterator = iter(items)
    while group := list(itertools.islice(iterator, size)):
        yield group


def train_one_epoch(run: Run, loader, log: RunLog) -> bool:
    """Train to the end of the epoch, or until some rank is asked to stop: then True."""
    args, progress = run.args, run.progress
    done = run.batches_done // args.accum_steps
    with log.meter(progress.epoch, run.steps_per_epoch, done, whole_batch(args, run.world.size)) as meter:
        for result in training_steps(run, loader):
            meter.advance(result.loss, result.lr)
            if not result.finite:
                log.say(f"step {progress.step} left out: loss {result.loss}, norm {result.grad_norm}")
            if progress.step % args.log_every == 0:
                log.step(progress.step, result, meter.images_per_second)
            if result.stop:
                return True
            if args.checkpoint_steps and progress.step % args.checkpoint_steps == 0:
                save(run)
    return False


def fit(run: Run, data: DataBundle, log: RunLog) -> int:
    """Train from where `run.progress` stands to the last epoch; returns the exit code."""
    args, progress, score = run.args, run.progress, run.task.score_name
    train_loader = build_loader(data.train, run.sampler, args, train=True, collate=run.task.collate)
    val_loader = build_val_loader(data.val, args, run.world, run.task.collate)
    results: dict[str, Result] = {}
    with run.stop:
        if progress.best is None and progress.epoch > 0:
            results = assess(run, val_loader)
            progress.best = leading(results).score
            log.say(
                f"no best {score} is known of the epochs before; the weights it starts from have {progress.best:.2f} %"
            )
            save(run, best=True)
        while progress.epoch < args.epochs:
            if train_one_epoch(run, train_loader, log):
                save(run)
                return stopped(run, log)
            share_replaced(run.dataset, run.world)
            results = assess(run, val_loader)
            best = record_epoch(run, results, data, log)
            progress.next_epoch()
            save(run, best)
            if progress.epoch < args.epochs and any_rank(run.stop.received is not None, run.world):
                return stopped(run, log)
    settle(run)
    results = results or assess(run, val_loader)
    replaced = data.train.num_replaced + data.val.num_replaced
    log.say(
        f"done: {progress.step:,} steps, {progress.skipped} left out, {replaced} images replaced; "
        f"{in_words(results)}; best {score} {progress.best:.2f} %"
    )
    if incidents := log.incidents_in_words():
        log.say(f"on the way: {incidents}; see incidents.txt")
    run.task.pictures(log, leading(results), data)
    return EXIT_DONE


def stopped(run: Run, log: RunLog) -> int:
    """The end of a run that was asked to stop: with its state on the disk, to be queued again."""
    settle(run)
    saved = "saved, --resume auto goes on" if run.args.output_dir else "not saved, no --output_dir"
    by = run.stop.received or "another rank"
    log.incident("stopped", run.progress.step, f"stopped by {by} at {run.progress.position}; {saved}")
    return EXIT_REQUEUE


def build_val_loader(dataset, args, world: World, collate=None):
    """Without `--dist-eval` every rank evaluates all images, as DeiT does; the numbers are the same."""
    ranks = (world.size, world.rank) if args.dist_eval else (1, 0)
    return build_loader(dataset, EvalSampler(len(dataset), *ranks), args, train=False, collate=collate)


def assess(run: Run, loader) -> dict[str, Result]:
    """Evaluate "raw" weights and their average, "ema": those of `--eval-weights` that there are."""
    run.writer.join()  # the loader may fork here, and a fork must not copy a thread that is writing
    args, results = run.args, {}
    share_buffers(run.model)
    if args.eval_weights != "ema" or run.ema is None:
        results["raw"] = run.task.evaluate(run.model, loader, args, run.world)
    faults.while_evaluating(run.progress.step, run.world.rank)
    if args.eval_weights != "raw" and run.ema is not None:
        with run.ema.applied_to(run.model):
            share_buffers(run.model)
            results["ema"] = run.task.evaluate(run.model, loader, args, run.world)
    share_replaced(loader.dataset, run.world)
    return results


def leading(results: dict[str, Result]) -> Result:
    """The evaluation that the best checkpoint follows: the raw weights' where both were evaluated."""
    return next(iter(results.values()))


def record_epoch(run: Run, results: dict[str, Result], data: DataBundle, log: RunLog) -> bool:
    """Log the epoch, tell the schedule, and say whether this was the best so far."""
    progress = run.progress
    row = {
        "epoch": progress.epoch,
        "step": progress.step,
        "train_lr": run.schedule.lr,
        "train_loss": progress.mean_loss,
    }
    for name, result in results.items():
        row |= result.row("test_" if name == "raw" else "test_ema_")
    row |= {
        "skipped_steps": progress.skipped,
        "replaced_images": data.train.num_replaced,
        "replaced_test_images": data.val.num_replaced,
        "n_parameters": sum(p.numel() for p in run.model.parameters() if p.requires_grad),
    }
    score = from_main(leading(results).score)  # a GPU's last digits may differ, the ranks' learning rates must not
    run.schedule.observe(progress.epoch, score)
    best = progress.best is None or score > progress.best
    if best:
        progress.best, progress.best_epoch = score, progress.epoch
    log.epoch(row)
    log.say(
        f"epoch {progress.epoch + 1}/{run.args.epochs}: training loss {progress.mean_loss:.4f}; "
        f"held-out {in_words(results)}; best {progress.best:.2f} %"
    )
    return best


def save(run: Run, best: bool = False) -> None:
    """Begin to write a checkpoint of the run as it stands, in the published form plus `progress`."""
    args, progress = run.args, run.progress
    share_replaced(run.dataset, run.world)
    if not (args.output_dir and run.world.is_main):
        return
    state = {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "lr_scheduler": run.schedule.state_dict(),
        "scaler": run.scaler.state_dict(),
        "epoch": progress.epoch - 1,  # the last finished one, as in published files
        "step": progress.step,
        "best_metric": progress.best,
        "progress": progress.state_dict(),
        "replaced": run.dataset.replaced.nonzero()[:, 0],
        "train_images": len(run.dataset),
        "whole_batch": whole_batch(args, run.world.size),
        "args": args,
        "class_names": list(run.class_names),
    }
    if run.ema is not None:
        state["model_ema"] = run.ema.state_dict()
    run.writer.store(args.output_dir, state, keep=args.keep_checkpoints, best=best)


def share_replaced(dataset: Items, world: World) -> None:
    """Let every rank know of all images that some rank could not read. Raises DataError if they are too many."""
    if world.size > 1 and dataset.on_broken != "raise":
        counts = sum_over_ranks(dataset.replaced.int().to(world.device))
        dataset.replaced |= (counts > 0).cpu()
        dataset.check_share()


def settle(run: Run) -> None:
    """Wait until the last checkpoint is on the disk; on all ranks an error if it is not."""
    with together():
        run.writer.wait()


def restore(run: Run, checkpoint: Checkpoint, grid: tuple[int, int] | None = None) -> str:
    """Take a run up where a checkpoint left it, as far as the file knows; returns what it knew, in words.

    A published file says which epoch was the last; a bare state dict has the weights alone, and
    `--start_epoch` counts. The average starts at the weights where the file has none. `grid`: (H, W) of the
    file's position embeddings, if known.
    """
    other_names = compare_classes(checkpoint, run.class_names, "give that run's data, or --finetune")
    resampled = "--finetune resamples the position embeddings"
    hints = {"head": "--finetune re-makes the head", "pos_embed": resampled, f"{DENSE_BACKBONE}pos_embed": resampled}
    load_weights(run.model, checkpoint.weights("model"), old_grid=grid, hints=hints, source=checkpoint.path)
    known = ["weights"]
    if run.ema is not None:
        with as_config_error(f"{checkpoint.path}: "):
            run.ema.load_state_dict(checkpoint.model_ema or run.model.state_dict())
        known += ["average"] if checkpoint.model_ema else []
    if checkpoint.optimizer is not None:
        load_optimizer(run, checkpoint)
        known.append("optimiser")
    run.schedule.load_state_dict(checkpoint.lr_scheduler or {})
    if run.scaler.is_enabled() and checkpoint.scaler:  # empty where it was off
        run.scaler.load_state_dict(checkpoint.scaler)
    restore_progress(run, checkpoint)
    if getattr(checkpoint.args, "eval_weights", run.args.eval_weights) != run.args.eval_weights:
        run.progress.best = None  # it may be of the other weights
    differences = "".join(f"; {each}" for each in (changes(run, checkpoint), other_names) if each)
    return f"{checkpoint.label}: {', '.join(known)}; goes on at {run.progress.position}{differences}"


def load_optimizer(run: Run, checkpoint: Checkpoint) -> None:
    """Weight decay and the like stay those of the flags, as the learning rate does, which a schedule sets anew.

    Without a schedule it is set here, and what "plateau" has made of it is scaled. Raises ConfigError where the file's
    optimiser is another one or of other parameters.
    """
    of_flags = [{name: group[name] for name in OF_FLAGS & group.keys()} for group in run.optimizer.param_groups]
    rates = [group.get("initial_lr", group["lr"]) for group in run.optimizer.param_groups]
    before = getattr(checkpoint.args, "opt", run.args.opt)
    if before != run.args.opt:
        raise ConfigError(
            f"{checkpoint.path} was trained with --opt {before}, not {run.args.opt}; take that, or --finetune"
        )
    try:
        if not {"state", "param_groups"} <= checkpoint.optimizer.keys():
            raise ValueError(f"it holds {some_of(list(checkpoint.optimizer)) or 'nothing'}")
        run.optimizer.load_state_dict(checkpoint.optimizer)
        check_moments(run.optimizer)
    except ValueError as error:
        raise ConfigError(
            f"{checkpoint.path}: its optimiser state does not fit ({error}); give the flags of that run, or --finetune"
        ) from None
    for group, settings, rate in zip(run.optimizer.param_groups, of_flags, rates):
        group.update(settings)
        if run.args.sched == "none":
            group["lr"] = rate
        elif "initial_lr" in group and group["initial_lr"] != rate:
            group["lr"] *= rate / group["initial_lr"]
            group["initial_lr"] = rate


def check_moments(optimizer: torch.optim.Optimizer) -> None:
    """torch's optimisers take state of any shape. Raises ValueError where it is not that of its parameter."""
    for parameter, state in optimizer.state.items():
        for name in MOMENTS:
            moment = state.get(name)
            if moment is not None and moment.dim() == parameter.dim() and moment.shape != parameter.shape:
                raise ValueError(f"{name} {tuple(moment.shape)} of a parameter {tuple(parameter.shape)}")


def changes(run: Run, checkpoint: Checkpoint) -> str:
    """In words, what differs from the run that wrote an own checkpoint: it will not be the run that never stopped."""
    if "progress" not in checkpoint.extra or checkpoint.args is None:
        return ""
    before, now = vars(checkpoint.args), vars(run.args)
    flags = [
        f"{name} {now[name]} (was {before[name]})"
        for name in sorted(before.keys() & now.keys() - CHANGES_NOTHING)
        if before[name] != now[name]
    ]
    batch = whole_batch(run.args, run.world.size)
    old_batch = checkpoint.extra.get("whole_batch", batch)
    if old_batch != batch:
        flags.append(f"whole batch {batch} (was {old_batch}), and with it the steps of an epoch")
    images = checkpoint.extra.get("train_images", len(run.dataset))
    flags += [f"{len(run.dataset):,} training images (were {images:,})"] if images != len(run.dataset) else []
    again = run.progress.samples % batch
    flags += [f"{again} images of the epoch come twice"] if again else []
    return f"other than before: {', '.join(flags)}" if flags else ""


def restore_progress(run: Run, checkpoint: Checkpoint) -> None:
    """Published files lack `progress`: they were written after an epoch, which all its steps precede."""
    if "progress" in checkpoint.extra:
        run.progress.load_state_dict(checkpoint.extra["progress"])
        replaced = torch.as_tensor(checkpoint.extra.get("replaced", []), dtype=torch.int64)
        run.dataset.replaced[replaced[replaced < len(run.dataset)]] = True
        if run.batches_done > run.sampler.num_batches:
            raise ConfigError(
                f"{checkpoint.path} has seen {run.progress.samples:,} images of an epoch, which has "
                f"{run.sampler.num_batches} batches here: give the data and flags of that run, or --finetune"
            )
        return
    if not isinstance(checkpoint.epoch, int | None):
        raise ConfigError(f"{checkpoint.path}: its epoch is {checkpoint.epoch!r}, expected a whole number; --finetune")
    run.progress.epoch = run.args.start_epoch if checkpoint.epoch is None else checkpoint.epoch + 1
    run.progress.step = run.progress.epoch * run.steps_per_epoch
