"""From arguments to the parts of a run: model, teacher, optimiser."""

from __future__ import annotations

import re

import timm
import torch
from timm.models import is_model_in_modules
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import models_baseline  # noqa: F401  (registers its models with timm)
import models_mamba  # noqa: F401  (registers its models with timm)
from arguments import size_of
from augment import build_mixup
from checkpoint import compare_classes, read_checkpoint
from classification import Classification
from datasets import DataBundle
from distributed import World, together
from ema import WeightsEma
from engine import Run
from errors import ConfigError, as_config_error
from fitting import head_parameter_names, load_weights
from identity import grid_of, hub_as_config_error, name_problem
from losses import build_criterion
from mamba_ssm.ops import backend
from optim import Schedule, build_optimizer, scaled_lr, whole_batch
from precision import build_scaler
from samplers import TrainSampler
from task import Task

# Arguments that not every timm model has; where one is missing it is left out, with a line in the log.
OPTIONAL_ARGUMENTS = ("img_size", "drop_path_rate", "drop_rate", "dynamic_img_size")
UNEXPECTED = re.compile(r"unexpected keyword argument(?:\(s\): \[| )('\w+'(?:, '\w+')*)")  # Python's words, timm's
# What to do about weights that a teacher cannot have, as `load_weights` wants it.
TEACHER_HINTS = {
    "head": "a teacher must know the data's classes: fine-tune it on them first",
    "pos_embed": "a teacher sees images of --input-size: fine-tune it at that size first",
}


def is_vim(name: str) -> bool:
    return is_model_in_modules(name, ["models_mamba"])


def check_model_name(flag: str, name: str) -> None:
    if problem := name_problem(name):
        raise ConfigError(f"{flag} {name} {problem}")


def create_model(flag: str, name: str, say=print, **arguments) -> nn.Module:
    """For `flag`, timm's create_model, without those optional arguments that this model does not have."""
    while True:
        try:
            with as_config_error(f"{flag} {name}: "), hub_as_config_error(flag, name):
                return timm.create_model(name, **arguments)
        except TypeError as error:
            found = UNEXPECTED.search(str(error))
            unexpected = re.findall(r"\w+", found[1]) if found else []
            if not unexpected or not all(each in OPTIONAL_ARGUMENTS and each in arguments for each in unexpected):
                raise
            for each in unexpected:
                say(f"{name} has no argument {each} (here {arguments.pop(each)}): left out")


def vim_arguments(args) -> dict:
    """Arguments of the model that only a Vim has. Raises ConfigError where they are given for another."""
    if is_vim(args.model):
        return {"dt_init_backward": args.dt_init_backward}
    if args.dt_init_backward != "published":
        raise ConfigError(f"--dt-init-backward is for a Vim; {args.model} is not one, leave it out")
    return {}


def build_model(args, num_classes: int, say=print) -> nn.Module:
    """The model of `--model` for this data. Raises ConfigError, one line each, for flags that cannot work."""
    check_model_name("--model", args.model)
    arguments = {
        "num_classes": num_classes,
        "in_chans": args.in_chans,
        "img_size": args.input_size,
        "drop_rate": args.drop,
        "drop_path_rate": args.drop_path,
    }
    model = create_model("--model", args.model, say, **arguments, **vim_arguments(args))
    check_input_size(args, model)
    if args.grad_checkpointing:
        checkpoint_gradients(args, model)
    if args.attn_only:
        train_attention_only(args, model)
    return model


def checkpoint_gradients(args, model: nn.Module) -> None:
    try:
        model.set_grad_checkpointing(True)
    except (AssertionError, AttributeError) as error:  # timm's ways to say so
        raise ConfigError(f"--grad-checkpointing: {args.model} does not support it; leave it out") from error


def check_input_size(args, model: nn.Module) -> None:
    patch = getattr(getattr(model, "patch_embed", None), "patch_size", 1)
    height, width = patch if isinstance(patch, tuple | list) else (patch, patch)
    size = size_of(args.input_size)
    if size[0] < height or size[1] < width:
        raise ConfigError(f"--input-size {size[0]}x{size[1]} is smaller than a patch of {args.model}, {height}x{width}")


def train_attention_only(args, model: nn.Module) -> None:
    """Freeze all but attention layers and the head (Touvron et al., arXiv 2203.09795)."""
    names = [name for name, _ in model.named_parameters()]
    if not any(".attn." in name for name in names):
        raise ConfigError(
            f"--attn-only: {args.model} has no attention layers; leave it out to train all of the model, "
            "or take a vision transformer such as --model deit_tiny_patch16_224"
        )
    heads = head_parameter_names(model)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(".attn." in name or name in heads)


