"""R2, R4, R6, R8, R11, R13, R14: what goes wrong ends soon, on all ranks, with one line and the right exit code.

Promises and their numbers: docs/RELIABILITY.md.
"""

import errno
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch

import checkpoint as checkpoints
import datasets
import distributed
import failures
import faults
import main as program
import report
from checkpoint import CheckpointWriter, latest_checkpoint, read_checkpoint
from datasets import ImageDataset
from errors import CheckpointError
from helpers import run_args, scalars, write_image_folder
from main import main
from processes import QUICK, STEPS, end, fault, no_pictures, pieces, start, start_ranks, wait_for_a_step  # noqa: F401

ROOT = Path(__file__).resolve().parents[1]


def run(flags: str, folder: Path) -> int:
    return main([*flags.split(), "--output_dir", str(folder)])


def one_line(capsys) -> str:
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


# --- the switch


@pytest.mark.parametrize("text", ["fire@1", "nan", "nan@", "nan@-1", "nan@1:x"])
def test_a_fault_that_does_not_exist_is_refused(text):
    with fault(text), pytest.raises(ValueError, match="expected KIND@STEP or KIND@STEP:RANK, KIND one of raise-before"):
        faults.planned()


def test_a_fault_strikes_at_its_step_on_its_rank_and_not_after_a_restart(monkeypatch):
    loss = torch.ones(())
    with fault("nan@3:1"):
        for step, rank in ((2, 1), (3, 0), (4, 1)):
            assert faults.before_exchange(step, rank, loss) is loss
        assert faults.before_exchange(3, 1, loss).isnan()
        monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
        assert faults.before_exchange(3, 1, loss) is loss


