"""What a run says and leaves behind."""

import csv
import dataclasses
import io
import json
import math
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import drawing
import report
from datasets import build_datasets
from engine import StepResult
from errors import ConfigError
from evaluation import Evaluation, Mistake
from helpers import run_args, scalars


def a_row(epoch, **more):
    return {"epoch": epoch, "step": 10 * (epoch + 1), "train_loss": 1.0 / (epoch + 1), "train_lr": 1e-3} | {
        "test_loss": 2.0, "test_acc1": 50.0 + epoch, **more
    }  # fmt: skip


def a_log(folder, *flags, is_main=True):
    return report.RunLog(run_args("--output_dir", str(folder), *flags), is_main)


def write_epochs(log, first, last):
    log.open(first, 10 * first)
    for epoch in range(first, last):
        log.epoch(a_row(epoch))
    log.close()


@pytest.fixture(scope="module")
def digits():
    return build_datasets(run_args("--data-set", "DIGITS", "--input-size", "32"))


# --- files


def test_rows_are_json_lines_a_table_and_tensorboard_events(tmp_path):
    write_epochs(a_log(tmp_path), 0, 3)
    rows = [json.loads(line) for line in (tmp_path / "log.txt").read_text().splitlines()]
    assert rows == [a_row(epoch) for epoch in range(3)]
    with open(tmp_path / "metrics.csv") as file:
        table = list(csv.DictReader(file))
    assert [{key: float(value) for key, value in row.items()} for row in table] == rows
    assert scalars(tmp_path, "epoch/test_acc1") == {10: 50.0, 20: 51.0, 30: 52.0}
    assert Image.open(tmp_path / "curves.png").width > 1000


def test_a_resumed_log_is_the_uninterrupted_one(tmp_path):
    """Also where an epoch's row had been written and its checkpoint had not."""
    write_epochs(a_log(tmp_path / "whole"), 0, 4)
    write_epochs(a_log(tmp_path / "parts"), 0, 3)
    write_epochs(a_log(tmp_path / "parts"), 2, 4)
    for name in ("log.txt", "metrics.csv"):
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert scalars(tmp_path / "parts", "epoch/test_acc1") == scalars(tmp_path / "whole", "epoch/test_acc1")


def test_a_new_run_in_an_old_folder_starts_its_own_log(tmp_path):
    write_epochs(a_log(tmp_path), 0, 3)
    write_epochs(a_log(tmp_path), 0, 1)
    assert (tmp_path / "log.txt").read_text().count("\n") == 1


def test_a_folder_that_tensorboard_cannot_name_is_one_line(tmp_path):
    """Its name is no UTF-8, as names on old storage."""
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/r\xf6"))
    with pytest.raises(ConfigError, match="cannot be TensorBoard's, rename it or add --report-to ''"):
        write_epochs(a_log(folder), 0, 1)


@pytest.mark.parametrize("line", [b"a note", b"\xff\xfe\x00", b"3", b'{"epoch": "x", "kind": 4}', b"{}"])
def test_lines_of_somebody_else_in_a_log_are_passed_over(line, tmp_path, capsys):
    log = a_log(tmp_path)
    write_epochs(log, 0, 2)
    log.incident("stopped", 3, "stopped")
    for name in ("log.txt", "incidents.txt"):
        with open(tmp_path / name, "ab") as file:
            file.write(b"\n" + line + b"\n")
    again = a_log(tmp_path)
    write_epochs(again, 2, 3)
    assert [row["epoch"] for row in again.rows] == [0, 1, 2] and again.incidents() == {"stopped": 1}
    assert f"{tmp_path / 'log.txt'}, line 4 is not of a run: passed over" in capsys.readouterr().out
    again.incident("resumed", 4, "resumed")
    assert again.incidents() == {"stopped": 1, "resumed": 1}


def test_columns_may_appear_late(tmp_path):
    text = report.as_csv([a_row(0), a_row(1, test_ema_acc1=60.0)])
    assert text.splitlines()[0].endswith(",test_ema_acc1")
    assert text.splitlines()[1].endswith(",") and text.splitlines()[2].endswith(",60.0")


def test_a_number_that_is_not_finite_is_null_in_the_log(tmp_path):
    log = a_log(tmp_path)
    log.open(0, 0)
    log.epoch(a_row(0) | {"train_loss": math.nan})
    log.close()
    assert json.loads((tmp_path / "log.txt").read_text())["train_loss"] is None


