"""Training in bfloat16 beside float32: the same model, images and order, from the published initialisation.

    python benchmarks/stability.py                 Vim-Ti at 224 px, 1000 steps, on a GPU

Images are generated: every class has a pattern of its own under noise, so that there is something to learn. The
run fails if a number is not finite, if bfloat16's loss does not fall, or if it ends further from float32's than
their own scatter. On a GPU a step is a captured CUDA graph, optimiser included (--launch eager: as Python calls it).
"""

import argparse
import math
import statistics
import sys
from pathlib import Path

import timm
import torch
from torch.nn import functional as F

import harness

sys.path.insert(0, str(harness.ROOT / "vim"))
import models_mamba  # noqa: F401  (registers the Vim names)

CLASSES = 10
TAIL = 100  # steps at the end whose mean loss is compared
RATE = 5e-4
EAGER_STEPS = 3  # before a capture


def batches(px: int, batch: int, steps: int, device: torch.device):
    """(images, labels) of every step, the same at every call: a class's pattern, half of it noise."""
    generator = torch.Generator(device).manual_seed(0)
    patterns = torch.randn(CLASSES, 3, 8, 8, generator=generator, device=device)
    patterns = F.interpolate(patterns, size=(px, px), mode="bilinear")  # (classes, 3, px, px)
    for _ in range(steps):
        labels = torch.randint(CLASSES, (batch,), generator=generator, device=device)
        noise = torch.randn(batch, 3, px, px, generator=generator, device=device)
        yield patterns[labels] + noise, labels


def train(
    model_name: str, px: int, batch: int, steps: int, device: torch.device, precision: str, launch: str = "graph"
) -> list[float]:
    """The loss of every step."""
    torch.manual_seed(0)
    model = timm.create_model(model_name, img_size=px, num_classes=CLASSES).to(device).train()
    on_gpu = device.type == "cuda"
    rate, loss_now = (torch.zeros((), device=device) for _ in range(2))
    images_now = torch.empty(batch, 3, px, px, device=device)
    labels_now = torch.empty(batch, dtype=torch.int64, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.1, capturable=on_gpu)

    def step():
        """Read images_now, labels_now and rate, write loss_now: what a graph replays is these very tensors."""
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            loss = F.cross_entropy(model(images_now), labels_now)
        loss.backward()
        optimizer.step()
        loss_now.copy_(loss.detach())

    run_step, losses = step, []
    for index, (images, labels) in enumerate(batches(px, batch, steps, device)):
        images_now.copy_(images)
        labels_now.copy_(labels)
        rate.fill_(RATE * warmup(index, steps))
        if on_gpu and launch == "graph" and index == EAGER_STEPS:
            run_step = harness.capture(step)
        if on_gpu and index < EAGER_STEPS:
            harness.on_side_stream(step)
        else:
            run_step()
        losses.append(loss_now.clone())
    return torch.stack(losses).tolist()


def warmup(index: int, steps: int) -> float:
    """The learning rate's factor: linear from 0.01 to 1 in the first twentieth of the steps."""
    return min(1.0, 0.01 + 0.99 * index / max(steps // 20, 1))


def judge(low: list[float], full: list[float]) -> dict[str, object]:
    """Whether a run in bfloat16 stayed finite, learnt, and ended where float32's did, within their scatter."""
    tail = min(TAIL, len(low) // 2)
    ends = [statistics.fmean(losses[-tail:]) for losses in (low, full)]
    finite = all(map(math.isfinite, low))
    scatter = max(statistics.stdev(losses[-tail:]) for losses in (low, full)) if finite else math.nan
    return {
        "finite": finite,
        "falls": finite and ends[0] < statistics.fmean(low[:tail]),
        "as_float32": finite and abs(ends[0] - ends[1]) <= 2 * scatter + 0.01,
        "end_bfloat16": ends[0],
        "end_float32": ends[1],
        "scatter": scatter,
    }


def run(
    model_name: str, px: int, batch: int, steps: int, device: torch.device, out: Path, launch: str = "graph"
) -> dict[str, object]:
    """Both runs; writes stability_DEVICE.json with both curves, and a line of the verdict."""
    precisions = ("bfloat16", "float32")
    curves = {precision: train(model_name, px, batch, steps, device, precision, launch) for precision in precisions}
    verdict = judge(curves["bfloat16"], curves["float32"])
    result = {
        "environment": harness.environment(device, "bfloat16 and float32"),
        "model": model_name, "px": px, "batch": batch, "steps": steps, "verdict": verdict, "losses": curves,
    }  # fmt: skip
    rows = [[model_name, px, batch, steps, *(verdict[key] for key in ("finite", "falls", "as_float32"))]]
    rows[0] += [f"{verdict['end_bfloat16']:.4f}", f"{verdict['end_float32']:.4f}", f"{verdict['scatter']:.4f}"]
    header = ["model", "px", "batch", "steps", "finite", "falls", "as float32", "end bf16", "end fp32", "scatter"]
    harness.write_results(out, f"stability_{device.type}", result, harness.markdown_table(header, rows))
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=harness.HelpFormatter)
    parser.add_argument("--device", default="cuda", help="cpu or cuda")
    parser.add_argument("--model", default="vim_tiny_patch16_224", help="a registered Vim")
    parser.add_argument("--px", type=int, default=224, help="side of the images")
    parser.add_argument("--batch", type=int, default=32, help="images a step")
    parser.add_argument("--steps", type=int, default=1000, help="of each of the runs that are compared")
    parser.add_argument("--launch", default="graph", choices=harness.LAUNCHES, help="of a GPU's kernels")
    parser.add_argument("--out", type=Path, default=harness.RESULTS, help="folder of the results")
    args = parser.parse_args()
    device = torch.device(args.device)
    harness.require_green_tests(device)
    sizes = args.model, args.px, args.batch, args.steps
    verdict = run(*sizes, device, args.out.resolve(), args.launch)["verdict"]
    if not (verdict["finite"] and verdict["falls"] and verdict["as_float32"]):
        sys.exit("bfloat16 training is not stable: see the table.")


if __name__ == "__main__":
    main()
