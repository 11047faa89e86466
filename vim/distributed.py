"""Ranks, exit codes and stop signals: what a run needs to know of the processes around it.

Every helper here is the identity in a run of one process, so that the loop has no `if distributed`.
"""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import random
import signal
import stat
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from errors import ConfigError, PeerError

EXIT_DONE = 0
EXIT_FAILED = 1
EXIT_NONFINITE = 3
EXIT_CONFIG = 4
EXIT_REQUEUE = 75

# Where `launch.py` wants to be told the ranks' exit codes: lines of a group of ranks, and of a code once it is known.
EXIT_CODE_FILE = "VIM_EXIT_CODE_FILE"

# What `launch.py` calls itself: a process number.
LAUNCHER = "VIM_LAUNCHER"
PR_SET_PDEATHSIG = 1  # linux/prctl.h: the signal at the end of the parent

# Windows has neither.
SIGUSR1, SIGHUP = (getattr(signal, name, None) for name in ("SIGUSR1", "SIGHUP"))

# See samplers.ORDER_STREAM: one stream of random numbers per purpose.
MODEL_STREAM = 4


@dataclass(frozen=True)
class World:
    """This process among all: rank of size, and the device it computes on."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process speaks and writes files for all."""
        return self.rank == 0


def start(args) -> World:
    """Join the other processes if a launcher started several; a run of one process needs no launcher.

    Ranks come from torchrun's environment, or from SLURM's. Raises ConfigError for `--distributed` or
    `--world_size` without either.
    """
    tell(None)
    end_with_launcher()
    rank, size, local_rank = read_ranks(args)
    device = torch.device(args.device)
    if device.type == "mps" and size > 1:
        raise ConfigError(f"--device {args.device}: torch connects no ranks on it; start one, or take --device cpu")
    if device.type == "cuda":
        here = local_rank + 1
        if size > 1:
            here = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("SLURM_NTASKS_PER_NODE") or here)
        wanted = here if device.index is None else device.index + 1
        if wanted > torch.cuda.device_count():  # on every rank of the machine: no one waits for those that left
            raise ConfigError(
                f"--device {args.device} with {here} rank(s) on this machine needs {wanted} GPUs of "
                f"{torch.cuda.device_count()}: start fewer ranks, or name another --device"
            )
        if device.index is None:
            device = torch.device("cuda", local_rank)
        torch.cuda.set_device(device)
    if size > 1 or args.distributed:
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend,
            init_method=args.dist_url,
            world_size=size,
            rank=rank,
            timeout=timedelta(seconds=args.dist_timeout),
        )
    return World(rank, size, device)


def end_with_launcher() -> None:
    """Have Linux send this rank SIGTERM when the `launch.py` that started it dies, of a SIGKILL that it cannot pass on.

    Its ranks would train on, and keep their output folder from the run that is started in their place.
    """
    launcher = int(os.environ.get(LAUNCHER) or 0)
    if sys.platform != "linux" or not launcher:
        return
    prctl = ctypes.CDLL(None).prctl
    prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != launcher:
        if not Path(f"/proc/{launcher}").exists():  # it died before
            os.kill(os.getpid(), signal.SIGTERM)
        prctl(PR_SET_PDEATHSIG, 0, 0, 0, 0)  # another's end, such as a shell's in between, says nothing


def read_ranks(args) -> tuple[int, int, int]:
    """(rank, number of ranks, rank within the machine) from the launcher's environment."""
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return int(env["RANK"]), int(env["WORLD_SIZE"]), int(env.get("LOCAL_RANK", args.local_rank))
    if args.distributed or args.world_size > 1:
        if "SLURM_PROCID" in env and "MASTER_ADDR" in env:
            return int(env["SLURM_PROCID"]), int(env["SLURM_NTASKS"]), int(env["SLURM_LOCALID"])
        flag = "--distributed" if args.distributed else f"--world_size {args.world_size}"
        raise ConfigError(
            f"{flag}: no launcher started this process; use torchrun --nproc_per_node=N main.py ... "
            "(srun needs MASTER_ADDR and MASTER_PORT)"
        )
    return 0, 1, args.local_rank


def finish() -> None:
    """Leave the other processes."""
    if dist.is_initialized():
        dist.destroy_process_group()
        # A thread of gloo's may be waiting for the interpreter's lock, to let go of what the last backward pass gave
        # it: if the interpreter shut down meanwhile, the process would end by SIGABRT. Sleeping hands it the lock.
        time.sleep(0.1)


@contextmanager
def together() -> Iterator[None]:
    """Where one rank raises inside, the others raise PeerError, instead of waiting for it further on.

    What is inside must not exchange anything itself.
    """
    error = None
    try:
        yield
    except Exception as caught:
        error = caught
    errors = gather_objects(None if error is None else (str(error), getattr(error, "transient", False)))
    if error is not None:
        raise error
    for rank, found in enumerate(errors):
        if found is not None:
            peer = PeerError(f"rank {rank} failed: {found[0]}")
            peer.transient = found[1]
            raise peer


def from_main(item):
    """What rank 0 passed, on every rank."""
    return gather_objects(item)[0]


