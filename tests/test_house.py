"""The house: packaging from any folder, licence files, the Makefile, and the README's commands."""

import os
import platform
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import setuptools.command.build_ext  # here, for it looks at the system when it is imported
import yaml

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"causal_conv1d": "causal_conv1d", "mamba-1p1p1": "mamba_ssm"}


def tracked_files():
    """What git tracks; in an unpacked archive, everything outside hidden folders."""
    listing = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listing.returncode == 0:
        return [ROOT / name for name in listing.stdout.splitlines() if (ROOT / name).is_file()]
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
    ]


def text_files():
    for path in tracked_files():
        if path.suffix not in {".png", ".jpg", ".npz", ".pth", ".safetensors"}:
            yield path, path.read_text(encoding="utf-8")


def python_in(folder, code):
    """Runs code in a fresh interpreter that starts in `folder`, which is thus its first import path."""
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


# --- packaging


@pytest.mark.parametrize("place", [".", "vim", "causal_conv1d", "mamba-1p1p1", "tests", "elsewhere"])
def test_both_packages_import_from_any_folder(place, tmp_path):
    """The folder causal_conv1d/ of the repository must not hide the package inside it."""
    folder = tmp_path if place == "elsewhere" else ROOT / place
    found = python_in(
        folder,
        "import causal_conv1d, mamba_ssm\n"
        "from causal_conv1d import causal_conv1d_fn\n"
        "from mamba_ssm.ops.selective_scan_interface import selective_scan_fn\n"
        "from mamba_ssm.modules.mamba_simple import Mamba\n"
        "print(causal_conv1d.__file__, mamba_ssm.__file__, sep='\\n')",
    )
    expected = [ROOT / folder / name / "__init__.py" for folder, name in PACKAGES.items()]
    assert [Path(line).resolve() for line in found.splitlines()] == expected


@pytest.mark.parametrize("package", PACKAGES.values())
def test_a_kernel_package_imports_nothing_but_torch(package):
    """The packages know tensors: the program, timm and torchvision stay out of them."""
    code = "import sys, torch; before = set(sys.modules); import {}; print(*set(sys.modules) - before)"
    loaded = {name.split(".")[0] for name in python_in(ROOT, code.format(package)).split()}
    torchs_own = {"torch", "numpy", "sympy", "mpmath", "triton"}  # what torch imports late
    ours = {name for name in loaded - sys.stdlib_module_names - torchs_own if not name.startswith("_")}
    assert ours == {package}


@pytest.mark.parametrize("package", PACKAGES.values())
def test_python_dash_m_tells_the_backends(package, tmp_path):
    command = [sys.executable, "-m", package]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    for backend in ("reference", "cpu", "triton"):
        assert backend in result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("folder", PACKAGES)
def test_a_wheel_holds_the_package_and_needs_only_torch(folder, tmp_path):
    """A wheel as others would build it: the modules and the library inside, no tests, torch (and triton) required."""
    compiler = tmp_path / "c++"
    compiler.write_text('#!/bin/sh\nexec g++ "$@" -O0\n')  # an optimised library takes a minute
    compiler.chmod(0o755)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--quiet", "--wheel-dir", str(tmp_path)]
    environment = os.environ | {"CXX": str(compiler)}
    result = subprocess.run(
        [*command, str(ROOT / folder)], env=environment, capture_output=True, text=True, timeout=600
    )
    assert result.returncode == 0, result.stderr
    listing = python_in(
        tmp_path,
        "import zipfile, pathlib\n"
        "wheel = zipfile.ZipFile(next(pathlib.Path('.').glob('*.whl')))\n"
        "print(*wheel.namelist(), sep='\\n')\n"
        "meta = next(name for name in wheel.namelist() if name.endswith('METADATA'))\n"
        "lines = wheel.read(meta).decode().splitlines()\n"
        "print(*[line for line in lines if line.startswith('Requires-Dist')], sep='\\n')",
    ).splitlines()
    names = [line for line in listing if not line.startswith("Requires-Dist")]
    required = {re.match(r"Requires-Dist: ([\w-]+)", line)[1] for line in listing if line not in names}
    assert f"{PACKAGES[folder]}/__init__.py" in names
    assert [name for name in names if re.search(r"/_cpu_kernels\..*so$", name)]
    assert not [name for name in names if name.split("/")[0] == "tests"]
    assert "torch" in required and required <= {"torch", "triton", "causal-conv1d", "causal_conv1d"}


# clang's name of a system: (sys.platform, platform.machine())
CLANG_TARGETS = {
    "aarch64-macos": ("darwin", "arm64"),
    "x86_64-macos": ("darwin", "arm64"),  # python.org's Python compiles for both processors
    "aarch64-linux-gnu": ("linux", "aarch64"),
    "x86_64-linux-gnu": ("linux", "x86_64"),
}


