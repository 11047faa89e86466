"""The program as users start it: training, stopping, resuming, evaluating, and what a mistake reads like."""

import argparse
import json
import math
import os
import pickle
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import yaml

import distributed
import engine
from checkpoint import read_checkpoint
from classification import Classification
from helpers import write_image_folder
from main import main
from processes import pieces
from run_folder import RUN_FILES, matching

ROOT = Path(__file__).resolve().parents[1]
QUICK = "--device cpu --input-size 8 --batch-size 128 --num_workers 0 --warmup-epochs 1 --lr 4e-3"
VIM = f"--model vim_nano_patch4_32 {QUICK}"
DEIT = f"--model deit_nano_patch4_32 {QUICK}"
TINY = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"


def run(flags: str, *more: str) -> int:
    return main([*flags.split(), *map(str, more)])


# --- a run and what it leaves behind


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two epochs of the small Vim on digits."""
    folder = tmp_path_factory.mktemp("trained")
    assert run(f"{VIM} --epochs 2 --model-ema-decay 0.9", "--output_dir", folder) == 0
    return folder


def test_a_run_leaves_its_arguments_logs_checkpoints_and_pictures(trained):
    names = {path.name for path in trained.iterdir()}
    pictures = {"curves.png", "confusion.png", "mistakes.png"}
    files = {"args.yaml", "log.txt", "metrics.csv", "checkpoint.pth", "best_checkpoint.pth"}
    assert names >= pictures | files
    assert any(name.startswith("events.out.tfevents") for name in names)
    assert {path.name for path in matching(trained, RUN_FILES)} == names - {"run.lock"}, "what the next run moves aside"
    rows = [json.loads(line) for line in (trained / "log.txt").read_text().splitlines()]
    assert [(row["epoch"], row["step"]) for row in rows] == [(0, 11), (1, 22)]
    assert rows[1]["train_loss"] < rows[0]["train_loss"]
    assert rows[1]["test_acc5"] >= rows[1]["test_acc1"] > 10
    assert (trained / "metrics.csv").read_text().count("\n") == 3
    assert yaml.safe_load((trained / "args.yaml").read_text())["num_classes"] is None  # as many as the data has


def test_a_checkpoint_has_the_published_form(trained):
    found = read_checkpoint(trained / "checkpoint.pth")
    assert {"model", "model_ema", "optimizer", "lr_scheduler", "epoch", "scaler", "args"} <= set(found.keys)
    assert found.epoch == 1 and found.args.model == "vim_nano_patch4_32"
    assert found.model.keys() == found.model_ema.keys() == timm.create_model(
        "vim_nano_patch4_32", img_size=8, num_classes=10
    ).state_dict().keys()  # fmt: skip


def test_the_derived_numbers_are_printed_with_their_inputs(capsys):
    assert run(f"{VIM} --epochs 1 --accum-steps 2 --no-model-ema --eval-weights raw") == 0
    text = capsys.readouterr().out
    assert "no --data-path: training on scikit-learn's digits" in text
    assert "256 = 128 x 1 rank(s) x 2 accumulated" in text
    assert "0.002 = 0.004 x 256 / 512" in text
    assert "5 steps = 10 batches / 2" in text
    assert "M trainable parameters" in text and "backend" in text and "step 5/5" in text
    assert "no best top-1 is known" not in text, "there are no epochs before"


def test_evaluation_repeats_what_training_measured(trained, capsys, tmp_path):
    row = json.loads((trained / "log.txt").read_text().splitlines()[-1])
    flags = ("--eval", "--resume", trained / "checkpoint.pth", "--output_dir", tmp_path)
    assert run(VIM, *flags) == 0
    text = capsys.readouterr().out
    assert f"raw weights: top-1 {row['test_acc1']:.2f} %" in text
    assert f"ema weights: top-1 {row['test_ema_acc1']:.2f} %" in text
    assert {path.name for path in tmp_path.iterdir()} == {"confusion.png", "mistakes.png"}


def test_the_file_beside_the_checkpoints_repeats_the_run(trained, tmp_path):
    assert run("--config", trained / "args.yaml", "--output_dir", tmp_path) == 0
    assert pieces(tmp_path) == pieces(trained)


# --- stop, resume (every way to stop: test_reliability_resume.py)


def test_loader_workers_never_change_a_run(tmp_path):
    for workers in (0, 2):
        assert run(f"{DEIT} --epochs 1 --num_workers {workers}", "--output_dir", tmp_path / str(workers)) == 0
    assert pieces(tmp_path / "0") == pieces(tmp_path / "2")


def test_a_run_resumes_from_a_checkpoint_inside_an_epoch(tmp_path):
    """As after a power cut: the newest file is a mid-epoch one, and a row of the log came after it."""
    flags = f"{DEIT} --epochs 2 --checkpoint-steps 4 --keep-checkpoints 9"
    assert run(flags, "--output_dir", tmp_path) == 0
    whole = pieces(tmp_path)
    for step in (16, 20, 22):
        (tmp_path / f"checkpoint-{step:08d}.pth").unlink()
    assert run(flags, "--output_dir", tmp_path, "--resume", "auto") == 0
    assert pieces(tmp_path) == whole


def test_a_finished_run_is_evaluated_again_and_nothing_else(trained, tmp_path, capsys):
    before = (trained / "log.txt").read_text()
    assert run(f"{VIM} --epochs 2", "--output_dir", trained, "--resume", "auto") == 0
    assert (trained / "log.txt").read_text() == before
    assert "done: 22 steps" in capsys.readouterr().out


def test_the_best_checkpoint_survives_a_resume_that_does_worse(tmp_path):
    flags = f"{DEIT} --epochs 2 --no-model-ema"
    assert run(flags, "--output_dir", tmp_path) == 0
    best = (tmp_path / "best_checkpoint.pth").resolve()
    ruined = f"{DEIT} --epochs 3 --no-model-ema --unscale-lr --lr 9 --min-lr 9 --warmup-lr 9 --warmup-epochs 0"
    assert run(ruined, "--output_dir", tmp_path, "--resume", "auto") == 0
    assert (tmp_path / "best_checkpoint.pth").resolve() == best
    assert (tmp_path / "checkpoint.pth").resolve() != best


def test_the_best_of_a_published_run_may_be_where_it_was_taken_up(trained, tmp_path):
    torch.save({"model": read_checkpoint(trained / "checkpoint.pth").model, "epoch": 1}, tmp_path / "published.pth")
    ruined = f"{VIM} --epochs 3 --no-model-ema --unscale-lr --lr 9 --min-lr 9 --warmup-lr 9 --warmup-epochs 0"
    assert run(ruined, "--output_dir", tmp_path / "run", "--resume", tmp_path / "published.pth") == 0
    steps = [read_checkpoint(tmp_path / "run" / f"{name}.pth").step for name in ("best_checkpoint", "checkpoint")]
    assert steps == [22, 33]


@pytest.mark.slow
def test_a_signal_to_the_process_saves_and_asks_for_a_requeue(tmp_path):
    command = [sys.executable, "vim/main.py", *VIM.split(), "--epochs", "500", "--log-every", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(
        [*command, "--output_dir", str(tmp_path)], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        lines = iter(process.stdout.readline, "")
        next(line for line in lines if "step 3/11" in line)
        process.send_signal(signal.SIGUSR1)
        rest = process.stdout.read()
        assert process.wait(timeout=60) == 75
    finally:
        process.kill()
    assert "stopped by SIGUSR1" in rest
    assert read_checkpoint(tmp_path / "checkpoint.pth").extra["progress"]["samples"] > 0


# --- published weights


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A training checkpoint as published for Vim-Ti, with an image folder beside it; 3 classes."""
    folder = tmp_path_factory.mktemp("published")
    write_image_folder(folder / "data", per_class=8)
    torch.manual_seed(0)
    model = timm.create_model(TINY, num_classes=3)
    average = {key: value + 0.01 * torch.randn_like(value) for key, value in model.state_dict().items()}
    state = {
        "model": model.state_dict(), "model_ema": average, "epoch": 299, "lr_scheduler": {}, "scaler": {},
        "optimizer": {"state": {}, "param_groups": []}, "args": argparse.Namespace(model=TINY, lr=1e-3),
    }  # fmt: skip
    torch.save(state, folder / "vim_t.pth")
    return folder


