"""`det/train.py` as users call it: train, evaluate, resume, several ranks, its refusals, its scripts and its demo."""

import csv
import json
import math
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import det_sets
import hub
import tiny  # noqa: F401  (registers the tests' model)
from arguments import build_parser, save_arguments
from checkpoint import read_checkpoint
from det.arguments import PROGRAM, parse, settings_of
from det.digits import scene_source
from det.program import build_detector, check_deterministic, main
from distributed import World
from errors import ConfigError
from optim import Schedule, build_optimizer
from processes import end, start_ranks
from scenes import Scenes

ROOT = Path(__file__).resolve().parents[1]
MODEL = (
    "--device cpu --model vim_two_blocks --pyramid-channels 8 --pyramid-scales 1 0.5 --anchor-sizes 16 24 32 "
    "--rpn-convs 1 --box-convs 0 --box-width 16 --mask-convs 1 --proposals 20 --roi-samples 8 --roi-side 96"
)
QUICK = f"{MODEL} --num_workers 0 --batch-size 2 --epochs 2 --lr 1e-3 --warmup-steps 1 --drop-path 0.2 --log-every 1"


def det(*flags, size=48):
    return main([*QUICK.split(), "--input-size", str(size), *map(str, flags)])


@pytest.fixture
def coco(tmp_path):
    return det_sets.write_tiny(tmp_path / "coco", train=5, val=3)


def rows(folder):
    return [json.loads(line) for line in (folder / "log.txt").read_text().splitlines()]


# --- train and evaluate


def test_a_coco_folder_is_trained_on_evaluated_and_pictured(coco, tmp_path, capsys):
    out = tmp_path / "run"
    assert det("--data-path", coco, "--output_dir", out) == 0
    said = capsys.readouterr().out
    assert "instances_train2017.json: 5 images, 8 objects of 3 classes; images without objects, kept: 1" in said
    assert "held-out raw weights: box AP " in said and "; mask AP " in said and "best box AP " in said
    (first, last) = rows(out)
    assert {"test_box_AP", "test_box_AP50", "test_mask_AP", "test_mask_APs"} <= first.keys()
    assert math.isfinite(last["train_loss"]) and last["step"] == 4
    assert Image.open(out / "detections.png").size[0] > 600
    with open(out / "metrics.csv") as file:
        assert [float(row["test_box_AP"]) for row in csv.DictReader(file)] == [
            first["test_box_AP"],
            last["test_box_AP"],
        ]

    hub.main(["inspect", str(out / "checkpoint.pth")])
    said = capsys.readouterr().out
    assert "best box AP " in said and "of         det/train.py --model vim_two_blocks" in said and "fits" not in said

    assert det("--data-path", coco, "--eval", "--resume", out / "checkpoint.pth", "--output_dir", out / "eval") == 0
    said = capsys.readouterr().out
    assert f"checkpoint.pth (SHA-256 {read_checkpoint(out / 'checkpoint.pth').sha256[:16]}...): 3 images; " in said
    assert f"raw weights: box AP {last['test_box_AP']:.2f} " in said
    assert "train2017" not in said and (out / "eval" / "detections.png").exists()


def test_a_checkpoint_is_evaluated_on_images_of_another_size(coco, tmp_path, capsys):
    """--resume takes those that it was trained on alone; at that size both say the same."""
    flags = ("--data-path", coco, "--score-threshold", 0)
    assert det(*flags, "--epochs", 1, "--output_dir", tmp_path) == 0
    (row,) = rows(tmp_path)
    weights = tmp_path / "checkpoint.pth"
    assert det(*flags, "--eval", "--resume", weights, size=64) == 4
    assert "(--finetune instead of --resume resamples the position embeddings)" in capsys.readouterr().err
    for size in (48, 64):
        assert det(*flags, "--eval", "--finetune", weights, size=size) == 0
        said = capsys.readouterr().out
        assert "3 images; raw weights: box AP" in said and "backbone from" not in said
        assert size != 48 or f"box AP {row['test_box_AP']:.2f} " in said


