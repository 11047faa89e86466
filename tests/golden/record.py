"""Golden runs: 50 steps on the digits, whose losses must not change unless somebody means it.

    python tests/golden/record.py      # writes tests/golden/losses.json anew; say why in the commit

The losses are exact on the torch build that recorded them, on any x86 processor with AVX2, and agree to 1e-5
elsewhere; AdamW's to 1e-5 everywhere. So that they do not follow the processor, torch, MKL and oneDNN are kept from
choosing their code by its maker and instruction set (`ONE_CODE`), which they do when they are loaded: the runs have a
process of their own (`record.py --compute`).
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterable
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
# Vim with mixup, stochastic depth and repeated augmentation; a DeiT, which has none of our kernels. They take steps of
# SGD: AdamW's square roots are MKL's, which begin with the processor's own approximation whatever MKL_CBWR says.
FLAGS = "--device cpu --no_amp --input-size 16 --batch-size 32 --num_workers 0 --drop-path 0.1 --warmup-epochs 0"
SGD = "--opt momentum --unscale-lr --lr 0.05"
RUNS = {
    "vim": f"--model vim_nano_patch4_32 {FLAGS} {SGD}",
    "deit": f"--model deit_nano_patch4_32 {FLAGS} {SGD}",
    "vim, AdamW": f"--model vim_nano_patch4_32 {FLAGS} --unscale-lr --lr 1e-4",
}
EXACT = ("vim", "deit")
# The same code on every processor, and the scans that a faster kernel has to agree with rather than redefine.
ONE_CODE = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_CBWR": "COMPATIBLE",
    "MAMBA_SSM_BACKEND": "reference",
    "CAUSAL_CONV1D_BACKEND": "reference",
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


def losses_of(names: Iterable[str]) -> dict:
    """The losses of these runs and what their last bits depend on; the process must have begun with ONE_CODE."""
    torch.backends.mkldnn.enabled = False
    build = {"torch": torch.__version__, "cpu": torch.backends.cpu.get_cpu_capability()}
    return build | {name: losses(RUNS[name]) for name in names}


def recorded_anew(names: Iterable[str] = RUNS) -> dict:
    """`losses_of` a new process, in which nothing has chosen its code yet."""
    command = [sys.executable, __file__, "--compute", *names]
    done = subprocess.run(command, env=os.environ | ONE_CODE, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--compute"]:
        json.dump(losses_of(sys.argv[2:]), sys.stdout)
    else:
        FILE.write_text(json.dumps(recorded_anew(), indent=1) + "\n")
