"""The seams by which other tasks use the program: the loop's `Task`, a command line of one's own, layer-wise decay."""

from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import nn

import build
import models_mamba  # noqa: F401  (registers its models with timm)
from arguments import COMMON_FLAGS, Program, parse_args
from datasets import DataBundle
from distributed import World
from errors import ConfigError
from lifecycle import run_program, train
from optim import Schedule, build_optimizer
from report import RunLog

WORLD = World(0, 1, torch.device("cpu"))


# --- a task that is no classification runs through the whole loop


class Doubles(torch.utils.data.Dataset):
    """`datasets.Items`: numbers x and what is to be learnt of them, 2 x; dictionaries, which torch batches its way."""

    on_broken, num_replaced = "raise", 0

    def __init__(self, size):
        self.replaced = torch.zeros(size, dtype=torch.bool)

    def __len__(self):
        return len(self.replaced)

    def __getitem__(self, key):
        index = key[1] if isinstance(key, tuple) else key
        x = torch.tensor([index / len(self)])
        return {"x": x, "y": 2 * x}


@dataclass
class Fit:
    """A `task.Result`."""

    score: float

    @property
    def words(self):
        return f"fit {self.score:.1f} %"

    def row(self, prefix):
        return {f"{prefix}fit": self.score}


class Doubling:
    """A `task.Task`."""

    score_name, score_column = "fit", "fit"

    def __init__(self):
        self.pictured = None

    @staticmethod
    def collate(items):
        return [item["x"] for item in items], [item["y"] for item in items]

    def loss(self, run, batch, micro):
        x, y = (torch.stack(part) for part in batch)
        return F.mse_loss(run.net(x), y)

    @torch.no_grad()
    def evaluate(self, model, loader, args, world):
        errors = [F.l1_loss(model(torch.stack(x)), torch.stack(y)) for x, y in loader]
        return Fit(100 * (1 - torch.stack(errors).mean().item()))

    def pictures(self, log, result, data):
        self.pictured = result


def resolve(args):
    args.shape = args.shape or "line"


def check(args):
    if args.shape == "spiral":
        raise ConfigError("--shape spiral: there is only line")


def add_shape(parser):
    parser.add_argument("--shape", default="", help="of the function")


PROGRAM = Program("doubles.py", "Learns to double.", "", (*COMMON_FLAGS, add_shape), resolve, check,
                  {"model": "linear", "model_ema": False, "epochs": 3, "unscale_lr": True})  # fmt: skip


def parse(argv=None):
    return parse_args(argv, PROGRAM)


def execute(args, world):
    torch.manual_seed(0)
    data = DataBundle(Doubles(64), Doubles(10), 1, ["y"], "doubles")
    task = Doubling()
    run = build.assemble(args, world, nn.Linear(1, 1), data, task)
    code = train(run, data, RunLog(args, True, (task.score_name, task.score_column)))
    assert task.pictured.score == run.progress.best or run.progress.best_epoch < args.epochs - 1
    return code


def doubles(*flags):
    common = "--device cpu --num_workers 0 --batch-size 8 --lr 0.1 --warmup-epochs 0"
    return run_program([*common.split(), *flags], parse, execute)


def test_another_task_trains_logs_and_keeps_its_best(tmp_path, capsys):
    assert doubles("--output_dir", str(tmp_path)) == 0
    text = capsys.readouterr().out
    assert "held-out raw weights: fit " in text and "; best fit " in text
    header, *rows = (tmp_path / "metrics.csv").read_text().splitlines()
    assert header.split(",")[:5] == ["epoch", "step", "train_lr", "train_loss", "test_fit"]
    scores = [float(row.split(",")[4]) for row in rows]
    assert len(scores) == 3 and scores == sorted(scores) and scores[-1] > scores[0] + 5
    assert (tmp_path / "best_checkpoint.pth").exists() and (tmp_path / "curves.png").exists()


