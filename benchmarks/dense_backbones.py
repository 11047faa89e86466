"""Backbones for dense prediction: Vim-Ti and DeiT-Ti with four levels of a pyramid (x4, x2, x1, x0.5).

The same harness, turns and table as vim_vs_deit.py: images per second and peak memory, at 512, 1024 and 1280 px.

    python benchmarks/dense_backbones.py                                      the CPU's table
    python benchmarks/dense_backbones.py --px 512 --modes infer
    python benchmarks/dense_backbones.py --device cuda --precision bfloat16 --batch 512:32 1024:16 1280:8 \\
        --attention flash cudnn efficient --modes infer backward
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

import harness
import subjects
import vim_vs_deit
from subjects import Subject
from vim_vs_deit import MODE_NAMES, Case, Settings, cases_of, parse_batch

PX = (512, 1024, 1280)
SIZE = "tiny"


def rivals(case: Case, settings: Settings) -> list[Subject]:
    """Vim first, then DeiT once per attention backend; all with the pyramid."""
    group = vim_vs_deit.rivals(case.size, case.px, case.batch, case.mode, settings)
    return [replace(subject, pyramid=True) for subject in group]


def run(cases: Sequence[Case], settings: Settings, out: Path) -> dict[str, object]:
    """Measure cases and write dense_DEVICE.json and .md. The gate is the caller's."""
    groups = [rivals(case, settings) for case in cases]
    peaks = vim_vs_deit.peaks_beforehand(groups, settings)
    records = []
    for case, group in zip(cases, groups):
        print(f"  {MODE_NAMES[case.mode]}, backbone with pyramid, {case.px} px, batch {case.batch}", flush=True)
        records += vim_vs_deit.measure_case(group, peaks, settings)
    result = {"environment": vim_vs_deit.describe_run(settings), "measurements": records}
    modes = dict.fromkeys(case.mode for case in cases)
    tables = "\n\n".join(vim_vs_deit.table(records, mode) for mode in modes)
    heading = "## Backbones with a pyramid of four levels (x4, x2, x1, x0.5)"
    harness.write_results(out, f"dense_{settings.device.type}", result, f"{heading}\n\n{tables}")
    return result


def main() -> None:
    parser = harness.command_line(__doc__, 10.0, "time for one case, at least 3 turns")
    parser.add_argument("--precision", default="float32", choices=list(subjects.PRECISIONS), help="what it computes in")
    parser.add_argument(
        "--attention", nargs="+", default=["sdpa", "eager"], choices=list(subjects.ATTENTION), help="of DeiT"
    )
    parser.add_argument("--modes", nargs="+", default=["infer"], choices=list(subjects.MODES), help=subjects.MODES_HELP)
    parser.add_argument("--px", nargs="+", type=int, default=list(PX), help="sides of the images")
    parser.add_argument("--batch", nargs="+", default=[], help="PX:BATCH; 1 where not given")
    args = parser.parse_args()
    harness.set_threads(args.threads)
    device = torch.device(args.device)
    settings = Settings(device, args.precision, "none", tuple(args.attention), args.seconds, launch=args.launch)
    batch = parse_batch(args.batch)
    cases = [case for mode in args.modes for case in cases_of(mode, SIZE, args.px, batch)]
    harness.require_green_tests(device)
    run(cases, settings, args.out.resolve())


if __name__ == "__main__":
    main()
