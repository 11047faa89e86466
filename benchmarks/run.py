"""All benchmarks of one device in one command: the kernels' tests, the kernels, the models, the goals.

python benchmarks/run.py                   about 20 minutes on 2 cores, into benchmarks/results
python benchmarks/run.py --quick           about 2 minutes, into output/bench-quick
python benchmarks/run.py --device cuda     about 5 minutes on one GPU

Needs no installed packages: PYTHONPATH=causal_conv1d:mamba-1p1p1 will do. On a copy of the files without their
repository BENCHMARK_COMMIT names the commit.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import torch

import dense_backbones
import harness
import ops
import published
import targets
import vim_vs_deit
from subjects import PRECISIONS
from vim_vs_deit import PX, Case, Settings, cases_of

QUICK_OUT = harness.ROOT / "output" / "bench-quick"

CPU_BATCH = {224: 8}
GPU_BATCH = {224: 128, 512: 128, 1248: 32}

PLANS = {
    # Training at a high resolution costs minutes a case on two cores: the small models stop earlier.
    ("cpu", "full"): [
        *cases_of("infer", "tiny", PX, CPU_BATCH),
        *cases_of("infer", "small", PX, CPU_BATCH),
        *cases_of("step", "tiny", PX, CPU_BATCH),
        *cases_of("step", "small", (224, 384, 512), CPU_BATCH),
    ],
    ("cpu", "quick"): [
        *cases_of("infer", "tiny", (224, 512, 1248), CPU_BATCH),
        *cases_of("step", "tiny", (224,), CPU_BATCH),
    ],
    ("cuda", "full"): [
        *cases_of("infer", "tiny", (224, 512, 1248), GPU_BATCH),
        Case("infer", "tiny", 1248, 64),
        *cases_of("infer", "small", (224,), GPU_BATCH),
        *cases_of("backward", "tiny", (224, 1248), GPU_BATCH),
    ],
    ("cuda", "quick"): [
        *cases_of("infer", "tiny", (224, 1248), GPU_BATCH),
        *cases_of("backward", "tiny", (224,), GPU_BATCH),
    ],
}

DENSE_PLANS = {
    ("cpu", "full"): cases_of("infer", dense_backbones.SIZE, dense_backbones.PX, {}),
    ("cpu", "quick"): cases_of("infer", dense_backbones.SIZE, dense_backbones.PX[:1], {}),
    ("cuda", "full"): [
        Case(mode, dense_backbones.SIZE, px, batch)
        for mode in ("infer", "backward")
        for px, batch in zip(dense_backbones.PX, (32, 16, 8))
    ],
    ("cuda", "quick"): [Case("infer", dense_backbones.SIZE, dense_backbones.PX[0], 32)],
}


def settings_for(device: torch.device, quick: bool, launch: str = "graph") -> Settings:
    if device.type == "cuda":
        attention = ("eager", "flash", "cudnn", "efficient")
        reason = published.missing()
        if reason:
            print(f"Left out: the published kernels: {reason}", flush=True)
        seconds = 0.3 if quick else 0.6
        return Settings(device, "bfloat16", "none", attention, seconds, published=reason is None, launch=launch)
    return Settings(device, "float32", "none", ("sdpa", "eager"), seconds=2.0 if quick else 8.0)


def gpu_only(out: Path, quick: bool, launch: str) -> list[str]:
    """The chip's own limits, and bfloat16 training beside float32: processes that share no memory with this one.

    Returns the programs that failed.
    """
    programs = {"limits.py": [], "stability.py": ["--steps", "100" if quick else "1000", "--launch", launch]}
    folder = Path(__file__).parent
    return [
        name for name, arguments in programs.items()
        if subprocess.run([sys.executable, folder / name, "--out", out, *arguments]).returncode
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=harness.HelpFormatter)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="what is measured")
    parser.add_argument("--quick", action="store_true", help="small shapes after the kernels' tests, in 2 minutes")
    parser.add_argument("--launch", default="graph", choices=harness.LAUNCHES, help="of a GPU's kernels")
    parser.add_argument("--threads", type=int, default=0, help="torch's thread count; 0: torch's own choice")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results, or output/bench-quick")
    args = parser.parse_args()
    harness.set_threads(args.threads)
    device = torch.device(args.device)
    out = (args.out or (QUICK_OUT if args.quick else harness.RESULTS)).resolve()
    settings = settings_for(device, args.quick, args.launch)

    harness.require_green_tests(device)
    dtype, _ = PRECISIONS[settings.precision]
    # What the goals are made of comes first: a run may be cut short.
    plan = device.type, "quick" if args.quick else "full"
    vim_vs_deit.run(PLANS[plan], settings, out)
    failed = gpu_only(out, args.quick, args.launch) if device.type == "cuda" else []
    ops.run(device, dtype, settings.seconds, out, args.quick, args.launch)
    dense_backbones.run(DENSE_PLANS[plan], settings, out)
    print("\n" + targets.write(out))
    if failed:
        sys.exit(f"These failed, as said above: {', '.join(failed)}")


if __name__ == "__main__":
    main()
