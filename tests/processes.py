"""The program, or a test's function, in processes of its own: one or several ranks over gloo.

A fork server imports the program once; a run then starts within a fraction of a second.
"""

import argparse
import atexit
import hashlib
import multiprocessing
import os
import shlex
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest
import torch

import report
import tiny  # noqa: F401  (registers the tests' model)
from checkpoint import read_checkpoint
from main import main

QUICK = (
    "--device cpu --model vim_two_blocks --input-size 8 --batch-size 128 --num_workers 0 --epochs 2 --warmup-epochs 0 "
    "--lr 4e-3 --drop-path 0.2 --model-ema-decay 0.9 --report-to tensorboard --log-every 1"
)
PICTURES = ("draw_curves", "draw_confusion", "draw_mistakes")
STEPS = 11  # of an epoch, with 1,437 digits in batches of 128 images
CONTEXT = multiprocessing.get_context("forkserver")
# By a run, not by main.py.
IMPORTED_LATE = ["matplotlib.figure", "sklearn.datasets", "sklearn.model_selection", "torch.utils.tensorboard"]
CONTEXT.set_forkserver_preload(["processes", *IMPORTED_LATE])
Program = Callable[[list[str]], int | None]  # of the flags; the exit code


def start(flags: str, out: Path, rank: int = 0, size: int = 1, program: Program = main, **environment: str):
    """Begin `main.py FLAGS`, or another program, in a new process; what it prints goes to the file `out`."""
    if size > 1:
        meeting = out.with_name(f"{out.name.rpartition('.')[0]}.meeting")
        flags = f"--dist_url file://{meeting} {flags}"
        environment |= {"RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_RANK": str(rank)}
    process = CONTEXT.Process(target=_run, args=(program, shlex.split(flags), out, environment))
    with mock.patch.dict(os.environ, PYTHONPATH=os.pathsep.join(sys.path)):  # the server's own imports need it
        process.start()
    atexit.register(process.kill)  # before multiprocessing's own, which waits for it
    return process


def start_ranks(flags: str, out: Path, size: int = 2, program: Program = main, **environment: str) -> list:
    """`start` for every rank; rank R prints to `out`.R and they meet in a file that must not be there yet."""
    out.with_name(f"{out.name}.meeting").unlink(missing_ok=True)
    outs = [out.with_name(f"{out.name}.{rank}") for rank in range(size)]
    return [start(flags, outs[rank], rank, size, program, **environment) for rank in range(size)]


def end(processes: list, seconds: float = 120) -> list[int]:
    """Wait for processes; their exit codes, minus the signal's number where one killed them."""
    try:
        for process in processes:
            process.join(seconds)
            assert not process.is_alive(), f"still running after {seconds} seconds"
        return [process.exitcode for process in processes]
    finally:
        for process in processes:
            if process.is_alive():
                process.kill()


def _end_with_parent() -> None:
    """Die when the tests do, however they ended: a run that hangs on purpose would stay for ever."""
    multiprocessing.parent_process().join()
    os.kill(os.getpid(), signal.SIGKILL)


def wait_for_a_step(process, out: Path) -> None:
    """Until a run has printed its first step."""
    while process.is_alive() and not (out.exists() and "  step " in out.read_text()):
        time.sleep(0.01)


def _run(program: Program, flags: list[str], out: Path, environment: dict[str, str]) -> None:
    os.setpgid(0, 0)  # as launchers start it
    threading.Thread(target=_end_with_parent, daemon=True).start()
    os.environ.update(environment)
    torch.set_num_threads(1)
    descriptor = os.open(out, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    for picture in PICTURES:
        setattr(report, picture, lambda *arguments: None)
    try:
        code = program(flags) or 0
    except Exception:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Half of a tiny run's time would go into them. For modules that import this name."""
    for picture in PICTURES:
        monkeypatch.setattr(report, picture, lambda *arguments: None)


@contextmanager
def fault(text: str):
    """The test-only switch of vim/faults.py, for a run inside this process."""
    with mock.patch.dict(os.environ, VIM_FAULT=text):
        yield


def pieces(folder: Path, name: str = "checkpoint.pth") -> dict[str, str]:
    """SHA-256 of each piece of a run that must be equal bit for bit: all tensors, counters and log rows."""
    found = read_checkpoint(folder / name)
    named = {piece: getattr(found, piece) for piece in ("model", "model_ema", "optimizer", "lr_scheduler", "scaler")}
    named |= {"best": found.best_metric, "progress": found.extra["progress"], "replaced": found.extra["replaced"]}
    named |= {log: (folder / log).read_text() for log in ("log.txt", "metrics.csv")}
    return {piece: hashlib.sha256(b"".join(_bytes(value))).hexdigest() for piece, value in named.items()}


def _bytes(value):
    if isinstance(value, torch.Tensor):
        yield f"{value.dtype}{tuple(value.shape)}".encode()
        yield value.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
    elif isinstance(value, dict):
        for key, item in value.items():
            yield repr(key).encode()
            yield from _bytes(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _bytes(item)
    elif not isinstance(value, argparse.Namespace):
        yield repr(value).encode()
