"""What a run says and leaves behind: printed lines, log files, trackers and pictures.

`log.txt` (one JSON object an epoch) and `metrics.csv` hold no times, so that a run that was stopped and
resumed leaves the same bytes as one that was not; speeds go to the terminal and to the trackers, and the stops
themselves to `incidents.txt` (one JSON object each).
"""

from __future__ import annotations

import csv
import fcntl
import hashlib
import importlib
import io
import json
import math
import os
import shutil
import socket
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

import distributed
from checkpoint import digest_path, set_back
from datasets import DataBundle
from errors import ConfigError
from evaluation import Evaluation

# What `incidents.txt` counts, and how the last line of a run calls it.
INCIDENTS = {
    "stopped": "stopped",
    "resumed": "resumed",
    "restarted": "started again from the beginning",
    "fallback": "damaged checkpoints passed over",
}

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

# More names than this on an axis cannot be read.
MOST_NAMES = 40


class Tracker:
    """Takes numbers by global step and does nothing with them; the others derive from it."""

    def log(self, values: dict[str, float], step: int) -> None:
        pass

    def close(self) -> None:
        pass


class TensorBoardTracker(Tracker):
    """Events for `tensorboard --logdir DIR`; what an earlier run wrote after step `done` is hidden."""

    def __init__(self, output_dir: Path, done: int):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(output_dir, purge_step=done + 1 if done else 0)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbTracker(Tracker):
    """Weights & Biases, resumed under the output folder's path and the number of runs before this one in it."""

    def __init__(self, args, output_dir: Path):
        wandb = import_tracker("wandb")
        earlier = num_earlier(output_dir)
        name = f"{output_dir.name}-{earlier}" if earlier else output_dir.name
        place = hashlib.sha256(str(output_dir.resolve()).encode()).hexdigest()[:16]
        self.run = wandb.init(
            project="vision-mamba", id=f"{place}-{earlier}", name=name, resume="allow", dir=output_dir,
            config=vars(args),
        )  # fmt: skip

    def log(self, values: dict[str, float], step: int) -> None:
        self.run.log(values, step=step)

    def close(self) -> None:
        self.run.finish()


class MlflowTracker(Tracker):
    """MLflow, at the server that its environment variables name."""

    def __init__(self, args, output_dir: Path):
        self.mlflow = import_tracker("mlflow")
        self.mlflow.start_run(run_name=output_dir.name)
        self.mlflow.log_params({key: str(value) for key, value in vars(args).items()})

    def log(self, values: dict[str, float], step: int) -> None:
        self.mlflow.log_metrics(values, step=step)

    def close(self) -> None:
        self.mlflow.end_run()


class TrackerList(Tracker):
    """Several trackers as one; none at all is a tracker too."""

    def __init__(self, trackers: list[Tracker]):
        self.trackers = trackers

    def log(self, values: dict[str, float], step: int) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        for tracker in self.trackers:
            tracker.log(finite, step)

    def close(self) -> None:
        for tracker in self.trackers:
            tracker.close()


def import_tracker(name: str):
    """An optional package. Raises ConfigError with the command that installs it."""
    try:
        return importlib.import_module(name)
    except ImportError:
        raise ConfigError(f"--report-to {name}: the package is not installed; pip install {name}") from None


def build_trackers(args, output_dir: Path | None, done: int) -> TrackerList:
    """The trackers of `--report-to`, which need an output folder, for a run that has `done` steps behind it."""
    names = [name for name in args.report_to.split(",") if name] if output_dir else []
    makers = {
        "tensorboard": lambda: TensorBoardTracker(output_dir, done),
        "wandb": lambda: WandbTracker(args, output_dir),
        "mlflow": lambda: MlflowTracker(args, output_dir),
    }
    return TrackerList([makers[name]() for name in names])


