"""Train on a SLURM cluster from Python: `python run_with_submitit.py --nodes 2 --ngpus 8 -- MAIN.PY'S FLAGS`.

One task per GPU runs main.py. Before the time limit (or when a job of higher priority needs the nodes) the run
saves, and the job is queued again and goes on (`--resume auto`). Needs `pip install submitit`, and an
`--output_dir` that all nodes share.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from arguments import OneLineParser, parse_args, positive_int
from distributed import EXIT_DONE, EXIT_REQUEUE
from errors import ConfigError, import_optional
from failures import run_cli


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="run_with_submitit.py", description=__doc__.splitlines()[0].partition(":")[0], allow_abbrev=False
    )
    parser.add_argument("--ngpus", default=8, type=positive_int, help="GPUs, and so ranks, of each node")
    parser.add_argument("--nodes", default=1, type=positive_int, help="nodes")
    parser.add_argument(
        "--timeout", default=1440, type=positive_int, help="minutes until a job is stopped and queued again"
    )
    parser.add_argument("--cpus-per-gpu", default=10, type=positive_int, help="for the loader's processes")
    parser.add_argument("--partition", default=None, help="SLURM's partition; default: the cluster's")
    parser.add_argument("--save-seconds", default=300, type=positive_int, help="warning before the end, to save in")
    parser.add_argument("flags", nargs="+", metavar="-- FLAGS", help="main.py's flags, --output_dir among them")
    return parser


@dataclass
class Training:
    """What every task of the job runs; submitit stores it, and runs the stored one again after a requeue."""

    flags: list[str]
    program: str = str(Path(__file__).resolve().parent)  # the job starts in the folder it was submitted from

    def __call__(self) -> int:
        """Train; queue the job again if it was stopped. Raises RuntimeError for any other end than success."""
        # submitit's own handler for its signal would leave in mid-step; the run finishes its step and saves.
        stopped = []
        signal.signal(signal.SIGUSR2, lambda number, frame: stopped.append(number))
        sys.path.insert(0, self.program)
        from main import main  # it imports torch, which takes its time

        self._find_peers()
        signal.signal(signal.SIGUSR2, lambda number, frame: signal.raise_signal(signal.SIGUSR1))
        code = EXIT_REQUEUE if stopped else main(self.flags)
        signal.signal(signal.SIGUSR2, signal.SIG_IGN)  # it would kill a process that is about to end well
        if code == EXIT_REQUEUE:
            if os.environ["RANK"] == "0":
                subprocess.run(["scontrol", "requeue", os.environ["SLURM_JOB_ID"]], check=True)
        elif code != EXIT_DONE:
            raise RuntimeError(f"main.py ended with exit code {code}; its error is in this job's log")
        return code

    def _find_peers(self) -> None:
        """Set what torchrun would, from what SLURM says."""
        env = os.environ
        hosts = subprocess.run(
            ["scontrol", "show", "hostnames", env["SLURM_JOB_NODELIST"]], capture_output=True, text=True, check=True
        ).stdout.split()
        env["MASTER_ADDR"], env["MASTER_PORT"] = hosts[0], str(20000 + int(env["SLURM_JOB_ID"]) % 20000)
        env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_NTASKS"]
        env["LOCAL_RANK"] = env["SLURM_LOCALID"]


def training(flags: list[str]) -> tuple[Training, Path]:
    """What the job runs, and its folder. Raises ConfigError for flags that cannot work on the cluster."""
    args = parse_args([*flags, "--device", "cpu"])  # the submitting machine may have no GPU
    if not args.output_dir:
        raise ConfigError("--output_dir is needed: checkpoints and the job's logs go there")
    resume = [] if args.resume else ["--resume", "auto"]
    return Training([*flags, *resume]), Path(args.output_dir)


def submit(args: argparse.Namespace) -> None:
    """Submit the job and say its number."""
    submitit = import_optional("submitit", "run_with_submitit.py")
    what, folder = training(args.flags)
    executor = submitit.SlurmExecutor(folder=folder / "slurm")
    executor.update_parameters(
        job_name="vim",
        nodes=args.nodes,
        ntasks_per_node=args.ngpus,
        gpus_per_node=args.ngpus,
        cpus_per_task=args.cpus_per_gpu,
        time=args.timeout,
        signal_delay_s=args.save_seconds,
        **({"partition": args.partition} if args.partition else {}),
    )
    job = executor.submit(what)
    print(f"submitted job {job.job_id}; its logs go to {folder / 'slurm'}")


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_cli(submit, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
