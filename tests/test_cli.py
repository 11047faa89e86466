"""The command line as a contract: names, defaults, YAML, and what a wrong flag says."""

import argparse
import itertools
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import arguments
import det.arguments as detection
import seg.arguments as segmentation
from arguments import Switch, build_parser, parse_args, save_arguments
from distributed import EXIT_CONFIG
from errors import ConfigError as Refused
from failures import explain, run_cli
from inference import choose_device
from lifecycle import run_program

# Flag (with its other spellings, a switch with its negation): default. DeiT's and Vim's, as published; a
# change here breaks somebody's script.
PUBLISHED = {
    "--batch-size": 64,
    "--epochs": 300,
    "--output_dir --output-dir": "",
    "--seed": 0,
    "--data-path": "",
    "--data-set": None,
    "--inat-category": "name",
    "--input-size": 224,
    "--num_workers --num-workers": 10 if sys.platform == "linux" else 4,
    "--pin-mem --no-pin-mem": True,
    "--repeated-aug --no-repeated-aug": True,
    "--train-mode --no-train-mode": True,
    "--model": "deit_base_patch16_224",
    "--drop": 0.0,
    "--drop-path": 0.1,
    "--attn-only --no-attn-only": False,
    "--model-ema --no-model-ema": True,
    "--model-ema-decay": 0.99996,
    "--model-ema-force-cpu --no-model-ema-force-cpu": False,
    "--resume": "",
    "--finetune": "",
    "--start_epoch --start-epoch": 0,
    "--opt": "adamw",
    "--opt-eps": 1e-08,
    "--opt-betas": None,
    "--clip-grad": None,
    "--momentum": 0.9,
    "--weight-decay": 0.05,
    "--lr": 0.0005,
    "--unscale-lr --no-unscale-lr": False,
    "--sched": "cosine",
    "--lr-noise": None,
    "--lr-noise-pct": 0.67,
    "--lr-noise-std": 1.0,
    "--warmup-lr": 1e-06,
    "--min-lr": 1e-05,
    "--decay-epochs": 30,
    "--warmup-epochs": 5,
    "--cooldown-epochs": 10,
    "--patience-epochs": 10,
    "--decay-rate --dr": 0.1,
    "--color-jitter": 0.3,
    "--aa": "rand-m9-mstd0.5-inc1",
    "--train-interpolation": "bicubic",
    "--reprob": 0.25,
    "--remode": "pixel",
    "--recount": 1,
    "--resplit --no-resplit": False,
    "--ThreeAugment --no-ThreeAugment": False,
    "--src --no-src": False,
    "--mixup": 0.8,
    "--cutmix": 1.0,
    "--cutmix-minmax": None,
    "--mixup-prob": 1.0,
    "--mixup-switch-prob": 0.5,
    "--mixup-mode": "batch",
    "--if_random_cls_token_position --no_random_cls_token_position": False,
    "--if_random_token_rank --no_random_token_rank": False,
    "--smoothing": 0.1,
    "--bce-loss --no-bce-loss": False,
    "--cosub --no-cosub": False,
    "--teacher-model": "regnety_160",
    "--teacher-path": "",
    "--distillation-type": "none",
    "--distillation-alpha": 0.5,
    "--distillation-tau": 1.0,
    "--eval --no-eval": False,
    "--eval-crop-ratio": 0.875,
    "--dist-eval --no-dist-eval": False,
    "--device": "cuda",
    "--if_amp --no_amp": None,
    "--if_continue_inf --no_continue_inf": False,
    "--if_nan2num --no_nan2num": False,
    "--distributed --no-distributed": False,
    "--world_size --world-size": 1,
    "--dist_url --dist-url": "env://",
    "--local-rank --local_rank": 0,
}

# Ours.
OWN = {
    "--config": "",
    "--accum-steps": 1,
    "--report-to": "tensorboard",
    "--log-every": 50,
    "--in-chans": 3,
    "--train-split": "train",
    "--val-split": "validation",
    "--image-key": "image",
    "--label-key": "",
    "--valid-labels": "",
    "--real-labels": "",
    "--summary --no-summary": False,
    "--num-classes": None,
    "--loader-timeout": 600.0,
    "--bad-image": "raise",
    "--bad-image-share": 0.01,
    "--dt-init-backward": "published",
    "--compile --no-compile": False,
    "--grad-checkpointing --no-grad-checkpointing": False,
    "--pos-embed-resize": "grid",
    "--trust-checkpoint --no-trust-checkpoint": False,
    "--no-decay-ssm --decay-ssm": False,
    "--sched-on-updates --no-sched-on-updates": False,
    "--warmup-steps": None,
    "--decay-milestones": [30.0, 60.0],
    "--layer-decay": None,
    "--eval-weights": "both",
    "--amp-dtype": "bfloat16",
    "--deterministic --no-deterministic": False,
    "--checkpoint-steps": 0,
    "--keep-checkpoints": 2,
    "--nonfinite": None,
    "--nonfinite-limit": 10,
    "--dist-timeout": 1800.0,
}