class RunLog:
    """The one place where a run speaks. On ranks other than the first it is silent and writes nothing."""

    def __init__(self, args, is_main: bool, score: tuple[str, str] = ("top-1", "acc1")):
        self.args = args
        self.is_main = is_main
        self.score = score  # its name, and how its columns end: see `task.Task`
        self.dir = Path(args.output_dir) if args.output_dir and is_main else None
        self.rows: list[dict] = []
        self.trackers = TrackerList([])
        self.lock: TextIO | None = None  # see `claim`
        self.launch = ""
        if self.dir:
            make_folder(self.dir)

    def say(self, text: str) -> None:
        if self.is_main:
            tqdm.write(text, file=sys.stdout)
            sys.stdout.flush()

    def incident(self, kind: str, step: int, text: str) -> None:
        """Say something that a smooth run would not, and add it to incidents.txt, which outlives the process."""
        self.say(text)
        if self.dir:
            path = self.dir / "incidents.txt"
            before = path.read_text(encoding="utf-8") if path.exists() else ""
            replace_text(path, before + json.dumps({"kind": kind, "step": step, "text": text}) + "\n")

    def forget_incidents(self) -> None:
        """Those in the output folder are of an attempt that left nothing else."""
        if self.dir:
            (self.dir / "incidents.txt").unlink(missing_ok=True)

    def claim(self) -> bool:
        """Take the output folder until this process ends: a second run would overwrite this one's files.

        Returns whether `own` was called for it by an earlier process that the same launch had started with the same
        command: what is in there is this run's. Raises ConfigError where another run is at work.
        """
        if not self.dir:
            return False
        path = self.dir / "run.lock"
        try:
            self.lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115 - open to the end, as long as held
        except OSError as error:
            raise ConfigError(f"{path}: {error.strerror}; take another --output_dir") from None
        command = hashlib.sha256(repr(sorted(vars(self.args).items())).encode()).hexdigest()[:16]
        self.launch = f"{distributed.launch_name()} {command}"
        seconds = min(LOCK_SECONDS, int(self.args.dist_timeout / 2))  # the other ranks wait for this one
        for second in range(seconds + 1):
            try:
                fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # a loader process does not inherit it
                return self._began_here()
            except (BlockingIOError, PermissionError):
                if self._began_here():  # a dead machine's lock, which a file server keeps for a while
                    self.say(f"{path} is still held by this run's earlier process: going on without it")
                    return True
                if second == 0:
                    self.say(f"{self._in_use()}: waiting {seconds} seconds for its end")
                time.sleep(1)
            except OSError as error:  # a file system without locks
                self.say(f"{path} cannot be locked ({error.strerror}): let no other run use this folder")
                return self._began_here()
        raise ConfigError(f"{self._in_use()}: stop that run, or take another folder")

    def own(self) -> None:
        """Note in the folder that what it holds from now on is this run's."""
        if self.lock is not None:
            self.lock.truncate(0)
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n{self.launch}\n")
            self.lock.flush()

    def _noted(self) -> list[str]:
        """What `own` wrote last: the process, the launch."""
        self.lock.seek(0)
        return self.lock.read().splitlines()

    def _began_here(self) -> bool:
        return bool(distributed.launch_name()) and self._noted()[1:] == [self.launch]

    def _in_use(self) -> str:
        return f"--output_dir {self.dir} is in use by {next(iter(self._noted()), 'another run')}"

    def make_room(self, why: str) -> None:
        """Move what another run has left in the output folder into one of its own, `earlier-N`, and say so.

        Nothing of it is lost, and `--resume auto` takes none of its checkpoints for this run's.
        """
        if self.dir and matching(self.dir, RUN_SIGNS):
            left = matching(self.dir, RUN_FILES)
            self._refuse_to_move_weights({path.absolute() for path in left})
            self.say(f"--output_dir {self.dir} holds another run, and {why}: moved it to {self._move_aside(left)}")

    def set_back(self, path: Path) -> None:
        """Go on from one of the output folder's own checkpoints: those of later steps are moved aside, and said."""
        later = set_back(path)
        if later:
            best = self.dir / "best_checkpoint.pth"
            sides = [side for file in later if (side := digest_path(file)).exists()]
            links = [best] if best.is_symlink() and best.resolve() in {file.resolve() for file in later} else []
            folder = self._move_aside([*later, *sides, *links])
            for name in ("log.txt", "metrics.csv"):  # whose later rows go
                if (self.dir / name).exists():
                    shutil.copy2(self.dir / name, folder)
            self.say(f"--resume {path.name} is not the newest of {self.dir}: moved later checkpoints to {folder}")

    def _move_aside(self, files: list[Path]) -> Path:
        folder = self.dir / f"earlier-{num_earlier(self.dir) + 1}"
        folder.mkdir()
        for path in files:
            path.rename(folder / path.name)
        return folder

    def _refuse_to_move_weights(self, left: set[Path]) -> None:
        """A restart would not find them any more. Raises ConfigError."""
        for flag in ("finetune", "teacher_path"):
            weights = getattr(self.args, flag, "")
            if weights and left & {Path(weights).absolute(), Path(weights).resolve()}:
                raise ConfigError(
                    f"--{flag.replace('_', '-')} {weights} is a file of the run in --output_dir {self.dir}, which this "
                    "run would move aside: take another --output_dir"
                )

    def incidents(self) -> Counter:
        """How often each of INCIDENTS happened to this run, in all of its processes."""
        path = self.dir / "incidents.txt" if self.dir else None
        if path is None or not path.exists():
            return Counter()
        return Counter(json.loads(line)["kind"] for line in path.read_text(encoding="utf-8").splitlines())

    def incidents_in_words(self) -> str:
        counts = self.incidents()
        return ", ".join(f"{counts[kind]} x {words}" for kind, words in INCIDENTS.items() if counts[kind])

    def open(self, epoch: int, step: int) -> None:
        """Start the log files, or take them up at `epoch`: rows that a crash left after the checkpoint go."""
        self.trackers = build_trackers(self.args, self.dir, step)
        counts = self.incidents()
        self.trackers.log({f"incidents/{kind}": counts[kind] for kind in INCIDENTS}, step)
        if self.dir and epoch and (self.dir / "log.txt").exists():
            lines = (self.dir / "log.txt").read_text(encoding="utf-8").splitlines()
            self.rows = [row for row in map(json.loads, lines) if row["epoch"] < epoch]

    def step(self, step: int, result, images_per_second: float) -> None:
        """Numbers of one step, for the trackers alone."""
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
        values["images_per_second"] = images_per_second
        self.trackers.log({f"train/{name}": value for name, value in values.items()}, step)

    def epoch(self, row: dict) -> None:
        """Numbers of one epoch: log.txt, metrics.csv, curves.png and the trackers."""
        self.trackers.log({f"epoch/{name}": value for name, value in row.items()}, row["step"])
        # JSON has no NaN: an epoch without one finite step has no loss.
        self.rows.append({name: value if math.isfinite(value) else None for name, value in row.items()})
        if self.dir:
            replace_text(self.dir / "log.txt", "".join(json.dumps(row) + "\n" for row in self.rows))
            replace_text(self.dir / "metrics.csv", as_csv(self.rows))
            draw_curves(self.rows, self.dir / "curves.png", self.score)

    def pictures(self, evaluation: Evaluation, data: DataBundle) -> None:
        """The confusion matrix and the most confident mistakes of an evaluation."""
        if not self.dir:
            return
        if evaluation.confusion is not None:
            draw_confusion(evaluation.confusion, data.class_names, self.dir / "confusion.png")
        draw_mistakes(evaluation, data, self.dir / "mistakes.png")
        self.say(f"pictures: {', '.join(str(path) for path in sorted(self.dir.glob('*.png')))}")

    @contextmanager
    def progress(self, epoch: int, steps: int, done: int, images_per_step: int) -> Iterator[Progress]:
        """A progress bar on a terminal, now and then a line elsewhere."""
        title = f"epoch {epoch + 1}/{self.args.epochs}"
        kind = TerminalProgress if sys.stderr.isatty() else LineProgress
        bar = (kind if self.is_main else Progress)(title, steps, done, images_per_step, self.args.log_every)
        try:
            yield bar
        finally:
            bar.close()

    def close(self) -> None:
        self.trackers.close()
        if self.lock is not None:
            self.lock.close()