def leave(code: int) -> NoReturn:
    """End this process with `exit_code(code)`: with what `atexit` has to run, but without Python's own end.

    Python would search all memory for what can be given back, which takes seconds in which a signal kills the process
    and gloo's threads may; and it would wait for a loader's process that hangs. No thread is waited for.
    """
    with StopSignal():  # a run that has ended is not stopped any more
        code = exit_code(code)
        if threading.current_thread() is threading.main_thread() and hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for each loader that is killed here
        for loader in multiprocessing.active_children():
            loader.kill()
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):  # what it went to is gone: too late to say so
                stream.flush()
        os._exit(code)


def exit_code(code: int) -> int:
    """The code to exit with: `code`, or under `launch.py` 0 for an end that a restart cannot mend.

    Torchrun would start all ranks again at any other exit code, so such an end is written to the launcher's file
    instead (`tell`), from which it takes its own exit code. The same for a rank that only lost a peer which ended so.
    """
    path = tell(code)
    if path is None or (code == EXIT_FAILED and told_end(path, _group()) is None):
        return code
    return EXIT_DONE


def tell(code: int | None) -> str | None:
    """Tell `launch.py`, if it has started this process, the exit code, or None at the beginning; returns its file.

    To be told before the other ranks see this one go.
    """
    path = os.environ.get(EXIT_CODE_FILE)
    if path is not None:
        os.makedirs(os.path.dirname(path), exist_ok=True)  # what cleans /tmp may have taken it
        with open(path, "a") as file:
            file.write(f"{_group()} {'' if code is None else code}\n")
    return path


def told_end(path: str, group: str | None = None) -> int | None:
    """The first exit code told in `path`, by ranks of a group or of the last one, that a restart cannot mend."""
    if not os.path.exists(path):
        return None
    with open(path) as file:
        lines = [line.split() for line in file]
    codes = [int(code) for met, *told in lines if met == (group or lines[-1][0]) for code in told]
    return next((code for code in codes if code not in (EXIT_DONE, EXIT_FAILED)), None)


def _group() -> str:
    """A name for this group of ranks; it changes at each restart."""
    names = ("TORCHELASTIC_RESTART_COUNT", "MASTER_ADDR", "MASTER_PORT")
    return ":".join(os.environ.get(name, "") for name in names)


def num_restarts() -> int:
    """How often a launcher or scheduler has started this run again."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) + int(os.environ.get("SLURM_RESTART_COUNT", 0))


def launch_name() -> str:
    """Names what started this process and may start it again: a SLURM job's number, torchrun's, or nothing ("")."""
    torchrun = os.environ.get("TORCHELASTIC_RUN_ID", "none")  # "none": every launch has it that was not given one
    return os.environ.get("SLURM_JOB_ID") or torchrun.removeprefix("none")


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """Sum over ranks, in place; returns `tensor`."""
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def any_rank(here: bool, world: World) -> bool:
    """Whether something is so on some rank."""
    return sum_over_ranks(torch.tensor(float(here), device=world.device)).item() > 0


def gather_objects(item) -> list:
    """What every rank passed, in the order of ranks, on every rank."""
    if not dist.is_initialized():
        return [item]
    items = [None] * dist.get_world_size()
    dist.all_gather_object(items, item)
    return items


def share_buffers(model: nn.Module) -> None:
    """Give all ranks the first one's buffers, which are saved: batch norm's statistics are of a rank's own images."""
    if dist.is_initialized():
        for buffer in model.buffers():
            dist.broadcast(buffer, src=0)


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed what builds the model, the same on all ranks; with `deterministic`, also choose exact algorithms.

    Randomness during training does not come from here but from counters (`seed_step` and the datasets).
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    torch.backends.cudnn.benchmark = not deterministic
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may add up in any order
        torch.use_deterministic_algorithms(True)


def seed_step(seed: int, micro_batch: int, rank: int) -> None:
    """Draw the model's own randomness (dropout, stochastic depth) from (seed, micro-batch of the run, rank).

    So a resumed run drops what the uninterrupted one would have, without saving any generator's state.
    """
    sequence = np.random.SeedSequence([seed, micro_batch, rank], spawn_key=(MODEL_STREAM,))
    torch.manual_seed(int(sequence.generate_state(1, np.uint64)[0]))


class StopSignal:
    """Remembers that SIGTERM, SIGUSR1, SIGINT or SIGHUP came, so that the loop can finish its step and save.

    A second SIGINT interrupts at once, as a person at a keyboard expects; a SIGHUP that nohup has had ignored stays
    so. Handlers are put back on leaving, and are Python's to set in the main thread alone: a run in another one is
    not stopped by signals.
    """

    HANDLED = tuple(filter(None, (signal.SIGTERM, SIGUSR1, signal.SIGINT, SIGHUP)))

    def __init__(self):
        self.received: str | None = None
        self._previous = {}

    def __enter__(self) -> StopSignal:
        if threading.current_thread() is threading.main_thread():
            for number in self.HANDLED:
                if number != SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)  # None: one that Python did not set

    def _remember(self, number, frame) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        if number == SIGHUP:
            let_go_of_terminal()
        self.received = signal.Signals(number).name


def let_go_of_terminal(descriptors: tuple[int, ...] = (1, 2)) -> None:
    """Print to files alone: the next line to a closed terminal, or to what read it, would end the run unsaved."""
    for descriptor in descriptors:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


class StopAtOnce(StopSignal):
    """Leaves with EXIT_REQUEUE on those signals: for the time in which there is no step to finish."""

    def _remember(self, number, frame) -> None:
        super()._remember(number, frame)
        print(f"stopped by {self.received} while not training: nothing to save", file=sys.stderr)
        sys.exit(EXIT_REQUEUE)
