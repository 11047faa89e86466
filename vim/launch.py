"""torchrun for long runs: signals reach the ranks, and the program's exit code comes back.

    python launch.py --standalone --nproc_per_node 8 main.py --output_dir run --resume auto ...

takes torchrun's flags and adds what a run that may be stopped needs: SIGUSR1, SIGTERM, SIGINT and SIGHUP (but not
under nohup) are passed to the ranks, which finish their step and save; a rank that dies restarts all of them
(`--max-restarts`, here 3 unless given); and the exit code is main.py's own (see there), where torchrun knows only 0
and 1. An end that a restart cannot mend, such as a wrong folder, is not restarted. Several machines are named as
torchrun names them (`--nnodes`, `--node_rank`, `--master_addr`, `--master_port`); a rank that dies on one restarts
those of all.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import sys
import tempfile

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig

from distributed import EXIT_CODE_FILE, EXIT_DONE, EXIT_FAILED, EXIT_REQUEUE, LAUNCHER, StopSignal, told_end

# Ranks that torchrun starts again would find each other through the store of the dead ones, where these have left
# their addresses: whoever reads one before its owner has renewed it waits for nobody. "1": a new store each time.
OWN_STORE = "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"

# Where machines meet that were told --master_addr alone: torchrun's own number.
PORT = 29500

# What ranks may take to finish a step, or an evaluation, and save; then they are killed.
SHUTDOWN_SECONDS = 600


def defaults() -> list[str]:
    """Flags of torchrun that come before the user's. torch 2.11 lacks the third and waits 30 seconds.

    SIGQUIT ends the ranks at once, as it does any process: if torchrun did not pass it on, they would stay behind.
    """
    flags = ["--signals-to-handle=SIGQUIT", "--max-restarts=3"]
    if "shutdown_timeout" in {field.name for field in dataclasses.fields(LaunchConfig)}:
        flags.append(f"--shutdown-timeout={SHUTDOWN_SECONDS}")
    return flags


def meeting_anew(args: argparse.Namespace) -> argparse.Namespace:
    """torchrun's flags, in place, so that the machines meet anew after each restart.

    Its `static` meeting, which --node_rank and --master_addr stand for, has one store for good, whatever OWN_STORE
    says: ranks wait for dead ones until their connections time out. `c10d` is told the same by other names.
    """
    if args.standalone or args.rdzv_backend != "static" or args.rdzv_endpoint:
        return args
    if torchrun.parse_min_max_nnodes(args.nnodes)[1] == 1:
        args.standalone = True
        return args
    args.rdzv_backend = "c10d"
    args.rdzv_endpoint = f"{args.master_addr}:{args.master_port or PORT}"
    args.rdzv_conf = ",".join(filter(None, (args.rdzv_conf, f"is_host={args.node_rank == 0}")))
    args.node_rank = 0  # c10d numbers the machines by itself, and torchrun would warn
    return args


class StopRanks(StopSignal):
    """Has torchrun pass the first signal on to the ranks and wait for them.

    Later ones are ignored, for torchrun would leave ranks behind that are still saving; also those after the run.
    """

    def __exit__(self, *exception) -> None:
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _remember(self, number, frame) -> None:
        super()._remember(number, frame)
        self.__exit__()
        raise SignalException(f"stopped by {self.received}", signal.Signals(number))


def launch(argv: list[str]) -> int:
    """Run torchrun with its own flags; returns the exit code of what it ran, which no signal changes any more."""
    with tempfile.TemporaryDirectory() as folder:
        os.environ[EXIT_CODE_FILE] = path = os.path.join(folder, "exit-codes")
        os.environ.setdefault(OWN_STORE, "1")
        os.environ[LAUNCHER] = str(os.getpid())
        try:
            with StopRanks():
                torchrun.run(meeting_anew(torchrun.parse_args([*defaults(), *argv])))
            code = EXIT_DONE
        except ChildFailedError:
            code = EXIT_FAILED
        except SignalException as stop:
            # EXIT_REQUEUE also where a rank was too slow to save: it goes on from its last checkpoint.
            code = EXIT_FAILED if stop.sigval == signal.SIGQUIT else EXIT_REQUEUE
            if not os.path.exists(path):  # no rank had begun
                print(f"stopped by {stop.sigval.name} while not training: nothing to save", file=sys.stderr)
        told = told_end(path)
        if told == EXIT_REQUEUE and code == EXIT_FAILED:
            told = None  # by a rank that torchrun stopped because another one had died
        return code if told is None else told


if __name__ == "__main__":
    sys.exit(launch(sys.argv[1:]))
