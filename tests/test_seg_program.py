"""`seg/train.py` as users call it: train, stop, resume, evaluate, its refusals, its scripts and its demo."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import hub
import tiny  # noqa: F401  (registers the tests' model)
from arguments import build_parser
from checkpoint import read_checkpoint
from distributed import EXIT_REQUEUE, World
from errors import ConfigError
from optim import build_optimizer
from processes import end, fault, pieces, start_ranks
from seg.arguments import PROGRAM, parse
from seg.program import build_model, check_deterministic, main
from seg_sets import write_ade20k, write_folder

ROOT = Path(__file__).resolve().parents[1]
# Two blocks cannot give four maps.
MODEL = "--device cpu --model vim_nano_patch4_32 --head-channels 8 --aux-channels 8 --drop-path 0.2"
QUICK = f"{MODEL} --num_workers 0 --batch-size 2 --epochs 2 --lr 1e-3 --warmup-steps 1 --crop-size 24 --resize 24x96"


def seg(*flags):
    return main([*QUICK.split(), *map(str, flags)])


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


def rows(path):
    return [json.loads(line) for line in (path / "log.txt").read_text().splitlines()]


def test_ade20k_is_trained_on_evaluated_and_pictured(tmp_path, capsys):
    """Images of different sizes; windows of 24 pixels; the evaluation of the checkpoint is that of the run."""
    root, out = write_ade20k(tmp_path / "ade"), tmp_path / "out"
    flags = ("--data-set", "ADE20K", "--data-path", root, "--window-stride", 16)
    assert seg(*flags, "--output_dir", out) == 0
    said = capsys.readouterr().out
    assert "6 train images and 3 val images in 150 classes" in said and "best mIoU" in said
    first, last = rows(out)
    assert {"test_miou", "test_macc", "test_aacc"} <= first.keys() and last["step"] == 6
    names = {path.name for path in out.iterdir()}
    assert names >= {"samples.png", "classes.png", "overlays", "curves.png", "args.yaml", "best_checkpoint.pth"}
    assert len(list((out / "overlays").glob("ADE_val_*.png"))) == 3
    with Image.open(out / "overlays" / "ADE_val_00000003.png") as picture:
        assert picture.size == (44, 32)

    hub.main(["inspect", str(out / "best_checkpoint.pth")])
    said = capsys.readouterr().out
    assert "best mIoU " in said and "of         seg/train.py --model vim_nano_patch4_32" in said
    assert "top-1" not in said and "fits" not in said
    assert hub.main(["export", str(out / "checkpoint.pth"), str(tmp_path / "folder")]) == 4
    assert "is a model of seg/train.py, not a classifier: evaluate it there" in capsys.readouterr().err

    last_weights = ("--eval", "--resume", out / "checkpoint.pth")
    assert seg(*flags, *last_weights, "--output_dir", out / "eval") == 0
    said = capsys.readouterr().out
    assert f"3 images; raw weights: mIoU {last['test_miou']:.2f} %" in said
    assert (out / "eval" / "samples.png").exists()
    several = ("--eval-mode", "whole", "--eval-flip", "--eval-scales", 0.75, 1, 1.25)
    assert seg(*flags, *last_weights, *several) == 0
    assert "3 images; raw weights: mIoU" in capsys.readouterr().out


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(folder, tmp_path):
    """In mid-epoch: views, stochastic depth, dropout, batch norm's statistics and the average are the whole's."""
    flags = ("--data-path", folder, "--model-ema", "--model-ema-decay", 0.5, "--resume", "auto")
    assert seg(*flags, "--output_dir", tmp_path / "whole") == 0
    with fault("sigusr1@3"):
        assert seg(*flags, "--output_dir", tmp_path / "parts") == EXIT_REQUEUE
    assert read_checkpoint(tmp_path / "parts" / "checkpoint.pth").step == 4
    torch.manual_seed(99)  # what a process happens to start with must not matter
    assert seg(*flags, "--output_dir", tmp_path / "parts") == 0
    assert pieces(tmp_path / "whole") == pieces(tmp_path / "parts")
    state = read_checkpoint(tmp_path / "parts" / "checkpoint.pth").model
    assert state["decode_head.bottleneck.bn.num_batches_tracked"] == 6


def test_scenes_train_where_there_is_no_folder(tmp_path, capsys):
    scenes = ("--scene-size", 48, "--train-scenes", 4, "--val-scenes", 2, "--epochs", 1, "--output_dir", tmp_path)
    assert seg(*scenes) == 0
    said = capsys.readouterr().out
    assert "no --data-path: training on generated scenes" in said and "2 val images in 11 classes" in said
    assert (tmp_path / "overlays" / "val-scene-0.png").exists()


def test_a_folder_that_scenes_do_not_read_is_said_not_to_be_read(folder, capsys):
    scenes = ("--data-set", "SCENES", "--scene-size", 48, "--train-scenes", 4, "--val-scenes", 2, "--epochs", 1)
    assert seg(*scenes, "--data-path", folder) == 0
    said = capsys.readouterr().out
    assert f"--data-path {folder} is not read: training on generated scenes" in said
    assert "SCENES: 4 train images" in said and said.count(str(folder)) == 1


@pytest.mark.parametrize(
    "flags",
    [
        ("--if_amp", "--amp-dtype", "bfloat16"),
        ("--grad-checkpointing", "--accum-steps", "2", "--layer-decay", "0.9"),
        ("--aux-channels", "0", "--no-train-mode"),
        ("--no-train-mode", "--batch-size", "1"),
        ("--model", "resnet10t", "--drop-path", "0", "--crop-size", "64", "--num-classes", "4"),
        ("--model", "deit_nano_patch4_32", "--pyramid-scales", "2", "1", "0.5", "0.25"),
        ("--crop-size", "64", "--model", "test_vit_relpos"),  # images of one size, and windows of 24 x 29
        ("--crop-size", "64", "--model", "pit_ti_224"),  # and of three stages
    ],
    ids=lambda flags: " ".join(flags[:4]),
)
def test_every_recipe_trains(flags, folder, tmp_path):
    assert seg("--data-path", folder, "--epochs", 1, "--output_dir", tmp_path, "--report-to", "", *flags) == 0
    (row,) = rows(tmp_path)
    assert np.isfinite(row["train_loss"])


def test_it_learns(tmp_path):
    """Colours that say the class: far above the 25 % of chance within seconds."""
    root = write_folder(tmp_path / "set", train=16)
    easy = "--scale-range 1 1 --no-photometric --epochs 16 --lr 2e-2 --batch-size 8 --drop-path 0 --head-channels 32"
    assert seg("--data-path", root, "--output_dir", tmp_path / "out", "--report-to", "", *easy.split()) == 0
    best = max(row["test_miou"] for row in rows(tmp_path / "out"))
    assert best > 60


def test_a_classifiers_weights_become_the_backbones(tmp_path, folder, capsys):
    from main import main as classify

    flags = "--device cpu --model vim_nano_patch4_32 --input-size 8 --num_workers 0 --epochs 1 --batch-size 512"
    assert classify([*flags.split(), "--output_dir", str(tmp_path / "classifier")]) == 0
    weights = tmp_path / "classifier" / "checkpoint.pth"
    capsys.readouterr()
    assert seg("--data-path", folder, "--finetune", weights, "--epochs", 1) == 0
    said = capsys.readouterr().out
    assert "pos_embed resampled from 2 x 2 to 6 x 6 (grid); class token's slot 2 of 5 taken out, now 18 of 37; " in said
    assert "; left out: head, norm_f" in said


def test_a_checkpoint_is_evaluated_in_windows_of_another_size(tmp_path, folder, capsys):
    """--resume takes the windows that it was trained on alone; at that size both say the same."""
    flags = ("--data-path", folder, "--epochs", 1)
    assert seg(*flags, "--output_dir", tmp_path) == 0
    (row,) = rows(tmp_path)
    weights = tmp_path / "checkpoint.pth"
    assert seg(*flags, "--eval", "--resume", weights, "--crop-size", 32) == 4
    assert "(--finetune instead of --resume resamples the position embeddings)" in capsys.readouterr().err
    for size in (24, 32, "20x28"):
        assert seg(*flags, "--eval", "--finetune", weights, "--crop-size", size) == 0
        said = capsys.readouterr().out
        assert "3 images; raw weights: mIoU" in said and "backbone from" not in said
        assert size != 24 or f"mIoU {row['test_miou']:.2f} %" in said


@pytest.mark.parametrize("flags", [("--eval", "--resume", "CKPT"), ("--resume", "auto", "--output_dir", "OUT")])
def test_another_rectangle_of_as_many_patches_is_not_resumed(flags, tmp_path, folder, capsys):
    """Four rows of nine patches as six of six would be other positions; at its own size the run goes on."""
    assert seg("--data-path", folder, "--epochs", 1, "--crop-size", "16x36", "--output_dir", tmp_path) == 0
    flags = [{"CKPT": tmp_path / "checkpoint.pth", "OUT": tmp_path}.get(flag, flag) for flag in flags]
    assert seg("--data-path", folder, "--crop-size", "24x24", *flags) == 4
    error = capsys.readouterr().err
    assert "backbone.model.pos_embed (file 4 x 9 patches, model 6 x 6)" in error and error.count("\n") == 1
    assert seg("--data-path", folder, "--crop-size", "16x36", *flags) == 0


def test_layer_decay_matches_every_block():
    args = parse([*QUICK.split(), "--layer-decay", "0.5"])
    model = build_model(args, 5, lambda text: None)
    names = {id(p): name for name, p in model.named_parameters()}
    scales = {
        names[id(p)]: group["lr_scale"]
        for group in build_optimizer(args, model, 1.0).param_groups
        for p in group["params"]
    }
    assert scales.keys() == dict(model.named_parameters()).keys()
    for name, scale in scales.items():
        block = name.removeprefix("backbone.model.layers.").split(".")[0]
        place = int(block) + 1 if block.isdigit() else 0 if name.startswith("backbone.") else 5
        assert scale == 0.5 ** (5 - place), name


# --- refusals


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--data-path", "nowhere"), "nowhere does not exist; --data-path takes the folder"),
        (("--data-set", "ADE20K"), "--data-set ADE20K needs --data-path DIR"),
        (("--batch-size", "1"), "--batch-size 1: the head's batch norm needs at least 2 images"),
        (("--model", "vim_two_blocks"), "--model vim_two_blocks: taps=4: the backbone has 2 blocks"),
        (("--pyramid-scales", "3", "2", "1", "0.5"), "--pyramid-scales: scale=3.0 is unknown: use one of 4.0, 2.0,"),
        (("--pyramid-scales", "1", "2", "0.5", "0.25"), "--pyramid-scales: 1 2 0.5 0.25: give each scale once"),
        (("--pyramid-scales", "2", "1"), "--pyramid-scales: 2 scales for 4 maps"),
        (("--model", "test_vit_relpos", "--eval-scales", "1.5"), "--model test_vit_relpos takes images of 48x48 alone"),
        (("--train-scenes", "1"), "1 training images do not fill one batch of 2"),
        (("--eval",), "--eval needs --resume CKPT to evaluate, or --finetune CKPT at another --crop-size"),
        (("--eval", "--resume", "auto", "--output_dir", "EMPTY"), "there is no checkpoint in --output_dir"),
    ],
)
def test_what_cannot_be_is_one_line(flags, words, capsys, tmp_path):
    flags = [str(tmp_path) if flag == "EMPTY" else flag for flag in flags]
    assert seg("--scene-size", 48, "--train-scenes", 4, "--val-scenes", 2, *flags) == 4
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and words in error


def test_a_step_that_torch_cannot_take_deterministically_is_refused():
    """On a GPU; an evaluation, and the CPU, have what it takes."""
    args = parse([*QUICK.split(), "--deterministic"])
    cpu, gpu = (World(0, 1, torch.device(name)) for name in ("cpu", "cuda"))
    with pytest.raises(ConfigError, match=r"^--deterministic: .* on cuda; leave it out, or take --device cpu$"):
        check_deterministic(args, gpu)
    check_deterministic(args, cpu)
    check_deterministic(parse([*QUICK.split(), "--deterministic", "--eval", "--resume", "x"]), gpu)
    check_deterministic(parse(QUICK.split()), gpu)


def test_a_whole_image_of_another_size_than_the_backbone_takes_is_refused_before_training(folder, capsys):
    assert seg("--data-path", folder, "--model", "test_vit_relpos", "--crop-size", 64, "--eval-mode", "whole") == 4
    error = capsys.readouterr().err
    assert error.startswith("error: --eval-mode whole: --model test_vit_relpos takes images of 64x64 alone")


def test_a_classifiers_flag_is_refused(capsys):
    assert seg("--mixup", "0.8") == 2
    assert "seg/train.py: error: unrecognized arguments: --mixup" in capsys.readouterr().err


def test_a_bad_label_ends_a_run_in_one_line(folder, capsys):
    path = folder / "annotations" / "val" / "south" / "0.png"
    Image.fromarray(np.full((30, 36), 77, np.uint8)).save(path)
    assert seg("--data-path", folder, "--epochs", 1) == 4
    assert "has the label value 77: 4 classes are numbered 0 to 3" in capsys.readouterr().err


def test_every_flag_has_words_of_help():
    parser = build_parser(PROGRAM)
    assert [action.dest for action in parser._actions if not action.help] == []
    assert "--reduce-zero-label" in parser.format_help()


def test_arguments_survive_the_file_beside_the_checkpoints(folder, tmp_path):
    assert seg("--data-path", folder, "--reduce-zero-label", "--num-classes", 4, "--epochs", 1,
               "--output_dir", tmp_path, "--crop-size", "24x32") == 0  # fmt: skip
    again = parse(["--config", str(tmp_path / "args.yaml")])
    assert (again.crop_size, again.resize, again.reduce_zero_label) == ((24, 32), (24, 96), True)


# --- several ranks


@pytest.mark.slow
def test_two_ranks_count_every_pixel_once(folder, tmp_path, capsys):
    """Three images over two ranks: the measures are those of one process."""
    flags = f"{QUICK} --data-path {folder} --epochs 1 --dist-eval --output_dir {tmp_path}"
    assert end(start_ranks(flags, tmp_path / "out", program=main)) == [0, 0]
    (row,) = rows(tmp_path)
    assert seg("--data-path", folder, "--eval", "--resume", tmp_path / "checkpoint.pth") == 0
    assert f"3 images; raw weights: mIoU {row['test_miou']:.2f} %" in capsys.readouterr().out


# --- scripts and demonstration


SCRIPTS = sorted((ROOT / "seg" / "scripts").glob("*.sh"))
RECIPES = {"paper": (16, 127, 6e-5, 0.01), "published": (32, 95, None, None)}
PUBLISHED = {"upernet-vim-t": (2e-4, 0.1), "upernet-vim-s": (1e-4, 0.05), "upernet-vim-b": (1e-4, 0.05)}


def run_script(script, tmp_path, **variables):
    (tmp_path / "classifier.pth").touch()
    known = {"DATA_PATH": tmp_path, "CKPT": tmp_path / "classifier.pth", "DRY_RUN": 1, "PYTHON": sys.executable}
    clean = {k: v for k, v in os.environ.items() if k not in ("BATCH", "NNODES", "OUTPUT_DIR", "NODE_RANK", "RECIPE")}
    environment = clean | {key: str(value) for key, value in (known | variables).items()}
    command = ["bash", str(script), "--device", "cpu"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", [1, 8])
def test_a_script_is_the_recipe_on_any_number_of_gpus(script, gpus, recipe, tmp_path):
    done = run_script(script, tmp_path, GPUS=gpus, RECIPE=recipe)
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    program = next(i for i, word in enumerate(words) if word.endswith("train.py"))
    assert Path(words[program]).resolve() == ROOT / "seg" / "train.py"
    args = parse(words[program + 1 :])
    whole, epochs, lr, decay = RECIPES[recipe]
    lr, decay = (lr, decay) if lr else PUBLISHED[script.stem]
    assert args.batch_size * args.accum_steps * gpus == whole
    assert (args.epochs, args.lr, args.weight_decay, args.unscale_lr) == (epochs, lr, decay, True)
    assert (args.sched, args.decay_rate, args.warmup_steps, args.sched_on_updates) == ("poly", 1.0, 1500, True)
    assert (args.crop_size, args.window_stride, args.resize, args.data_set) == (512, 341, (512, 2048), "ADE20K")
    steps = epochs * (20210 // whole)
    assert steps == pytest.approx({"paper": 160_000, "published": 60_000}[recipe], rel=0.01)


def test_there_is_a_script_for_each_size_and_a_wrong_recipe_is_said(tmp_path):
    assert [script.stem for script in SCRIPTS] == [f"upernet-vim-{size}" for size in "bst"]
    done = run_script(SCRIPTS[0], tmp_path, GPUS=1, RECIPE="best")
    assert done.returncode == 4 and "RECIPE='best' is not paper or published." in done.stderr


def test_the_demo_trains_and_then_evaluates_its_own_checkpoint():
    command = ["make", "--dry-run", "demo-seg", "VENV=no-such-environment"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    lines = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]
    train, evaluate = (parse(words[2:]) for words in lines if words[1:2] == ["seg/train.py"])
    assert train.data_set == "SCENES" and not train.eval and train.scene_size == evaluate.scene_size
    assert evaluate.eval and Path(evaluate.resume).parent == Path(train.output_dir)


def test_the_defaults_are_the_published_recipe():
    args = parse(["--device", "cpu", "--data-path", "x"])
    assert (args.opt, args.lr, args.unscale_lr, args.weight_decay) == ("adamw", 6e-5, True, 0.01)
    assert (args.sched, args.decay_rate, args.min_lr, args.warmup_epochs) == ("poly", 1.0, 0.0, 1)
    assert (args.batch_size, args.crop_size, args.resize, args.aux_weight) == (16, 512, (512, 2048), 0.4)
    assert args.epochs * (20210 // 16) == pytest.approx(160_000, rel=5e-3), "iterations on ADE20K"


@pytest.mark.parametrize(("sched", "rate"), [("poly", 1.0), ("step", 0.1), ("multistep", 0.1), ("plateau", 0.1)])
def test_a_schedule_that_cuts_the_rate_does_not_cut_it_by_polys_exponent(sched, rate):
    flags = ["--no-sched-on-updates"] if sched == "plateau" else []
    assert parse(["--device", "cpu", "--sched", sched, *flags]).decay_rate == rate