CONFIGS = Path(__file__).resolve().parents[1] / "vim" / "configs"
ON_CPU = ("--device", "cpu")


def refusal(capsys, *flags) -> str:
    """The one line with which argparse refuses flags."""
    with pytest.raises(SystemExit) as stop:
        parse_args([*ON_CPU, *flags])
    assert stop.value.code == 2
    text = capsys.readouterr().err
    assert text.count("\n") == 1
    return text


def config(tmp_path, text: str) -> list[str]:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    return ["--config", str(path)]


def round_trip(args, folder):
    """The arguments that the file beside a checkpoint gives back."""
    save_arguments(args, folder / "args.yaml")
    again = parse_args(["--config", str(folder / "args.yaml")])
    again.config = args.config
    return again


def test_flags_and_defaults_are_the_published_ones_and_ours():
    found = {" ".join(a.option_strings): a.default for a in build_parser()._actions if a.dest != "help"}
    assert found == PUBLISHED | OWN


def test_every_flag_has_words_of_help():
    assert [action.dest for action in build_parser()._actions if not action.help] == []


def test_help_tells_all_flags_and_defaults(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_args(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    assert all(name.split()[0] in text for name in PUBLISHED | OWN)
    assert "weight of the old average at each step (default: 0.99996)" in " ".join(text.split())


def group_of(parser, flag: str) -> str:
    return next(g.title for g in parser._action_groups for a in g._group_actions if flag in a.option_strings)


PROGRAMS = [arguments.CLASSIFIER, segmentation.PROGRAM, detection.PROGRAM]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.prog)
def test_every_help_text_can_be_read_by_itself_and_is_true_of_its_program(program):
    parser = build_parser(program)
    helps = {action.dest: action.help for action in parser._actions}
    fragment = re.compile(r"(of|at|to|where|for|the (first|last) epoch\S*) ")
    assert [text for text in helps.values() if fragment.match(text)] == []
    assert helps["lr"].startswith("peak learning rate; multiplied by whole batch / 512 unless --unscale-lr")
    assert helps["warmup_lr"].startswith("rate at which the warm-up starts (default: ")
    assert "all alike" not in helps["layer_decay"]


def test_flags_stand_where_one_looks_for_them():
    parser = build_parser()
    assert group_of(parser, "--data-path") == group_of(parser, "--data-set") == "images and classes"
    assert {group_of(parser, flag) for flag in ("--model", "--drop", "--train-mode", "--summary")} == {"model"}
    titles = [group.title for group in parser._action_groups]
    assert len(titles) == len(set(titles))
    assert group_of(build_parser(segmentation.PROGRAM), "--data-path") == "labelled images"


def test_the_model_by_default_is_said_to_be_deits():
    (text,) = [action.help for action in build_parser()._actions if action.dest == "model"]
    assert "the default is DeiT's" in text and "one of this project's (vim_tiny" in text


def test_of_both_lengths_of_a_warm_up_the_command_lines_counts(tmp_path):
    flags = ("--sched-on-updates", *config(tmp_path, "warmup_epochs: 5\nwarmup_steps: 250\n"))
    assert parse_args([*ON_CPU, *flags]).warmup_steps == 250
    other_order = ("--sched-on-updates", *config(tmp_path, "warmup_steps: 250\nwarmup_epochs: 5\n"))
    assert parse_args([*ON_CPU, *other_order]).warmup_steps == 250
    assert parse_args([*ON_CPU, "--sched-on-updates", "--warmup-epochs", "2", "--warmup-steps=9"]).warmup_steps == 9
    args = parse_args([*ON_CPU, *flags, "--warmup-epochs", "10"])
    assert (args.warmup_epochs, args.warmup_steps) == (10, None)
    assert vars(round_trip(args, tmp_path)) == vars(args)


@pytest.mark.parametrize("kind", ["mps", "xpu"])
def test_auto_is_no_device_that_vim_has_no_kernels_for(kind, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device(kind))
    assert parse_args(["--device", "auto"]).device == choose_device("auto").type == "cpu"


@pytest.mark.parametrize(("system", "number"), [("linux", 10), ("darwin", 4), ("win32", 4)])
def test_loader_processes_are_fewer_where_they_are_not_forked(system, number, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    assert build_parser().get_default("num_workers") == number


def test_every_switch_can_be_turned_on_and_off():
    switches = [action for action in build_parser()._actions if isinstance(action, Switch)]
    assert len(switches) > 20
    for action in switches:
        on, off = (vars(build_parser().parse_args([name]))[action.dest] for name in action.option_strings)
        assert (on, off) == (True, False)


def test_open_defaults_are_resolved():
    args = parse_args(["--device", "auto"])
    assert args.device in ("cpu", "cuda")
    assert args.if_amp == (args.device == "cuda")
    assert (args.data_set, args.nonfinite) == ("DIGITS", "stop")
    assert parse_args([*ON_CPU, "--data-path", "x"]).data_set == "IMNET"
    assert parse_args([*ON_CPU, "--if_amp"]).if_amp
    assert parse_args([*ON_CPU, "--if_continue_inf"]).nonfinite == "skip"


@pytest.mark.parametrize("device", ["cuda", "cuda:1"])
def test_mixed_precision_is_on_with_any_gpu(device, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert parse_args(["--device", device]).if_amp


def test_the_published_switch_wins_over_a_saved_policy(tmp_path):
    save_arguments(parse_args(ON_CPU), tmp_path / "args.yaml")
    assert parse_args(["--config", str(tmp_path / "args.yaml"), "--if_continue_inf"]).nonfinite == "skip"
    save_arguments(parse_args([*ON_CPU, "--nonfinite", "skip"]), tmp_path / "args.yaml")
    assert parse_args(["--config", str(tmp_path / "args.yaml")]).nonfinite == "skip"
    assert parse_args(["--config", str(tmp_path / "args.yaml"), "--no_continue_inf"]).nonfinite == "stop"


def test_two_configuration_files_are_refused(tmp_path):
    with pytest.raises(Refused, match=r"--config a.yaml and --config b.yaml: give one file"):
        parse_args(["--config", "a.yaml", "--config=b.yaml"])


def test_the_published_commands_parse():
    """The published pre-training and evaluation commands, as users have them in scripts."""
    name = "vim_tiny_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
    args = parse_args(
        f"--model {name} --batch-size 128 --drop-path 0.0 --weight-decay 0.1 --num_workers 25 "
        "--data-path DATA --output_dir OUT --no_amp --device cpu".split()
    )
    assert (args.batch_size, args.drop_path, args.weight_decay, args.if_amp) == (128, 0.0, 0.1, False)
    args = parse_args(f"--eval --resume CKPT --model {name} --data-path DATA --device cpu".split())
    assert args.eval and args.resume == "CKPT"


def test_sides_of_an_image():
    assert parse_args([*ON_CPU, "--input-size", "96"]).input_size == 96
    assert parse_args([*ON_CPU, "--input-size", "96x160"]).input_size == (96, 160)


# --- YAML


def test_yaml_gives_flags_and_the_command_line_wins(tmp_path):
    text = "epochs: 7\nlr: 5e-4\nmodel-ema: false\nopt_betas: [0.9, 0.95]\ndevice: cpu\ndr: 0.5\n"
    flags = config(tmp_path, text)
    args = parse_args(flags)
    assert (args.epochs, args.lr, args.model_ema, args.opt_betas) == (7, 5e-4, False, [0.9, 0.95])
    assert (args.device, args.decay_rate) == ("cpu", 0.5)
    assert parse_args([*flags, "--epochs", "9", "--model-ema"]).epochs == 9
    assert parse_args([*flags, "--model-ema"]).model_ema


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("epoch: 3", ["unknown key 'epoch'", "did you mean", "epochs"]),
        ("help: true", ["unknown key 'help'"]),
        ("no_model_ema: true", ["unknown key 'no_model_ema'", "model_ema"]),
        ("- 1\n- 2", ["holds a list"]),
        ("a: [1", ["is not YAML"]),
        ("compile: 3", ["compile: 3", "true or false"]),
        ("epochs: true", ["epochs: True", "a value"]),
        ("aa: null", ["aa: None", "a value"]),
    ],
)
def test_a_wrong_configuration_file_is_one_line(tmp_path, text, words):
    with pytest.raises(Refused) as refused:
        parse_args([*ON_CPU, *config(tmp_path, text)])
    line = str(refused.value)
    assert "\n" not in line and "run.yaml" in line
    assert all(word in line for word in words), line


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.name)
def test_the_projects_own_configurations_parse(path):
    args = parse_args([*ON_CPU, "--config", str(path)])
    given = yaml.safe_load(path.read_text())
    assert given and all(vars(args)[key] == type(vars(args)[key])(given[key]) for key in given if key != "device")


