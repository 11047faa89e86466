"""What reliability costs: the promise is at most 2 % of a step, and checkpoints that do not stop training.

    python benchmarks/reliability_cost.py [--seconds 60] [--out FOLDER]

vim_tiny_patch16_224 with batch 8, in turns: the step as it is, and the same step without what only reliability
needs (randomness by counters for the model and each image, the agreement before the optimiser moves, the fault
switch). A plain step still reads its loss and gradient norm once, as every training loop does that logs them.
The pairs' noise on a small machine exceeds the difference, so what was taken out is timed alone as well. Then a
checkpoint: what it takes to write, how long training waits for it, and how steps slow down meanwhile.
"""

import argparse
import statistics
import sys
import tempfile
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "vim"))

import torch  # noqa: E402

import augment  # noqa: E402
import datasets  # noqa: E402
import distributed  # noqa: E402
import engine  # noqa: E402
import faults  # noqa: E402
import harness  # noqa: E402  (the program's modules are found by the line above, and so are those below)
from arguments import parse_args  # noqa: E402
from build import build_model, build_run  # noqa: E402
from checkpoint import CheckpointWriter, store_checkpoint  # noqa: E402

BATCH, SIDE = 8, 224
FLAGS = (
    f"--device cpu --model vim_tiny_patch16_224 --batch-size {BATCH} --input-size {SIDE} --num_workers 0 "
    "--drop-path 0.1 --clip-grad 1"
)
DEVICE = torch.device("cpu")


def make_run():
    args = parse_args(FLAGS.split())
    data = datasets.build_datasets(args)
    return build_run(args, distributed.World(0, 1, DEVICE), build_model(args, data.num_classes), data), data


def plain_agree(loss, norm, stop, failed, world):
    """What is left of the agreement in a loop that only logs: one read of two numbers."""
    return (*torch.stack([loss.float(), norm.float()]).tolist(), False, False)


def without_reliability() -> ExitStack:
    """The program with everything that only reliability needs taken out of a step."""
    stack = ExitStack()
    for module, name, other in (
        (engine, "seed_step", lambda *counters: None),
        (engine, "agree", plain_agree),
        (faults, "before_exchange", lambda step, rank, loss: loss),
        (faults, "after_exchange", lambda step, rank: None),
        (augment, "counter_randomness", lambda *counters, stream=0: nullcontext()),
        (datasets, "counter_randomness", lambda *counters, stream=0: nullcontext()),
    ):
        stack.enter_context(mock.patch.object(module, name, other))
    return stack


def whole_step(run, data):
    """Load a batch in this process, as without loader workers, and train on it."""

    def step():
        items = [data.train[datasets.SampleKey(0, index, 0)] for index in range(BATCH)]
        images = torch.stack([image for image, _ in items])  # 8 of (C, H, W) -> (8, C, H, W)
        engine.training_step(run, [(images, torch.tensor([label for _, label in items]))], run.progress.step)

    return step


def step_pairs(run, data, seconds: float) -> dict:
    step = whole_step(run, data)

    def plain():
        with without_reliability():
            step()

    timings = harness.interleave({"program": step, "plain": plain}, DEVICE, seconds=seconds)
    return {
        "pairs": len(timings["plain"].samples),
        "program_seconds": timings["program"].median,
        "plain_seconds": timings["plain"].median,
        "ratio": harness.ratio(timings["program"], timings["plain"]),
    }


def seconds_of(call, repeats: int = 300) -> float:
    """The median of single calls."""
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def parts(run) -> dict[str, float]:
    """Seconds a step of what was taken out, each alone."""
    loss, norm = torch.ones(()), torch.ones(())

    def randomness():
        for index in range(BATCH + 1):  # each image, and mixup
            with augment.counter_randomness(0, 0, index, 0):
                pass

    agreement = seconds_of(lambda: engine.agree(loss, norm, False, False, run.world))
    reading = seconds_of(lambda: plain_agree(loss, norm, False, False, run.world))
    return {
        "randomness of images and mixup": seconds_of(randomness),
        "randomness of the model": seconds_of(lambda: distributed.seed_step(0, 1, 0)),
        "agreement": max(0.0, agreement - reading),
        "fault switch": seconds_of(lambda: (faults.before_exchange(1, 0, loss), faults.after_exchange(1, 0))),
    }


def a_state(run) -> dict:
    return {
        "model": run.model.state_dict(), "model_ema": run.ema.state_dict(),
        "optimizer": run.optimizer.state_dict(), "step": 1, "args": run.args,
    }  # fmt: skip


def checkpoints(run, data, repeats: int = 5) -> dict[str, float]:
    """Writing, waiting for the copy, and steps taken while a thread writes."""
    step, writer = whole_step(run, data), CheckpointWriter()
    synchronous, waiting, meanwhile, alone = [], [], [], []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            start = time.perf_counter()
            store_checkpoint(folder, a_state(run))
            synchronous.append(time.perf_counter() - start)
            alone.append(seconds_of(step, 1))
            start = time.perf_counter()
            writer.store(folder, a_state(run), 2, False)
            waiting.append(time.perf_counter() - start)
            meanwhile.append(seconds_of(step, 1))
            writer.wait()
        size = max(path.stat().st_size for path in Path(folder).glob("*.pth"))
    return {
        "megabytes": size / 1e6,
        "written_seconds": statistics.median(synchronous),
        "training_waits_seconds": statistics.median(waiting),
        "step_alone_seconds": statistics.median(alone),
        "step_while_writing_seconds": statistics.median(meanwhile),
    }


def table(found: dict) -> str:
    step, pairs, written = found["step"]["plain_seconds"], found["step"], found["checkpoint"]
    ratio = pairs["ratio"]
    rows = [[name, f"{1e3 * value:.3f}", f"{100 * value / step:.3f}"] for name, value in found["parts"].items()]
    total = sum(found["parts"].values())
    rows.append(["together", f"{1e3 * total:.3f}", f"{100 * total / step:.3f}"])
    return "\n".join([
        f"vim_tiny_patch16_224, batch {BATCH} at {SIDE} px: a step without reliability takes {1e3 * step:.0f} ms.",
        "",
        harness.markdown_table(["taken out and timed alone", "ms a step", "% of a step"], rows),
        "",
        f"In {pairs['pairs']} pairs of steps, with over without: {ratio['median']:.4f} "
        f"(quartiles {ratio['q1']:.4f} to {ratio['q3']:.4f}).",
        "",
        f"A checkpoint of {written['megabytes']:.0f} MB takes {1e3 * written['written_seconds']:.0f} ms to write; "
        f"training waits {1e3 * written['training_waits_seconds']:.0f} ms of it, for the copy. The step taken "
        f"meanwhile lasts {1e3 * written['step_while_writing_seconds']:.0f} ms instead of "
        f"{1e3 * written['step_alone_seconds']:.0f} ms, because the thread shares the CPU's cores.",
    ])  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", default=50.0, type=float, help="for the pairs of steps")
    parser.add_argument("--out", default=ROOT / "benchmarks" / "results", type=Path, help="where the results go")
    args = parser.parse_args()
    harness.require_green_tests(DEVICE)
    run, data = make_run()
    found = {
        "environment": harness.environment(DEVICE, "float32"),
        "step": step_pairs(run, data, args.seconds),
        "parts": parts(run),
        "checkpoint": checkpoints(run, data),
    }
    harness.write_results(args.out, "reliability_cost", found, table(found))


if __name__ == "__main__":
    main()
