"""What a run says and leaves behind: printed lines, log files and trackers.

`log.txt` (one JSON object an epoch) and `metrics.csv` hold no times, so that a run that was stopped and
resumed leaves the same bytes as one that was not; speeds go to the terminal and to the trackers, and the stops
themselves to `incidents.txt` (one JSON object each).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tqdm import tqdm

from datasets import DataBundle
from distributed import let_go_of_terminal
from drawing import draw_confusion, draw_curves, draw_mistakes
from errors import as_config_error, import_optional
from evaluation import Evaluation
from run_folder import RunFolder, num_earlier

# What `incidents.txt` counts, and how the last line of a run calls it.
INCIDENTS = {
    "stopped": "stopped",
    "resumed": "resumed",
    "restarted": "started again from the beginning",
    "fallback": "damaged checkpoints passed over",
}


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

        with as_config_error(f"--output_dir {output_dir} cannot be TensorBoard's, rename it or add --report-to '': "):
            self.writer = SummaryWriter(output_dir, purge_step=done + 1 if done else 0)

    def log(self, values: dict[str, float], step: int) -> None:
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        self.writer.close()


class WandbTracker(Tracker):
    """Weights & Biases, resumed under the output folder's path and the number of runs before this one in it."""

    def __init__(self, args, output_dir: Path):
        wandb = import_optional("wandb", "--report-to wandb")
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
        self.mlflow = import_optional("mlflow", "--report-to mlflow")
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


def build_trackers(args, output_dir: Path | None, done: int) -> TrackerList:
    """The trackers of `--report-to`, which need an output folder, for a run that has `done` steps behind it."""
    names = [name for name in args.report_to.split(",") if name] if output_dir else []
    makers = {
        "tensorboard": lambda: TensorBoardTracker(output_dir, done),
        "wandb": lambda: WandbTracker(args, output_dir),
        "mlflow": lambda: MlflowTracker(args, output_dir),
    }
    return TrackerList([makers[name]() for name in names])


def print_line(text: str) -> None:
    """Above a progress bar, if there is one. A run goes on without its reader: Ctrl-C ends `| tee` first."""
    try:
        tqdm.write(text, file=sys.stdout)
        sys.stdout.flush()
    except BrokenPipeError:
        let_go_of_terminal((1,))


class RunLog:
    """The one place where a run speaks. On ranks other than the first it is silent and writes nothing."""

    def __init__(self, args, is_main: bool, score: tuple[str, str] = ("top-1", "acc1")):
        self.args = args
        self.is_main = is_main
        self.score = score  # its name, and how its columns end: see `task.Task`
        self.folder = RunFolder(args, is_main, print_line)
        self.rows: list[dict] = []
        self.trackers = TrackerList([])

    @property
    def dir(self) -> Path | None:
        """Where files go; None where nothing is written."""
        return self.folder.path

    def say(self, text: str) -> None:
        if self.is_main:
            print_line(text)

    def incident(self, kind: str, step: int, text: str) -> None:
        """Say something that a smooth run would not, and add it to incidents.txt, which outlives the process."""
        self.say(text)
        if self.dir:
            self.folder.check_own()
            path = self.dir / "incidents.txt"
            before = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
            replace_text(path, before + json.dumps({"kind": kind, "step": step, "text": text}) + "\n")

    def forget_incidents(self) -> None:
        """Delete incidents.txt: it is from an attempt that saved no checkpoint."""
        if self.dir:
            (self.dir / "incidents.txt").unlink(missing_ok=True)

    def incidents(self) -> Counter:
        """How often each of INCIDENTS happened to this run, in all of its processes."""
        path = self.dir / "incidents.txt" if self.dir else None
        if path is None or not path.exists():
            return Counter()
        return Counter(incident["kind"] for incident in self._records(path, "kind", str))

    def incidents_in_words(self) -> str:
        counts = self.incidents()
        return ", ".join(f"{counts[kind]} x {words}" for kind, words in INCIDENTS.items() if counts[kind])

    def open(self, epoch: int, step: int) -> None:
        """Start the log files, or take them up at `epoch`: rows that a crash left after the checkpoint go."""
        self.trackers = build_trackers(self.args, self.dir, step)
        counts = self.incidents()
        self.trackers.log({f"incidents/{kind}": counts[kind] for kind in INCIDENTS}, step)
        if self.dir and epoch and (self.dir / "log.txt").exists():
            self.rows = [row for row in self._records(self.dir / "log.txt", "epoch", int) if row["epoch"] < epoch]

    def _records(self, path: Path, key: str, kind: type) -> Iterator[dict]:
        """The lines of a log file, of which each has a `key` of that `kind`; others are passed over, and told."""
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                record = None
            if isinstance(record, dict) and isinstance(record.get(key), kind):
                yield record
            else:
                self.say(f"{path}, line {number} is not of a run: passed over")

    def step(self, step: int, result, images_per_second: float) -> None:
        """Numbers of one step, for the trackers alone."""
        values = {"loss": result.loss, "grad_norm": result.grad_norm, "lr": result.lr}
        values["images_per_second"] = images_per_second
        self.trackers.log({f"train/{name}": value for name, value in values.items()}, step)

    def epoch(self, row: dict) -> None:
        """Numbers of one epoch: log.txt, metrics.csv, curves.png and the trackers."""
        self.folder.check_own()
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
        self.folder.check_own()
        if evaluation.confusion is not None:
            draw_confusion(evaluation.confusion, data.class_names, self.dir / "confusion.png")
        draw_mistakes(evaluation, data, self.dir / "mistakes.png")
        self.say(f"pictures: {', '.join(str(path) for path in sorted(self.dir.glob('*.png')))}")

    @contextmanager
    def meter(self, epoch: int, steps: int, done: int, images_per_step: int) -> Iterator[SpeedMeter]:
        """A progress bar on a terminal, now and then a line elsewhere."""
        title = f"epoch {epoch + 1}/{self.args.epochs}"
        kind = BarMeter if sys.stderr.isatty() else LineMeter
        meter = (kind if self.is_main else SpeedMeter)(title, steps, done, images_per_step, self.args.log_every)
        try:
            yield meter
        finally:
            meter.close()

    def close(self) -> None:
        self.trackers.close()
        self.folder.release()


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


class SpeedMeter:
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


class LineMeter(SpeedMeter):
    """A plain line every few steps, for log files."""

    def advance(self, loss: float, lr: float) -> None:
        super().advance(loss, lr)
        if self.done % self.every == 0 or self.done == self.steps:
            print_line(
                f"{self.title}  step {self.done}/{self.steps}  loss {loss:.4f}  lr {lr:.2e}  "
                f"{self.images_per_second:.0f} images/s  {clock(self.seconds_left)} left"
            )


class BarMeter(SpeedMeter):
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