@pytest.mark.slow
def test_the_papers_command_evaluates_a_published_checkpoint(published):
    """From vim/, as the paper's repository says it, with a folder of 3 classes."""
    command = [sys.executable, "main.py", "--eval", "--resume", published / "vim_t.pth", "--model", TINY]
    command += ["--data-path", published / "data", "--device", "cpu", "--num_workers", "2"]
    done = subprocess.run(command, cwd=ROOT / "vim", capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "24 images; raw weights: top-1" in done.stdout and "ema weights: top-1" in done.stdout


@pytest.mark.parametrize("kept", ["model", "model_ema"])
def test_either_kind_of_weights_is_enough_for_an_evaluation(kept, tmp_path, capsys):
    weights = timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=10).state_dict()
    torch.save({kept: weights}, tmp_path / "half.pth")
    assert run(VIM, "--eval", "--resume", tmp_path / "half.pth") == 0
    text = capsys.readouterr().out
    name = "raw" if kept == "model" else "ema"
    assert f"{name} weights: top-1" in text and text.count("weights: top-1") == 1


def test_weights_are_evaluated_at_another_resolution(tmp_path, capsys):
    """As in DeiT by --finetune: --resume wants the image size of training, and says so."""
    torch.manual_seed(0)
    model = timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "small.pth")
    larger = f"{VIM} --input-size 12 --eval"
    text = refusal(capsys, 4, larger, "--resume", tmp_path / "small.pth")
    assert "(--finetune instead of --resume resamples the position embeddings)" in text
    assert run(larger, "--finetune", tmp_path / "small.pth") == 0
    told = capsys.readouterr().out
    assert "raw weights: top-1" in told and "small.pth (SHA-256" in told
    assert "pos_embed resampled from 2 x 2 to 3 x 3" in told
    model.reset_classifier(7)
    torch.save({"model": model.state_dict()}, tmp_path / "seven.pth")
    text = refusal(capsys, 4, larger, "--finetune", tmp_path / "seven.pth")
    assert "its head is of other classes than the data's: if the data's classes are the first" in text
    assert "add --num-classes 7; " in text