def test_another_rectangle_of_as_many_patches_is_not_resumed(coco, tmp_path, capsys):
    assert det("--data-path", coco, "--epochs", 1, "--output_dir", tmp_path, size="32x128") == 0
    for flags in (("--eval", "--resume", tmp_path / "checkpoint.pth"), ("--resume", "auto", "--output_dir", tmp_path)):
        assert det("--data-path", coco, *flags, size=64) == 4
        error = capsys.readouterr().err
        assert "backbone.model.pos_embed (file 8 x 32 patches, model 16 x 16)" in error and error.count("\n") == 1


@pytest.mark.parametrize("detector", ["cascade", "mask"])
def test_generated_scenes_train_where_there_is_no_folder(detector, tmp_path, capsys):
    scenes = ("--train-scenes", 4, "--val-scenes", 2, "--pad", "batch", "--epochs", 1)
    assert det("--detector", detector, *scenes, "--output_dir", tmp_path) == 0
    said = capsys.readouterr().out
    assert "generated scenes: 4 images, " in said and "objects of 10 classes" in said
    assert (
        "roi_heads.stages.2.box_predictor.bbox_pred.weight" in read_checkpoint(tmp_path / "checkpoint.pth").model
    ) == (detector == "cascade")
    assert parse(["--config", str(tmp_path / "args.yaml")]).flip_prob == 0


def test_without_flags_scenes_are_not_mirrored_and_images_are(tmp_path):
    assert parse(["--device", "cpu"]).flip_prob == 0
    assert parse(["--device", "cpu", "--flip-prob", "0"]).flip_prob == 0
    save_arguments(parse(["--device", "cpu", "--data-path", "x"]), tmp_path / "args.yaml")
    assert parse(["--config", str(tmp_path / "args.yaml")]).flip_prob == 0.5


def test_a_run_that_was_stopped_goes_on_to_the_same_bits(coco, tmp_path):
    """From the middle of the second epoch: views, samples of boxes and stochastic depth are those of the whole run."""
    whole, rest = tmp_path / "whole", tmp_path / "rest"
    common = ("--data-path", coco, "--checkpoint-steps", 1, "--keep-checkpoints", 9)
    assert det(*common, "--output_dir", whole) == 0
    torch.manual_seed(99)  # what a process happens to start with must not matter
    assert det(*common, "--output_dir", rest, "--resume", whole / "checkpoint-00000003.pth") == 0
    assert rows(whole)[-1] == rows(rest)[-1]
    one, other = (read_checkpoint(folder / "checkpoint.pth") for folder in (whole, rest))
    assert one.model.keys() == other.model.keys() and one.step == other.step == 4
    assert all(torch.equal(value, other.model[name]) for name, value in one.model.items())
    before = read_checkpoint(whole / "checkpoint-00000003.pth").model
    assert not torch.equal(before["rpn.head.cls_logits.weight"], one.model["rpn.head.cls_logits.weight"])


def test_gradient_checkpointing_and_accumulation_run(coco, tmp_path):
    flags = ("--grad-checkpointing", "--accum-steps", 2, "--epochs", 1, "--model-ema", "--model-ema-decay", 0.5)
    assert det("--data-path", coco, "--output_dir", tmp_path, *flags) == 0
    (row,) = rows(tmp_path)
    assert row["step"] == 1 and "test_ema_box_AP" in row


@pytest.mark.parametrize("detector", ["cascade", "mask"])
def test_mixed_precision_trains_and_evaluates(detector, coco, tmp_path):
    flags = ("--if_amp", "--amp-dtype", "bfloat16", "--detector", detector, "--epochs", 1, "--score-threshold", 0)
    assert det("--data-path", coco, "--output_dir", tmp_path, *flags) == 0
    assert math.isfinite(rows(tmp_path)[0]["train_loss"])