def test_steps_go_to_the_trackers(tmp_path):
    log = a_log(tmp_path)
    log.open(0, 0)
    log.step(7, StepResult(loss=2.5, grad_norm=math.inf, lr=1e-3, finite=False, stop=False), 123.0)
    log.close()
    assert scalars(tmp_path, "train/loss") == {7: 2.5}
    assert scalars(tmp_path, "train/images_per_second") == {7: 123.0}
    assert "train/grad_norm" not in EventAccumulator(str(tmp_path)).Reload().Tags()["scalars"]


@pytest.mark.parametrize("case", ["no folder", "another rank"])
def test_nothing_is_written_without_a_folder_or_by_other_ranks(case, tmp_path, monkeypatch, capsys, digits):
    monkeypatch.chdir(tmp_path)
    log = a_log("" if case == "no folder" else tmp_path / "run", is_main=case == "no folder")
    log.say("words")
    write_epochs(log, 0, 1)
    log.pictures(an_evaluation(), digits)
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ("words\n" if case == "no folder" else "")


# --- optional trackers


def test_optional_trackers_get_the_same_numbers(tmp_path, monkeypatch):
    calls = []

    def recorder(name):
        return lambda *args, **kwargs: calls.append((name, args, kwargs))

    run = types.SimpleNamespace(log=recorder("wandb.log"), finish=recorder("wandb.finish"))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **settings: run))
    names = ("start_run", "log_params", "log_metrics", "end_run")
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(**{n: recorder(f"mlflow.{n}") for n in names}))
    write_epochs(a_log(tmp_path, "--report-to", "wandb,mlflow"), 0, 1)
    logged = {name: args[0] for name, args, _ in calls if name in ("wandb.log", "mlflow.log_metrics")}
    assert logged["wandb.log"] == logged["mlflow.log_metrics"] == {f"epoch/{k}": v for k, v in a_row(0).items()}
    assert [name for name, _, _ in calls][-2:] == ["wandb.finish", "mlflow.end_run"]
    assert not list(tmp_path.glob("events*"))


def test_folders_of_one_name_are_different_runs(tmp_path, monkeypatch):
    """Weights & Biases goes on with a run by its id; a resumed run has the id that it had."""
    ids = []
    run = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda: None)

    def init(**settings):
        ids.append(settings["id"])
        return run

    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=init))
    for folder in ("a/run", "b/run", "a/run"):
        (tmp_path / folder).mkdir(parents=True, exist_ok=True)
        log = a_log(tmp_path / folder, "--report-to", "wandb")
        log.open(0, 0)
        log.close()
    assert ids[0] == ids[2] != ids[1]


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_a_tracker_that_is_not_installed_says_how_to_install_it(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ConfigError, match=f"^--report-to {name}: .*{name}.*; pip install {name}$"):
        a_log(tmp_path, "--report-to", name).open(0, 0)


# --- progress


def test_where_no_terminal_is_a_line_comes_now_and_then(tmp_path, capsys):
    log = a_log("", "--log-every", "2", "--epochs", "9")
    with log.meter(epoch=3, steps=5, done=0, images_per_step=8) as bar:
        for _ in range(5):
            bar.advance(loss=1.5, lr=1e-3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[:3] for line in lines] == [["epoch 4/9", f"step {n}/5", "loss 1.5000"] for n in (2, 4, 5)]
    assert all("images/s" in line and line.endswith(" left") for line in lines)


