"""Vim against DeiT as the resolution grows: images per second, training steps, peak memory.

Each case holds the rivals of one resolution and mode and times them in turns. DeiT is timm's, with
attention by name: "eager" writes the attention matrix, "sdpa" is torch's own choice, "flash", "cudnn",
"efficient" and "math" force one of its backends. On a GPU every rival is timed as a CUDA graph (--launch eager: as
Python calls it); one that cannot be captured is timed eagerly, and its record says so.

    python benchmarks/vim_vs_deit.py                                     the CPU's table
    python benchmarks/vim_vs_deit.py --px 224 512 --size tiny --modes infer
    python benchmarks/vim_vs_deit.py --device cuda --precision bfloat16 --batch 224:128 1248:32 \\
        --attention eager flash cudnn efficient
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

import harness
import memory
import subjects
from subjects import Subject

SIZES = {"tiny": ("vim_tiny_patch16_224", "deit_tiny_patch16_224"),
         "small": ("vim_small_patch16_224", "deit_small_patch16_224")}  # fmt: skip
PX = (224, 384, 512, 640, 738, 1024, 1248)
PATCH = 16
MODE_NAMES = {"infer": "inference", "backward": "forward + backward", "step": "training step"}


@dataclass(frozen=True)
class Settings:
    """How all subjects of a run are built, and how long a case may take."""

    device: torch.device
    precision: str
    compile: str
    attention: tuple[str, ...]
    seconds: float
    published: bool = False  # the published CUDA kernels take part
    launch: str = "graph"  # on a GPU: "graph" or "eager"


class Ready(NamedTuple):
    """A subject that can be timed. `call` is None where it did not fit in memory, `peak` where it is not known."""

    call: Callable[[], object] | None
    peak: int | None
    launch: str | None


# --- cases


def rivals(size: str, px: int, batch: int, mode: str, settings: Settings) -> list[Subject]:
    """Vim first, then DeiT once per attention backend."""
    vim, deit = SIZES[size]
    published = [vim + subjects.PUBLISHED] if settings.published else []
    names = [vim, *published, *(f"{deit}/{attention}" for attention in settings.attention)]
    device = str(settings.device)
    return [Subject(name, px, batch, mode, settings.precision, device, settings.compile) for name in names]


def peaks_beforehand(groups: Sequence[Sequence[Subject]], settings: Settings) -> dict[Subject, int | None]:
    """On a CPU, where each subject needs a process of its own; on a GPU `measure_case` finds them. Empty where a CPU's
    cannot be measured: then all subjects are timed."""
    if settings.device.type == "cuda":
        return {}
    if sys.platform != "linux":
        print("  peak memory is left out: it is read from /proc, which Linux alone has", flush=True)
        return {}
    everyone = [subject for group in groups for subject in group]
    print(f"  peak memory of {len(everyone)} runs, each in a process of its own", flush=True)
    return dict(zip(everyone, memory.peak_memory(everyone)))


def ready_on_cpu(case: Sequence[Subject], peaks: Mapping[Subject, int | None]) -> dict[Subject, Ready]:
    missing = Ready(None, None, None)
    too_large = {subject for subject, peak in peaks.items() if peak is None}
    return {
        subject: missing if subject in too_large else Ready(subjects.build(subject), peaks.get(subject), "eager")
        for subject in case
    }


def ready_on_gpu(case: Sequence[Subject], settings: Settings) -> dict[Subject, Ready]:
    """All peaks first: graphs keep their memory, which the rivals of a case share."""
    built = {subject: memory.ready_on_gpu(subject) for subject in case}
    pool = torch.cuda.graph_pool_handle()
    ready = {}
    for subject, (call, peak) in built.items():
        how = None
        if call is not None:
            call, how = harness.launched(call, launch_of(subject, settings), settings.device, pool)
        ready[subject] = Ready(call, peak, how)
    return ready


def launch_of(subject: Subject, settings: Settings) -> str:
    """torch.compile's modes with CUDA graphs of their own are launched as they are."""
    return settings.launch if subject.compile in ("none", "default") else "eager"


def measure_case(case: Sequence[Subject], peaks: Mapping[Subject, int | None], settings: Settings) -> list[dict]:
    """Time a case in turns; what did not fit in memory is left out. The first subject is compared with."""
    ready = ready_on_gpu(case, settings) if settings.device.type == "cuda" else ready_on_cpu(case, peaks)
    calls = {subject: one.call for subject, one in ready.items() if one.call is not None}
    timings = harness.interleave(calls, settings.device, seconds=settings.seconds)
    return [record_of(subject, one, timings, case[0]) for subject, one in ready.items()]


