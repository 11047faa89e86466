"""Races in the mixer's CUDA kernels, found without a GPU: each launch of a small mixer, compiled by g++ with its thread
sanitizer, one fiber a CUDA thread (cuda_emulation.h, cuda_races.cpp). Arithmetic is test_cuda_kernels.py's matter.
"""

import os
import shutil
import struct
import subprocess
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")
import test_cuda_kernels as mixer
from once import kept, shared_folder

from mamba_ssm.ops.cuda import bimamba as kernels
from mamba_ssm.ops.cuda import runtime

TESTS = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("emulated_cuda"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="the sanitizer is g++'s"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has compute-sanitizer"),
]
RACE, NONE = 66, 0  # how a program under the sanitizer ends


def launches_of(few: bool, length: int, channels: int, monkeypatch, batch: int = 1) -> list[tuple]:
    """(file, kernel, definitions, grid, threads, shared, arguments) of a mixer's forward and backward."""
    case = mixer.case(batch, length, channels, dtype=torch.bfloat16)
    launched, load = [], runtime.load

    def recorded(file, name, defines=()):
        kernel = load(file, name, defines)

        def run(grid, threads, shared, *args):
            before = [arg.clone() if isinstance(arg, torch.Tensor) else arg for arg in args]
            launched.append((file, name, defines, grid, threads, shared, before))
            kernel(grid, threads, shared, *args)

        return run

    xz, ahead, behind, dy = mixer.arguments(case)
    with monkeypatch.context() as patch:
        patch.setattr(kernels, "_device", lambda: kernels.Device(1, 2**20))
        patch.setattr(kernels, "FEW_WARPS", 10**6 if few else 0)
        patch.setattr(kernels, "TILES_OF_A_SLOT", 0)
        patch.setattr(runtime, "load", recorded)
        kernels.bimamba_forward(xz, ahead, behind, 0.5, True)
        kernels.bimamba_backward(dy, xz, ahead, behind, 0.5, None)
    return launched


def write(path: Path, file: str, name: str, grid, threads: int, shared: int, args: list) -> Path:
    """The launch as cuda_races.cpp reads it, of at most two blocks in each place of the grid: a thread costs 1 ms. Of
    scan_forward all blocks, some of which wait for others."""
    grid = [blocks if name == "scan_forward" else min(blocks, 2) for blocks in grid]
    with path.open("wb") as out:
        out.write(struct.pack("<6q", *grid, threads, shared, len(args)))
        for code, arg in zip(runtime.parameter_formats(runtime.read_source(file), name), args):
            if isinstance(arg, torch.Tensor):
                content = arg.contiguous().view(-1).view(torch.uint8).numpy().tobytes()
            else:
                content = b"" if arg is None else struct.pack(f"<{code}", arg)
            out.write(struct.pack("<2q", len(content), code == "Q") + content)
    return path


def compiled(folder: Path, file: str, name: str, defines: tuple) -> Path:
    """With -O0 it would be compiled in less time, and half of the controls' races not be found."""
    program = Path(tempfile.mkdtemp(dir=folder)) / name
    flags = [f"-D{key}={value}" for key, value in (*defines, ("KERNEL", name), ("SOURCE", f'"{file}"'))]
    command = ["g++", "-O1", "-g1", "-std=c++17", "-fsanitize=thread", "-DVIM_EMULATION", *flags]
    command += [f"-I{runtime.FOLDER}", str(TESTS / "cuda_races.cpp"), "-o", str(program)]
    subprocess.run(command, check=True)
    return program


def end_of(program: Path, launch: Path, **environment: str) -> tuple[int, str]:
    environment |= {"TSAN_OPTIONS": "atexit_sleep_ms=0"}  # else it waits a second for threads of the system: none here
    command = [program, launch]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, timeout=300)
    return done.returncode, done.stderr


@pytest.fixture(scope="module")
def program_of(tmp_path_factory):
    """program_of(file, kernel, definitions): compiled once for all tests of this file."""
    folder = shared_folder(tmp_path_factory, "programs")
    return partial(kept(folder, compiled), folder)


@pytest.mark.parametrize("few", [True, False], ids=["two-channels", "four-channels"])
def test_no_kernel_has_a_race(few, program_of, tmp_path, monkeypatch):
    """An odd and an even number of tiles, of which the last is not whole; idle warps; a sequence of one tile; sequences
    cut in pieces."""
    seen = set()
    for length, channels, batch in ((17, 96, 1), (28, 32, 1), (5, 32, 1), (37, 32, 5)):
        once = {launch[:3]: launch for launch in launches_of(few, length, channels, monkeypatch, batch)}
        for file, name, defines, *launch in once.values():
            if (name, defines) in seen and not name.startswith("scan_"):  # the others' loops are the same at any length
                continue
            program = program_of(file, name, defines)
            status, said = end_of(program, write(tmp_path / "launch", file, name, *launch))
            assert status == NONE, f"{name} {dict(defines)}, {length} tokens:\n{said[:3000]}"
            seen.add((name, defines))
    expected = {"conv_forward", "scan_forward", "scan_backward", "conv_backward", "sum_rows"}
    assert expected <= {name for name, _ in seen}


def races_of_scans(launches: list[tuple], missing: str, program_of, tmp_path) -> dict[str, bool]:
    """Whether a race of each is found where barriers or announcements of that name order nothing."""
    found = {}
    for file, name, defines, *launch in launches:
        if name.startswith("scan_") and dict(defines).get("FOR_BACKWARD") != 0:
            program, launch = program_of(file, name, defines), write(tmp_path / "launch", file, name, *launch)
            status, _ = end_of(program, launch, EMULATION_UNORDERED=missing)
            assert status in (NONE, RACE)
            found[name] = found.get(name, False) or status == RACE
    return found


@pytest.mark.parametrize("missing", ["sync_block", "sync_named", "sync_warp"])
def test_a_missing_barrier_is_a_race(missing, program_of, tmp_path, monkeypatch):
    """The control of the test above: with any kind of barrier ordering nothing, both scans' races are found."""
    found = races_of_scans(launches_of(False, 17, 96, monkeypatch), missing, program_of, tmp_path)
    assert found == {"scan_forward": True, "scan_backward": missing != "sync_named"}, "backward has no named barriers"


def test_a_piece_that_is_not_waited_for_is_a_race(program_of, tmp_path, monkeypatch):
    """The control of the first test's sequences in pieces, which come from forward alone."""
    launches = [launch for launch in launches_of(False, 37, 32, monkeypatch, batch=5) if launch[1] == "scan_forward"]
    assert races_of_scans(launches, "announce", program_of, tmp_path) == {"scan_forward": True}
