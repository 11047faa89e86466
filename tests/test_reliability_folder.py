"""One run to an output folder, and no weights lost in it: whoever comes second waits, is refused or moves aside.

Promises and their numbers: docs/RELIABILITY.md.
"""

import argparse
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import report
import run_folder
from checkpoint import latest_checkpoint, read_checkpoint
from distributed import EXIT_CONFIG, EXIT_FAILED, EXIT_REQUEUE
from errors import ConfigError
from helpers import run_args, write_image_folder
from main import main
from processes import QUICK, STEPS, fault, no_pictures, pieces, start, wait_for_a_step  # noqa: F401


def run(flags: str, folder: Path) -> int:
    return main([*flags.split(), "--output_dir", str(folder)])


def step_of(link: Path) -> int:
    return read_checkpoint(link).step


@pytest.fixture
def busy(tmp_path):
    """(folder, process) of a run that has trained for a step and stays."""
    folder = tmp_path / "busy"
    process = start(f"{QUICK} --epochs 500 --output_dir {folder}", tmp_path / "out", VIM_FAULT="hang@3:0")
    wait_for_a_step(process, tmp_path / "out")
    yield folder, process
    process.kill()
    process.join()


@pytest.mark.parametrize("resume", ["", "--resume auto"])
def test_a_second_run_in_a_folder_is_refused(resume, busy, monkeypatch, capsys):
    folder, process = busy
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    before = sorted(folder.iterdir())
    assert run(f"{QUICK} {resume}", folder) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert said.startswith(f"error: --output_dir {folder} is in use by process {process.pid} on ")
    assert "another folder" in said and said.count("\n") == 1
    assert sorted(folder.iterdir()) == before


@pytest.fixture
def whenever_an_epoch_is_logged(monkeypatch):
    """Call a function each time, before the log is written."""

    def register(function) -> None:
        true_epoch = report.RunLog.epoch
        monkeypatch.setattr(report.RunLog, "epoch", lambda *arguments: (function(), true_epoch(*arguments)))

    return register


@pytest.mark.filterwarnings("ignore:Exception in thread")  # TensorBoard's own
@pytest.mark.parametrize("trackers", ["tensorboard", ""])
def test_a_folder_that_was_moved_under_its_run_is_not_made_anew(
    trackers, tmp_path, whenever_an_epoch_is_logged, capsys
):
    folder, moved = tmp_path / "run", tmp_path / "moved"
    whenever_an_epoch_is_logged(lambda: latest_checkpoint(folder) and folder.rename(moved))
    assert run(f"{QUICK} --report-to={trackers}", folder) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert said == f"error: {run_folder.gone(folder)}\n"
    assert not folder.exists() and read_checkpoint(latest_checkpoint(moved)).epoch == 0


def test_a_run_writes_nothing_into_the_folder_that_took_its_own_ones_place(
    tmp_path, whenever_an_epoch_is_logged, capsys
):
    folder, moved = tmp_path / "run", tmp_path / "moved"

    def replace() -> None:
        if latest_checkpoint(folder):
            folder.rename(moved)
            folder.mkdir()
            (folder / "run.lock").write_text("process 1 on elsewhere\n\n")

    whenever_an_epoch_is_logged(replace)
    assert run(f"{QUICK} --report-to=", folder) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert said.startswith(f"error: --output_dir {folder} is another folder by now, of process 1 on elsewhere: ")
    assert [path.name for path in folder.iterdir()] == ["run.lock"] and latest_checkpoint(moved)


def test_looking_into_the_lock_does_not_let_it_go(tmp_path):
    """Closing any descriptor of a file gives up a process's locks on it."""
    first = run_folder.RunFolder(argparse.Namespace(output_dir=str(tmp_path), dist_timeout=60), True, print)
    first.claim()
    first.own()
    first.check_own()
    claim = "import fcntl, sys; fcntl.lockf(open(sys.argv[1], 'a'), fcntl.LOCK_EX | fcntl.LOCK_NB)"
    second = subprocess.run([sys.executable, "-c", claim, tmp_path / "run.lock"], capture_output=True, text=True)
    first.release()
    assert "BlockingIOError" in second.stderr