@pytest.mark.parametrize("flag", ["--resume", "--finetune"])
def test_the_mend_for_a_head_of_more_classes_mends(flag, tmp_path, capsys):
    model = timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=12)
    torch.save({"model": model.state_dict()}, tmp_path / "twelve.pth")
    evaluation = ("--eval", flag, tmp_path / "twelve.pth")
    hint = (
        "if the data's classes are the first of the model's, add --num-classes 12; "
        "if they are others of them, add --valid-labels"
    )
    assert hint in refusal(capsys, 4, VIM, *evaluation)
    assert run(VIM, *evaluation, "--num-classes", "12") == 0
    if flag == "--resume":
        (tmp_path / "numbers").write_text("0 1 2 3 4 5 6 7 8 11")
        labels = ("--valid-labels", tmp_path / "numbers")
        assert "(add the model's --num-classes 12)" in refusal(capsys, 4, VIM, *evaluation, *labels)


@pytest.mark.parametrize(("size", "grid"), [((4, 16), "1 x 4"), (8, "2 x 2")], ids=str)
def test_weights_of_another_grid_of_as_many_patches_are_refused(size, grid, tmp_path, capsys):
    """Their shapes are the model's; evaluated or trained on as they are, the numbers would be wrong."""
    model = timm.create_model("vim_nano_patch4_32", img_size=size, num_classes=10)
    args = argparse.Namespace(model="vim_nano_patch4_32", input_size=size, num_classes=10)
    torch.save({"model": model.state_dict(), "args": args}, tmp_path / "other.pth")
    flags = f"{VIM} --input-size 16x4 --epochs 1"
    for more in ([], ["--eval"]):
        text = refusal(capsys, 4, flags, *more, "--resume", tmp_path / "other.pth")
        assert f"pos_embed (file {grid} patches, model 4 x 1) (--finetune" in text
    assert run(flags, "--eval", "--finetune", tmp_path / "other.pth") == 0