@pytest.mark.slow
def test_two_ranks_share_training_and_evaluation(coco, tmp_path, capsys):
    """Each image is detected in once: two ranks and one process come to the same precisions."""
    flags = f"--data-path {coco} --input-size 48 --epochs 1 --score-threshold 0"
    ranks = start_ranks(f"{QUICK} {flags} --output_dir {tmp_path}", tmp_path / "out", program=main)
    assert end(ranks) == [0, 0]
    said = ["instances_train2017.json: 5 images" in (tmp_path / f"out.{rank}").read_text() for rank in (0, 1)]
    assert said == [True, False], "one rank speaks for all"
    (row,) = rows(tmp_path)
    assert row["step"] == 1  # five images, two ranks of two
    alone = ("--eval", "--resume", tmp_path / "checkpoint.pth", "--output_dir", tmp_path / "alone")
    assert det(*flags.split(), *alone) == 0
    assert f"box AP {row['test_box_AP']:.2f} " in capsys.readouterr().out


# --- model from flags


def test_every_block_of_the_backbone_has_its_own_rate_and_the_rest_the_whole():
    args = parse([*QUICK.split(), "--data-path", "x", "--layer-decay", "0.5", "--input-size", "48"])
    model = build_detector(args, 3, print)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = build_optimizer(args, model, 1.0).param_groups
    scale = {names[id(p)]: group.get("lr_scale", 1.0) for group in groups for p in group["params"]}
    assert scale.keys() == dict(model.named_parameters()).keys()
    for name, factor in scale.items():
        block = name.removeprefix("backbone.model.layers.").split(".")[0]
        place = int(block) + 1 if block.isdigit() else 0 if name.startswith("backbone.") else 3
        assert factor == 0.5 ** (3 - place), name
    decay = {names[id(p)]: group["weight_decay"] for group in groups for p in group["params"]}
    assert decay["backbone.model.pos_embed"] == 0 and decay["pyramid.levels.p2.1.weight"] == 0  # a norm
    assert decay["pyramid.levels.p2.0.weight"] == 0.1


@pytest.mark.parametrize("name", ["deit_nano_patch4_32", "resnet10t"])
def test_other_backbones_than_a_vim_detect(name):
    """A transformer of stride 4 and a convolutional network of stride 32, on a rectangle."""
    flags = [*QUICK.split(), "--data-path", "x", "--input-size", "128", "--pad", "batch", "--model", name]
    model = build_detector(parse(flags), 3, print).eval()
    assert model.pyramid.strides == ([4, 8] if name.startswith("deit") else [32, 64])
    with torch.no_grad():
        (found,) = model([torch.randn(3, 100, 128)])
    assert found["boxes"].shape == (len(found["scores"]), 4)


def test_a_classifiers_weights_become_the_backbones(tmp_path, capsys):
    """Trained at 8 pixels, two patches a side; position embeddings of 48 pixels are resampled."""
    from main import main as classify

    flags = "--device cpu --model vim_two_blocks --input-size 8 --num_workers 0 --epochs 1 --batch-size 512"
    assert classify([*flags.split(), "--output_dir", str(tmp_path)]) == 0
    trained = read_checkpoint(tmp_path / "checkpoint.pth").model
    args = parse(
        [*QUICK.split(), "--data-path", "x", "--input-size", "48", "--finetune", str(tmp_path / "checkpoint.pth")]
    )
    model = build_detector(args, 3, print)
    assert "left out: " in capsys.readouterr().out
    own = model.backbone.model.state_dict()
    assert torch.equal(own["layers.1.mixer.in_proj.weight"], trained["layers.1.mixer.in_proj.weight"])
    assert own["pos_embed"].shape[1] == 12 * 12 + 1
    assert torch.equal(own["pos_embed"][:, 72], trained["pos_embed"][:, 2])  # the class token, in the middle


@pytest.mark.parametrize(
    ("flags", "milestones", "rate"),
    [("", [88.89, 96.3], 0.1), ("--epochs 12", [10.6668, 11.556], 0.1), ("--sched poly", [88.89, 96.3], 1.0)],
)
def test_the_rate_is_cut_at_shares_of_the_epochs(flags, milestones, rate):
    """A shortened recipe keeps both cuts, and poly is linear."""
    args = parse(["--device", "cpu", "--data-path", "x", *flags.split()])
    assert args.decay_milestones == pytest.approx(milestones) and args.decay_rate == rate


