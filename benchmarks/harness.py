"""What every benchmark here shares: interleaved timing, the record of the machine, the gate, the results.

Rules. Rivals are timed in turns (A B A B ...) in one process after a warm-up, so that a busy machine or a
cold clock meets all of them alike; a ratio is the median of the ratios of the turns; every figure carries
its spread (quartiles). On a GPU every rival is a captured CUDA graph, so that its kernels are timed and not Python's
launching of them. The kernels' tests run first: with a red test no figure is printed.
"""

import argparse
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
KERNEL_PACKAGES = ("causal_conv1d", "mamba-1p1p1")
KERNEL_FILES = {".py", ".toml", ".c", ".cpp", ".cu", ".cuh", ".h", ".hpp", ".so", ".dylib"}
# What the environment sets of the kernels begins with one of these.
SWITCHES = ("MAMBA_SSM_", "CAUSAL_CONV1D_", "TRITON_INTERPRET")
VERDICTS = ROOT / "output" / "kernel-tests-green.json"

HelpFormatter = argparse.RawDescriptionHelpFormatter
MIN_TURNS = 3
# A sample of a short call times several of them, so that the clock and the synchronisation do not count.
SAMPLE_SECONDS = 0.01
LONG_SECONDS = 1.0
LAUNCHES = ("graph", "eager")
MAX_TEST_WORKERS = 16  # compiling kernels keeps a core busy each


# --- timing


@dataclass(frozen=True)
class Timing:
    """Seconds per call of one rival, one number per turn."""

    samples: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def quartiles(self) -> tuple[float, float]:
        return quartiles(self.samples)


def quartiles(values: Sequence[float]) -> tuple[float, float]:
    """First and third quartile (inclusive method: inside the values' range)."""
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third


def ratio(slower: Timing, faster: Timing) -> dict[str, float]:
    """How many times faster: the median over turns of slower / faster, with its quartiles."""
    ratios = [a / b for a, b in zip(slower.samples, faster.samples)]
    low, high = quartiles(ratios)
    return {"median": statistics.median(ratios), "q1": low, "q3": high}


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _timed(call: Callable[[], object], repeats: int, device: torch.device) -> float:
    synchronize(device)
    start = time.perf_counter()
    for _ in range(repeats):
        call()
    synchronize(device)
    return (time.perf_counter() - start) / repeats


def interleave(
    rivals: Mapping[Hashable, Callable[[], object]],
    device: torch.device,
    *,
    seconds: float,
    max_turns: int = 31,
) -> dict[Hashable, Timing]:
    """Time the rivals in turns for about `seconds` in all, and at least MIN_TURNS turns.

    Two warm-up calls (one, if it is long) choose kernels and fill caches; the last sets how many calls make
    one sample.
    """
    repeats = {}
    for name, call in rivals.items():
        warm = _timed(call, 1, device)
        if warm < LONG_SECONDS:
            warm = _timed(call, 1, device)
        repeats[name] = max(1, math.ceil(SAMPLE_SECONDS / warm))
    samples: dict[Hashable, list[float]] = {name: [] for name in rivals}
    start = time.perf_counter()
    for turn in range(max_turns):
        if turn >= MIN_TURNS and time.perf_counter() - start > seconds:
            break
        for name, call in rivals.items():
            samples[name].append(_timed(call, repeats[name], device))
    return {name: Timing(tuple(values)) for name, values in samples.items()}


# --- CUDA graphs


def on_side_stream(call: Callable[[], object]) -> None:
    """Run a call as a capture will: kernels are compiled, libraries have chosen theirs."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)


def capture(call: Callable[[], object], pool=None) -> Callable[[], None]:
    """The kernels of one call as a CUDA graph; calling the result launches them. The call itself is not run.

    `pool`: memory shared with graphs of which no two run at once, and of which nothing is read afterwards.
    """
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(torch.cuda.current_stream()):  # which a failed capture would not put back
        with torch.cuda.graph(graph, pool=pool):
            call()
    return partial(_replay, graph, call)


def _replay(graph: torch.cuda.CUDAGraph, call: Callable[[], object]) -> None:
    """`call` is held for its weights and inputs: the graph reads them where they lay."""
    graph.replay()


def launched(
    call: Callable[[], object], launch: str, device: torch.device, pool=None
) -> tuple[Callable[[], object], str]:
    """What is to be timed, and how it starts its kernels: "cuda graph", "eager", or "eager (why no graph)"."""
    if launch == "eager" or device.type != "cuda":
        return call, "eager"
    try:
        on_side_stream(call)
        return capture(call, pool), "cuda graph"
    except RuntimeError as error:  # what cannot be captured (a copy to the host, say) is a rival all the same
        torch.cuda.synchronize(device)
        return call, f"eager ({type(error).__name__}: {str(error).partition(chr(10))[0]})"


# --- the machine


def _output_of(*command: str) -> str:
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return result.stdout.strip() if result.returncode == 0 else ""


def commit() -> str:
    """The commit that is measured; "+ changes" if files other than the results differ from it.

    BENCHMARK_COMMIT names it where a copy of the files is measured without their repository.
    """
    if os.environ.get("BENCHMARK_COMMIT"):
        return os.environ["BENCHMARK_COMMIT"]
    status = ("git", "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results")
    head = _output_of("git", "rev-parse", "--short=12", "HEAD") or "unknown"
    return f"{head} + changes" if _output_of(*status) else head


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = cpuinfo.read_text().splitlines()
        pairs = (line.partition(":") for line in lines if ":" in line)
        fields = {key.strip(): value.strip() for key, _, value in pairs}
        features = (fields.get("flags") or fields.get("Features", "")).split()  # of x86, of ARM
        widest = [name for name in ("avx512f", "avx2", "asimd") if name in features]
        return ", ".join([fields.get("model name") or platform.machine(), *widest[:1]])
    return platform.processor() or platform.machine()


def chip(device: torch.device) -> str:
    """The name of the GPU, or of the processor."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