def matching(folder: Path, patterns: Iterable[str]) -> list[Path]:
    """Entries of a folder that fit one of the glob patterns, in the order of their names."""
    return sorted({path for pattern in patterns for path in folder.glob(pattern)})


def num_earlier(folder: Path) -> int:
    """How often a run, or the later part of one, has been moved aside in an output folder."""
    numbers = (path.name.removeprefix("earlier-") for path in folder.glob("earlier-*"))
    return max((int(number) for number in numbers if number.isdigit()), default=0)


def make_folder(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--output_dir {path} cannot be made: {error.strerror}") from None
    if not os.access(path, os.W_OK):
        raise ConfigError(f"--output_dir {path} cannot be written to")


def replace_text(path: Path, text: str) -> None:
    """Write a whole file at once, so that nobody ever sees half of it, not after a crash either."""
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def as_csv(rows: list[dict]) -> str:
    """Rows under the names of all their columns, in the order of appearance."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


class Progress:
    """Measures the speed of an epoch and shows nothing."""

    def __init__(self, title: str, steps: int, done: int, images_per_step: int, every: int):
        self.title = title
        self.steps = steps
        self.done = done
        self.images_per_step = images_per_step
        self.every = every
        self.began = time.perf_counter()
        self.done_at_start = done

    @property
    def images_per_second(self) -> float:
        seconds = time.perf_counter() - self.began
        return (self.done - self.done_at_start) * self.images_per_step / max(seconds, 1e-9)

    @property
    def seconds_left(self) -> float:
        return (self.steps - self.done) * self.images_per_step / max(self.images_per_second, 1e-9)

    def advance(self, loss: float, lr: float) -> None:
        self.done += 1

    def close(self) -> None:
        pass


class LineProgress(Progress):
    """A plain line every few steps, for log files."""

    def advance(self, loss: float, lr: float) -> None:
        super().advance(loss, lr)
        if self.done % self.every == 0 or self.done == self.steps:
            print(
                f"{self.title}  step {self.done}/{self.steps}  loss {loss:.4f}  lr {lr:.2e}  "
                f"{self.images_per_second:.0f} images/s  {clock(self.seconds_left)} left",
                flush=True,
            )


class TerminalProgress(Progress):
    """A bar with the loss, images/s and the time left."""

    def __init__(self, title: str, steps: int, done: int, images_per_step: int, every: int):
        super().__init__(title, steps, done, images_per_step, every)
        layout = "{desc} |{bar}| {n_fmt}/{total_fmt} {postfix} {remaining} left"
        self.bar = tqdm(total=steps, initial=done, desc=title, bar_format=layout, leave=False, dynamic_ncols=True)

    def advance(self, loss: float, lr: float) -> None:
        super().advance(loss, lr)
        self.bar.set_postfix_str(f"loss {loss:.3f} lr {lr:.1e} {self.images_per_second:.0f} images/s", refresh=False)
        self.bar.update()

    def close(self) -> None:
        self.bar.close()


def clock(seconds: float) -> str:
    """Seconds as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def draw_curves(rows: list[dict], path: Path, score: tuple[str, str]) -> None:
    """Loss, score and learning rate over epochs, side by side."""
    name, column = score
    figure = Figure(figsize=(12, 3.5))
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.15, top=0.91, wspace=0.18)
    wanted = (
        ("loss", {"train_loss": "training", "test_loss": "held-out", "test_ema_loss": "held-out, EMA"}),
        (f"{name}, %", {f"test_{column}": "held-out", f"test_ema_{column}": "held-out, EMA"}),
        ("learning rate", {"train_lr": ""}),
    )
    for panel, (title, columns) in zip(panels, wanted):
        for key, label in columns.items():
            points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
            if points:
                panel.plot(*zip(*points), marker="o", markersize=3, label=label)
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1:
            panel.legend()
    figure.savefig(path, dpi=120)