def test_another_task_goes_on_where_it_was(tmp_path):
    """The epochs of one run, in two processes' worth of it."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert doubles("--output_dir", str(whole), "--sched", "none") == 0
    for epochs in ("1", "3"):
        assert doubles("--output_dir", str(parts), "--sched", "none", "--resume", "auto", "--epochs", epochs) == 0
    assert (whole / "log.txt").read_text() == (parts / "log.txt").read_text()


def test_another_programs_refusals_are_one_line(capsys):
    assert doubles("--shape", "spiral") == 4
    assert capsys.readouterr().err == "error: --shape spiral: there is only line\n"
    assert doubles("--mixup", "0.8") == 2
    assert "doubles.py: error: unrecognized arguments: --mixup" in capsys.readouterr().err


def test_another_program_has_its_own_defaults_and_the_common_flags(tmp_path):
    args = parse(["--device", "cpu"])
    assert (args.shape, args.model, args.model_ema, args.epochs) == ("line", "linear", False, 3)
    assert not hasattr(args, "mixup") and not hasattr(args, "data_set")
    config = tmp_path / "c.yaml"
    config.write_text("shape: circle\n")
    assert parse(["--device", "cpu", "--config", str(config)]).shape == "circle"


# --- layer-wise decay and schedules by steps


def optimizer_of(model, *flags):
    args = parse(["--device", "cpu", "--lr", "1", *flags])
    return build_optimizer(args, model, args.lr)


def scales(optimizer, model):
    """Parameter's name -> factor of its learning rate."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: group.get("lr_scale", 1.0) for group in optimizer.param_groups for p in group["params"]}


def test_layer_decay_reaches_every_block_of_a_vim():
    model = timm.create_model("vim_nano_patch4_32", num_classes=3)
    found = scales(optimizer_of(model, "--layer-decay", "0.5"), model)
    assert found.keys() == dict(model.named_parameters()).keys()
    for name, scale in found.items():
        place = int(name.split(".")[1]) + 1 if name.startswith("layers.") else {"h": 5, "n": 4}.get(name[0], 0)
        assert scale == 0.5 ** (5 - place), name


def test_without_layer_decay_all_learn_alike():
    model = timm.create_model("vim_nano_patch4_32", num_classes=3)
    assert set(scales(optimizer_of(model), model).values()) == {1.0}


def test_layer_decay_and_its_rival_are_not_both():
    model = timm.create_model("vim_nano_patch4_32", num_classes=3)
    with pytest.raises(ConfigError, match="--layer-decay and --no-decay-ssm"):
        optimizer_of(model, "--layer-decay", "0.5", "--no-decay-ssm")


def test_the_blocks_rates_follow_the_schedule_and_the_log_has_the_heads():
    model = timm.create_model("vim_nano_patch4_32", num_classes=3)
    optimizer = optimizer_of(model, "--layer-decay", "0.5")
    schedule = Schedule(parse(["--device", "cpu", "--lr", "1", "--warmup-epochs", "0"]), optimizer, 10)
    assert schedule.set(0, 0) == 1.0
    assert min(group["lr"] for group in optimizer.param_groups) == 0.5**5


def test_layer_decay_needs_a_schedule_that_applies_it():
    with pytest.raises(ConfigError, match="--sched constant"):
        parse(["--device", "cpu", "--layer-decay", "0.5", "--sched", "none"])


def rates(*flags, steps, per_epoch=10):
    common = "--device cpu --sched-on-updates --warmup-lr 0 --min-lr 0 --epochs 4"
    args = parse([*common.split(), *flags])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = Schedule(args, optimizer, per_epoch)
    return [schedule.set(step // per_epoch, step) for step in steps]


def test_poly_decays_linearly_after_a_warm_up_of_steps():
    found = rates("--sched", "poly", "--decay-rate", "1", "--warmup-steps", "5", steps=[0, 1, 4, 5, 20, 39])
    assert found == pytest.approx([0, 0.2, 0.8, 1 - 5 / 40, 0.5, 1 / 40])


def test_multistep_steps_where_it_is_told():
    flags = ("--sched", "multistep", "--decay-milestones", "2", "3.5", "--warmup-steps", "2")
    assert rates(*flags, steps=[1, 15, 25, 37]) == pytest.approx([0.5, 1, 0.1, 0.01])


def test_a_warm_up_of_steps_needs_a_rate_by_steps():
    with pytest.raises(ConfigError, match="--warmup-steps 5 needs --sched-on-updates"):
        parse(["--device", "cpu", "--warmup-steps", "5"])
