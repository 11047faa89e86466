"""One checkout's side of compare.py: FOLDER's code, timed when it is asked.

Not a benchmark by itself: compare.py starts it for each of its two checkouts. Every line of stdin is a request in
JSON and gets a line on stdout: {"threads": torch's}, {"build": a subject's fields, "launch": how}, {"seconds": how long
to time it}, {"drop": true}, before another is built anywhere.
"""

import json
import os
import sys

import torch

# Before what is installed, and what is beside this file.
sys.path.insert(0, f"{sys.argv[1]}/causal_conv1d")
sys.path.insert(0, f"{sys.argv[1]}/mamba-1p1p1")
sys.path.insert(0, f"{sys.argv[1]}/benchmarks")
import harness
import memory
from subjects import PRECISIONS, Subject, build


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the code under test prints, of Python or not, is no answer
    device = built = call = None
    for line in sys.stdin:
        request, answer = json.loads(line), {}
        if "threads" in request:
            harness.set_threads(request["threads"])
        elif "drop" in request:
            built = call = None
        elif "build" in request:
            subject, peak = Subject(**request["build"]), None
            device = torch.device(subject.device)
            if device.type == "cuda":
                built, peak = memory.ready_on_gpu(subject)
            else:
                built = build(subject)
            how = "does not fit"
            if built is not None:
                call, how = harness.launched(built, request["launch"], device)
            backend = harness.backends(device, PRECISIONS[subject.precision][0])["bimamba"]
            answer = {"launch": how, "peak": peak, "backend": backend}
        else:
            timing = harness.interleave({"": call}, device, seconds=request["seconds"])
            answer = {"seconds": timing[""].median}
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    main()