def test_a_missing_configuration_file_is_named():
    with pytest.raises(Refused, match=r"--config nowhere\.yaml: No such file"):
        parse_args(["--config", "nowhere.yaml"])


def test_an_empty_configuration_file_changes_nothing(tmp_path):
    assert vars(parse_args([*config(tmp_path, ""), *ON_CPU])).items() >= {"epochs": 300}.items()


def test_yaml_values_are_checked_as_flags_are(tmp_path, capsys):
    assert "argument --epochs: -1 is not a positive" in refusal(capsys, *config(tmp_path, "epochs: -1"))


def test_arguments_survive_the_file_beside_the_checkpoints(tmp_path):
    flags = "--cutmix-minmax 0.2 0.8 --lr-noise 0.3 0.9 --no-model-ema --input-size 96x160 --no-decay-ssm"
    args = parse_args([*ON_CPU, *flags.split(), "--if_amp", "--opt-eps", "1e-7", "--in-chans", "1"])
    assert vars(round_trip(args, tmp_path)) == vars(args)
    assert yaml.safe_load((tmp_path / "args.yaml").read_text())["input_size"] == "96x160"


VALUES = {
    None: st.text(st.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), max_size=9),
    int: st.integers(-(10**9), 10**9),
    float: st.floats(allow_nan=False, allow_infinity=False),
    arguments.positive_int: st.integers(1, 10**9),
    arguments.natural_int: st.integers(0, 10**9),
    arguments.at_least_two: st.integers(2, 10**9),
    arguments.fraction: st.floats(0, 1),
    arguments.positive_float: st.floats(0, exclude_min=True, allow_infinity=False),
    arguments.natural_float: st.floats(0, allow_infinity=False),
    arguments.seed_number: st.integers(0, 2**63 - 1),
    arguments.image_size: st.sampled_from(["224", "96x160"]),
    arguments.data_set: st.sampled_from(["DIGITS", "hfds/someone/name"]),
    arguments.tracker_list: st.sampled_from(["", "tensorboard", "tensorboard,wandb"]),
}