def test_the_defaults_are_the_published_recipe():
    args = parse(["--device", "cpu", "--data-path", "x"])
    assert (args.opt, args.lr, args.unscale_lr, args.weight_decay) == ("adamw", 1e-4, True, 0.1)
    assert (args.layer_decay, args.drop_path, args.epochs, args.warmup_steps) == (0.837, 0.1, 100, 250)
    assert (args.input_size, args.scale_range, args.flip_prob) == (1024, [0.1, 2.0], 0.5)
    steps = 118287 // 64
    milestones = [round(epoch * steps) for epoch in args.decay_milestones]
    assert milestones == pytest.approx([163889, 177546], rel=5e-3)
    assert settings_of(args).pad == (1024, 1024) and settings_of(args).detector == "cascade"


@pytest.mark.parametrize(
    ("flags", "epochs", "steps"),
    [
        ("", 5, 250),
        ("--warmup-epochs 10", 10, None),
        ("--warmup-steps 9", 5, 9),
        ("--no-sched-on-updates", 5, None),
        ("--no-sched-on-updates --warmup-epochs 2", 2, None),
    ],
)
def test_the_warm_up_is_as_long_as_told_in_epochs_or_steps(flags, epochs, steps, tmp_path):
    args = parse(["--device", "cpu", *flags.split()])
    assert (args.warmup_epochs, args.warmup_steps) == (epochs, steps)
    save_arguments(args, tmp_path / "args.yaml")
    again = parse(["--config", str(tmp_path / "args.yaml")])
    assert (again.warmup_epochs, again.warmup_steps) == (epochs, steps)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    last = (steps or 10 * epochs) if args.sched_on_updates else epochs
    schedule = Schedule(args, optimizer, steps_per_epoch=10)
    rate = schedule.set if args.sched_on_updates else lambda epoch, step: schedule.set(step + 1, 0)
    assert rate(0, last - 1) < rate(0, last) == 1.0


# --- refusals


@pytest.mark.parametrize(
    ("flags", "device", "refused"),
    [
        ("--deterministic --pad batch", "cuda", True),
        ("--deterministic --pad batch", "cpu", False),
        ("--pad batch", "cuda", False),
        ("--deterministic", "cuda", False),
        ("--deterministic --pad batch --eval --resume x", "cuda", False),
        ("--deterministic --pad batch --model resnet10t --input-size 64", "cuda", False),
    ],
)
def test_a_step_that_torch_cannot_take_deterministically_is_refused(flags, device, refused):
    """On a GPU the gradient of resampled position embeddings has no fixed order of sums."""
    args = parse([*QUICK.split(), "--data-path", "x", "--input-size", "48", *flags.split()])
    model, world = build_detector(args, 3, print), World(0, 1, torch.device(device))
    if refused:
        with pytest.raises(ConfigError, match=r"^--deterministic --pad batch: .*; take --pad square$"):
            check_deterministic(args, world, model)
    else:
        check_deterministic(args, world, model)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ("--scale-range 2 0.1", "--scale-range 2 0.1: expected two scales above 0"),
        ("--scale-range 0 1", "--scale-range 0 1: expected two scales above 0"),
        ("--scale-range 1 inf", "--scale-range 1 inf: expected two scales above 0"),
        ("--roi-side -4", "--roi-side -4: expected pixels above 0"),
        ("--no-train-mode", "--no-train-mode: torchvision's heads have losses in training mode alone; leave it out"),
        (
            "--pad batch --model test_vit_relpos --input-size 64",
            "--pad batch: --model test_vit_relpos takes images of 64x64 alone; take --pad square",
        ),
        ("--compile", "--compile: a detector's boxes change in number"),
        ("--data-path= --flip-prob 0.5", "--flip-prob 0.5: the digits of generated scenes must not be mirrored; leave"),
        ("--anchor-sizes 8 16", "2 anchor sizes for 3 levels"),
        ("--pyramid-scales 3 1", "--pyramid-scales 3 1: use some of 4 2 1 0.5, each once, the largest first"),
        ("--pyramid-scales 0.5 1", "--pyramid-scales 0.5 1: use some of 4 2 1 0.5"),
        ("--input-size 50", "--model vim_two_blocks at --input-size 50: images filled up to (50, 50) pixels: take mul"),
        ("--data-path nowhere", "nowhere/annotations/instances_train2017.json cannot be read"),
        ("--model resnet999", "--model resnet999 is not registered with timm"),
        ("--batch-size 9", "5 training images do not fill one batch of 9"),
        ("--decay-milestones 3 2", "--decay-milestones 3 2: expected rising numbers of epochs"),
        ("--decay-milestones 500 600", "--decay-milestones 500 600: --epochs "),
        ("--sched plateau", "--sched plateau follows the evaluations, not the steps; give --no-sched-on-updates"),
        ("--sched plateau --no-sched-on-updates --decay-rate 1", "--decay-rate 1: --sched plateau cuts the rate by a"),
        ("--eval", "--eval needs --resume CKPT to evaluate, or --finetune CKPT at another --input-size"),
    ],
)
def test_what_cannot_work_is_one_line(flags, said, coco, capsys):
    assert det("--data-path", coco, *flags.split()) == 4
    error = capsys.readouterr().err
    assert error.startswith("error: ") and said in error and error.count("\n") == 1