def backends(device: torch.device, dtype: torch.dtype) -> dict[str, str]:
    """Which implementation of each kernel package serves tensors of this device and dtype."""
    import causal_conv1d.backend
    import mamba_ssm.ops.backend

    conv = causal_conv1d.backend.choose(device, dtype, 4)
    scan = mamba_ssm.ops.backend.choose("selective_scan", device, dtype, 16, 4)
    block = mamba_ssm.ops.backend.choose("bimamba", device, dtype, 16, 4)
    return {"causal_conv1d": conv.__name__, "selective_scan": scan.__name__, "bimamba": block.__name__}


def environment(device: torch.device, precision: str) -> dict[str, object]:
    """What a figure needs beside it: commit, device, threads, precision, versions, backends.

    `precision` begins with the name of a dtype, that of the activations.
    """
    import timm

    dtype = getattr(torch, re.match(r"[a-z]+[0-9]+", precision).group())
    return {
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
        "device": f"{device.type}: {chip(device)}",
        "threads": torch.get_num_threads(),
        "precision": precision,
        "tf32": torch.get_float32_matmul_precision() != "highest",
        "backends": backends(device, dtype),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "timm": timm.__version__,
        },
    }


# --- the gate


def kernel_digest(device: torch.device) -> str:
    """A digest of all that the kernels' tests depend on: both packages' files, torch, the machine, the switches."""
    digest = hashlib.sha256()
    switches = sorted((name, value) for name, value in os.environ.items() if name.startswith(SWITCHES))
    digest.update(repr((torch.__version__, processor(), device.type, chip(device), switches)).encode())
    for folder in KERNEL_PACKAGES:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in KERNEL_FILES:
                digest.update(str(path.relative_to(ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()


def require_green_tests(device: torch.device) -> None:
    """Run the kernels' fast tests for this kind of device; a red one ends the program without a figure.

    A green verdict is remembered for as long as nothing changes that the tests depend on.
    """
    digest = kernel_digest(device)
    if VERDICTS.exists() and json.loads(VERDICTS.read_text()).get(device.type) == digest:
        print("The kernels' tests were green for exactly these kernels on this machine.", flush=True)
        return
    marks = "gpu" if device.type == "cuda" else "not gpu and not slow"
    tests = [f"{folder}/tests" for folder in KERNEL_PACKAGES]
    print(f"The kernels' tests first ({marks}); this takes a minute or two:", flush=True)
    command = [sys.executable, "-m", "pytest", "-q", "-x", "--no-header", "-m", marks, *_workers(device), *tests]
    env = os.environ | ({"OMP_NUM_THREADS": "1"} if "-n" in command else {})  # one worker for each processor
    result = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if result.returncode != 0:
        sys.exit(f"{result.stdout[-4000:]}\nThe kernels' tests are red: no figures.")
    print(result.stdout.strip().splitlines()[-1], flush=True)
    remember_green(device, digest)


def _workers(device: torch.device) -> list[str]:
    """pytest-xdist's processes, where it is installed: most of a GPU's tests is compiling, which takes a CPU."""
    if device.type != "cuda" or importlib.util.find_spec("xdist") is None:
        return []
    return ["-n", str(min(os.cpu_count(), MAX_TEST_WORKERS))]


def remember_green(device: torch.device, digest: str) -> None:
    verdicts = json.loads(VERDICTS.read_text()) if VERDICTS.exists() else {}
    VERDICTS.parent.mkdir(parents=True, exist_ok=True)
    VERDICTS.write_text(json.dumps(verdicts | {device.type: digest}) + "\n")


# --- results


def number(value: float) -> str:
    """Three digits, and all of them before the point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def megabytes(peak: int | None) -> str:
    return "" if peak is None else f"{peak / 1e6:.0f}"


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    return "\n".join(map(table_line, [header, ["---"] * len(header), *rows]))


def table_line(cells: Sequence[object]) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def describe(record: Mapping[str, object]) -> str:
    """The environment as lines of Markdown, for the head of a table."""
    lines = []
    for key, value in record.items():
        if isinstance(value, Mapping):
            value = ", ".join(f"{name} {item}" for name, item in value.items())
        lines.append(f"- {key}: {value}")
    return "\n".join(lines)


def write_results(out: Path, name: str, record: Mapping[str, object], tables: str) -> None:
    """Write NAME.json (everything) and NAME.md (for people) into `out`, and print the tables."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    (out / f"{name}.md").write_text(f"{describe(record['environment'])}\n\n{tables}\n")
    shown = out.relative_to(ROOT) if out.is_relative_to(ROOT) else out
    print(f"\n{tables}\n\nWritten: {shown}/{name}.json, .md", flush=True)


def command_line(description: str, seconds: float, seconds_help: str) -> argparse.ArgumentParser:
    """A parser with the flags of every benchmark."""
    parser = argparse.ArgumentParser(description=description, formatter_class=HelpFormatter)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--seconds", type=float, default=seconds, help=seconds_help)
    parser.add_argument("--launch", default="graph", choices=LAUNCHES, help="of a GPU's kernels")
    parser.add_argument("--threads", type=int, default=0, help="torch's thread count; 0: torch's own choice")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder of the results")
    return parser


def set_threads(threads: int) -> None:
    """Fix torch's thread count (0 leaves it)."""
    if threads:
        torch.set_num_threads(threads)
    os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))
