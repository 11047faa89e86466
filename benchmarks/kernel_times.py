"""Where a model's time goes: each kernel of a GPU, or each of torch's operations on a CPU, with its calls and share.

Models as elsewhere here, DeiT with its attention behind a slash. To look at, not to compare: no rivals in turns, no
tests before it, and launched as Python calls it; a GPU's kernels take as long in a CUDA graph.

    python benchmarks/kernel_times.py --px 224 --batch 128 --device cuda --precision bfloat16
    python benchmarks/kernel_times.py deit_tiny_patch16_224/flash --px 1248 --mode backward --device cuda
"""

import argparse
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

import harness
import subjects
from subjects import Subject


class Row(NamedTuple):
    """Of one pass."""

    name: str
    calls: float
    microseconds: float


def kernel_times(call: Callable[[], object], device: torch.device, passes: int = 3) -> list[Row]:
    """What `passes` calls after a warm-up ran on the device, the longest in all first."""
    on_gpu = device.type == "cuda"
    for _ in range(2):
        call()
    harness.synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]) as profiler:
        for _ in range(passes):
            call()
        harness.synchronize(device)
    wanted = DeviceType.CUDA if on_gpu else DeviceType.CPU
    rows = [
        Row(event.key, event.count / passes, time / passes)
        for event in profiler.key_averages()
        if event.device_type == wanted
        and (time := event.self_device_time_total if on_gpu else event.self_cpu_time_total) > 0
    ]
    return sorted(rows, key=lambda row: row.microseconds, reverse=True)


def table(rows: list[Row], top: int, width: int = 90) -> str:
    whole = sum(row.microseconds for row in rows)

    def line(name: str, calls: float, microseconds: float) -> list[str]:
        of_call, share = microseconds / calls, 100 * microseconds / whole
        return [name, f"{calls:.0f}", f"{of_call:.1f}", f"{microseconds:.0f}", f"{share:.1f}"]

    lines = [line(row.name[:width].replace("|", "/"), row.calls, row.microseconds) for row in rows[:top]]
    if rest := rows[top:]:
        calls, microseconds = (sum(column) for column in zip(*(row[1:] for row in rest)))
        lines.append(line(f"{len(rest)} others", calls, microseconds))
    lines.append(["all", f"{sum(row.calls for row in rows):.0f}", "", f"{whole:.0f}", "100"])
    return harness.markdown_table(["kernel", "calls", "us a call", "us", "%"], lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=harness.HelpFormatter)
    default = "vim_tiny_patch16_224"
    parser.add_argument("model", nargs="?", default=default, help="a model, or MODEL/ATTENTION of a DeiT")
    parser.add_argument("--px", type=int, default=224, help="side of the images")
    parser.add_argument("--batch", type=int, default=8, help="images at a time")
    parser.add_argument("--mode", default="infer", choices=subjects.MODES, help=subjects.MODES_HELP)
    parser.add_argument("--precision", default="float32", choices=list(subjects.PRECISIONS), help="what it computes in")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="torch's thread count; 0: torch's own choice")
    parser.add_argument("--top", type=int, default=30, help="rows of the table")
    args = parser.parse_args()
    harness.set_threads(args.threads)
    device = torch.device(args.device)
    subject = Subject(args.model, args.px, args.batch, args.mode, args.precision, args.device)
    rows = kernel_times(subjects.build(subject), device)
    print(f"{harness.describe(harness.environment(device, args.precision))}\n")
    print(f"One pass of {args.model}, {args.mode}, {args.px} px, batch {args.batch}:\n\n{table(rows, args.top)}")


if __name__ == "__main__":
    main()