@pytest.fixture
def of_animals(tmp_path):
    """A checkpoint that knows the names of its four classes."""
    model = timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=4)
    names = ["ant", "bee", "cow", "dog"]
    torch.save({"model": model.state_dict(), "class_names": names}, tmp_path / "animals.pth")
    return tmp_path / "animals.pth"


@pytest.mark.parametrize(
    ("classes", "wrong"),
    [(("bee", "cow", "dog"), "'bee' is 0 in the data and 1 there"), (("bee", "cow", "dog", "eel"), "'bee' is 0"),
     (("ant", "bee", "dog"), "'dog' is 2 in the data and 3 there")],
)  # fmt: skip
def test_labels_of_other_numbers_than_in_training_are_refused(classes, wrong, of_animals, tmp_path, capsys):
    """Every image of the class would count as another one's."""
    data = write_image_folder(tmp_path / "data", classes)
    flags = f"{VIM} --num-classes 4 --batch-size 4 --epochs 1 --data-path {data}"
    for more in (["--eval"], []):
        text = refusal(capsys, 4, flags, *more, "--resume", of_animals)
        assert f"was trained with other numbers of classes: {wrong}" in text
    (tmp_path / "numbers").write_text(" ".join("0123"[4 - len(classes) :]))
    assert run(flags, "--eval", "--resume", of_animals, "--valid-labels", tmp_path / "numbers") == 0


def test_classes_of_other_names_are_told(of_animals, tmp_path, capsys):
    """They may be the same ones, renamed."""
    data = write_image_folder(tmp_path / "data", ("ant", "bee", "cattle", "dog"))
    assert run(f"{VIM} --data-path {data} --eval --resume {of_animals}") == 0
    assert "classes have other names than in training: 'cattle' for 'cow'\n" in capsys.readouterr().out


def test_averaged_weights_alone_are_fine_tuned(tmp_path, capsys):
    weights = timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=10).state_dict()
    torch.save({"model_ema": weights}, tmp_path / "average.pth")
    assert run(f"{VIM} --epochs 1", "--finetune", tmp_path / "average.pth") == 0
    assert "averaged weights, it has no others: every weight loaded" in capsys.readouterr().out


def test_a_folder_in_the_home_is_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert run(f"{DEIT} --epochs 1 --output_dir ~/run") == 0
    assert (tmp_path / "run" / "checkpoint.pth").exists()


def test_a_single_class_is_told(tmp_path, capsys):
    data = write_image_folder(tmp_path / "data", ("ant",))
    assert run(f"{DEIT} --data-path {data} --batch-size 4 --epochs 1") == 0
    assert "8 train images (all of class 'ant': nothing to tell apart)" in capsys.readouterr().out


def test_a_teacher_of_other_classes_is_told_by_its_flag(tmp_path, capsys):
    torch.save({"model": timm.create_model("resnet10t", num_classes=5).state_dict()}, tmp_path / "five.pth")
    flags = f"{DEIT} --distillation-type hard --teacher-model resnet10t"
    text = refusal(capsys, 4, flags, "--teacher-path", tmp_path / "five.pth")
    assert f"--teacher-path {tmp_path / 'five.pth'}: the weights do not fit the model: 2 mismatched: fc.weight" in text
    assert "a teacher must know the data's classes" in text and "--finetune" not in text