def test_a_signal_from_outside_ends_the_tests_and_not_the_run_under_test():
    """conftest.py: else whoever stops pytest would only end one test."""
    with distributed.StopSignal() as stop:
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"):
            os.kill(os.getpid(), signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == "SIGTERM"


@pytest.mark.parametrize("number", distributed.StopSignal.HANDLED)
def test_a_signal_before_the_first_step_asks_for_a_requeue_at_once(number, tmp_path, monkeypatch, capsys):
    """As while a large folder is scanned: there is nothing to save yet."""
    if signal.getsignal(number) is signal.SIG_IGN:
        pytest.skip("pytest runs under nohup")
    monkeypatch.setattr(program, "build_datasets", lambda args: signal.raise_signal(number))
    before = signal.getsignal(number)
    assert run(QUICK, tmp_path) == distributed.EXIT_REQUEUE
    assert capsys.readouterr().err == f"stopped by {signal.Signals(number).name} while not training: nothing to save\n"
    assert signal.getsignal(number) is before and not list(tmp_path.iterdir())


def test_a_run_in_a_thread_leaves_signals_to_the_main_one():
    """Python has no handlers elsewhere, and to be told so would end the run."""
    before, seen = signal.getsignal(signal.SIGTERM), []

    def run():
        with distributed.StopSignal() as stop:
            seen.append((stop.received, signal.getsignal(signal.SIGTERM)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert seen == [(None, before)]


# --- R11: no hang


RAISES = {
    "before the exchange": ("raise-before@3:1", "InjectedError"),
    "inside the exchange": ("raise-inside@3:1", "InjectedError"),
    "after the exchange": ("raise-after@3:1", "InjectedError"),
    "out of memory": ("oom@3:1", "error: out of memory with --batch-size 64"),
}


@pytest.mark.slow
@pytest.mark.parametrize("moment", RAISES)
def test_an_error_on_one_rank_ends_the_other_soon(moment, tmp_path):
    text, said = RAISES[moment]
    flags = f"{QUICK} --batch-size 64 --output_dir {tmp_path}"
    codes = end(start_ranks(flags, tmp_path / "out", VIM_FAULT=text), 60)
    assert codes == [distributed.EXIT_FAILED, distributed.EXIT_CONFIG if "oom" in text else 1]
    assert said in (tmp_path / "out.1").read_text()
    assert "error: another rank died or did not answer in time" in (tmp_path / "out.0").read_text()


@pytest.mark.slow
def test_a_rank_that_hangs_is_waited_for_as_long_as_said(tmp_path):
    flags = f"{QUICK} --batch-size 64 --dist-timeout 10"
    alive, hanging = start_ranks(flags, tmp_path / "out", VIM_FAULT="hang@3:1")
    try:
        assert end([alive], 60) == [distributed.EXIT_FAILED]
    finally:
        hanging.kill()
    assert "error: another rank died or did not answer in time" in (tmp_path / "out.0").read_text()


@pytest.mark.slow
def test_an_error_that_only_rank_0_can_have_is_every_ranks(tmp_path):
    """A folder that cannot be made, known before the first exchange."""
    (tmp_path / "file").write_text("")
    flags = f"{QUICK} --batch-size 64 --output_dir {tmp_path / 'file' / 'run'}"
    assert end(start_ranks(flags, tmp_path / "out"), 60) == [4, 4]
    assert "error: --output_dir" in (tmp_path / "out.0").read_text()
    assert "error: rank 0 failed: --output_dir" in (tmp_path / "out.1").read_text()


def broken_reading(monkeypatch, breakage) -> None:
    """Have reading image 700 do something in a loader's worker."""
    true_get = ImageDataset.__getitem__

    def get(self, key):
        if key[1] == 700 and torch.utils.data.get_worker_info() is not None:
            breakage()
        return true_get(self, key)

    monkeypatch.setattr(ImageDataset, "__getitem__", get)


def test_a_loader_that_gives_no_batch_is_one_line(tmp_path, monkeypatch, capsys):
    broken_reading(monkeypatch, lambda: time.sleep(30))
    assert run(f"{QUICK} --no-repeated-aug --num_workers 1 --loader-timeout 2", tmp_path) == distributed.EXIT_FAILED
    assert "no batch came for --loader-timeout 2 seconds" in one_line(capsys)


def test_a_loader_process_that_dies_is_one_line(tmp_path, monkeypatch, capsys):
    broken_reading(monkeypatch, lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert run(f"{QUICK} --no-repeated-aug --num_workers 1", tmp_path) == distributed.EXIT_FAILED
    assert "a loader process died" in one_line(capsys)


def test_a_signal_to_the_process_group_spares_the_loader(tmp_path):
    """As torchrun and a terminal send them: the run must be able to finish its step and save."""
    out = tmp_path / "out"
    process = start(f"{QUICK} --num_workers 2 --epochs 500 --output_dir {tmp_path}", out)
    wait_for_a_step(process, out)
    os.killpg(process.pid, signal.SIGTERM)
    assert end([process]) == [distributed.EXIT_REQUEUE], out.read_text()
    step = read_checkpoint(tmp_path / "checkpoint.pth").step
    assert step > 0 and f"stopped by SIGTERM at epoch {1 + step // STEPS}" in out.read_text()


@pytest.mark.skipif(sys.platform != "linux", reason="on macOS it does not")
def test_a_sigterm_to_every_process_spares_the_loader(tmp_path):
    """As systemd and SLURM send it; here it comes to the loader long before the run."""
    out = tmp_path / "out"
    process = start(f"{QUICK} --num_workers 2 --epochs 500 --output_dir {tmp_path}", out)
    wait_for_a_step(process, out)
    for worker in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(worker), signal.SIGTERM)
    while process.is_alive() and f"epoch 2/500  step {STEPS}" not in out.read_text():
        time.sleep(0.01)
    process.terminate()
    assert end([process]) == [distributed.EXIT_REQUEUE], out.read_text()
    assert read_checkpoint(tmp_path / "checkpoint.pth").step >= 2 * STEPS


# --- R6: one decision


@pytest.mark.slow
def test_a_loss_that_is_not_finite_on_one_rank_stops_all(tmp_path):
    flags = f"{QUICK} --batch-size 64 --checkpoint-steps 2 --output_dir {tmp_path}"
    assert end(start_ranks(flags, tmp_path / "out", VIM_FAULT="nan@4:1"), 60) == [distributed.EXIT_NONFINITE] * 2
    assert all("error: step 4 of epoch 1: loss nan" in (tmp_path / f"out.{rank}").read_text() for rank in (0, 1))
    assert read_checkpoint(latest_checkpoint(tmp_path)).step == 4, "what was saved before stays"


@pytest.mark.slow
def test_a_skipped_step_is_counted_in_every_row_and_at_the_end(tmp_path, capsys):
    with fault("nan@4"):
        assert run(f"{QUICK} --nonfinite skip", tmp_path) == 0
    assert [json.loads(line)["skipped_steps"] for line in (tmp_path / "log.txt").read_text().splitlines()] == [1, 1]
    assert scalars(tmp_path, "epoch/skipped_steps") == {STEPS: 1, 2 * STEPS: 1}
    text = capsys.readouterr().out
    assert "step 5 left out: loss nan" in text and "1 left out" in text


# --- R8: replaced images


def test_replaced_images_are_counted_over_a_resume(tmp_path, capsys):
    """The file is met before the stop; the row written after it must still count it."""
    data = write_image_folder(tmp_path / "data", per_class=8)
    (data / "train" / "ant" / "3.jpg").write_text("no image")
    flags = f"{QUICK} --data-path {data} --batch-size 8 --bad-image replace --bad-image-share 0.1 --resume auto"
    flags += " --no-repeated-aug --aa none"
    assert run(flags, tmp_path / "whole") == 0
    with fault("sigterm@2"):
        assert run(flags, tmp_path / "parts") == distributed.EXIT_REQUEUE
    assert run(flags, tmp_path / "parts") == 0
    assert pieces(tmp_path / "whole") == pieces(tmp_path / "parts")
    assert json.loads((tmp_path / "whole" / "log.txt").read_text().splitlines()[-1])["replaced_images"] == 1
    assert list(scalars(tmp_path / "parts", "epoch/replaced_images").values()) == [1, 1]
    assert "0 left out, 1 images replaced; " in capsys.readouterr().out


def test_replaced_images_of_all_ranks_count_towards_the_limit(tmp_path):
    """Each rank meets some of them; together they are too many."""
    data = write_image_folder(tmp_path / "data", per_class=16)
    for number in range(3):
        (data / "train" / "ant" / f"{number}.jpg").write_text("no image")
    flags = f"{QUICK} --data-path {data} --batch-size 8 --bad-image replace --no-repeated-aug --aa none --epochs 2"
    flags += f" --bad-image-share 0.05 --output_dir {tmp_path / 'run'}"
    assert end(start_ranks(flags, tmp_path / "out")) == [distributed.EXIT_CONFIG] * 2
    assert "3 of 48 images cannot be read, more than --bad-image-share 0.05" in (tmp_path / "out.0").read_text()


def test_held_out_images_that_cannot_be_read_are_counted(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", per_class=8)
    (data / "val" / "ant" / "3.jpg").write_text("no image")
    flags = f"{QUICK} --data-path {data} --batch-size 8 --bad-image replace --bad-image-share 0.1 --aa none --epochs 1"
    assert run(flags, tmp_path / "run") == 0
    assert json.loads((tmp_path / "run" / "log.txt").read_text())["replaced_test_images"] == 1
    assert "0 left out, 1 images replaced; " in capsys.readouterr().out
    assert run(f"{flags} --eval --resume {tmp_path / 'run' / 'checkpoint.pth'}", tmp_path / "eval") == 0
    assert "24 images, 1 of them unreadable; raw weights: " in capsys.readouterr().out


def test_a_second_interrupt_is_one_line(monkeypatch, tmp_path, capsys):
    """The first one finishes the step, which may be long."""

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(program, "execute", interrupted)
    assert run(QUICK, tmp_path) == 130
    assert capsys.readouterr().err == "interrupted: --resume auto goes on from the last checkpoint\n"


# --- R13: out of memory


def test_out_of_memory_says_what_to_do(tmp_path, capsys):
    with fault("oom@2"):
        assert run(QUICK, tmp_path) == distributed.EXIT_CONFIG
    text = one_line(capsys)
    assert "out of memory with --batch-size 128" in text
    assert "--batch-size 64 --accum-steps 2 keeps the whole batch" in text and "--grad-checkpointing" in text


@pytest.mark.parametrize(
    ("batch", "mixes", "advice"),
    [
        (50, True, "--batch-size 10 --accum-steps 10 keeps"),
        (50, False, "--batch-size 25 --accum-steps 4 keeps"),
        (7, False, "--batch-size 1 --accum-steps 14 keeps"),
        (2, True, "--grad-checkpointing"),
    ],
)
def test_the_advice_keeps_the_whole_batch_and_can_be_followed(batch, mixes, advice):
    """Mixup and cutmix take an even batch."""
    mixing = ["--mixup", "0.8"] if mixes else ["--mixup", "0", "--cutmix", "0"]
    args = run_args("--batch-size", str(batch), "--accum-steps", "2", *mixing)
    said = failures.out_of_memory(MemoryError("no room"), args)
    assert f" --batch-size {batch} --num_workers {args.num_workers}: {advice}" in said


FULL_MEMORY = {
    "torch": (lambda *_: torch.empty(10**18), "(DefaultCPUAllocator: can't allocate memory: you tried to allocate"),
    "numpy": (lambda *_: np.empty(10**18), "(Unable to allocate"),
    "Python": (lambda *_: bytearray(10**18), "(MemoryError)"),
}


@pytest.mark.parametrize("library", FULL_MEMORY)
def test_a_full_main_memory_says_what_to_do(library, tmp_path, monkeypatch, capsys):
    """As where a CPU trains, on which no library raises torch's own error."""
    allocate, reason = FULL_MEMORY[library]
    monkeypatch.setattr(faults, "before_exchange", allocate)
    assert run(QUICK, tmp_path) == distributed.EXIT_CONFIG
    text = one_line(capsys)
    assert "out of main memory with --batch-size 128 --num_workers 0: --batch-size 64 --accum-steps 2 keeps" in text
    assert reason in text and "loader processes" not in text and "peak memory" not in text


@pytest.mark.parametrize("library", FULL_MEMORY)
def test_a_full_main_memory_of_a_loader_process_says_what_to_do(library, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(ImageDataset, "__getitem__", FULL_MEMORY[library][0])
    assert run(f"{QUICK} --num_workers 1", tmp_path) == distributed.EXIT_CONFIG
    text = one_line(capsys)
    assert "out of main memory with --batch-size 128 --num_workers 1: " in text
    assert "fewer loader processes hold fewer batches (" in text and "Traceback" not in text


# --- R14 and R2: the disk


def test_a_full_disk_ends_the_run_with_the_last_checkpoint_whole(tmp_path, capsys):
    with fault("disk-full@8"):
        assert run(f"{QUICK} --checkpoint-steps 4", tmp_path) == distributed.EXIT_CONFIG
    assert "No space left on device; the last checkpoint is untouched" in one_line(capsys)
    assert read_checkpoint(latest_checkpoint(tmp_path, on_rejected=pytest.fail)).step == 4
    assert not list(tmp_path.glob(".*"))


def main_and_leave(flags):
    distributed.leave(main(flags))


def test_the_end_of_a_run_whose_loaders_are_at_work_is_one_line(tmp_path):
    """They are killed at its end, which torch takes for a fault of theirs."""
    flags = f"{QUICK} --num_workers 2 --checkpoint-steps 4 --output_dir {tmp_path / 'run'}"
    assert end([start(flags, tmp_path / "out", program=main_and_leave, VIM_FAULT="disk-full@8")]) == [4]
    _, _, last = (tmp_path / "out").read_text().rpartition("error: ")
    assert "No space left on device" in last and last.count("\n") == 1


@pytest.mark.parametrize("number", [errno.EPERM, errno.EFBIG, errno.ENAMETOOLONG, errno.EOPNOTSUPP])
def test_storage_that_never_takes_a_checkpoint_is_an_end(number, tmp_path, monkeypatch, capsys):
    def write(path, text):  # the digest beside a checkpoint
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(checkpoints, "_write_text", write)
    assert run(f"{QUICK} --epochs 1", tmp_path) == distributed.EXIT_CONFIG
    assert f"{os.strerror(number)}; the last checkpoint is untouched\n" in one_line(capsys)


@pytest.mark.parametrize("number", [errno.EIO, errno.ESTALE])
def test_storage_that_fails_for_now_is_no_end(number, tmp_path, monkeypatch, capsys):
    """A launcher starts again what ends with 1."""

    class Failing(io.FileIO):
        def write(self, data):  # torch's writer hides what fails once it has begun
            if self.tell() > 0:
                raise OSError(number, os.strerror(number))
            return super().write(data)

    monkeypatch.setattr(checkpoints, "open", lambda path, mode: Failing(path, mode), raising=False)
    assert run(f"{QUICK} --epochs 1", tmp_path) == distributed.EXIT_FAILED
    assert f"{os.strerror(number)}; the last checkpoint is untouched; --resume auto goes on\n" in one_line(capsys)


@pytest.mark.parametrize(
    ("number", "code", "said"),
    [
        (errno.ESTALE, distributed.EXIT_FAILED, "0.jpg could not be read: Stale file handle; --resume auto goes on"),
        (errno.EMFILE, distributed.EXIT_CONFIG, "too little room for open files for --num_workers 1 --batch-size 4: "),
    ],
)
def test_images_that_cannot_be_read_for_now_are_not_broken(number, code, said, tmp_path, monkeypatch, capsys):
    def decode(path):
        raise OSError(number, os.strerror(number), path)

    folder = write_image_folder(tmp_path / "images", per_class=2)
    monkeypatch.setattr(datasets, "decode_image", decode)
    flags = f"{QUICK} --data-set IMNET --data-path {folder} --batch-size 4 --num_workers 1 --bad-image replace"
    assert run(flags, tmp_path / "run") == code
    assert said in one_line(capsys)


@pytest.mark.parametrize(("transient", "code"), [(True, distributed.EXIT_FAILED), (False, distributed.EXIT_CONFIG)])
def test_storage_that_fails_on_rank_0_ends_the_others_as_it_does_that_one(transient, code, tmp_path, monkeypatch):
    """Else a launcher would be told by them that nothing can be mended."""
    monkeypatch.setattr(distributed, "gather_objects", lambda item: [("storage", transient), item])
    with pytest.raises(distributed.PeerError, match="rank 0 failed: storage") as raised, distributed.together():
        pass
    assert failures.explain(raised.value)[0] == code


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS])
def test_a_log_that_cannot_be_written_is_one_line(number, tmp_path, monkeypatch, capsys):
    def write(path, text):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(report, "replace_text", write)
    assert run(f"{QUICK} --epochs 1 --checkpoint-steps 4", tmp_path) == distributed.EXIT_CONFIG
    assert f"log.txt: {os.strerror(number)}; --resume auto goes on from the last checkpoint" in one_line(capsys)
    assert read_checkpoint(latest_checkpoint(tmp_path, on_rejected=pytest.fail)).step == 8


@pytest.mark.parametrize("name", [os.fsencode, str])
def test_a_log_on_storage_that_fails_for_now_is_one_line_and_started_again(name, tmp_path, monkeypatch, capsys):
    """TensorBoard's files have names of bytes."""

    def write(path, text):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), name(path))

    monkeypatch.setattr(report, "replace_text", write)
    assert run(f"{QUICK} --epochs 1", tmp_path) == distributed.EXIT_FAILED
    expected = f"error: {tmp_path}/log.txt: {os.strerror(errno.ESTALE)}; --resume auto goes on from the last checkpoint"
    assert expected in one_line(capsys)


def test_a_folder_in_the_place_of_a_log_is_one_line(tmp_path, capsys):
    (tmp_path / "args.yaml").mkdir()
    assert run(f"{QUICK} --epochs 1", tmp_path) == distributed.EXIT_CONFIG
    line = f"error: {tmp_path}/args.yaml: Is a directory; move it away, or take another --output_dir\n"
    assert one_line(capsys) == line


@pytest.mark.slow
def test_a_full_disk_of_rank_0_ends_all_ranks(tmp_path):
    flags = f"{QUICK} --batch-size 64 --checkpoint-steps 4 --output_dir {tmp_path}"
    assert end(start_ranks(flags, tmp_path / "out", VIM_FAULT="disk-full@8"), 60) == [4, 4]
    assert "No space left on device" in (tmp_path / "out.0").read_text()
    assert "error: rank 0 failed: " in (tmp_path / "out.1").read_text()


FILL = """
import resource, sys
sys.path.insert(0, "vim")
import torch
from checkpoint import latest_checkpoint, read_checkpoint, store_checkpoint
from errors import CheckpointError
folder, limit = sys.argv[1], int(sys.argv[2])
if limit:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
def state(step, size):
    return {"model": {"weight": torch.full((size,), float(step))}, "step": step}
store_checkpoint(folder, state(1, 100_000))
for size in (450_000, 2_000_000):
    try:
        store_checkpoint(folder, state(2, size))
    except CheckpointError as error:
        print(error)
print("left", read_checkpoint(latest_checkpoint(folder, on_rejected=print)).step)
"""


def small_disk(folder: Path) -> list[str]:
    """A command prefix that runs a command with a 2 MB tmpfs at `folder`, [] where mounting is not allowed."""
    mount = f'mount -t tmpfs -o size=2m tmpfs "{folder}" && exec "$@"'
    for unshare in (["unshare", "--mount"], ["unshare", "--map-root-user", "--mount"]):
        prefix = [*unshare, "sh", "-c", mount, "sh"]
        if shutil.which("unshare") and subprocess.run([*prefix, "true"], capture_output=True).returncode == 0:
            return prefix
    return []


@pytest.mark.slow
def test_a_disk_of_two_megabytes_keeps_the_first_checkpoint(tmp_path):
    """The second one does not fit beside it. Where no small disk can be mounted, a limit on files' sizes stands in."""
    disk = small_disk(tmp_path)
    command = [*disk, sys.executable, "-c", FILL, str(tmp_path), "0" if disk else str(1 << 20)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [line.count("was not written: ") for line in lines] == [1, 1, 0]
    assert all("the last checkpoint is untouched" in line for line in lines[:2])
    assert lines[2] == "left 1"
    if disk:
        assert "MiB are free" in lines[1] and "Free some space" in lines[1]


# --- background writing


def test_the_state_that_is_written_is_that_of_the_call(tmp_path, monkeypatch):
    """Training changes the tensors while the thread writes."""
    gate, true_store = threading.Event(), checkpoints.store_checkpoint
    monkeypatch.setattr(checkpoints, "store_checkpoint", lambda *a, **k: (gate.wait(), true_store(*a, **k)))
    weight, args = torch.ones(5), Namespace(lr=1.0)
    writer = CheckpointWriter()
    writer.store(tmp_path, {"model": {"weight": weight}, "step": 1, "args": args, "list": [weight]}, 2, False)
    weight.zero_()
    args.lr = 2.0
    assert not list(tmp_path.iterdir()), "nothing is written before `store` has returned"
    gate.set()
    writer.wait()
    found = read_checkpoint(tmp_path / "checkpoint.pth")
    assert found.model["weight"].eq(1).all() and found.extra["list"][0].eq(1).all() and found.args.lr == 1.0


def test_checkpoints_are_written_one_after_the_other(tmp_path, monkeypatch):
    events = []

    def store(folder, state, *options):
        events.append(f"begin {state['step']}")
        time.sleep(0.05)
        events.append(f"end {state['step']}")

    monkeypatch.setattr(checkpoints, "store_checkpoint", store)
    writer = CheckpointWriter()
    for step in (1, 2):
        writer.store(tmp_path, {"step": step}, 2, False)
    writer.wait()
    assert events == ["begin 1", "end 1", "begin 2", "end 2"]


def test_an_error_of_the_writer_is_kept_and_nothing_is_written_after_it(tmp_path):
    writer = CheckpointWriter()
    with fault("disk-full@1"):
        writer.store(tmp_path, {"model": {"weight": torch.ones(5)}, "step": 1}, 2, False)
        writer.join()
    assert writer.failed
    writer.store(tmp_path, {"model": {"weight": torch.ones(5)}, "step": 2}, 2, False)
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        writer.wait()
    assert latest_checkpoint(tmp_path) is None


def test_a_fallback_is_said_and_counted(tmp_path, capsys):
    assert run(f"{QUICK} --epochs 1 --checkpoint-steps 4", tmp_path) == 0
    newest = latest_checkpoint(tmp_path)
    newest.write_bytes(newest.read_bytes()[:-1000])
    assert run(f"{QUICK} --resume auto", tmp_path) == 0
    text = capsys.readouterr().out
    assert f"checkpoint passed over: {newest} is damaged" in text
    assert "on the way: 1 x resumed, 1 x damaged checkpoints passed over" in text
    kinds = [json.loads(line)["kind"] for line in (tmp_path / "incidents.txt").read_text().splitlines()]
    assert kinds == ["fallback", "resumed"]
    assert read_checkpoint(tmp_path / "checkpoint.pth").step == 2 * STEPS
    assert scalars(tmp_path, "incidents/fallback") == {0: 0, 8: 1}
    assert scalars(tmp_path, "incidents/resumed") == {0: 0, 8: 1}


def test_a_start_that_repeats_one_without_a_checkpoint_is_counted_too(tmp_path, monkeypatch, capsys):
    """A rank that dies before the first checkpoint leaves nothing to resume; what an earlier run counted is not its."""
    (tmp_path / "incidents.txt").write_text('{"kind": "stopped", "step": 7, "text": "of another run"}\n')
    assert run(f"{QUICK} --epochs 1", tmp_path) == 0
    assert "on the way" not in capsys.readouterr().out and not (tmp_path / "incidents.txt").exists()
    for checkpoint in tmp_path.glob("*.pth"):
        checkpoint.unlink()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert run(f"{QUICK} --epochs 1 --resume auto", tmp_path) == 0
    text = capsys.readouterr().out
    assert "restart 1: no checkpoint to go on from" in text
    assert "on the way: 1 x started again from the beginning; see incidents.txt" in text
    assert scalars(tmp_path, "incidents/restarted") == {0: 1}