def flag_with_value(action):
    """Anything that a flag accepts, as words of a command line."""
    if isinstance(action, Switch):
        return st.sampled_from([[name] for name in action.option_strings])
    value = st.sampled_from(list(action.choices)) if action.choices else VALUES[action.type]
    if action.nargs is None:
        return value.map(lambda v: [f"{action.option_strings[0]}={v}"])
    sizes = (1, 3) if action.nargs == "+" else (action.nargs, action.nargs)
    values = st.lists(value.filter(lambda v: "-" not in str(v)), min_size=sizes[0], max_size=sizes[1])
    return values.map(lambda vs: [action.option_strings[0], *map(str, vs)])


FLAGS = [a for a in build_parser()._actions if a.dest not in ("help", "config", "device")]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(FLAGS).flatmap(flag_with_value), max_size=8))
def test_any_arguments_survive_yaml(tmp_path_factory, flags):
    """All flags, with anything that they accept; combinations that are refused have no file to survive."""
    try:
        args = parse_args([*ON_CPU, *itertools.chain(*flags)])
    except Refused:
        assume(False)
    assert vars(round_trip(args, tmp_path_factory.getbasetemp())) == vars(args)


# --- refusals


def test_a_misspelt_flag_names_near_ones(capsys):
    assert "--batchsize 3 (did you mean --batch-size" in refusal(capsys, "--batchsize", "3")
    assert "did you mean --epochs" in refusal(capsys, "--epoch=3")
    assert "--help lists all flags" in refusal(capsys, "--qqqqqqqq")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--epochs", "0"], "--epochs: 0 is not a positive whole number"),
        (["--smoothing", "1.5"], "--smoothing: 1.5 is not between 0 and 1"),
        (["--seed", "-1"], "--seed: -1 is negative"),
        (["--data-set", "MNIST"], "invalid choice: 'MNIST'"),
        (["--report-to", "tensorboard,csv"], "--report-to: 'csv' is unknown: use one of tensorboard, wandb, mlflow"),
        (["--keep-checkpoints", "1"], "--keep-checkpoints: 1 is less than 2"),
        (["--input-size", "1x2x3"], "--input-size: 1x2x3 has 3 sides"),
        (["--input-size", "big"], "--input-size: big is not a size; give 224, or 192x256 (height x width)"),
        (["--input-size", "32x"], "--input-size: 32x is not a size; give"),
        (["--input-size", "16,64"], "--input-size: 16,64 is not a size; give"),
        (["--epochs", "1.5"], "--epochs: 1.5 is not a positive whole number"),
        (["--seed", "abc"], "--seed: abc is not 0 or a positive whole number"),
        (["--lr", "abc"], "--lr: abc is not 0 or a positive number"),
        (["--clip-grad", "abc"], "--clip-grad: abc is not a positive number"),
        (["--smoothing", "abc"], "--smoothing: abc is not a number between 0 and 1"),
        (["--keep-checkpoints", "abc"], "--keep-checkpoints: abc is not a whole number of at least 2"),
        (["--clip-grad", "0"], "--clip-grad: 0 is not a positive number; without the flag"),
        (["--weight-decay", "-1"], "--weight-decay: -1 is not 0 or a positive number"),
        (["--mixup", "nan"], "--mixup: nan is not 0 or a positive number"),
        (["--seed", str(10**20)], "has more than 63 bits; give a smaller seed"),
        (["--loader-timeout", "-5"], "--loader-timeout: -5 is not 0 or a positive number"),
        (["--cutmix-minmax", "0.3"], "--cutmix-minmax: expected 2 arguments"),
        (["--lr-noise", "30"], "--lr-noise: 30 is not between 0 and 1"),
    ],
)
def test_a_bad_value_is_one_line(capsys, flags, words):
    assert words in refusal(capsys, *flags)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-set", "IMNET"], "--data-set IMNET needs --data-path DIR"),
        (["--if_random_token_rank"], "--if_random_token_rank: no published weights were trained with it"),
        (["--resplit"], "--resplit belongs to augmentation splits"),
        (["--distillation-type", "hard"], "--distillation-type hard needs --teacher-path"),
        (["--distillation-type", "soft", "--teacher-path", "t", "--cosub"], "--cosub is its own teacher"),
        (["--eval"], "--eval needs --resume CKPT to evaluate, or --finetune CKPT at another --input-size"),
        (["--resume", "auto"], "--resume auto looks into --output_dir"),
        (["--resume", "a", "--finetune", "b"], "give one of them"),
        (["--sched", "plateau", "--sched-on-updates"], "--sched plateau follows the evaluations"),
        (["--cutmix-minmax", "0.9", "0.2"], "--cutmix-minmax 0.9 0.2: the second must be larger"),
        (["--cutmix-minmax", "0.2", "0.21", "--input-size", "32"], "by a pixel at least"),
        (["--start_epoch", "5", "--epochs", "5"], "--start_epoch 5 of --epochs 5 leaves nothing to train"),
        (
            ["--sched", "multistep", "--decay-milestones", "5", "--epochs", "5"],
            "--decay-milestones 5: --epochs 5 ends before the rate is first cut",
        ),
        (
            ["--lr-noise", "0.9", "0.4"],
            "--lr-noise 0.9 0.4: expected where the noise begins, and where it ends if that",
        ),
        (["--lr-noise", "0.1", "0.4", "0.9"], "--lr-noise 0.1 0.4 0.9: expected where the noise begins"),
        (["--sched", "step", "--decay-rate", "1"], "--decay-rate 1: --sched step cuts the rate by a factor below 1"),
        (["--report-to", "wandb"], "--report-to wandb keeps its files in --output_dir"),
        (["--device", "cpu:x"], "--device cpu:x is unknown: use one of cuda, cuda:N, cpu, mps, auto"),
        (["--device", "tpu"], "--device tpu is unknown: use one of cuda, cuda:N, cpu, mps, auto"),
    ],
)
def test_flags_that_cannot_go_together_are_one_line(flags, words):
    with pytest.raises(Refused) as refused:
        parse_args([*ON_CPU, *flags])
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_command_that_is_interrupted_is_one_line(capsys):
    def command(args):
        raise KeyboardInterrupt

    assert run_cli(command, argparse.Namespace()) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB. GPU 0 has"), "CUDA out of memory"),
        (MemoryError(), "MemoryError"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"), "DefaultCPUAllocator: "),
    ],
)
def test_a_command_without_enough_memory_is_one_line(error, reason, capsys):
    def command(args):
        raise error

    assert run_cli(command, argparse.Namespace(batch_size=32)) == EXIT_CONFIG
    said = capsys.readouterr().err
    assert said.startswith("error: out of memory: take a --batch-size below 32, smaller images or a smaller model (")
    assert reason in said and said.count("\n") == 1
    assert run_cli(command, argparse.Namespace()) == EXIT_CONFIG
    assert capsys.readouterr().err.startswith("error: out of memory: take smaller images or a smaller model (")