def test_grey_images_are_fine_tuned_from_rgb_weights(tmp_path, capsys):
    model = timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=10)
    torch.save({"model": model.state_dict()}, tmp_path / "rgb.pth")
    assert run(f"{VIM} --in-chans 1 --epochs 1", "--finetune", tmp_path / "rgb.pth") == 0
    assert "patch_embed.proj.weight adapted from 3 channels to 1" in capsys.readouterr().out


def test_a_published_run_goes_on_after_its_last_epoch(tmp_path, capsys):
    """Weights and epoch count; the best top-1, which the file lacks, is measured, and the best weights are those."""
    weights = timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=10).state_dict()
    torch.save({"model": weights, "epoch": 4, "args": argparse.Namespace(lr=1)}, tmp_path / "old.pth")
    assert run(f"{VIM} --epochs 6", "--resume", tmp_path / "old.pth", "--output_dir", tmp_path / "run") == 0
    text = capsys.readouterr().out
    assert "goes on at epoch 6, image 0 of it, step 55" in text
    assert "no best top-1 is known of the epochs before" in text
    assert (tmp_path / "run" / "best_checkpoint.pth").exists()
    assert json.loads((tmp_path / "run" / "log.txt").read_text())["epoch"] == 5


@pytest.mark.slow
def test_fine_tuning_carries_weights_to_the_stride_8_model(published, tmp_path, monkeypatch):
    """The class-token slot of pos_embed unchanged, the grid a plain 2-D resample, the head as it was."""
    monkeypatch.setattr(engine, "training_step", lambda run, batches, micro: stop_without_moving(run))
    flags = f"--model {TINY.replace('patch16', 'patch16_stride8')} --device cpu --num_workers 0 --batch-size 2"
    more = ("--data-path", published / "data", "--finetune", published / "vim_t.pth", "--output_dir", tmp_path)
    assert run(flags, *more) == distributed.EXIT_REQUEUE
    before, after = read_checkpoint(published / "vim_t.pth").model, read_checkpoint(tmp_path / "checkpoint.pth").model
    slot, grid = before["pos_embed"][:, 98], before["pos_embed"][:, [i for i in range(197) if i != 98]]
    assert torch.equal(after["pos_embed"][:, 364], slot)
    resampled = torch.nn.functional.interpolate(
        grid.view(1, 14, 14, 192).permute(0, 3, 1, 2), (27, 27), mode="bicubic", antialias=False
    )
    others = [i for i in range(730) if i != 364]
    torch.testing.assert_close(after["pos_embed"][:, others], resampled.flatten(2).transpose(1, 2))
    assert all(torch.equal(before[key], after[key]) for key in before if key != "pos_embed")


def stop_without_moving(run) -> engine.StepResult:
    return engine.StepResult(loss=0.0, grad_norm=0.0, lr=0.0, finite=True, stop=True)


def test_fine_tuning_re_makes_the_head_for_other_classes_and_says_so(tmp_path, capsys):
    other = timm.create_model("vim_nano_patch4_32", img_size=16, num_classes=7)
    torch.save({"model": other.state_dict(), "class_names": list("abcdefg")}, tmp_path / "seven.pth")
    assert run(f"{VIM} --epochs 1", "--finetune", tmp_path / "seven.pth") == 0
    text = capsys.readouterr().out
    assert "head re-made: 7 classes in the file, 10 classes in the model" in text and "pos_embed" in text
    assert "its head was trained on other classes" not in text, "it is not taken"


# --- any timm model