def test_a_folder_with_nothing_to_train_on_is_one_line(tmp_path, capsys):
    for split in ("train", "val"):
        crowd = det_sets.annotation(1, 3, (0, 0, 4, 4), iscrowd=1, segmentation=det_sets.run_length(np.ones((8, 8))))
        det_sets.write_half(tmp_path, split, {1: (8, 8)}, [crowd])
    assert det("--data-path", tmp_path) == 4
    error = capsys.readouterr().err
    assert "has nothing to train on: " in error and "crowd regions, left out of training: 1" in error


@pytest.mark.parametrize("crowds", [0, 1])
def test_held_out_images_without_an_object_end_the_run_before_training(crowds, coco, capsys):
    """Their average precision would be no number, and no epoch better than the first."""
    crowd = det_sets.annotation(1, 3, (0, 0, 4, 4), iscrowd=1, segmentation=det_sets.run_length(np.ones((8, 8))))
    det_sets.write_half(coco, "val", {1: (8, 8), 2: (8, 8)}, [crowd] * crowds)
    assert det("--data-path", coco) == 4
    error = capsys.readouterr().err
    assert "instances_val2017.json has no object to evaluate with in 2 images" in error and error.count("\n") == 1


def test_a_damaged_image_ends_the_run_with_its_name(coco, capsys):
    (coco / "train2017" / "000000000102.png").write_bytes(b"no image")
    assert det("--data-path", coco) == 4
    error = capsys.readouterr().err
    assert "000000000102.png" in error and "repair the file" in error and error.count("\n") == 1


def test_a_flag_of_another_program_is_refused(capsys):
    assert det("--mixup", "0.8") == 2
    assert "train.py: error: unrecognized arguments: --mixup" in capsys.readouterr().err