def test_a_commands_own_fault_keeps_its_traceback():
    def command(args):
        raise RuntimeError("shapes do not fit")

    with pytest.raises(RuntimeError, match="shapes do not fit"):
        run_cli(command, argparse.Namespace())


def test_a_command_whose_reader_has_enough_ends_quietly():
    """`predict.py ... | head -1`"""
    program = (
        "import argparse, sys; sys.path.insert(0, sys.argv[1]); from failures import run_cli\n"
        "def command(args):\n"
        "    sys.stdin.readline()\n"
        "    for i in range(9999): print('a line')\n"
        "sys.exit(run_cli(command, argparse.Namespace()))\n"
    )
    command = [sys.executable, "-c", program, str(Path(arguments.__file__).parent)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, text=True, **pipes) as process:
        process.stdout.close()
        process.stdin.write("go\n")
        process.stdin.flush()
        assert process.stderr.read() == ""
    assert process.returncode == 128 + signal.SIGPIPE


def test_a_file_that_may_not_be_read_is_one_line():
    assert explain(PermissionError(13, "Permission denied", "w.pth")) == (EXIT_CONFIG, "w.pth: Permission denied")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (
            RuntimeError(
                "Caught RuntimeError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
                "RuntimeError: unable to allocate shared memory(shm) for file </torch_1>: No space left (28)\n"
            ),
            "too little shared memory for --num_workers 3 --batch-size 7: give it more (`docker run --shm-size 16g`, "
            "or a larger /dev/shm), or take fewer loader processes (unable to allocate shared memory(shm) for file "
            "</torch_1>: No space left (28))",
        ),
        (
            OSError(24, "Too many open files"),
            "too little room for open files for --num_workers 3 --batch-size 7: allow more (`ulimit -n 65536`), or "
            "take fewer loader processes ([Errno 24] Too many open files)",
        ),
        (
            OSError(28, "No space left on device"),
            "one of out, /dev/shm (--num_workers), the program's output: No space left on device; --resume auto goes "
            "on from the last checkpoint, if there is one",
        ),
    ],
    ids=["shared memory", "open files", "no name"],
)
def test_what_a_container_has_too_little_of_is_named(error, line):
    """The first two as torch says them."""
    args = argparse.Namespace(num_workers=3, batch_size=7, output_dir="out")
    assert explain(error, args) == (EXIT_CONFIG, line)