@pytest.mark.parametrize("model", ["resnet10t", "poolformer_s12", "mixer_s32_224", "deit_tiny_patch16_224"])
def test_any_timm_model_trains(model, tmp_path, capsys):
    folder = write_image_folder(tmp_path / "data", per_class=4)
    flags = f"--device cpu --model {model} --input-size 32 --batch-size 4 --epochs 1 --num_workers 0"
    assert run(flags, "--data-path", folder) == 0
    text = capsys.readouterr().out
    assert "epoch 1/1: training loss" in text
    assert (f"{model} has no argument img_size (here 32): left out" in text) == (
        model in ("resnet10t", "poolformer_s12")
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("precision", ["--if_amp", "--if_amp --amp-dtype float16", "--no_amp"])
def test_training_evaluation_and_resume_on_a_gpu(precision, tmp_path, capsys):
    flags = f"{VIM.replace('--device cpu', '--device cuda')} {precision} --model-ema-decay 0.9"
    assert run(f"{flags} --epochs 2", "--output_dir", tmp_path) == 0
    assert run(f"{flags} --epochs 3", "--output_dir", tmp_path, "--resume", "auto") == 0
    row = json.loads((tmp_path / "log.txt").read_text().splitlines()[-1])
    assert row["epoch"] == 2 and row["test_acc1"] > 20
    capsys.readouterr()
    assert run(flags, "--eval", "--resume", tmp_path / "checkpoint.pth") == 0
    assert f"raw weights: top-1 {row['test_acc1']:.2f} %" in capsys.readouterr().out


# --- mistakes are one line


def refusal(capsys, code: int, flags: str, *more) -> str:
    """What a failing run says on stderr: one line."""
    assert run(flags, *more) == code
    text = capsys.readouterr().err
    assert text.startswith("error: ") and text.count("\n") == 1, text
    return text


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ("--model vim_tinny_patch16_224", "--model vim_tinny_patch16_224 is not registered with timm; did you mean"),
        ("--model vim_tiny", "--model vim_tiny is not registered with timm; did you mean vim_tiny_patch16_224 or"),
        ("--model vim_nano_patch4_32.foo", "--model vim_nano_patch4_32.foo has the unknown tag 'foo'"),
        (
            "--model deit_nano_patch4_32 --teacher-model resnet18.foo --distillation-type hard --teacher-path x",
            "--teacher-model resnet18.foo has the unknown tag 'foo'; resnet18 has ",
        ),
        (
            "--model vim_nano_patch4_32 --teacher-model vim_tiny_patch16_224 --distillation-type soft --teacher-path x",
            "error: --teacher-model vim_tiny_patch16_224: an image of ",
        ),
        ("--model vim_nano_patch4_32 --input-size 3", "smaller than a patch"),
        ("--model deit_tiny_patch16_224 --input-size 8", "--input-size 8x8 is smaller than a patch of deit_tiny"),
        ("--model vim_nano_patch4_32 --attn-only", "has no attention layers; leave it out"),
        ("--model deit_nano_patch4_32 --dt-init-backward same", "--dt-init-backward is for a Vim"),
        ("--model deit_nano_patch4_32 --no-decay-ssm", "--no-decay-ssm: deit_nano_patch4_32 has no state-space"),
        ("--model deit_nano_patch4_32 --opt adamww", "--opt adamww is not an optimiser of timm; did you mean adamw"),
        ("--model deit_nano_patch4_32 --opt sgd --momentum 0", "--opt sgd: Nesterov momentum requires"),
        ("--model deit_nano_patch4_32 --sched cos", "--sched cos is unknown: use one of"),
        ("--model deit_nano_patch4_32 --batch-size 9", "a batch of 9"),
        ("--model deit_nano_patch4_32 --batch-size 2000", "do not fill one batch of 2000"),
        ("--model deit_nano_patch4_32 --num-classes 4", "the data has 10 classes"),
        ("--model deit_nano_patch4_32 --data-path /nowhere/at/all", "/nowhere/at/all"),
        ("--model deit_nano_patch4_32 --resume /nowhere.pth", "/nowhere.pth"),
        ("--model deit_nano_patch4_32 --finetune /nowhere.pth", "/nowhere.pth"),
        ("--model deit_nano_patch4_32 --world_size 4", "use torchrun"),
        ("--model deit_nano_patch4_32 --distributed", "use torchrun"),
        ("--model deit_nano_patch4_32 --report-to wandb --output_dir OUT", "pip install wandb"),
        (
            "--model deit_nano_patch4_32 --teacher-model regnety --distillation-type hard --teacher-path x",
            "--teacher-model",
        ),
    ],
)
def test_a_mistake_is_one_line(flags, words, capsys, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    flags = flags.replace("OUT", str(tmp_path / "out"))
    assert words in refusal(capsys, 4, f"--device cpu --num_workers 0 --input-size 8 {flags}")


def test_data_without_held_out_images_is_refused(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "data", per_class=2)
    (folder / "val").rename(folder / "valid")
    assert f"{folder / 'val'}" in refusal(capsys, 4, DEIT, "--data-path", folder)


def test_a_held_out_class_that_training_lacks_is_refused(tmp_path, capsys):
    folder = write_image_folder(tmp_path / "data", per_class=2)
    (folder / "val" / "ant").rename(folder / "val" / "wasp")
    assert "wasp" in refusal(capsys, 4, DEIT, "--data-path", folder)


def test_a_checkpoint_of_another_width_is_refused_with_its_names(tmp_path, capsys):
    torch.save({"model": timm.create_model("deit_tiny_patch16_224").state_dict()}, tmp_path / "wide.pth")
    text = refusal(capsys, 4, VIM, "--resume", tmp_path / "wide.pth")
    assert "missing" in text and "unexpected" in text and "mismatched" in text


def test_a_truncated_checkpoint_is_refused(tmp_path, capsys):
    torch.save({"model": {"weight": torch.zeros(1000)}}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:1500])
    assert f"{tmp_path / 'cut.pth'}" in refusal(capsys, 4, VIM, "--resume", tmp_path / "cut.pth")


