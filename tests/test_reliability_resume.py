"""R1, R5, R12, R15: a run that was stopped, killed or moved to other processes is the run that never was.

Promises and their numbers: docs/RELIABILITY.md.
"""

import random
import shutil
import signal
import time
from pathlib import Path

import pytest

import engine
from checkpoint import latest_checkpoint, read_checkpoint
from distributed import EXIT_CONFIG, EXIT_REQUEUE
from faults import InjectedError
from main import main
from processes import QUICK, STEPS, end, fault, no_pictures, pieces, start, start_ranks, wait_for_a_step  # noqa: F401


def run(flags: str, folder: Path) -> int:
    return main([*flags.split(), "--output_dir", str(folder), "--resume", "auto"])


def differing(a: Path, b: Path) -> list[str]:
    """Names of the pieces of two runs that are not bit for bit the same."""
    first, second = pieces(a), pieces(b)
    return [piece for piece in first if first[piece] != second[piece]]


# --- R1: stopped by a signal


STOPS = {
    "in mid-epoch": ("", "sigusr1@3"),
    "in the last step of an epoch": ("", f"sigterm@{STEPS - 1}"),
    "in the first step of an epoch, without an average": ("--no-model-ema", f"sigint@{STEPS}"),
    "accumulation, in the last step of an epoch": ("--accum-steps 2", f"sigterm@{STEPS // 2 - 1}"),
    "bfloat16": ("--if_amp", "sigusr1@14"),
    "workers, dropout, no repeated augmentation": ("--num_workers 2 --drop 0.1 --no-repeated-aug", "sigint@3"),
    "lamb, rate by step, clipped": ("--opt lamb --sched-on-updates --clip-grad 1", "sigterm@15"),
    "plateau": ("--sched plateau", "sigterm@12"),
    "DeiT, accumulation": ("--model deit_nano_patch4_32 --accum-steps 2", "sigterm@3"),
    "DeiT, float16": ("--model deit_nano_patch4_32 --if_amp --amp-dtype float16", "sigusr1@13"),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", STOPS)
def test_a_stopped_run_resumes_bit_for_bit(setting, tmp_path, capsys):
    flags, stop = STOPS[setting]
    flags = f"{QUICK} --seed 3 {flags}"
    assert run(flags, tmp_path / "whole") == 0
    with fault(stop):
        assert run(flags, tmp_path / "parts") == EXIT_REQUEUE
    assert "saved, --resume auto goes on" in capsys.readouterr().out
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pth").step == int(stop.partition("@")[2]) + 1
    assert run(flags, tmp_path / "parts") == 0
    assert differing(tmp_path / "whole", tmp_path / "parts") == []


def test_a_run_in_the_folder_of_another_is_never_taken_for_it(tmp_path, capsys, monkeypatch):
    """Not even if it dies before its first checkpoint: `--resume auto` would go on with the older run."""
    assert run(f"{QUICK} --seed 7", tmp_path / "whole") == 0
    folder = tmp_path / "both"
    assert run(f"{QUICK} --seed 1", folder) == 0
    older = pieces(folder)
    with fault("raise-before@2:0"), pytest.raises(InjectedError):
        main([*f"{QUICK} --seed 7".split(), "--output_dir", str(folder)])
    assert f"holds another run, and there is no --resume: moved it to {folder / 'earlier-1'}" in capsys.readouterr().out
    assert pieces(folder / "earlier-1") == older and latest_checkpoint(folder) is None
    assert run(f"{QUICK} --seed 7", folder) == 0
    assert differing(tmp_path / "whole", folder) == []
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a job queued again, in which nothing had run yet
    assert main([*f"{QUICK} --seed 1 --epochs 1".split(), "--output_dir", str(folder)]) == 0
    assert differing(tmp_path / "whole", folder / "earlier-2") == []


@pytest.mark.parametrize("left", ["neither link", "the link to a checkpoint of the same step", "another best one"])
def test_a_run_killed_before_the_best_checkpoint_was_linked_links_it(left, tmp_path):
    """Resumed from that very checkpoint, it does not repeat the epoch."""
    assert run(f"{QUICK} --lr 0 --min-lr 0 --epochs 2 --keep-checkpoints 6", tmp_path) == 0
    best = tmp_path / "best_checkpoint.pth"
    first, second = tmp_path / f"checkpoint-{STEPS:08d}.pth", tmp_path / f"checkpoint-{2 * STEPS:08d}.pth"
    assert best.resolve() == first and [read_checkpoint(file).is_best for file in (first, second)] == [True, False]
    for file in tmp_path.glob(f"{second.name}*"):
        file.unlink()
    best.unlink()
    (tmp_path / "checkpoint.pth").unlink()
    if left != "neither link":
        (tmp_path / "checkpoint.pth").symlink_to(first.name)
    if left == "another best one":
        best.symlink_to("checkpoint-00000001.pth")
    assert run(f"{QUICK} --lr 0 --min-lr 0 --epochs 2", tmp_path) == 0
    assert best.resolve() == first and read_checkpoint(tmp_path / "checkpoint.pth").step == 2 * STEPS


@pytest.mark.parametrize("name", ["best_checkpoint.pth", "checkpoint.pth"])
def test_weights_that_would_be_moved_are_refused(name, tmp_path, capsys):
    """A restart would not find them, or would take this run's own."""
    assert run(f"{QUICK} --epochs 1", tmp_path) == 0
    flags = [*QUICK.split(), "--finetune", str(tmp_path / name), "--output_dir", str(tmp_path)]
    assert main(flags) == EXIT_CONFIG
    assert "which this run would move aside: take another --output_dir" in capsys.readouterr().err
    assert (tmp_path / name).exists() and not list(tmp_path.glob("earlier-*"))
    (tmp_path / "link").symlink_to(tmp_path)
    for weights in (tmp_path / "link" / name, tmp_path / name):
        for folder in (tmp_path / "link", tmp_path):
            assert main([*QUICK.split(), "--finetune", str(weights), "--output_dir", str(folder)]) == EXIT_CONFIG
    assert (tmp_path / name).exists() and not list(tmp_path.glob("earlier-*"))


def test_a_run_stopped_during_an_evaluation_finishes_it_first(tmp_path, monkeypatch, capsys):
    true_assess = engine.assess

    def assess(*arguments):
        signal.raise_signal(signal.SIGTERM)
        return true_assess(*arguments)

    assert run(QUICK, tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(engine, "assess", assess)
        assert run(QUICK, tmp_path / "parts") == EXIT_REQUEUE
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pth").step == STEPS
    assert run(QUICK, tmp_path / "parts") == 0
    assert differing(tmp_path / "whole", tmp_path / "parts") == []
    text = capsys.readouterr().out
    assert f"checkpoint-{STEPS:08d}.pth (SHA-256 " in text
    assert "on the way: 1 x stopped, 1 x resumed; see incidents.txt" in text


DROPPED = {
    "the optimiser's moments": ("load_optimizer", lambda run, checkpoint: None, "model"),
    "the place in the epoch": ("restore_progress", lambda run, checkpoint: None, "progress"),
}


@pytest.mark.parametrize("piece", DROPPED)
def test_the_comparison_sees_a_lost_piece_of_state(piece, tmp_path, monkeypatch):
    """The control: a resume that forgets something must not pass for the run that never stopped."""
    function, forget, seen_in = DROPPED[piece]
    flags = f"{QUICK} --epochs 1"
    assert run(flags, tmp_path / "whole") == 0
    with fault("sigterm@4"):
        assert run(flags, tmp_path / "parts") == EXIT_REQUEUE
    monkeypatch.setattr(engine, function, forget)
    assert run(flags, tmp_path / "parts") == 0
    assert seen_in in differing(tmp_path / "whole", tmp_path / "parts")


def test_the_comparison_sees_a_lost_average(tmp_path, monkeypatch):
    flags = f"{QUICK} --epochs 1"
    assert run(flags, tmp_path / "whole") == 0
    with fault("sigterm@4"):
        assert run(flags, tmp_path / "parts") == EXIT_REQUEUE
    monkeypatch.setattr(engine.WeightsEma, "load_state_dict", lambda self, state: None)
    assert run(flags, tmp_path / "parts") == 0
    seen_in = set(differing(tmp_path / "whole", tmp_path / "parts"))
    assert "model_ema" in seen_in and "model" not in seen_in


# --- R1 and R2: killed without warning


@pytest.mark.slow
def test_a_run_killed_again_and_again_is_the_run_that_never_was(tmp_path):
    """SIGKILL at twenty moments, wherever they fall: in steps, in evaluations, while a checkpoint is written."""
    flags = f"{QUICK} --epochs 5 --checkpoint-steps 2 --resume auto --output_dir"
    moments = random.Random(0)
    kills = 0
    for _ in range(20):
        out = tmp_path / "out"
        out.unlink(missing_ok=True)
        process = start(f"{flags} {tmp_path / 'parts'}", out)
        wait_for_a_step(process, out)
        time.sleep(moments.uniform(0, 0.2))
        kills += process.is_alive()
        process.kill()
        process.join()
        latest_checkpoint(tmp_path / "parts", on_rejected=pytest.fail)  # raises if none is whole
    assert end([start(f"{flags} {tmp_path / way}", tmp_path / f"out.{way}") for way in ("parts", "whole")]) == [0, 0]
    assert kills >= 10, "the kills must meet a run that is alive"
    assert differing(tmp_path / "whole", tmp_path / "parts") == []


KILLS = {
    "while a checkpoint is written": ("", "kill-writing@10"),
    "in mid-step, accumulation, bfloat16": ("--accum-steps 2 --if_amp", "kill@8"),
    "in the last step of an epoch, without an average": ("--no-model-ema", f"kill@{STEPS - 1}"),
    "between the evaluations of weights and average, workers": ("--num_workers 2", f"kill-evaluating@{STEPS}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("setting", KILLS)
def test_a_kill_loses_nothing(setting, tmp_path):
    flags, kill = KILLS[setting]
    flags = f"{QUICK} --checkpoint-steps 5 --resume auto {flags} --output_dir"
    whole = start(f"{flags} {tmp_path / 'whole'}", tmp_path / "out.whole")
    killed = start(f"{flags} {tmp_path / 'parts'}", tmp_path / "out.parts", VIM_FAULT=kill)
    assert end([whole, killed]) == [0, -signal.SIGKILL]
    assert end([start(f"{flags} {tmp_path / 'parts'}", tmp_path / "out")]) == [0]
    assert f"resuming {tmp_path / 'parts'}" in (tmp_path / "out").read_text()
    assert differing(tmp_path / "whole", tmp_path / "parts") == []


# --- several ranks


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    """A run of two ranks that nothing disturbed."""
    folder = tmp_path_factory.mktemp("ranks")
    assert end(start_ranks(f"{QUICK} --batch-size 64 --output_dir {folder / 'run'}", folder / "out")) == [0, 0]
    return folder / "run"


@pytest.mark.slow
def test_two_ranks_stopped_by_a_signal_to_one_resume_bit_for_bit(two_ranks, tmp_path):
    """Rank 1 alone is told; both finish the same step."""
    flags = f"{QUICK} --batch-size 64 --resume auto --output_dir {tmp_path}"
    assert end(start_ranks(flags, tmp_path / "out", VIM_FAULT="sigterm@5:1")) == [EXIT_REQUEUE] * 2
    assert read_checkpoint(tmp_path / "checkpoint.pth").step == 6
    assert "stopped by another rank" in (tmp_path / "out.0").read_text()
    assert end(start_ranks(flags, tmp_path / "out")) == [0, 0]
    assert differing(two_ranks, tmp_path) == []


@pytest.mark.slow
def test_two_ranks_of_which_one_was_killed_resume_bit_for_bit(two_ranks, tmp_path):
    """The other one is told by the broken connection and ends with one line, soon."""
    flags = f"{QUICK} --batch-size 64 --checkpoint-steps 3 --resume auto --output_dir {tmp_path}"
    assert end(start_ranks(flags, tmp_path / "out", VIM_FAULT="kill@14:1"), 60) == [1, -signal.SIGKILL]
    assert "error: another rank died" in (tmp_path / "out.0").read_text()
    assert read_checkpoint(latest_checkpoint(tmp_path)).step >= 9
    assert end(start_ranks(flags, tmp_path / "out")) == [0, 0]
    assert differing(two_ranks, tmp_path) == []


@pytest.mark.slow
def test_a_run_of_two_ranks_goes_on_with_one(tmp_path, capsys):
    """R15: with twice the accumulation each step has the same images, though not the same bits.

    One rank has 23 batches an epoch, of which the last fills no step.
    Without what is drawn for each rank the weights are those of one rank from the start, but for the order of sums.
    The control: in the same steps with other images they are not.
    """
    flags = f"{QUICK} --batch-size 62 --mixup 0 --cutmix 0 --drop-path 0 --opt momentum --momentum 0 --lr 0.5"
    flags_of_one = f"{flags} --accum-steps 2"
    assert run(flags_of_one, tmp_path / "one") == 0
    assert run(f"{flags_of_one} --no-repeated-aug", tmp_path / "other images") == 0
    stopping = f"{flags} --output_dir {tmp_path / 'both'}"
    assert end(start_ranks(stopping, tmp_path / "out", VIM_FAULT="sigterm@5:0")) == [EXIT_REQUEUE] * 2
    shutil.copytree(tmp_path / "both", tmp_path / "half the batch")
    capsys.readouterr()
    assert run(flags_of_one, tmp_path / "both") == 0
    assert "other than before: accum_steps 2 (was 1)\n" in capsys.readouterr().out
    assert run(flags, tmp_path / "half the batch") == 0
    assert "whole batch 62 (was 124), and with it the steps of an epoch" in capsys.readouterr().out
    one, both, other = (read_checkpoint(tmp_path / name / "checkpoint.pth") for name in ("one", "both", "other images"))
    assert one.step == both.step == 2 * STEPS

    def distance(found) -> float:
        return max((value - found.model[name]).abs().max().item() for name, value in one.model.items())

    assert distance(both) < 0.01 * distance(other)


# --- R12


@pytest.mark.slow
def test_deterministic_runs_are_the_same_whatever_the_loader(tmp_path):
    for workers in (0, 2):
        assert run(f"{QUICK} --epochs 1 --deterministic --num_workers {workers}", tmp_path / str(workers)) == 0
    assert differing(tmp_path / "0", tmp_path / "2") == []
