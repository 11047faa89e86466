"""This checkout against another one, in turns: is a change faster, and what does it cost in memory?

Each checkout runs in a process of its own, and both are timed alternately, so that a busy machine or a cold clock meets
both alike. To decide by, not to publish: no tests run before it, and there are no rivals.

    git worktree add ../before main
    python benchmarks/compare.py ../before --px 224 512 --modes infer step
    python benchmarks/compare.py ../before --device cuda --precision bfloat16 --batch 224:128 1248:32 \\
        --px 224 1248 --modes infer backward

The other checkout needs no install, but on a CPU its kernels must be built: `python setup.py build_ext --inplace` in
its mamba-1p1p1/. The table says which backend ran.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import harness
import subjects
from harness import Timing
from subjects import Subject
from vim_vs_deit import MODE_NAMES, parse_batch

TURNS = 7
OWN, OTHER = "here", "there"


class Checkout:
    """A checkout's process."""

    def __init__(self, folder: Path):
        command = [sys.executable, str(Path(__file__).with_name("checkout.py")), str(folder)]
        self.folder = folder
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request) -> dict:
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            sys.exit(f"{self.folder}: its process ended (status {self.process.wait()}), see above")
        return json.loads(answer)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()


def measure(checkouts: dict[str, Checkout], subject: Subject, launch: str, seconds: float) -> list[list[str]]:
    """Rows of the table: a line for each checkout."""
    for one in checkouts.values():
        one.ask(drop=True)
    built = {name: one.ask(build=subject.fields(), launch=launch) for name, one in checkouts.items()}
    fits = {name: one for name, one in checkouts.items() if built[name]["launch"] != "does not fit"}
    samples = {name: [] for name in fits}
    for _ in range(TURNS):
        for name, one in fits.items():
            samples[name].append(one.ask(seconds=seconds / TURNS / len(fits))["seconds"])
    timings = {name: Timing(tuple(values)) for name, values in samples.items()}
    return [_row(subject, name, built[name], timings) for name in checkouts]


def _row(subject: Subject, name: str, built: dict, timings: dict[str, Timing]) -> list[str]:
    case = f"{subject.name}, {MODE_NAMES[subject.mode]}, {subject.px} px, batch {subject.batch}"
    speed = spread = faster = ""
    if name in timings:
        low, high = timings[name].quartiles
        speed, *ends = (harness.number(subject.batch / t) for t in (timings[name].median, high, low))
        spread = " to ".join(ends)
    if name == OWN and len(timings) == 2:
        ratio = harness.ratio(timings[OTHER], timings[OWN])
        faster = f"{ratio['median']:.3f}x ({ratio['q1']:.3f} to {ratio['q3']:.3f})"
    how = f"{built['backend']}, {built['launch']}"
    return [case, name, speed, spread, faster, harness.megabytes(built["peak"]), how]


HEADER = ["case", "checkout", "images/s", "quartiles", "here faster by (quartiles)", "peak, MB", "runs as"]


def compare(other: Path, cases: Sequence[Subject], launch: str, seconds: float, threads: int) -> Iterator[list[str]]:
    """The table's rows, as they come. `other`: a checkout's folder."""
    checkouts = {}
    try:
        for name, folder in ((OWN, harness.ROOT), (OTHER, other)):
            checkouts[name] = Checkout(folder)
            checkouts[name].ask(threads=threads)
        for subject in cases:
            yield from measure(checkouts, subject, launch, seconds)
    finally:
        for one in checkouts.values():
            one.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=harness.HelpFormatter)
    parser.add_argument("other", type=Path, help="folder of another checkout")
    default = ["vim_tiny_patch16_224"]
    parser.add_argument("--model", nargs="+", default=default, help="models, or MODEL/ATTENTION of a DeiT")
    parser.add_argument("--modes", nargs="+", default=["infer"], choices=subjects.MODES, help=subjects.MODES_HELP)
    parser.add_argument("--px", nargs="+", type=int, default=[224], help="sides of the images")
    parser.add_argument("--batch", nargs="+", default=["224:8"], help="PX:BATCH; 1 where not given")
    parser.add_argument("--precision", default="float32", choices=list(subjects.PRECISIONS), help="what it computes in")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--launch", default="graph", choices=harness.LAUNCHES, help="of a GPU's kernels")
    parser.add_argument("--seconds", type=float, default=10.0, help=f"for one case, at least: {TURNS} turns of both")
    parser.add_argument("--threads", type=int, default=0, help="torch's thread count; 0: torch's own choice")
    args = parser.parse_args()
    other = args.other.resolve()
    if not (other / "benchmarks" / "subjects.py").is_file():
        sys.exit(f"{other} is no checkout of this project: make one with `git worktree add {args.other} COMMIT`")
    batch = parse_batch(args.batch)
    cases = [
        Subject(model, px, batch.get(px, 1), mode, args.precision, args.device)
        for model in args.model for mode in args.modes for px in args.px
    ]  # fmt: skip
    print(harness.markdown_table(HEADER, []), flush=True)
    for row in compare(other, cases, args.launch, args.seconds, args.threads):
        print(harness.table_line(row), flush=True)


if __name__ == "__main__":
    main()
