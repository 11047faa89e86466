"""Peak memory of a subject beyond its weights and input.

On a GPU: the allocator's peak minus what was allocated before the call, in this process, of the very callable that is
timed afterwards. On a CPU: the peak of the resident set (/proc, Linux) minus the resident set just before the call,
each subject in a process of its own. A run before it sees to it that libraries and thread pools are not counted.

Not a benchmark by itself: the others call it, and it starts itself to measure (subjects as JSON on stdin).
"""

import ctypes
import gc
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path

# A child may take this share of the memory that is available when it starts; then its subject "does not fit".
SHARE_OF_MEMORY = 0.8
WARMUP_PX = 64


def peak_memory(subjects: Sequence) -> list[int | None]:
    """Bytes for each subject on a CPU; None where it did not fit. One helper process forks once per subject."""
    request = json.dumps([subject.fields() for subject in subjects])
    result = subprocess.run([sys.executable, __file__], input=request, stdout=subprocess.PIPE, text=True, check=True)
    return [json.loads(line) for line in result.stdout.splitlines()]


def _kilobytes(path: str, key: str) -> int:
    line = next(line for line in Path(path).read_text().splitlines() if line.startswith(key + ":"))
    return int(line.split()[1])


def _measure_cpu(call) -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak, VmHWM
    before = _kilobytes("/proc/self/status", "VmRSS")
    call()
    return 1024 * (_kilobytes("/proc/self/status", "VmHWM") - before)


def ready_on_gpu(subject) -> tuple[Callable[[], object] | None, int | None]:
    """(the subject's callable, bytes of its peak), or (None, None) where it did not fit."""
    import torch

    import subjects

    gc.collect()
    torch.cuda.empty_cache()
    try:
        call = subjects.build(subject)
        call()  # kernels are compiled, libraries have their workspaces, the optimiser its moments
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        return None, None
    return call, torch.cuda.max_memory_allocated() - before


def _measure(subject) -> int | None:
    """The peak of one call on a CPU; None if the allocation was refused."""
    import torch

    import subjects

    subjects.build(replace(subject, px=WARMUP_PX, batch=1))()
    limit = int(SHARE_OF_MEMORY * 1024 * _kilobytes("/proc/meminfo", "MemAvailable"))
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    try:
        call = subjects.build(subject)
        if subject.mode != "infer":
            call()  # gradients and the optimiser's moments exist before the measured step, as in training
        return _measure_cpu(call)
    except torch.OutOfMemoryError:
        return None
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):
            raise
        return None


def _in_fork(subject) -> int | None:
    """Measure in a forked child: the imports are shared, the heap and the thread pools are fresh."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        with os.fdopen(writer, "w") as pipe:
            json.dump(_measure(subject), pipe)
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(child, 0)
    if status != 0:
        raise RuntimeError(f"measuring the memory of {subject} failed (status {status})")
    return json.loads(answer)


def serve(requests: Iterable[dict]) -> None:
    """Answer each subject with one line on stdout. Runs before anything has started a thread pool."""
    import subjects

    for fields in requests:
        print(json.dumps(_in_fork(subjects.Subject(**fields))), flush=True)


if __name__ == "__main__":
    if sys.platform != "linux":
        sys.exit("memory.py reads the peak from /proc and runs on Linux only.")
    serve(json.load(sys.stdin))