class RunsCode:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (os.system, (f"touch {self.path}",))


def test_a_checkpoint_that_would_run_code_does_not(tmp_path, capsys):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"model": RunsCode(tmp_path / "ran")}))
    text = refusal(capsys, 4, f"{VIM} --eval", "--resume", tmp_path / "evil.pth")
    assert "system" in text and not (tmp_path / "ran").exists()


def test_averaged_weights_that_are_not_there_are_named(tmp_path, capsys):
    weights = timm.create_model("vim_nano_patch4_32", img_size=8, num_classes=10).state_dict()
    torch.save({"model": weights}, tmp_path / "raw.pth")
    text = refusal(capsys, 4, f"{VIM} --eval --eval-weights ema", "--resume", tmp_path / "raw.pth")
    assert "holds no 'model_ema'" in text


def test_another_optimiser_is_refused_on_resume(trained, capsys):
    text = refusal(capsys, 4, f"{VIM} --opt lamb", "--resume", trained / "checkpoint.pth")
    assert "was trained with --opt adamw, not lamb" in text


def test_an_output_folder_that_cannot_be_made_is_named(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert f"--output_dir {tmp_path / 'file' / 'run'}" in refusal(
        capsys, 4, DEIT, "--output_dir", tmp_path / "file/run"
    )


def test_a_loss_that_is_not_finite_ends_with_its_own_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Classification, "loss", lambda task, run, batch, micro: run.net(batch[0]).sum() * math.nan)
    text = refusal(capsys, 3, f"{DEIT} --epochs 1", "--output_dir", tmp_path)
    assert "step 0 of epoch 1: loss nan" in text
    assert not list(tmp_path.glob("*.pth"))


@pytest.mark.slow
@pytest.mark.parametrize("flag", ["--epoch=1", "--data-set=MNIST"])
def test_a_wrong_flag_on_the_command_line_is_one_line_and_code_2(flag):
    done = subprocess.run([sys.executable, "main.py", flag], cwd=ROOT / "vim", capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1 and done.stdout == ""