def record_of(subject: Subject, ready: Ready, timings: dict, first: Subject) -> dict[str, object]:
    record = subject.fields() | {"attention_backend": subjects.attention_chosen(subject)}
    record |= {"peak_memory": ready.peak, "launch": ready.launch}
    if subject not in timings:
        return record | {"seconds": None}
    timing = timings[subject]
    low, high = timing.quartiles
    record |= {
        "tokens": (subject.px // PATCH) ** 2 + 1,
        "seconds": timing.median,
        "seconds_q1": low,
        "seconds_q3": high,
        "turns": len(timing.samples),
        "images_per_second": subject.batch / timing.median,
    }
    if first in timings:
        record["first_faster_by"] = harness.ratio(timing, timings[first])
    return record


def growth(size: str, settings: Settings, low: int = 512, high: int = 1248) -> dict[str, object]:
    """Vim's time per token at `high` px over that at `low` px, batch 1, in turns: 1 is linear."""
    vim, batch = SIZES[size][0], 1
    calls = {}
    for px in (low, high):
        subject = rivals(size, px, batch, "infer", settings)[0]
        calls[px], _ = harness.launched(subjects.build(subject), launch_of(subject, settings), settings.device)
    timings = harness.interleave(calls, settings.device, seconds=settings.seconds)
    tokens = [(px // PATCH) ** 2 + 1 for px in (low, high)]
    per_turn = harness.ratio(timings[high], timings[low])
    scale = tokens[0] / tokens[1]
    return {"model": vim, "px": [low, high], "batch": batch} | {key: scale * v for key, v in per_turn.items()}


# --- tables and figure


def _label(record: dict) -> str:
    name, _, attention = record["name"].partition("/")
    name = name.replace("_patch16_224", "")
    if not attention:
        return name
    chosen = record["attention_backend"]
    return f"{name}, {attention}" + (f" ({chosen})" if chosen != attention else "")


def table(records: list[dict], mode: str) -> str:
    rows = []
    for record in (record for record in records if record["mode"] == mode):
        row = [record["px"], record["batch"], _label(record)]
        if record["seconds"] is None:
            rows.append([*row, "", "", "", "does not fit"])
            continue
        low, high = (record["batch"] / record[key] for key in ("seconds_q3", "seconds_q1"))
        faster = record.get("first_faster_by")
        rows.append(
            [
                *row,
                harness.number(record["images_per_second"]),
                f"{harness.number(low)} to {harness.number(high)}",
                f"{faster['median']:.2f}x" if faster else "",
                harness.megabytes(record["peak_memory"]),
            ]
        )
    header = ["px", "batch", "model", "images/s", "quartiles", "Vim faster by", "peak beyond weights, MB"]
    parts = [f"### {MODE_NAMES[mode].capitalize()}", harness.markdown_table(header, rows), _not_captured(records, mode)]
    return "\n\n".join(filter(None, parts))


def _not_captured(records: list[dict], mode: str) -> str:
    """A line that names the runs which became no CUDA graph, and why."""
    odd = [record for record in records if record["mode"] == mode and (record["launch"] or "").startswith("eager (")]
    return "; ".join(f"{record['px']} px, {_label(record)}: launched {record['launch']}" for record in odd)


def figure(records: list[dict], path: Path, size: str, title: str) -> None:
    """The paper's teaser with our numbers: speed and memory of inference against resolution."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    chosen = [r for r in records if r["mode"] == "infer" and subjects.model_of(r["name"]) in SIZES[size]]
    panels = (
        ("images per second", "log", lambda r: r.get("images_per_second")),
        ("peak memory, MB per image", "linear",
         lambda r: r["peak_memory"] and r["peak_memory"] / 1e6 / r["batch"]),
    )  # fmt: skip
    chart, axes = plt.subplots(1, 2, figsize=(11, 4.2), constrained_layout=True)
    for axis, (label, scale, value) in zip(axes, panels):
        for line in dict.fromkeys(_label(record) for record in chosen):
            of_line = [r for r in reversed(chosen) if _label(r) == line and value(r) is not None]
            points = {r["px"]: value(r) for r in of_line}  # of two batches at one resolution, the first
            width = 2.5 if line == _label({"name": SIZES[size][0]}) else 1.5
            axis.plot(*zip(*sorted(points.items())), marker="o", linewidth=width, label=line)
        axis.set(xlabel="resolution, px", ylabel=label, yscale=scale)
        axis.set_xticks(sorted({record["px"] for record in chosen}))
        axis.tick_params(axis="x", rotation=45)
        axis.grid(alpha=0.3)
    axes[0].legend()
    chart.suptitle(title)
    chart.savefig(path, dpi=120)
    plt.close(chart)


# --- a whole run


@dataclass(frozen=True)
class Case:
    """Rivals of one size at one resolution, batch and mode."""

    mode: str
    size: str
    px: int
    batch: int = 1


def cases_of(mode: str, size: str, resolutions: Sequence[int], batch: Mapping[int, int]) -> list[Case]:
    """One case for each resolution; batch 1 where `batch` names none."""
    return [Case(mode, size, px, batch.get(px, 1)) for px in resolutions]


def run(cases: Sequence[Case], settings: Settings, out: Path) -> dict[str, object]:
    """Measure cases and write vim_vs_deit_DEVICE.json, .md and one .png per size. The gate is the caller's."""
    groups = [rivals(case.size, case.px, case.batch, case.mode, settings) for case in cases]
    peaks = peaks_beforehand(groups, settings)
    records = []
    for case, group in zip(cases, groups):
        print(f"  {MODE_NAMES[case.mode]}, {case.size}, {case.px} px, batch {case.batch}", flush=True)
        records += measure_case(group, peaks, settings)
    machine = describe_run(settings)
    result = {"environment": machine, "measurements": records, "growth": growth("tiny", settings)}
    name = f"vim_vs_deit_{settings.device.type}"
    tables = "\n\n".join(table(records, mode) for mode in dict.fromkeys(case.mode for case in cases))
    harness.write_results(out, name, result, tables)
    for size in dict.fromkeys(case.size for case in cases if case.mode == "infer"):
        title = f"{machine['device']}, {settings.precision}, commit {machine['commit']}"
        figure(records, out / f"{name}_{size}.png", size, title)
    return result


def describe_run(settings: Settings) -> dict[str, object]:
    launch = settings.launch if settings.device.type == "cuda" else "eager"
    more = {"compile": settings.compile, "launch": launch}
    return harness.environment(settings.device, settings.precision) | more


def parse_batch(items: Sequence[str]) -> dict[int, int]:
    """["224:8", "512:2"] -> {224: 8, 512: 2}."""
    try:
        pairs = [item.split(":") for item in items]
        return {int(px): int(batch) for px, batch in pairs}
    except ValueError:
        raise SystemExit(f"--batch takes PX:BATCH, such as 224:8, not {' '.join(items)!r}") from None


def main() -> None:
    parser = harness.command_line(__doc__, 10.0, "time for one case, at least 3 turns")
    parser.add_argument("--precision", default="float32", choices=list(subjects.PRECISIONS), help="what it computes in")
    parser.add_argument("--compile", default="none", choices=subjects.COMPILE, help="mode of torch.compile, or none")
    parser.add_argument(
        "--attention", nargs="+", default=["sdpa", "eager"], choices=list(subjects.ATTENTION), help="of DeiT"
    )
    parser.add_argument("--size", nargs="+", default=["tiny"], choices=list(SIZES), help="pairs of models")
    parser.add_argument(
        "--modes", nargs="+", default=["infer", "step"], choices=list(subjects.MODES), help=subjects.MODES_HELP
    )
    parser.add_argument("--px", nargs="+", type=int, default=list(PX), help="sides of the images")
    parser.add_argument("--batch", nargs="+", default=["224:8"], help="PX:BATCH; 1 where not given")
    args = parser.parse_args()
    harness.set_threads(args.threads)
    device = torch.device(args.device)
    attention = tuple(args.attention)
    settings = Settings(device, args.precision, args.compile, attention, args.seconds, launch=args.launch)
    batch = parse_batch(args.batch)
    cases = [case for mode in args.modes for size in args.size for case in cases_of(mode, size, args.px, batch)]
    harness.require_green_tests(device)
    run(cases, settings, args.out.resolve())


if __name__ == "__main__":
    main()