@pytest.mark.slow
@pytest.mark.parametrize("target", CLANG_TARGETS)
@pytest.mark.parametrize("folder", PACKAGES)
def test_clang_compiles_the_kernels(folder, target, monkeypatch, tmp_path):
    """With the flags of setup.py there, OpenMP's among them, for all instruction sets. It is macOS's compiler."""
    pytest.importorskip("ziglang")  # clang, from PyPI
    system, machine = CLANG_TARGETS[target]
    monkeypatch.chdir(ROOT / folder)
    monkeypatch.setattr(setuptools, "setup", lambda **arguments: None)
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    build = runpy.run_path(str(ROOT / folder / "setup.py"))
    monkeypatch.undo()
    assert len(build["ISA_FLAGS"]) == (3 if machine == "x86_64" else 1)
    clang = [sys.executable, "-m", "ziglang", "c++", "-target", target, "-Werror", "-fPIC"]
    for isa, flags in build["ISA_FLAGS"].items():
        optimised = [flag for flag in build["FLAGS"] if flag != "-O3"]  # without, in a third of the time
        for source in ("library.cpp", "kernels.cpp"):
            macros = [f"-DISA={isa}", '-DSOURCES=""']
            command = [*clang, *optimised, *flags, *macros, "-c", ROOT / folder / "csrc" / source]
            run = subprocess.run([*command, "-o", tmp_path / source], capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
        assert b"__kmpc_fork_call" in (tmp_path / "kernels.cpp").read_bytes()


# --- files


def test_no_file_names_a_place_of_one_machine():
    """No absolute path of somebody's disk, no private address, no secret."""
    places = re.compile(
        r"(?<![\w.])/(?:home|root|Users|work|opt/venv)/\w"
        r"|file:/{3}"
        r"|\b(?:10|192\.168)\.\d+\.\d+\.\d+\b"
        r"|hf_[A-Za-z0-9]{30,}|-----BEGIN [A-Z ]*PRIVATE KEY"
    )
    found = {str(path.relative_to(ROOT)): places.findall(text) for path, text in text_files()}
    assert {name: hits for name, hits in found.items() if hits} == {}


def test_no_large_file():
    large = {str(path.relative_to(ROOT)): path.stat().st_size for path in tracked_files()}
    assert {name: size for name, size in large.items() if size > 2**20} == {}


def test_the_licence_and_the_credits_are_there():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence and "Version 2.0, January 2004" in licence
    notice = (ROOT / "NOTICE").read_text()
    for credit in ("2401.09417", "hustvl/Vim", "2312.00752", "state-spaces/mamba", "causal-conv1d",
                   "facebookresearch/deit", "pytorch-image-models"):  # fmt: skip
        assert credit in notice


def test_yaml_and_shell_files_parse():
    for path in tracked_files():
        if path.suffix in {".yaml", ".yml"}:
            yaml.safe_load(path.read_text())
        if path.suffix == ".sh" or path.name == "run":
            subprocess.run(["bash", "-n", str(path)], check=True, timeout=60)


# --- commands


def make(*words):
    result = subprocess.run(["make", *words], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_make_alone_lists_the_commands():
    listing = make()
    for target in ("demo", "test", "test-fast", "test-gpu", "lint", "bench", "bench-quick", "bench-gpu"):
        assert f"make {target} " in listing


def test_continuous_integration_runs_make_test():
    script = (ROOT / ".ci" / "run").read_text()
    assert script.strip().endswith("make test")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def commands_of(target, **variables):
    """The commands that make would run for a target in a checkout without an environment."""
    words = [f"{key}={value}" for key, value in variables.items()]
    output = make("--dry-run", target, "VENV=no-such-environment", *words)
    return [shlex.split(line) for line in output.replace("\\\n", " ").splitlines()]


@pytest.mark.parametrize("model", ["vim_nano_patch4_32", "deit_nano_patch4_32"])
def test_the_demo_trains_and_then_evaluates_its_own_checkpoint(model):
    import arguments

    runs = [words[2:] for words in commands_of("demo", MODEL=model) if words[1:2] == ["vim/main.py"]]
    train, evaluate = (arguments.parse_args(flags) for flags in runs)
    assert train.model == evaluate.model == model
    assert train.data_set == "DIGITS" and not train.eval
    assert evaluate.eval and Path(evaluate.resume).parent == Path(train.output_dir)


def test_an_install_makes_its_own_environment_with_both_packages():
    commands = commands_of("install")
    assert ["python3", "-m", "venv", "no-such-environment"] in commands
    (install,) = (words for words in commands if "--editable" in words)
    for word in ("./causal_conv1d", "./mamba-1p1p1", "vim/vim_requirements.txt"):
        assert word in install


def readme_commands():
    """The lines of the README's code blocks that name no language, comments removed."""
    blocks = re.findall(r"^```(\w*)\n(.*?)^```$", (ROOT / "README.md").read_text(), re.MULTILINE | re.DOTALL)
    for language, block in blocks:
        if not language:
            yield from (line.split("  #")[0].strip() for line in block.replace("\\\n", " ").splitlines())


def test_the_readme_names_the_commands_that_must_work():
    text = "\n".join(readme_commands())
    for command in (
        "make demo",
        "make test",
        "pip install -e causal_conv1d -e mamba-1p1p1 -r vim/vim_requirements.txt",
        "bash vim/scripts/pt-vim-t.sh",
        "python main.py --eval --resume",
        "torchrun --nproc_per_node=",
    ):
        assert command in text


def test_the_readmes_make_targets_exist():
    listing = make()
    used = {line.split()[1] for line in readme_commands() if line.startswith("make ")}
    assert used and all(f"make {target} " in listing for target in used)


def test_the_readmes_flags_and_files_exist():
    """main.py's flags in the README parse; scripts and linked files are in the repository."""
    import arguments

    known = {flag for action in arguments.build_parser()._actions for flag in action.option_strings}
    for line in readme_commands():
        words = shlex.split(line)
        if "main.py" in words or "vim/scripts" in line:
            program = words.index("main.py") if "main.py" in words else 0
            flags = {word.split("=")[0] for word in words[program:] if word.startswith("--")}
            assert flags <= known, line
        for word in words:
            if word.startswith("vim/scripts/"):
                assert (ROOT / word).is_file(), line
    text = (ROOT / "README.md").read_text()
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert [link for link in links if not (ROOT / link).exists()] == []
