"""The kernels' machine code for sm_80, sm_90 and gfx942, compiled without a GPU: no spills, no growth.

The limits are counts of instructions, not speeds: those need a GPU (`make bench-gpu`). Recorded table:
`benchmarks/results/gpu_code.json`, rewritten by `python benchmarks/gpu_code.py --out benchmarks/results`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from once import shared_folder

triton = pytest.importorskip("triton")

ROOT = Path(__file__).resolve().parents[2]
RECORDED = json.loads((ROOT / "benchmarks" / "results" / "gpu_code.json").read_text())
pytestmark = pytest.mark.slow
TARGETS = ("sm_80", "sm_90", "gfx942")
RECORDED_VERSION = triton.__version__ == RECORDED["triton"]
SPILLED = 0 if RECORDED_VERSION else 8  # bytes: another Triton may keep one number fewer in registers (3.6: none)


# gpu_code.py, which compiles nothing and reads nothing that test_cuda_runtime.py has compiled and read.
PROGRAM = """
import sys
from pathlib import Path

tests, benchmarks, kept_in, *flags = sys.argv[1:]
sys.path[:0] = [tests, benchmarks]
import gpu_code
from once import kept

gpu_code.cuda_runtime.compile_cubin = kept(Path(kept_in), gpu_code.cuda_runtime.compile_cubin)
gpu_code.cuobjdump = kept(Path(kept_in), gpu_code.cuobjdump)
gpu_code.main(flags)
"""


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """The table of this checkout, from a process of its own: it replaces Triton's driver."""
    folder = tmp_path_factory.mktemp("gpu_code")
    places = (Path(__file__).parent, ROOT / "benchmarks", shared_folder(tmp_path_factory, "machine-code"))
    command = [sys.executable, "-c", PROGRAM, *map(str, places), "--out", str(folder)]
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    assert run.returncode == 0, run.stdout[-2000:] + run.stderr[-4000:]
    return json.loads((folder / "gpu_code.json").read_text())["results"]


@pytest.mark.parametrize("target", TARGETS)
def test_no_register_is_spilled_to_memory(results, target):
    spilled = {
        f"{name}, {size}": row["spill_bytes"]
        for size, kernels in results[target].items()
        for name, row in kernels.items()
        if row["spill_bytes"] > SPILLED
    }
    assert not spilled


def test_instructions_per_state_update(results):
    """Forward's recurrence: 6.5. Backward's two passes: 20; with other versions of Triton 3.5 % more (3.6: 20.6)."""
    limit = 20.0 if RECORDED_VERSION else 20.7
    for kernels in results["sm_90"].values():
        assert kernels["scan_forward_kernel"]["per_state_update"]["recurrence"] <= 6.5
        back = kernels["scan_backward_kernel"]["per_state_update"]
        assert back["marking"] + back["back"] <= limit


def test_instructions_per_state_update_in_cuda(results):
    """Everything that a tile of tokens takes: staging, gate and sums too. The target of backward is 20."""
    for size, kernels in results["sm_90"].items():
        assert kernels["cuda.scan_forward"]["per_state_update"]["all"] <= (8.5 if size == "base" else 7.7)
        assert kernels["cuda.scan_backward"]["per_state_update"]["all"] <= 20


@pytest.mark.skipif(not RECORDED_VERSION, reason=f"the table is of Triton {RECORDED['triton']}, not this one")
@pytest.mark.parametrize("target", TARGETS)
def test_no_kernel_grew_by_more_than_a_tenth(results, target):
    grown = {
        f"{name}, {size}": (RECORDED["results"][target][size][name]["instructions"], row["instructions"])
        for size, kernels in results[target].items()
        for name, row in kernels.items()
        if row["instructions"] > 1.1 * RECORDED["results"][target][size][name]["instructions"]
    }
    assert not grown, "record the new table if this growth is wanted (see this file's docstring)"
