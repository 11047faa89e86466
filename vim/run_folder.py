"""The output folder of a run: one run at a time, and what another has left there is moved aside, never lost."""

from __future__ import annotations

import hashlib
import os
import shutil
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO

import distributed
from checkpoint import FULL, digest_path, set_back
from errors import PASSING, ConfigError

try:
    import fcntl
except ImportError:  # on Windows
    fcntl = None

# What a run leaves in its output folder, and by what it is recognised there.
RUN_SIGNS = ("checkpoint.pth", "checkpoint-[0-9]*.pth*", "log.txt", "incidents.txt")
RUN_FILES = (
    *RUN_SIGNS,
    "best_checkpoint.pth",
    "args.yaml",
    "metrics.csv",
    "curves.png",
    "confusion.png",
    "mistakes.png",
    "detections.png",
    "samples.png",
    "classes.png",
    "overlays",
    "events.out.tfevents.*",
)

# How long a run waits for the end of the one that has its output folder: of its own earlier process, mostly.
LOCK_SECONDS = 60

SAVED_THERE = "what this run has saved is where its folder was moved to; give that as --output_dir to go on"


def gone(path: str | Path) -> str:
    """The line of a run whose output folder is not there any more."""
    return f"--output_dir {path} was moved or removed while its run wrote to it: {SAVED_THERE}"