def build_teacher(args, data: DataBundle, device: torch.device, say=print) -> nn.Module | None:
    """`--teacher-model` with the weights of `--teacher-path`, frozen; None without distillation."""
    if args.distillation_type == "none":
        return None
    check_model_name("--teacher-model", args.teacher_model)
    arguments = {"num_classes": data.num_classes, "in_chans": args.in_chans, "img_size": args.input_size}
    teacher = create_model("--teacher-model", args.teacher_model, say, **arguments)
    checkpoint = read_checkpoint(args.teacher_path, args.trust_checkpoint)
    other_names = compare_classes(checkpoint, data.class_names, "a teacher must know the data's classes")
    if other_names:
        say(f"--teacher-path {checkpoint.path}: {other_names}")
    with as_config_error("--teacher-path "):
        grid, file = grid_of(checkpoint), args.teacher_path
        load_weights(teacher, checkpoint.weights("model"), old_grid=grid, hints=TEACHER_HINTS, source=file)
    return teacher.to(device).eval().requires_grad_(False)


def wrap_model(args, world: World, model: nn.Module) -> nn.Module:
    """What the loop calls: the model, compiled where asked for, its gradients averaged over ranks."""
    net = torch.compile(model) if args.compile else model
    if world.size > 1:
        net = DistributedDataParallel(net, device_ids=[world.device] if world.device.type == "cuda" else None)
    return net


def build_run(args, world: World, model: nn.Module, data: DataBundle, say=print) -> Run:
    """All that training a classifier needs, ready at epoch `--start_epoch`."""
    with as_config_error():
        mixup = build_mixup(args, data.num_classes)
    with together():
        teacher = build_teacher(args, data, world.device, say)
    if teacher is not None and hasattr(model, "set_distilled_training"):
        model.set_distilled_training(True)
    criterion = build_criterion(args, mixup is not None, data.num_classes, teacher)
    task = Classification(criterion, mixup, data.num_classes)
    return assemble(args, world, model, data, task, repeats=3 if args.repeated_aug else 1)


def assemble(args, world: World, model: nn.Module, data: DataBundle, task: Task, repeats: int = 1) -> Run:
    """All that training for any task needs, ready at epoch `--start_epoch`; `repeats` as of `TrainSampler`."""
    with as_config_error():
        sampler = TrainSampler(
            len(data.train), args.batch_size, world.size, world.rank, args.seed, repeats, args.accum_steps
        )
    with as_config_error(f"--opt {args.opt}: "):
        optimizer = build_optimizer(args, model, scaled_lr(args, world.size))
    steps_per_epoch = sampler.num_batches // args.accum_steps
    run = Run(
        args=args,
        world=world,
        model=model,
        net=wrap_model(args, world, model),
        task=task,
        optimizer=optimizer,
        schedule=Schedule(args, optimizer, steps_per_epoch),
        scaler=build_scaler(args, world.device),
        sampler=sampler,
        dataset=data.train,
        class_names=data.class_names,
        ema=build_ema(args, model),
    )
    run.progress.epoch = args.start_epoch
    run.progress.step = args.start_epoch * steps_per_epoch
    return run


def build_ema(args, model: nn.Module) -> WeightsEma | None:
    if not args.model_ema:
        return None
    return WeightsEma(model, args.model_ema_decay, "cpu" if args.model_ema_force_cpu else None)


def describe(run: Run) -> str:
    """The numbers this run is made of, each with what it was derived from."""
    args, world = run.args, run.world
    batch, lr = whole_batch(args, world.size), scaled_lr(args, world.size)
    rule = f"{args.lr:g}, unscaled" if args.unscale_lr else f"{args.lr:g} x {batch} / 512"
    trainable = sum(p.numel() for p in run.model.parameters() if p.requires_grad)
    precision = f"mixed with {args.amp_dtype}" if args.if_amp else "float32"
    lines = (
        f"model          {args.model}, {trainable / 1e6:.2f} M trainable parameters",
        f"device         {device_name(world.device)}, {precision}, {world.size} rank(s)",
        f"whole batch    {batch} = {args.batch_size} x {world.size} rank(s) x {args.accum_steps} accumulated",
        f"learning rate  {lr:g} = {rule}; {args.opt}, {args.sched}",
        f"epoch          {run.steps_per_epoch} steps = {run.sampler.num_batches} batches / "
        f"{args.accum_steps}; {args.epochs} epochs are {args.epochs * run.steps_per_epoch:,} steps",
    )
    if args.sched != "none" and args.warmup_steps is None and args.warmup_epochs >= args.epochs:
        lines += (f"warm-up        {args.warmup_epochs} epochs: this run ends before it reaches its learning rate",)
    if is_vim(args.model):
        lines += (
            f"kernels        {kernel_backend(world.device)} backend; `python -m mamba_ssm` says why",
            f"time steps     the backward ones start as {args.dt_init_backward}; see --dt-init-backward",
        )
    return "\n".join(lines)


def kernel_backend(device: torch.device) -> str:
    """The name of the scan's backend on `device`. Raises ConfigError where a forced one cannot run."""
    try:
        module = backend.choose("bimamba", device, torch.float32)
    except (ValueError, RuntimeError) as error:
        raise ConfigError(str(error)) from None
    return next(name for name, path in backend.MODULES.items() if path == module.__name__)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} ({device})"
    if device.type == "cpu":
        return f"cpu, {torch.get_num_threads()} threads"
    return f"{device.type}, where this program has not been tested; Vim's kernels are for cuda and cpu"