WINDOWS = """
import os, signal, sys, tiny, main  # with all that is not ours, which may need what is deleted here
for name in [name for name in sys.modules if getattr(sys.modules[name], "__file__", None)]:
    if os.path.dirname(sys.modules[name].__file__) == os.path.dirname(main.__file__):
        del sys.modules[name]
for place, name in ((signal, "SIGUSR1"), (signal, "SIGHUP"), (signal, "SIGKILL"), (os, "setpgid")):
    delattr(place, name)
sys.modules["fcntl"] = None
import checkpoint, export, main, predict, visualize
sys.exit(main.main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_without_locks_and_unix_signals_all_but_training_into_a_folder_works(tmp_path):
    """A system such as Windows: the programs start, train without a folder, and refuse one in a line."""
    flags = f"{QUICK} --epochs 1 --report-to="
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    for more, code in ((["--output_dir", str(tmp_path / "run")], EXIT_CONFIG), ([], 0)):
        command = [sys.executable, "-c", WINDOWS, *flags.split(), *more]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
        assert done.returncode == code, done.stderr
        assert done.stderr.count("in WSL, the Windows Subsystem for Linux\n") == (code != 0)


def test_a_new_folder_without_a_lock_in_the_place_of_a_moved_one_is_another(tmp_path):
    run = run_folder.RunFolder(argparse.Namespace(output_dir=str(tmp_path / "run"), dist_timeout=60), True, print)
    run.claim()
    run.own()
    (tmp_path / "run").rename(tmp_path / "moved")
    (tmp_path / "run").mkdir()
    with pytest.raises(ConfigError, match="was moved or removed while its run wrote to it"):
        run.check_own()
    run.release()


def test_a_run_goes_on_where_its_lock_was_deleted(tmp_path, whenever_an_epoch_is_logged):
    whenever_an_epoch_is_logged((tmp_path / "run.lock").unlink)
    assert run(f"{QUICK} --epochs 1", tmp_path) == 0


@pytest.mark.parametrize(
    ("number", "code", "line"),
    [
        (errno.EOPNOTSUPP, EXIT_CONFIG, "no symbolic link can be made there (Operation not supported)"),
        (errno.ENOSPC, EXIT_CONFIG, "No space left on device"),
        (errno.EIO, EXIT_FAILED, "Input/output error"),
    ],
)
def test_a_folder_without_links_is_refused_at_once(number, code, line, tmp_path, monkeypatch, capsys):
    """Not by the first checkpoint, an epoch later. What is no matter of links is said as it is."""

    def symlink_to(self, target):
        raise OSError(number, os.strerror(number), str(self))

    monkeypatch.setattr(Path, "symlink_to", symlink_to)
    assert run(QUICK, tmp_path) == code
    said = capsys.readouterr().err
    assert line in said and ("symbolic link" in said) == (number == errno.EOPNOTSUPP) and "Traceback" not in said


def test_a_folder_is_free_as_soon_as_its_run_was_killed(busy, monkeypatch):
    """Loader processes, which may outlive it for some seconds, do not hold the lock."""
    folder, process = busy
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    process.kill()
    process.join()
    assert run(f"{QUICK} --epochs 1 --resume auto", folder) == 0


@pytest.fixture(scope="module")
def first(tmp_path_factory):
    """A run of one epoch, to resume from."""
    folder = tmp_path_factory.mktemp("first")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw_curves", lambda *arguments: None)
        assert run(f"{QUICK} --epochs 1", folder) == 0
    return folder


def test_a_run_resumed_from_elsewhere_moves_another_one_aside(first, tmp_path, capsys):
    assert run(f"{QUICK} --seed 5 --epochs 1", tmp_path) == 0
    older = pieces(tmp_path)
    assert run(f"{QUICK} --resume {first / 'checkpoint.pth'}", tmp_path) == 0
    assert f"is not of it: moved it to {tmp_path / 'earlier-1'}" in capsys.readouterr().out
    assert pieces(tmp_path / "earlier-1") == older


@pytest.mark.parametrize("resume", ["named", "none"])
def test_a_run_started_again_goes_on_from_its_own_checkpoints(resume, first, tmp_path, monkeypatch, capsys):
    """A scheduler repeats the whole command, --resume FILE included."""
    flags = QUICK + (f" --resume {first / 'checkpoint.pth'}" if resume == "named" else "")
    begins = STEPS if resume == "named" else 0
    assert run(flags, tmp_path / "whole") == 0
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run(f"{QUICK} --seed 5", tmp_path / "parts") == 0  # an older run
    with fault(f"sigterm@{begins + 3}"):
        assert run(flags, tmp_path / "parts") == EXIT_REQUEUE
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(flags, tmp_path / "parts") == 0
    assert f"resuming (restart 1) {tmp_path / 'parts'}/checkpoint-{begins + 4:08d}.pth" in capsys.readouterr().out
    assert pieces(tmp_path / "whole") == pieces(tmp_path / "parts")


def test_a_start_that_never_had_the_folder_is_no_start(first, tmp_path, monkeypatch, capsys):
    """Its process died on the way to the weights; what lies in the folder is still another run's."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run(f"{QUICK} --seed 5 --epochs 1", tmp_path) == 0
    older, flags = pieces(tmp_path), f"{QUICK} --resume {first / 'checkpoint.pth'}"
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr("lifecycle.fetch", lambda address: (_ for _ in ()).throw(ConnectionError()))
        run(flags, tmp_path)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(flags, tmp_path) == 0
    assert f"resuming (restart 1) {first}" in capsys.readouterr().out
    assert pieces(tmp_path / "earlier-1") == older