def draw_confusion(confusion: torch.Tensor, names: list[str], path: Path) -> None:
    """Counts (C, C) of (label, predicted), each row as shares of its label's images."""
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    size = min(4 + 0.3 * len(confusion), 14)
    figure = Figure(figsize=(size + 1, size), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label", title="share of each label's images")
    if len(names) <= MOST_NAMES:
        shown = [literal(name) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(names)), shown)
    if len(confusion) <= 20:
        for (row, column), count in zip(confusion.ne(-1).nonzero().tolist(), confusion.flatten().tolist()):
            color = "black" if shares[row, column] > 0.5 else "white"
            if count:
                axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, shrink=0.8)
    figure.savefig(path, dpi=120)


def draw_mistakes(evaluation: Evaluation, data: DataBundle, path: Path, columns: int = 6) -> None:
    """The images that the model was surest about and wrong, with label, prediction and confidence."""
    mistakes, names = evaluation.mistakes, data.class_names
    lines = max(1, -(-len(mistakes) // columns))
    figure = Figure(figsize=(columns * 1.9, 0.6 + lines * 2.3), layout="constrained")
    figure.suptitle(f"most confident mistakes; {evaluation.top1:.2f} % of {evaluation.images:,} images are right")
    for panel in figure.subplots(lines, columns, squeeze=False).flat:
        panel.axis("off")
    for panel, mistake in zip(figure.axes, mistakes):
        panel.imshow(data.val.raw(mistake.index))
        label, predicted = names[mistake.label], class_name(names, mistake.predicted)
        title = f"{label}\ntaken for {predicted}, {100 * mistake.confidence:.0f} %"
        panel.set_title(literal(title), fontsize=8)
    figure.savefig(path, dpi=120)


def literal(text: str) -> str:
    """For matplotlib, which would read a formula between two dollars."""
    return text.replace("$", r"\$")


def class_name(names: list[str], label: int) -> str:
    """The name of a class; a model may have more classes than the data."""
    return names[label] if label < len(names) else f"class {label}"