def test_a_program_whose_output_is_closed_goes_on(monkeypatch):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    assert run_program([], lambda argv: parse_args(["--device", "cpu"]), lambda args, world: print("x") or 7) == 7


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_cuda_without_a_gpu_says_what_to_use(capsys, monkeypatch):
    """The published default gives way, aloud: the paper's commands run on a laptop as they are."""
    with pytest.raises(Refused, match="--device cuda: this torch sees no GPU; use --device cpu or --device auto"):
        parse_args(["--device", "cuda"])
    args = parse_args([])
    assert capsys.readouterr().err == "no GPU and no --device: on the CPU\n"
    assert (type(args.device), args.device, args.if_amp) == (str, "cpu", False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_ranks_of_one_machine_without_a_gpu_run_on_its_cpu_and_those_of_several_do_not(capsys, monkeypatch):
    """Other machines may have GPUs, and this one's ranks would wait for theirs in another way."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    assert parse_args([]).device == "cpu"
    assert capsys.readouterr().err == "no GPU and no --device: on the CPU\n"
    monkeypatch.setenv("RANK", "1")
    assert parse_args([]).device == "cpu" and capsys.readouterr().err == ""
    for several in ({"LOCAL_WORLD_SIZE": "1"}, {"LOCAL_WORLD_SIZE": "2", "SLURM_PROCID": "1"}):
        for name, value in several.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Refused, match="--device cuda: this torch sees no GPU"):
            parse_args([])
