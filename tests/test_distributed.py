"""Several processes: the same gradients as one, exact shared counts, one decision for all.

Real processes over gloo; some are started by torchrun, as users do.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import Subset

import distributed
from arguments import parse_args
from build import build_model, build_run
from checkpoint import read_checkpoint
from datasets import build_datasets, build_loader
from engine import build_val_loader, training_step
from errors import ConfigError, NonFiniteError
from evaluation import evaluate
from fitting import load_weights
from helpers import run_args
from main import main
from processes import end, start, start_ranks

ROOT = Path(__file__).resolve().parents[1]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
SGD = (
    "--device cpu --model deit_nano_patch4_32 --input-size 8 --num_workers 0 --mixup 0 --cutmix 0 --drop-path 0 "
    "--opt momentum --momentum 0 --weight-decay 0 --lr 0.5 --sched none --epochs 1 --model-ema-decay 0.5"
)


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


@pytest.mark.slow
def test_two_ranks_take_the_steps_of_one_process_with_twice_the_batch(tmp_path):
    """SGD without momentum, so the weights are the start minus the sum of gradients; the same images a step."""
    assert end(start_ranks(f"{SGD} --batch-size 64 --output_dir {tmp_path / 'two'}", tmp_path / "out")) == [0, 0]
    assert main([*SGD.split(), "--batch-size", "128", "--output_dir", str(tmp_path / "one")]) == 0
    two, one = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("two", "one"))
    assert two.step == one.step == 11
    for weights in ("model", "model_ema"):
        for key, value in getattr(one, weights).items():
            torch.testing.assert_close(getattr(two, weights)[key], value, rtol=2e-4, atol=2e-5)
    (row_two,), (row_one,) = rows(tmp_path / "two"), rows(tmp_path / "one")
    assert row_two["train_loss"] == pytest.approx(row_one["train_loss"], rel=1e-5)
    assert ["DIGITS: " in (tmp_path / f"out.{rank}").read_text() for rank in (0, 1)] == [True, False], "one speaks"


def save_gradients(flags: list[str]) -> None:
    """A program: the first batch's gradients, into <number of ranks>.pt in the output folder."""
    args = parse_args(flags)
    world = distributed.start(args)
    distributed.seed_everything(args.seed, deterministic=False)
    data = build_datasets(args)
    run = build_run(args, world, build_model(args, data.num_classes), data)
    run.sampler.set_epoch(0)
    images, labels = next(iter(build_loader(data.train, run.sampler, args, train=True)))
    run.task.criterion(images, run.net(images), labels).backward()
    if world.is_main:
        gradients = {name: p.grad for name, p in run.model.named_parameters()}
        torch.save(gradients, f"{args.output_dir}/{world.size}.pt")
    distributed.finish()


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vim_nano_patch4_32", "deit_nano_patch4_32"])
def test_two_ranks_have_the_gradients_of_one_process_with_twice_the_batch(model, tmp_path):
    flags = f"{SGD.replace('deit_nano_patch4_32', model)} --output_dir {tmp_path} --batch-size"
    ranks = start_ranks(f"{flags} 16", tmp_path / "out", program=save_gradients)
    assert end([*ranks, start(f"{flags} 32", tmp_path / "alone", program=save_gradients)]) == [0, 0, 0]
    two, one = torch.load(tmp_path / "2.pt"), torch.load(tmp_path / "1.pt")
    assert two.keys() == one.keys()
    for name, gradient in one.items():
        largest = gradient.abs().max().item()
        torch.testing.assert_close(two[name], gradient, rtol=1e-4, atol=1e-5 * largest + 1e-9)


def save_counts(flags: list[str]) -> None:
    """A program: what an evaluation of 359 images finds, into <number of ranks>.json in the output folder."""
    args = parse_args(flags)
    world = distributed.start(args)
    data = build_datasets(args)
    model = build_model(args, data.num_classes)
    load_weights(model, read_checkpoint(args.resume).model)
    loader = build_val_loader(Subset(data.val, range(359)), args, world)
    found = evaluate(model, loader, args, world, data.num_classes)
    if world.is_main:
        mistakes = [(m.index, m.label, m.predicted) for m in found.mistakes]
        counts = {"images": found.images, "top1": found.top1, "top5": found.top5, "loss": found.loss,
                  "confusion": found.confusion.tolist(), "mistakes": mistakes}  # fmt: skip
        Path(args.output_dir, f"{world.size}.json").write_text(json.dumps(counts))
    distributed.finish()