def test_a_run_goes_on_when_nobody_reads_what_it_says(tmp_path):
    """Ctrl-C ends `main.py | tee log` with tee first: the lines after it must not end the run unsaved."""
    program = (
        "import sys; sys.path[:0] = sys.argv[1:3]; import report\n"
        "from helpers import run_args\n"
        "log = report.RunLog(run_args('--log-every', '1'), True)\n"
        "sys.stdin.readline()\n"
        "log.say('a line')\n"
        "with log.meter(0, 2, 0, 8) as bar: bar.advance(1.0, 1e-3)\n"
        "log.say('another'); print('saved', file=sys.stderr)\n"
    )
    root = Path(report.__file__).parent
    command = [sys.executable, "-c", program, str(root), str(Path(__file__).parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stderr.read().strip().endswith("saved")
    assert process.returncode == 0


def test_on_a_terminal_there_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    log = a_log("", "--epochs", "9")
    with log.meter(epoch=0, steps=3, done=1, images_per_step=8) as bar:
        for _ in range(2):
            bar.advance(loss=1.5, lr=1e-3)
        bar.bar.refresh()
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "epoch 1/9" in captured.err and "3/3" in captured.err and "images/s" in captured.err


def test_other_ranks_show_no_progress(capsys):
    with a_log("", "--log-every", "1", is_main=False).meter(0, 2, 0, 8) as bar:
        bar.advance(1.0, 1e-3)
    assert capsys.readouterr() == ("", "")


def test_speed_counts_what_this_process_did(monkeypatch):
    now = iter([100.0, 104.0, 104.0])
    monkeypatch.setattr(report.time, "perf_counter", lambda: next(now))
    bar = report.SpeedMeter("", steps=10, done=6, images_per_step=32, every=1)
    bar.advance(1.0, 1.0)
    bar.advance(1.0, 1.0)
    assert bar.images_per_second == 2 * 32 / 4
    assert bar.seconds_left == 4.0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (61, "1:01"), (3725, "1:02:05"), (59.7, "1:00")])
def test_times_read_as_a_clock_shows_them(seconds, text):
    assert report.clock(seconds) == text


# --- pictures


def an_evaluation(mistakes=3, classes=10):
    found = [Mistake(index=i, label=i % 10, predicted=(i + 1) % classes, confidence=0.9) for i in range(mistakes)]
    confusion = torch.eye(classes, dtype=torch.long) * 5 if classes < 100 else None
    return Evaluation(images=360, top1=99.0, top5=100.0, loss=0.1, confusion=confusion, mistakes=found)


@pytest.mark.parametrize("mistakes", [0, 1, 24])
def test_the_pictures_of_an_evaluation(mistakes, tmp_path, digits, capsys):
    log = a_log(tmp_path)
    log.pictures(an_evaluation(mistakes), digits)
    for name in ("confusion.png", "mistakes.png"):
        assert Image.open(tmp_path / name).height > 100
        assert str(tmp_path / name) in capsys.readouterr().out or name == "mistakes.png"


def test_too_many_classes_have_no_confusion_picture(tmp_path, digits):
    a_log(tmp_path).pictures(an_evaluation(classes=5000), digits)
    assert not (tmp_path / "confusion.png").exists() and (tmp_path / "mistakes.png").exists()


def test_names_with_dollars_are_no_formulas(tmp_path, digits):
    """matplotlib would read one between two dollars, and end the run at one that is none."""
    named = dataclasses.replace(digits, class_names=["$x^$", "cost $5_$", *digits.class_names[2:]])
    a_log(tmp_path).pictures(an_evaluation(), named)
    assert Image.open(tmp_path / "confusion.png").height > 100 and Image.open(tmp_path / "mistakes.png").height > 100


def test_names_that_the_font_lacks_are_one_line_for_all_pictures(tmp_path, digits, capsys, recwarn):
    drawing.say_lacking.cache_clear()
    named = dataclasses.replace(digits, class_names=["猫", "犬", *digits.class_names[2:]])
    log = a_log(tmp_path)
    for _ in range(2):
        log.pictures(an_evaluation(), named)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("pictures: the font DejaVu Sans lacks characters of the names")
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]


def test_other_warnings_of_a_picture_stay(tmp_path):
    figure = types.SimpleNamespace(savefig=lambda *_, **__: warnings.warn("something else", stacklevel=1))
    with pytest.warns(UserWarning, match="something else"):
        drawing.save_figure(figure, tmp_path / "a.png")


@pytest.mark.parametrize("name", ["$x^$", "cost $5_$ 6", "$", "a\\$b", "plain"])
def test_a_name_is_drawn_as_it_is(name):

    def drawn(text, **settings):
        figure, file = Figure(figsize=(2, 1)), io.BytesIO()
        figure.text(0.1, 0.5, text, **settings)
        figure.savefig(file)
        return file.getvalue()

    assert drawn(drawing.literal(name)) == drawn(name, parse_math=False)


def test_names_that_are_not_utf8_are_drawn(tmp_path):
    figure = Figure(figsize=(2, 1))
    figure.text(0.1, 0.5, drawing.literal("caf\udce9"))
    figure.savefig(tmp_path / "a.png")


def test_a_class_that_only_the_model_has_is_numbered():
    assert drawing.class_name(["cat", "dog"], 1) == "dog"
    assert drawing.class_name(["cat", "dog"], 7) == "class 7"