class RunFolder:
    """`--output_dir` in the hands of one run.

    path: None without that flag, and on ranks other than the first; nothing happens then.
    """

    def __init__(self, args, is_main: bool, say: Callable[[str], None]):
        self.args = args
        self.path = Path(args.output_dir) if args.output_dir and is_main else None
        self.say = say
        self.lock: TextIO | None = None  # see `claim`
        self.launch = ""
        self.owned: os.stat_result | None = None  # see `own`
        if self.path:
            make_folder(self.path)

    def claim(self) -> bool:
        """Take the output folder until this process ends: a second run would overwrite this one's files.

        Returns True if an earlier process of this same launch and command owned the folder, so its files belong to
        this run. Raises ConfigError where another run is at work.
        """
        if not self.path:
            return False
        if fcntl is None:
            raise ConfigError(
                f"--output_dir {self.path}: its lock, links and signals are those of Linux and macOS; on Windows train "
                "in WSL, the Windows Subsystem for Linux"
            )
        path = self.path / "run.lock"
        try:
            self.lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open to the end, as long as held
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; take another --output_dir") from None
        self._try_link()
        command = hashlib.sha256(repr(sorted(vars(self.args).items())).encode()).hexdigest()[:16]
        self.launch = f"{distributed.launch_name()} {command}"
        seconds = min(LOCK_SECONDS, int(self.args.dist_timeout / 2))  # the other ranks wait for this one
        for second in range(seconds + 1):
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a loader process does not inherit it
                return self._began_here()
            except (BlockingIOError, PermissionError):
                if second == 0:
                    self.say(f"{self._in_use()}: waiting {seconds} seconds for its end")
                time.sleep(1)
            except OSError as error:  # a file system without locks
                self.say(f"{path} cannot be locked ({error.strerror}): let no other run use this folder")
                return self._began_here()
        if self._began_here() and not self._noted()[0].endswith(f" on {socket.gethostname()}"):
            # A file server keeps a dead machine's lock for a while. On this machine its holder would be alive.
            self.say(f"{path} is still held by this run's earlier process: going on without it")
            return True
        raise ConfigError(f"{self._in_use()}: stop that run, or take another folder")

    def _try_link(self) -> None:
        """Raises ConfigError where the first checkpoint could not be linked, hours from now."""
        probe = self.path / f".link-{socket.gethostname()}-{os.getpid()}.tmp"
        try:
            probe.unlink(missing_ok=True)
            probe.symlink_to("run.lock")
            probe.unlink(missing_ok=True)
        except OSError as error:
            if error.errno in (*FULL, *PASSING):  # of any file
                raise
            raise ConfigError(
                f"--output_dir {self.path}: no symbolic link can be made there ({error.strerror}), as checkpoint.pth "
                "and best_checkpoint.pth are; take a folder on another file system"
            ) from None

    def own(self) -> None:
        """Note in the folder that what it holds from now on is this run's."""
        if self.lock is not None:
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{self.launch}\n")
            self.lock.flush()
            self.owned = os.stat(self.path)

    def check_own(self) -> None:
        """Raise ConfigError where the folder of this name is not the one that `own` took any more.

        One that was moved or removed under its run would be made anew, and what is there by now may be another
        run's, of which this one's files would become part. A deleted lock alone is no other folder.
        """
        if self.owned is None:
            return
        lock = self.path / "run.lock"
        try:
            same = os.path.samestat(os.stat(self.path), self.owned)
            # Never open our own lock again: closing it would let it go. A new folder can have the old one's number.
            if same and (not lock.exists() or os.path.samestat(os.stat(lock), os.fstat(self.lock.fileno()))):
                return
            by = next(iter(lock.read_text(encoding="utf-8").splitlines()), "another run")
        except FileNotFoundError:
            raise ConfigError(gone(self.path)) from None
        raise ConfigError(f"--output_dir {self.path} is another folder by now, of {by}: {SAVED_THERE}")

    def _noted(self) -> list[str]:
        """What `own` wrote last: the process, the launch."""
        self.lock.seek(0)
        return self.lock.read().splitlines()

    def _began_here(self) -> bool:
        return bool(distributed.launch_name()) and self._noted()[1:] == [self.launch]

    def _in_use(self) -> str:
        return f"--output_dir {self.path} is in use by {next(iter(self._noted()), 'another run')}"

    def make_room(self, why: str) -> None:
        """Move what another run has left in the output folder into one of its own, `earlier-N`, and say so.

        Nothing of it is lost, and `--resume auto` takes none of its checkpoints for this run's.
        """
        if self.path and matching(self.path, RUN_SIGNS):
            left = matching(self.path, RUN_FILES)
            self._refuse_to_move_weights({path.absolute() for path in left} | {path.resolve() for path in left})
            self.say(f"--output_dir {self.path} holds another run, and {why}: moved it to {self._move_aside(left)}")

    def set_back(self, path: Path) -> None:
        """Go on from one of the output folder's own checkpoints: later ones are moved aside, and the log says so."""
        later = set_back(path, self.args.trust_checkpoint)
        if later:
            best = self.path / "best_checkpoint.pth"
            sides = [side for file in later if (side := digest_path(file)).exists()]
            links = [best] if best.is_symlink() and best.resolve() in {file.resolve() for file in later} else []
            folder = self._move_aside([*later, *sides, *links])
            for name in ("log.txt", "metrics.csv"):  # whose later rows go
                if (self.path / name).exists():
                    shutil.copy2(self.path / name, folder)
            self.say(f"--resume {path.name} is not the newest of {self.path}: moved later checkpoints to {folder}")

    def _move_aside(self, files: list[Path]) -> Path:
        folder = self.path / f"earlier-{num_earlier(self.path) + 1}"
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)
        return folder

    def _refuse_to_move_weights(self, left: set[Path]) -> None:
        """A restart would not find them any more. Raises ConfigError."""
        for flag in ("finetune", "teacher_path"):
            weights = getattr(self.args, flag, "")
            path = Path(weights).expanduser()
            if weights and left & {path.absolute(), path.resolve()}:
                raise ConfigError(
                    f"--{flag.replace('_', '-')} {weights} is a file of the run in --output_dir {self.path}, which "
                    "this run would move aside: take another --output_dir"
                )

    def release(self) -> None:
        """Let go of what `claim` took."""
        if self.lock is not None:
            self.lock.close()


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Entries of a folder that fit one of the glob patterns, in the order of their names."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def num_earlier(folder: Path) -> int:
    """How often a run, or the later part of one, has been moved aside in an output folder."""
    numbers = (path.name.removeprefix("earlier-") for path in folder.glob("earlier-*"))
    return max((int(number) for number in numbers if number.isdecimal()), default=0)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise ConfigError(f"--output_dir {path} cannot be written to")