@pytest.mark.slow
def test_shared_evaluation_counts_every_image_once(tmp_path):
    """359 images do not divide by two; accuracy, loss and mistakes are those of one process."""
    assert main([*SGD.split(), "--batch-size", "128", "--output_dir", str(tmp_path)]) == 0
    flags = f"{SGD} --batch-size 50 --eval --resume {tmp_path / 'checkpoint.pth'} --output_dir {tmp_path}"
    ranks = start_ranks(f"{flags} --dist-eval", tmp_path / "out", program=save_counts)
    assert end([*ranks, start(flags, tmp_path / "alone", program=save_counts)]) == [0, 0, 0]
    found, expected = (json.loads((tmp_path / name).read_text()) for name in ("2.json", "1.json"))
    assert found.pop("loss") == pytest.approx(expected.pop("loss"), rel=1e-12)
    assert found == expected
    assert found["images"] == 359 and sum(map(sum, found["confusion"])) == 359


@pytest.mark.slow
def test_ranks_evaluate_with_the_batch_statistics_that_are_saved(tmp_path):
    """Batch norm's running statistics are of a rank's own images; a checkpoint holds the first rank's."""
    flags = f"{SGD.replace('deit_nano_patch4_32', 'resnet10t')} --batch-size 64 --output_dir {tmp_path}"
    assert end(start_ranks(f"{flags} --dist-eval --eval-weights both", tmp_path / "out")) == [0, 0]
    args = parse_args(flags.split())
    data = build_datasets(args)
    model, world = build_model(args, data.num_classes), distributed.World(0, 1, torch.device("cpu"))
    loader = build_val_loader(data.val, args, world)
    (row,), checkpoint = rows(tmp_path), read_checkpoint(tmp_path / "checkpoint.pth")
    for weights, column in ((checkpoint.model, "test_loss"), (checkpoint.model_ema, "test_ema_loss")):
        load_weights(model, weights)
        assert evaluate(model, loader, args, world, data.num_classes).loss == pytest.approx(row[column], rel=1e-6)


def save_decision(flags: list[str]) -> None:
    """A program: NaN on rank 1 alone in two steps, then SIGTERM on rank 0 alone; each rank saves what it did."""
    args = parse_args(flags)
    world = distributed.start(args)
    data = build_datasets(args)
    torch.manual_seed(0)
    run = build_run(args, world, build_model(args, data.num_classes), data)
    images, labels = torch.randn(8, 3, 8, 8), torch.arange(8)
    before = [p.clone() for p in run.model.parameters()]
    broken = images * float("nan") if world.rank == 1 else images
    outcomes = []
    for micro in range(2):
        try:
            outcomes.append(f"finite {training_step(run, [(broken, labels)], micro).finite}")
        except NonFiniteError:
            outcomes.append("stopped")
            break
    untouched = all(torch.equal(a, b) for a, b in zip(before, run.model.parameters()))
    run.stop.received = "SIGTERM" if world.rank == 0 else None
    stop = training_step(run, [(images, labels)], 2).stop
    saved = f"{', '.join(outcomes)}, untouched {untouched}, stop {stop}"
    Path(args.output_dir, str(world.rank)).write_text(saved)
    distributed.finish()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "outcome"),
    [
        ("stop", "stopped"),
        ("skip", "finite False, finite False"),
        ("skip --nonfinite-limit 1", "finite False, stopped"),
    ],
    ids=["stop", "skip", "limit"],
)
def test_a_loss_that_is_not_finite_or_a_signal_on_one_rank_is_one_decision(policy, outcome, tmp_path):
    flags = f"{SGD} --batch-size 8 --output_dir {tmp_path} --nonfinite {policy}"
    assert end(start_ranks(flags, tmp_path / "out", program=save_decision)) == [0, 0]
    assert [(tmp_path / rank).read_text() for rank in "01"] == [f"{outcome}, untouched True, stop True"] * 2


