"""The optimiser and the learning rate, both from timm."""

from __future__ import annotations

import difflib
import warnings
from functools import partial

import timm
import torch
from timm.optim import (
    OptimInfo,
    create_optimizer_v2,
    get_optimizer_class,
    get_optimizer_info,
    list_optimizers,
    optimizer_kwargs,
    param_groups_weight_decay,
)
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler_factory import scheduler_kwargs
from torch import nn

from arguments import SCHEDULES
from errors import ConfigError, nearby, one_line, unknown

COMMON_OPTIMIZERS = ("adamw", "sgd", "lamb", "lion", "muon")


def whole_batch(args, num_ranks: int) -> int:
    """Images per optimiser step."""
    return args.batch_size * num_ranks * args.accum_steps


def scaled_lr(args, num_ranks: int) -> float:
    """The learning rate for this run's whole batch, linear in it; `--lr` is for 512 images."""
    return args.lr if args.unscale_lr else args.lr * whole_batch(args, num_ranks) / 512


def optimizer_info(opt: str) -> OptimInfo:
    """What timm knows of `--opt`. Raises ConfigError for an unknown name and for what cannot train here."""
    name, common = opt.lower(), f"common ones are {', '.join(COMMON_OPTIMIZERS)}"
    bare = name.removeprefix("lookahead_")
    if bare != name and bare in list_optimizers():
        raise ConfigError(f"--opt {opt}: timm's prefix lookahead_ is not supported; take {bare} alone")
    if name not in list_optimizers():
        hint = nearby(difflib.get_close_matches(name, list_optimizers(), n=3)) or f"; {common}"
        raise ConfigError(f"--opt {opt} is not an optimiser of timm{hint}")
    info = get_optimizer_info(name)
    if info.second_order:
        raise ConfigError(f"--opt {opt} needs second derivatives, which training does not compute; {common}")
    try:
        get_optimizer_class(name)
    except (AssertionError, ImportError) as error:  # AssertionError: timm's way to ask for a GPU
        package = info.opt_class.partition(".")[0]
        raise ConfigError(f"--opt {opt} needs a GPU and the package {package}: {one_line(error)}; {common}") from error
    return info


def build_optimizer(args, model: nn.Module, lr: float) -> torch.optim.Optimizer:
    """An optimiser over the trainable parameters: without weight decay for biases, norms and embeddings.

    The published runs decayed the scan's `A_log`; `--no-decay-ssm` exempts it. Raises ConfigError for a
    name that `optimizer_info` refuses, and for as many `--opt-betas` as the optimiser does not take.
    """
    info = optimizer_info(args.opt)
    wanted = info.num_betas if info.has_betas else 0
    if args.opt_betas is not None and len(args.opt_betas) != wanted:
        given = " ".join(f"{beta:g}" for beta in args.opt_betas)
        raise ConfigError(f"--opt-betas {given}: --opt {args.opt} takes {wanted or 'none'}, not {len(args.opt_betas)}")
    groups = None
    if args.no_decay_ssm:
        if not any(key.endswith("A_log") for key, _ in model.named_parameters()):
            raise ConfigError(f"--no-decay-ssm: {args.model} has no state-space parameters; leave it out")
        exempt = {"*A_log", "*A_b_log", *getattr(model, "no_weight_decay", set)()}
        groups = partial(param_groups_weight_decay, weight_decay=args.weight_decay, no_weight_decay_list=exempt)
    if args.layer_decay is not None and groups is not None:
        raise ConfigError("--layer-decay and --no-decay-ssm each group the parameters in their own way; take one")
    return create_optimizer_v2(model, **{**optimizer_kwargs(args), "lr": lr}, param_group_fn=groups)


class Schedule:
    """The learning rate as a function of the epoch or of the step, never of how often it was asked for.

    By default it changes once an epoch, with DeiT's values: epochs 0 and 1 share the schedule's first value,
    because DeiT steps its schedule after an epoch with that epoch's number. `--sched-on-updates` makes it a
    function of the global step instead. `plateau` follows the evaluations and alone has a state.
    """

    def __init__(self, args, optimizer: torch.optim.Optimizer, steps_per_epoch: int):
        if args.sched not in SCHEDULES:
            near = difflib.get_close_matches(args.sched, SCHEDULES, n=3)
            raise ConfigError(unknown(f"--sched {args.sched}", SCHEDULES) + nearby(near))
        with warnings.catch_warnings():
            # timm warns that it does not save the state of a plateau schedule; `state_dict` here does.
            warnings.simplefilter("ignore", FutureWarning)
            values = scheduler_kwargs(args)
            if args.warmup_steps is not None:
                values["warmup_epochs"] = args.warmup_steps / steps_per_epoch
            try:
                self.timm, _ = create_scheduler_v2(optimizer, **values, updates_per_epoch=steps_per_epoch)
            except ValueError as error:  # timm's way to refuse lengths that do not fit together
                raise ConfigError(f"--sched {args.sched}: {error}") from error
        if self.timm is None and args.sched != "none":  # constant, wsd, rsqrt before timm 1.0.31
            raise ConfigError(f"--sched {args.sched} is unknown to timm {timm.__version__}: upgrade it, or take cosine")
        self.optimizer = optimizer
        self.follows_metric = args.sched == "plateau"
        self.on_updates = args.sched_on_updates

    def set(self, epoch: int, step: int) -> float:
        """Give the optimiser the learning rate of this epoch and global step; returns it."""
        if self.timm is not None and not self.follows_metric:
            if self.on_updates:
                self.timm.step_update(step)
            else:
                self.timm.step(max(epoch - 1, 0))
        return self.lr

    @property
    def lr(self) -> float:
        """The rate of those parameters that learn fastest: with `--layer-decay`, the head's."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def observe(self, epoch: int, metric: float) -> None:
        """Tell a plateau schedule how good the model is after `epoch`."""
        if self.follows_metric:
            self.timm.step(epoch + 1, metric)  # timm warms up by the number of epochs behind

    def state_dict(self) -> dict:
        if not self.follows_metric:
            return {}
        return {"plateau": self.timm.lr_scheduler.state_dict(), "restore_lr": self.timm.restore_lr}

    def load_state_dict(self, state: dict) -> None:
        """Take over the state of a plateau schedule; the others have none to take over."""
        if self.follows_metric and "plateau" in state:
            self.timm.lr_scheduler.load_state_dict(state["plateau"])
            self.timm.restore_lr = state["restore_lr"]
