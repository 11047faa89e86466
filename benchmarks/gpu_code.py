"""Machine code of the GPU kernels, without a GPU: registers, spills, instructions per state update.

    python benchmarks/gpu_code.py                      print the table
    python benchmarks/gpu_code.py --out FOLDER         and write gpu_code.json and gpu_code.md there

The launchers run on tensors without memory ("meta"); every launch is compiled for the target, never started, so
what is examined is exactly what a GPU would get. A state update is one token, channel, state and direction. For
`scan_forward` and `scan_backward` the loops of the machine code are counted with their numbers of iterations:
"recurrence" is forward's loop over tokens, "marking" and "back" are backward's two passes, "all" adds the staging
of the time step with its projection and softplus. Of the CUDA kernels ("cuda.", by NVRTC) "all" counts every
instruction of the loop over tiles of tokens; of a forward with a loop for each half of the way, of the longer one.
"""

import argparse
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "mamba-1p1p1"), str(ROOT / "causal_conv1d"), str(ROOT / "benchmarks")]

from causal_conv1d import triton_kernels as conv  # noqa: E402
from harness import commit  # noqa: E402
from mamba_ssm.ops.cuda import bimamba as cuda_mixer  # noqa: E402
from mamba_ssm.ops.cuda import runtime as cuda_runtime  # noqa: E402
from mamba_ssm.ops.triton import bimamba, norm_kernels, selective_scan  # noqa: E402
from mamba_ssm.ops.triton.common import backward_block  # noqa: E402

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SIZES = {"tiny": 192, "small": 384, "base": 768}  # width E; D = 2 E, R = E / 16
STATES, WIDTH, BATCH, LENGTH = 16, 4, 4, 197


class Loop(NamedTuple):
    """A loop of the machine code: its instructions outside inner loops, and those."""

    own: int
    inner: tuple["Loop", ...]

    def cost(self, trips: tuple) -> float:
        """Instructions of one iteration; `trips`: (iterations, trips of its inner loops) of every inner loop."""
        if len(trips) != len(self.inner):
            raise ValueError(f"expected {len(trips)} inner loops, found {len(self.inner)}: {self}")
        return self.own + sum(count * loop.cost(deeper) for loop, (count, deeper) in zip(self.inner, trips))


class FakeDriver:
    """What Triton asks of a driver when it only compiles."""

    def __init__(self, target: GPUTarget):
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return list(TARGETS.values()).index(self.target)  # Triton keeps what it compiled for a device number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("meta")


def compile_launches(target: GPUTarget, work) -> dict:
    """Run `work`, compiling its launches for the target instead of starting them: {kernel name: compiled}."""
    compiled, run = {}, JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        compiled[self.fn.__name__] = run(self, *args, grid=grid, warmup=True, **kwargs)
        return compiled[self.fn.__name__]

    JITFunction.run = compile_only
    triton.runtime.driver.set_active(FakeDriver(target))
    try:
        work()
    finally:
        JITFunction.run = run
    return compiled