@pytest.mark.slow
def test_a_signal_to_torchruns_ranks_saves_and_the_resumed_run_is_the_same(tmp_path):
    flags = f"{SGD.replace('--epochs 1', '--epochs 3')} --batch-size 32 --log-every 1 --resume auto --output_dir"
    command = [*TORCHRUN, "vim/main.py", *flags.split(), str(tmp_path / "parts")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        next(line for line in process.stdout if "step 5/22" in line)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    finally:
        process.kill()
    saved = read_checkpoint(tmp_path / "parts" / "checkpoint.pth")
    assert 5 <= saved.step < 22 and saved.extra["progress"]["samples"] == 64 * saved.step
    for folder in ("parts", "whole"):
        assert end(start_ranks(f"{flags} {tmp_path / folder}", tmp_path / "out")) == [0, 0]
    parts, whole = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("parts", "whole"))
    assert parts.step == whole.step == 66
    assert all(torch.equal(parts.model[key], value) for key, value in whole.model.items())
    assert rows(tmp_path / "parts") == rows(tmp_path / "whole")


# --- where ranks come from


def test_a_process_without_launcher_is_alone(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert distributed.read_ranks(run_args()) == (0, 1, 0)


def test_a_launch_is_known_by_its_number_and_its_restarts(monkeypatch):
    names = ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID", "SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")

    def found(**environment):
        for name in names:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return distributed.launch_name(), distributed.num_restarts()

    assert found() == found(TORCHELASTIC_RUN_ID="none") == ("", 0)
    assert found(TORCHELASTIC_RUN_ID="mine", TORCHELASTIC_RESTART_COUNT="2") == ("mine", 2)
    both = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "2"}
    assert found(SLURM_JOB_ID="17", SLURM_RESTART_COUNT="3", **both) == ("17", 5)


def test_torchruns_environment_is_read(monkeypatch):
    for name, value in {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}.items():
        monkeypatch.setenv(name, value)
    assert distributed.read_ranks(run_args()) == (3, 8, 1)
    monkeypatch.delenv("LOCAL_RANK")
    assert distributed.read_ranks(run_args("--local-rank", "2")) == (3, 8, 2)


@pytest.mark.parametrize("rank", [0, 1])
def test_too_few_gpus_are_every_ranks_error(rank, monkeypatch):
    """Also that of a rank whose GPU is there: it would wait for the others until --dist-timeout."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match=r"--device cuda with 2 rank\(s\) on this machine needs 2 GPUs of 1"):
        distributed.start(run_args("--device", "cuda"))


def test_several_ranks_on_an_apple_gpu_are_refused(monkeypatch):
    for name, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ConfigError, match="--device mps: torch connects no ranks on it; start one"):
        distributed.start(run_args("--device", "mps"))


def test_slurms_environment_is_read_where_several_processes_are_asked_for(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    slurm = {"SLURM_PROCID": "5", "SLURM_NTASKS": "16", "SLURM_LOCALID": "1", "MASTER_ADDR": "node1"}
    for name, value in slurm.items():
        monkeypatch.setenv(name, value)
    assert distributed.read_ranks(run_args("--distributed")) == (5, 16, 1)
    assert distributed.read_ranks(run_args()) == (0, 1, 0)


@pytest.mark.parametrize("flags", [("--distributed",), ("--world_size", "4")])
def test_several_processes_without_a_launcher_are_refused(flags, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"no launcher started this process; use torchrun"):
        distributed.read_ranks(run_args(*flags))


def test_signals_are_remembered_and_handlers_put_back():
    before = signal.getsignal(signal.SIGUSR1)
    with distributed.StopSignal() as stop:
        assert stop.received is None
        signal.raise_signal(signal.SIGUSR1)
        assert stop.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_second_interrupt_from_the_keyboard_is_not_waited_for():
    with distributed.StopSignal():
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_hangup_that_nohup_has_had_ignored_stays_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with distributed.StopSignal() as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.received is None
    finally:
        signal.signal(signal.SIGHUP, before)


ON_A_TERMINAL = """
import signal, sys
sys.path.insert(0, "vim")
import distributed
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the tests run under
with distributed.StopSignal() as stop:
    print("in a step", flush=True)
    while stop.received is None:
        pass
print("saved", flush=True)
sys.exit(75)
"""


def test_a_line_for_a_terminal_that_was_closed_does_not_end_the_run():
    terminal, screen = os.openpty()
    process = subprocess.Popen([sys.executable, "-c", ON_A_TERMINAL], cwd=ROOT, stdout=screen, stderr=screen)
    os.close(screen)
    assert os.read(terminal, 100).startswith(b"in a step")
    os.close(terminal)
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=60) == 75


def test_one_process_needs_no_exchange():
    tensor = torch.arange(3.0)
    assert distributed.sum_over_ranks(tensor) is tensor
    assert distributed.gather_objects("x") == ["x"]
