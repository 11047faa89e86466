"""What bounds the kernels on this GPU: rates of copy, bfloat16 matrix product, exponential and multiply-add.

    python benchmarks/limits.py            prints the table, writes limits_cuda.json and .md

What is said of kernels' limits refers to these rates, measured in the same run, not to a data sheet's.
"""

import argparse
from pathlib import Path

import torch
import triton
import triton.language as tl

import harness

ROUNDS, LANES, PROGRAMS = 4096, 1024, 4096


@triton.jit
def exp_kernel(out, rounds, LANES: tl.constexpr):
    """Four independent chains of exp2 a lane: nothing but the special-function unit."""
    lane = tl.arange(0, LANES)
    a, b, c, d = -lane * 1e-3, -lane * 2e-3, -lane * 3e-3, -lane * 4e-3
    for _ in range(rounds):
        a, b, c, d = tl.exp2(a), tl.exp2(b), tl.exp2(c), tl.exp2(d)
        a, b, c, d = -a, -b, -c, -d
    tl.store(out + tl.program_id(0) * LANES + lane, a + b + c + d)


@triton.jit
def multiply_add_kernel(out, rounds, factor, LANES: tl.constexpr):
    """Four independent chains of float32 multiply-adds a lane."""
    lane = tl.arange(0, LANES)
    a, b, c, d = lane * 1e-3, lane * 2e-3, lane * 3e-3, lane * 4e-3
    for _ in range(rounds):
        a, b, c, d = a * factor + 1.0, b * factor + 1.0, c * factor + 1.0, d * factor + 1.0
    tl.store(out + tl.program_id(0) * LANES + lane, a + b + c + d)


def _rate(call, work: float, device: torch.device, seconds: float) -> float:
    return work / harness.interleave({"": call}, device, seconds=seconds)[""].median


def measure(device: torch.device, seconds: float = 0.3) -> list[dict[str, object]]:
    """Rates per second: {what, rate, unit}."""
    source = torch.ones(2**28, device=device)  # 1 GiB
    target = torch.empty_like(source)
    size = 8192
    left = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    out = torch.empty(PROGRAMS * LANES, device=device)
    chains = 4.0 * ROUNDS * PROGRAMS * LANES

    def run(kernel, *arguments):
        return lambda: kernel[(PROGRAMS,)](out, ROUNDS, *arguments, LANES=LANES, num_warps=4)

    calls = {
        ("copy", "B/s, read and write"): (lambda: target.copy_(source), 8.0 * source.numel()),
        ("bfloat16 matrix product", "FLOP/s"): (lambda: left @ left, 2.0 * size**3),
        ("exp2", "1/s"): (run(exp_kernel), chains),
        ("float32 multiply-add", "1/s"): (run(multiply_add_kernel, 0.5), chains),
    }
    return [
        {"what": what, "unit": unit, "rate": _rate(call, work, device, seconds)}
        for (what, unit), (call, work) in calls.items()
    ]


def table(records: list[dict[str, object]]) -> str:
    rows = [[record["what"], f"{record['rate']:.3g}", record["unit"]] for record in records]
    return harness.markdown_table(["limit", "measured", "unit"], rows)


def run(device: torch.device, out: Path) -> list[dict[str, object]]:
    """Measure and write limits_cuda.json and .md."""
    records = measure(device)
    result = {"environment": harness.environment(device, "float32"), "measurements": records}
    harness.write_results(out, f"limits_{device.type}", result, table(records))
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=harness.HelpFormatter)
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    run(torch.device("cuda"), parser.parse_args().out.resolve())


if __name__ == "__main__":
    main()