def test_the_file_runs_from_any_folder(tmp_path):
    command = [sys.executable, str(ROOT / "det" / "train.py"), "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Cascade Mask R-CNN" in done.stdout and "--layer-decay" in done.stdout


# --- generated scenes


def test_scenes_are_annotated_exactly():
    source, scenes = scene_source("val", 96, 3), Scenes("val", 96, 3)
    for i, scene in enumerate(scenes):
        assert np.array_equal(np.asarray(source.read(i)), scene.image)
        assert [instance.label for instance in source.instances(i)] == (scene.labels + 1).tolist()
        own = [one for one in source.truth["annotations"] if one["image_id"] == source.image_id(i)]
        boxes = np.array([one["bbox"] for one in own])
        assert np.array_equal(boxes[:, :2] + boxes[:, 2:], scene.boxes[:, 2:])
        assert [one["area"] for one in own] == scene.masks.sum((1, 2)).tolist()
    assert source.class_names == [str(digit) for digit in range(10)]


# --- scripts and demonstration


SCRIPTS = sorted((ROOT / "det" / "scripts").glob("*.sh"))


def arguments_of(script, coco, tmp_path, gpus, *flags):
    """What a script starts the program with."""
    weights = tmp_path / "classifier.pth"
    weights.touch()
    variables = {"DATA_PATH": coco, "CKPT": weights, "GPUS": gpus, "DRY_RUN": 1, "PYTHON": sys.executable}
    clean = {k: v for k, v in os.environ.items() if k not in ("BATCH", "NNODES", "OUTPUT_DIR", "NODE_RANK")}
    done = subprocess.run(
        ["bash", str(script), "--device", "cpu", *flags],
        env=clean | {key: str(value) for key, value in variables.items()},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    words = shlex.split(done.stdout)
    program = next(i for i, word in enumerate(words) if word.endswith("train.py"))
    assert Path(words[program]).resolve() == ROOT / "det" / "train.py"
    return parse(words[program + 1 :])


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.stem)
@pytest.mark.parametrize("gpus", [1, 2, 8])
def test_a_script_is_the_recipe_on_any_number_of_gpus(script, gpus, coco, tmp_path):
    args = arguments_of(script, coco, tmp_path, gpus)
    assert args.batch_size * args.accum_steps * gpus == 64
    assert args.finetune == str(tmp_path / "classifier.pth") and args.data_path == str(coco)
    assert args.warmup_steps == 250 and args.decay_milestones == [88.89, 96.3]
    defaults = parse(["--device", "cpu", "--data-path", "x"])
    for name in PROGRAM.defaults.keys() - {"model"}:
        assert getattr(args, name) == getattr(defaults, name), name


def test_a_scripts_recipe_can_be_shortened(coco, tmp_path):
    args = arguments_of(SCRIPTS[0], coco, tmp_path, 1, "--epochs", "12", "--warmup-epochs", "3")
    assert args.decay_milestones == pytest.approx([10.6668, 11.556])
    assert (args.warmup_epochs, args.warmup_steps) == (3, None)


def test_there_is_a_script_for_each_size():
    assert [script.stem for script in SCRIPTS] == [f"cascade-vim-{size}" for size in "bst"]


def test_the_demonstration_trains_and_then_evaluates_its_own_checkpoint():
    done = subprocess.run(
        ["make", "--dry-run", "demo-det", "VENV=no-such-environment"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    lines = [shlex.split(line) for line in done.stdout.replace("\\\n", " ").splitlines()]
    runs = [words[2:] for words in lines if words[1:2] == ["det/train.py"]]
    runs = [[f"--config={ROOT / words[1]}", *words[2:]] for words in runs]
    train, evaluate = (parse([*words, "--device", "cpu"]) for words in runs)
    assert not train.eval and not train.data_path and train.model == evaluate.model
    assert evaluate.eval and Path(evaluate.resume).parent == Path(train.output_dir)
    assert train.batch_size * (train.train_scenes // train.batch_size) * train.epochs <= 12000  # it has to end soon


def test_the_guides_commands_exist():
    """Every flag and file that docs/DENSE.md names for a detector."""
    text = (ROOT / "docs" / "DENSE.md").read_text()
    known = {flag for action in build_parser(PROGRAM)._actions for flag in action.option_strings}
    lines = [line.split("  #")[0] for line in text.splitlines()]
    commands = [line for line in lines if line.startswith("python det/train.py")]
    flags = {word for command in commands for word in shlex.split(command) if word.startswith("--")}
    assert len(commands) >= 2 and flags <= known
    named = set(re.findall(r"det/[\w/.-]+\.(?:py|sh|yaml|txt)", text))
    assert len(named) >= 5 and all((ROOT / name).is_file() for name in named)