def empty(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def mixer_arguments(embed_dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, tuple]:
    """(xz, one direction's parameters) of a block's mixer."""
    channels, rank = 2 * embed_dim, embed_dim // 16
    parameters = (
        empty(channels, WIDTH), empty(channels), empty(rank + 2 * STATES, channels), empty(channels, rank),
        empty(channels), empty(channels, STATES), empty(channels),
    )  # fmt: skip
    return empty(BATCH, LENGTH, 2 * channels, dtype=dtype), parameters


def launch_everything(embed_dim: int, dtype: torch.dtype = torch.bfloat16) -> None:
    """One block's mixer and norm, forward and backward, and the single convolution."""
    xz, parameters = mixer_arguments(embed_dim, dtype)
    y, saved = bimamba.bimamba_forward(xz, parameters, parameters, 0.5, True, segments=1)
    bimamba.bimamba_backward(y, xz, parameters, parameters, 0.5, saved, segments=1)
    rows, residual = empty(BATCH * LENGTH, embed_dim, dtype=dtype), empty(BATCH * LENGTH, embed_dim)
    weight, rstd = empty(embed_dim), empty(BATCH * LENGTH)
    norm_kernels.add_norm_forward(rows, residual, weight, None, 1e-5, "rms", torch.float32)
    norm_kernels.add_norm_backward(rows, residual, residual, weight, None, None, rstd, "rms", dtype, torch.float32)


def launch_convolution(embed_dim: int) -> None:
    """The convolution of the other package, whose kernels bear the same names as the mixer's."""
    channels = 2 * embed_dim
    x = torch.empty(BATCH, LENGTH, channels, dtype=torch.bfloat16, device="meta").transpose(1, 2)
    weight, bias = torch.empty(channels, WIDTH, device="meta"), torch.empty(channels, device="meta")
    conv.conv_forward(x, weight, bias, None, True)
    conv.conv_backward(x, x, weight, bias, None, True)


def cuda_launches(
    embed_dim: int, dtype: torch.dtype = torch.bfloat16, multiprocessors: int = 1
) -> list[tuple[str, str, tuple]]:
    """(file, kernel, definitions) of what the mixer in CUDA C++ launches, forward and backward.

    Arguments are checked against the kernels' parameters. Few multiprocessors have many sequences each.
    """
    launched, kept = [], (cuda_runtime.load, cuda_mixer._device)

    def load(file, name, defines=()):
        launched.append((file, name, defines))
        formats = cuda_runtime.parameter_formats(cuda_runtime.read_source(file), name)
        arguments = cuda_runtime.Arguments(name, formats)
        return lambda grid, block, shared, *args: arguments.pack(args)

    cuda_runtime.load, cuda_mixer._device = load, lambda: cuda_mixer.Device(multiprocessors)
    try:
        xz, parameters = mixer_arguments(embed_dim, dtype)
        y, saved = cuda_mixer.bimamba_forward(xz, parameters, parameters, 0.5, True)
        cuda_mixer.bimamba_backward(y, xz, parameters, parameters, 0.5, saved)
    finally:
        cuda_runtime.load, cuda_mixer._device = kept
    return list(dict.fromkeys(launched))


# --- reading the code


def cuobjdump(cubin: bytes, *options: str) -> str:
    """What the cuobjdump that Triton's wheel carries says of a CUDA binary."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([tool, *options, file.name], capture_output=True, text=True, check=True).stdout


def disassemble(cubin: bytes, name: str) -> list[tuple[int, str]]:
    """(address, instruction) of one kernel of a CUDA binary."""
    text = cuobjdump(cubin, "-sass", "-fun", name)
    found = re.findall(r"^\s+/\*([0-9a-f]{4,6})\*/\s+(.*?);", text, re.M)
    return [(int(address, 16), code) for address, code in found]


def resources(cubin: bytes, name: str) -> dict:
    """Registers, bytes of stack and of local memory (spills)."""
    text = cuobjdump(cubin, "-res-usage")
    registers, stack, local = re.search(rf"Function {name}:\s+REG:(\d+) STACK:(\d+) .*?LOCAL:(\d+)", text).groups()
    return {"registers": int(registers), "spill_bytes": int(stack) + int(local)}


def loops(instructions: list[tuple[int, str]]) -> tuple[Loop, ...]:
    """The outermost loops: spans that a backward branch closes; two branches to one target are one loop."""
    spans = {}
    for address, code in instructions:
        branch = re.search(r"\bBRA(?:\.\w+)*\s+.*?0x([0-9a-f]+)", code)
        if branch and int(branch.group(1), 16) < address:
            spans[int(branch.group(1), 16)] = address
    return _nest(sorted((start, -end) for start, end in spans.items()), instructions)


def _nest(spans, instructions) -> tuple[Loop, ...]:
    found, i = [], 0
    while i < len(spans):
        start, end = spans[i][0], -spans[i][1]
        inside = [span for span in spans[i + 1 :] if -span[1] <= end]
        inner = _nest(inside, instructions)
        size = sum(start <= address <= end for address, _ in instructions)
        found.append(Loop(size - sum(map(_size, inner)), inner))
        i += 1 + len(inside)
    return tuple(found)


def _size(loop: Loop) -> int:
    return loop.own + sum(map(_size, loop.inner))


def _pieces(block: int, size: str) -> tuple:
    """Trips of the loop that stages the time step of `block` channels in pieces: fewer channels for a large rank."""
    rank = SIZES[size] // 16
    piece = 64 if rank <= 16 else 32
    return max(block // piece, 1), ()


def forward_counts(code, size: str) -> dict:
    """Instructions per state update of the recurrence's loop, and of everything a tile of tokens takes."""
    tile = max(loops(code), key=_size)
    *staging, group = tile.inner
    lane_states = 2 * STATES  # two channels per thread
    groups = selective_scan.TILE // selective_scan.GROUP
    trips = (*(_pieces(selective_scan.FORWARD_BLOCK, size) for _ in staging), (groups, ()))
    return {
        "recurrence": _size(group) / (selective_scan.GROUP * lane_states),
        "all": tile.cost(trips) / (selective_scan.TILE * lane_states),
    }


def backward_counts(code, size: str) -> dict:
    """Instructions per state update: the pass that marks states, the pass back, and everything a chunk takes."""
    chunk = max(loops(code), key=_size)
    tiles, groups = selective_scan.CHUNK // selective_scan.TILE, selective_scan.CHUNK // selective_scan.GROUP
    pairs = (STATES // selective_scan.STATES_AT_A_TIME, ())
    block, per_thread = backward_block()
    lane_states = per_thread * STATES
    marks = STATES // 4  # trips of the first pass over the states
    marking, back = chunk.inner[-2:]
    staging = chunk.inner[:-2]
    stages = tuple((tiles, tuple(_pieces(block, size) for _ in loop.inner)) for loop in staging)
    trips = (*stages, (groups - 1, ((marks, ()),)), (groups, (pairs,)))
    updates = selective_scan.CHUNK * lane_states
    return {
        "marking": (groups - 1) * marking.cost(((marks, ()),)) / updates,
        "back": groups * back.cost((pairs,)) / updates,
        "all": chunk.cost(trips) / updates,
    }


COUNTS = {"scan_forward_kernel": forward_counts, "scan_backward_kernel": backward_counts}


def examine_nvidia(name: str, compiled, size: str) -> dict:
    cubin = compiled.asm["cubin"]
    code = disassemble(cubin, name)
    row = resources(cubin, name) | {"instructions": len(code)}
    if name in COUNTS:
        row["per_state_update"] = {key: round(value, 2) for key, value in COUNTS[name](code, size).items()}
    return row


def examine_cuda(arch: str, size: str) -> dict:
    """{kernel: row} of the CUDA kernels; a scan's forward that is run again for backward by a name of its own."""
    rows = {}
    for file, name, defines in cuda_launches(SIZES[size]):
        cubin, macros = cuda_runtime.compile_cubin(cuda_runtime.read_source(file), defines, arch), dict(defines)
        code = disassemble(cubin, name)
        row = resources(cubin, name) | {"instructions": len(code)}
        if file.startswith("scan_"):
            updates = cuda_mixer.TILE * macros["CH"] * 4  # of a thread: tokens, channels, states
            row["per_state_update"] = {"all": round(_size(max(loops(code), key=_size)) / updates, 2)}
        again = " for backward" if macros.get("FOR_BACKWARD") else ""
        rows[f"cuda.{name}{again}"] = row
    return rows


def examine_amd(name: str, compiled, size: str) -> dict:
    text = compiled.asm["amdgcn"]

    def number(key):
        return int(re.search(rf"\.{key}:\s*(\d+)", text).group(1))

    return {
        "registers": number("vgpr_count"),
        "spill_bytes": 4 * number("vgpr_spill_count") + number("private_segment_fixed_size"),
        "scalars_in_lanes": number("sgpr_spill_count"),  # kept in lanes of vector registers, not in memory
        "instructions": len(re.findall(r"^\t[sv]_|^\t(?:global|buffer|ds|flat|scratch)_", text, re.M)),
    }


def examine(target_name: str, size: str) -> dict:
    """{kernel: row} for one target and one model size."""
    target = TARGETS[target_name]
    reader = examine_amd if target.backend == "hip" else examine_nvidia
    compiled = compile_launches(target, lambda: launch_everything(SIZES[size]))
    single = compile_launches(target, lambda: launch_convolution(SIZES[size]))
    rows = {name: reader(name, kernel, size) for name, kernel in compiled.items()}
    rows |= {"causal_conv1d." + name: reader(name, kernel, size) for name, kernel in single.items()}
    if target.backend == "cuda":
        rows |= examine_cuda(target_name, size)
    return dict(sorted(rows.items()))


def table(results: dict) -> str:
    lines = [
        "| kernel | target | size | registers | spilled bytes | scalars in lanes | instructions | per state update |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for target, sizes in results.items():
        for size, kernels in sizes.items():
            for name, row in kernels.items():
                counts = ", ".join(f"{key} {value}" for key, value in row.get("per_state_update", {}).items())
                lines.append(
                    f"| `{name}` | {target} | {size} | {row['registers']} | {row['spill_bytes']} "
                    f"| {row.get('scalars_in_lanes', '')} | {row['instructions']} | {counts} |"
                )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--targets", nargs="+", choices=TARGETS, default=list(TARGETS), help="architectures to compile for"
    )
    parser.add_argument(
        "--sizes", nargs="+", choices=SIZES, default=list(SIZES), help="models whose shapes are compiled"
    )
    parser.add_argument("--out", type=Path, help="folder for gpu_code.json and gpu_code.md")
    args = parser.parse_args(argv)
    results = {target: {size: examine(target, size) for size in args.sizes} for target in args.targets}
    text = table(results)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        record = {"triton": triton.__version__, "commit": commit(), "results": results}
        (args.out / "gpu_code.json").write_text(json.dumps(record, indent=1) + "\n")
        nvrtc = ".".join(map(str, cuda_runtime.nvrtc_version()))
        header = f"# Machine code of the GPU kernels\n\nTriton {triton.__version__}, NVRTC {nvrtc}, bf16, N 16, L 197, "
        header += f"commit {record['commit']}, compiled without a GPU by `python benchmarks/gpu_code.py`. Speeds: "
        header += "`vim_vs_deit_cuda.md`.\n\n"
        (args.out / "gpu_code.md").write_text(header + text + "\n")


if __name__ == "__main__":
    main()