def test_a_second_command_of_a_repeated_job_is_its_own(tmp_path, monkeypatch, capsys):
    """The count of restarts stays for the rest of a job."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(f"{QUICK} --checkpoint-steps 6 --keep-checkpoints 6", tmp_path) == 0
    assert run(f"{QUICK} --epochs 1 --resume {tmp_path / 'checkpoint-00000006.pth'}", tmp_path) == 0
    assert f"resuming (restart 1) {tmp_path / 'checkpoint-00000006.pth'}" in capsys.readouterr().out


def test_a_lock_that_a_dead_machine_left_does_not_stop_its_run(busy, monkeypatch, capsys):
    """A file server lets go of it late; the scheduler has started the same command again."""
    folder, _ = busy
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    noted = (folder / "run.lock").read_text()
    taken = run_folder.RunFolder(run_args("--output_dir", str(folder)), True, print)
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    with pytest.raises(ConfigError, match=f"is in use by {noted.splitlines()[0]}: stop that run"):
        taken.claim()
    (folder / "run.lock").write_text(f"{noted.splitlines()[0]}\n{taken.launch}\n")
    with pytest.raises(ConfigError, match=r"is in use by .*: stop that run"):
        taken.claim()  # the same command once more in the same job, on the machine where the first one lives
    (folder / "run.lock").write_text(f"process 1 on gone\n{taken.launch}\n")
    assert taken.claim()
    assert "run.lock is still held by this run's earlier process: going on" in capsys.readouterr().out


def test_another_launch_is_not_a_start_again(first, tmp_path, monkeypatch, capsys):
    """Its first process died before it had the folder, in which an older run lies."""
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    assert run(f"{QUICK} --seed 5 --epochs 1", tmp_path) == 0
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert run(f"{QUICK} --resume {first / 'checkpoint.pth'}", tmp_path) == 0
    text = capsys.readouterr().out
    assert f"resuming (restart 1) {first}" in text and f"moved it to {tmp_path / 'earlier-1'}" in text


def test_a_teacher_that_would_be_moved_aside_is_refused(tmp_path):
    file = tmp_path / "checkpoint.pth"
    file.touch()
    args = argparse.Namespace(output_dir=str(tmp_path), finetune="", teacher_path=str(file))
    with pytest.raises(ConfigError, match=r"^--teacher-path .* is a file of the run in --output_dir"):
        run_folder.RunFolder(args, True, print).make_room("it is another run's")
    assert file.exists()


def test_what_is_moved_aside_has_a_number_above_all_that_are_there(tmp_path):
    assert run_folder.num_earlier(tmp_path) == 0
    for name in ("earlier-3", "earlier-notes"):
        (tmp_path / name).mkdir()
    assert run_folder.num_earlier(tmp_path) == 3


def test_going_back_in_a_folder_moves_later_checkpoints_aside(tmp_path, capsys):
    """The best one among them would be overwritten, at an equal step, by a worse one."""
    assert run(f"{QUICK} --checkpoint-steps 6 --keep-checkpoints 6", tmp_path) == 0
    assert step_of(tmp_path / "best_checkpoint.pth") == 2 * STEPS
    best, *rows = ((tmp_path / name).read_bytes() for name in ("best_checkpoint.pth", "log.txt", "metrics.csv"))
    flags = f"{QUICK} --epochs 1 --lr 0 --resume {tmp_path / 'checkpoint-00000006.pth'}"
    assert run(flags, tmp_path) == 0
    aside = tmp_path / "earlier-1"
    assert f"moved later checkpoints to {aside}" in capsys.readouterr().out
    assert (aside / "best_checkpoint.pth").read_bytes() == best
    assert [(aside / name).read_bytes() for name in ("log.txt", "metrics.csv")] == rows
    assert step_of(latest_checkpoint(aside)) == 2 * STEPS
    assert step_of(tmp_path / "best_checkpoint.pth") == step_of(tmp_path / "checkpoint.pth") == STEPS


def test_going_back_in_a_copy_whose_links_became_files_moves_later_checkpoints_aside(tmp_path, capsys):
    """`cp -rL`, and what copies to an object store, follows links."""
    original, copied = tmp_path / "run", tmp_path / "copied"
    assert run(f"{QUICK} --lr 0 --min-lr 0 --epochs 3 --keep-checkpoints 6", original) == 0
    shutil.copytree(original, copied, symlinks=False)
    assert step_of(copied / "best_checkpoint.pth") == STEPS and not (copied / "best_checkpoint.pth").is_symlink()
    flags = f"{QUICK} --lr 0 --min-lr 0 --epochs 2 --keep-checkpoints 2 --resume {copied / 'best_checkpoint.pth'}"
    assert run(flags, copied) == 0
    assert f"moved later checkpoints to {copied / 'earlier-1'}" in capsys.readouterr().out
    assert step_of(latest_checkpoint(copied / "earlier-1")) == 3 * STEPS
    assert step_of(latest_checkpoint(copied)) == 2 * STEPS


def test_a_file_of_another_program_is_not_overwritten(first, tmp_path):
    """The published program calls its newest weights checkpoint.pth."""
    shutil.copy(first / "checkpoint.pth", tmp_path / "checkpoint.pth")
    published = (tmp_path / "checkpoint.pth").read_bytes()
    assert run(f"{QUICK} --resume {tmp_path / 'checkpoint.pth'}", tmp_path) == 0
    assert step_of(tmp_path / "checkpoint.pth") == 2 * STEPS
    assert (tmp_path / "checkpoint-before.pth").read_bytes() == published


def test_a_resume_with_other_flags_says_them_and_takes_them(first, tmp_path, capsys):
    assert run(f"{QUICK} --weight-decay 0.9 --resume {first / 'checkpoint.pth'}", tmp_path) == 0
    assert "; other than before: epochs 2 (was 1), weight_decay 0.9 (was 0.05)\n" in capsys.readouterr().out
    groups = read_checkpoint(tmp_path / "checkpoint.pth").optimizer["param_groups"]
    assert {group["weight_decay"] for group in groups} == {0.0, 0.9}


@pytest.mark.parametrize("sched", ["none", "plateau", "constant"])
def test_a_resume_takes_the_flags_rates(sched, first, tmp_path):
    """Also those that no schedule sets anew: without one, and what a plateau would have made of it."""
    begun = tmp_path / "begun"
    assert run(f"{QUICK} --epochs 1 --warmup-epochs 0 --lr 1e-3 --sched {sched}", begun) == 0
    flags = f"{QUICK} --warmup-epochs 0 --lr 1e-5 --sched {sched} --resume {begun / 'checkpoint.pth'}"
    assert run(flags, tmp_path / "resumed") == 0
    rates = [json.loads(line)["train_lr"] for line in (begun / "log.txt").read_text().splitlines()]
    rates += [json.loads(line)["train_lr"] for line in (tmp_path / "resumed" / "log.txt").read_text().splitlines()]
    assert rates[-1] == pytest.approx(rates[0] / 100)


def test_a_resume_takes_the_flags_layer_decay(tmp_path):
    flags = f"{QUICK} --warmup-epochs 0 --sched constant"
    assert run(f"{flags} --epochs 1 --layer-decay 0.75", tmp_path / "begun") == 0
    assert run(f"{flags} --layer-decay 0.1 --resume {tmp_path / 'begun' / 'checkpoint.pth'}", tmp_path / "resumed") == 0
    groups = read_checkpoint(tmp_path / "resumed" / "checkpoint.pth").optimizer["param_groups"]
    assert min(group["lr_scale"] for group in groups) < 0.002


def test_the_saved_flags_leave_the_number_of_classes_to_the_data(first):
    """They may be used with other data; what was trained is in the checkpoint."""
    assert yaml.safe_load((first / "args.yaml").read_text())["num_classes"] is None
    assert read_checkpoint(first / "checkpoint.pth").args.num_classes == 10


def test_the_best_is_found_anew_where_other_weights_are_evaluated(first, tmp_path, capsys):
    flags = f"{QUICK} --model-ema --model-ema-decay 0.5"
    assert run(f"{flags} --epochs 1", tmp_path) == 0
    assert run(f"{flags} --epochs 2 --resume auto --eval-weights ema", tmp_path) == 0
    said = capsys.readouterr().out
    assert "eval_weights ema (was both)" in said and "no best top-1 is known of the epochs before" in said


def test_a_place_in_the_epoch_that_does_not_fit_is_said(tmp_path, capsys):
    with fault("sigterm@9"):  # behind 1,280 images
        assert run(QUICK, tmp_path) == EXIT_REQUEUE
    assert run(f"{QUICK} --batch-size 300 --epochs 1 --resume auto", tmp_path) == 0
    said = "batch_size 300 (was 128), epochs 1 (was 2), whole batch 300 (was 128), and with it the steps of an epoch"
    said += ", 80 images of the epoch come twice"
    assert said in capsys.readouterr().out


def test_an_epoch_of_fewer_images_is_one_line(tmp_path, capsys):
    with fault("sigterm@9"):
        assert run(QUICK, tmp_path / "run") == EXIT_REQUEUE
    data = write_image_folder(tmp_path / "data", tuple("abcdefghij"), per_class=13)
    assert run(f"{QUICK} --data-path {data} --resume auto", tmp_path / "run") == EXIT_CONFIG
    said = capsys.readouterr().err
    assert "has seen 1,280 images of an epoch, which has 1 batches here: give the data and flags" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_a_signal_to_a_finished_run_changes_nothing(number, tmp_path, monkeypatch):
    monkeypatch.setattr("lifecycle.distributed.finish", lambda: signal.raise_signal(number))
    assert run(f"{QUICK} --epochs 1", tmp_path) == 0
