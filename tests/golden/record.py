"""Golden runs: 50 steps on the digits, whose losses must not change unless somebody means it.

    python tests/golden/record.py      # writes tests/golden/losses.json anew; say why in the commit

The losses are exact on the torch build and processor that recorded them, and agree to 1e-5 elsewhere.
"""

import itertools
import json
import os
import platform
import sys
from pathlib import Path

FOLDER = Path(__file__).parent
sys.path[:0] = [str(FOLDER.parents[1] / "vim")]

import torch  # noqa: E402  (the program's modules are found by the line above, and so are those below)

from arguments import parse_args  # noqa: E402
from build import build_model, build_run  # noqa: E402
from datasets import build_datasets, build_loader  # noqa: E402
from distributed import World, seed_everything  # noqa: E402
from engine import training_steps  # noqa: E402

STEPS = 50
FILE = FOLDER / "losses.json"
# Vim with mixup, stochastic depth and repeated augmentation; a DeiT, which has none of our kernels.
FLAGS = "--device cpu --no_amp --input-size 16 --batch-size 32 --num_workers 0 --warmup-epochs 0 --unscale-lr --lr 1e-4"
RUNS = {
    "vim": f"--model vim_nano_patch4_32 --drop-path 0.1 {FLAGS}",
    "deit": f"--model deit_nano_patch4_32 --drop-path 0.1 {FLAGS}",
}


def losses(flags: str) -> list[float]:
    """The losses of the first 50 steps, over the end of an epoch."""
    torch.set_num_threads(1)
    args = parse_args(flags.split())
    seed_everything(args.seed, args.deterministic)
    data = build_datasets(args)
    model = build_model(args, data.num_classes, say=lambda text: None)
    run = build_run(args, World(0, 1, torch.device("cpu")), model, data, say=lambda text: None)
    loader = build_loader(data.train, run.sampler, args, train=True)
    found = []
    while len(found) < STEPS:
        found += [step.loss for step in itertools.islice(training_steps(run, loader), STEPS - len(found))]
        run.progress.next_epoch()
    return found


def machine() -> dict[str, str]:
    """What the last bits depend on: torch's products choose their code by the processor's maker and model too."""
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "cpu": capability, "processor": processor()}


def processor() -> str:
    """Maker, family and model; platform's word for it where there is no /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
    except OSError:
        return platform.processor()
    known = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    return " ".join(known.get(key, "") for key in ("vendor_id", "cpu family", "model")).strip()


if __name__ == "__main__":
    os.environ["MAMBA_SSM_BACKEND"] = os.environ["CAUSAL_CONV1D_BACKEND"] = "reference"
    recorded = machine() | {name: losses(flags) for name, flags in RUNS.items()}
    FILE.write_text(json.dumps(recorded, indent=1) + "\n")
