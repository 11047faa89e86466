"""Which errors a person can do something about: their one line, and the exit code they end with.

Anything that is not named here is a fault of the program and keeps its traceback.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from checkpoint import FULL
from distributed import EXIT_CONFIG, EXIT_DONE, EXIT_FAILED, EXIT_NONFINITE, let_go_of_terminal
from errors import PASSING, CheckpointError, ConfigError, DataError, NonFiniteError, PeerError, first_sentence
from run_folder import gone

# What torch says on a CPU, in a plain RuntimeError.
CPU_ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"


def explain(error: Exception, args=None) -> tuple[int, str] | None:
    """(exit code, one line) for an error that is not the program's fault, else None."""
    if isinstance(error, NonFiniteError):
        return EXIT_NONFINITE, str(error)
    if getattr(error, "transient", False):
        return EXIT_FAILED, f"{error}; --resume auto goes on"
    if isinstance(error, ConfigError | DataError | CheckpointError | PeerError):
        return EXIT_CONFIG, str(error)
    if memory_is_full(error):
        return EXIT_CONFIG, out_of_memory(error, args)
    if args and (line := too_little(error, args)):
        return EXIT_CONFIG, line
    if isinstance(error, PermissionError):
        return EXIT_CONFIG, f"{error.filename}: {error.strerror}"
    if isinstance(error, OSError) and (found := unwritable(error, getattr(args, "output_dir", ""))):
        return found
    if isinstance(error, RuntimeError):
        line = loader_failure(error, args) or lost_rank(error)
        return (EXIT_FAILED, line) if line else None
    return None


def unwritable(error: OSError, output_dir: str) -> tuple[int, str] | None:
    """(exit code, one line) for a log or picture that cannot be written, else None; checkpoints have their own."""
    file = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else ""
    inside = bool(output_dir and file) and Path(file).absolute().is_relative_to(Path(output_dir).absolute())
    if inside and isinstance(error, FileNotFoundError) and not Path(output_dir).is_dir():
        return EXIT_CONFIG, gone(output_dir)
    if inside and isinstance(error, IsADirectoryError | NotADirectoryError):
        return EXIT_CONFIG, f"{file}: {error.strerror}; move it away, or take another --output_dir"
    if error.errno in FULL or (inside and error.errno in PASSING):
        # Without a name: of a file that was open, or of what the system made for a loader.
        places = filter(None, (output_dir, "/dev/shm (--num_workers)", "the program's output"))
        where = file or f"one of {', '.join(places)}"
        line = f"{where}: {error.strerror}; --resume auto goes on from the last checkpoint, if there is one"
        return EXIT_CONFIG if error.errno in FULL else EXIT_FAILED, line
    return None


def run_cli(command: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> int:
    """Run a command; what a user can mend becomes one line on stderr and exit code 4."""
    try:
        command(args)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has enough
        let_go_of_terminal((1,))
        return 128 + signal.SIGPIPE
    except (ConfigError, DataError, CheckpointError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CONFIG
    except (RuntimeError, MemoryError) as error:
        if not memory_is_full(error):
            raise
        smaller = f"a --batch-size below {args.batch_size}, " if getattr(args, "batch_size", None) else ""
        line = f"out of memory: take {smaller}smaller images or a smaller model ({memory_reason(error)})"
        print(f"error: {line}", file=sys.stderr)
        return EXIT_CONFIG
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    return EXIT_DONE


def memory_is_full(error: Exception) -> bool:
    """The device's or the main memory."""
    return isinstance(error, torch.OutOfMemoryError) or main_memory_is_full(error)


def main_memory_is_full(error: Exception) -> bool:
    """Not the device's. What numpy raises in a loader process comes as the text of a RuntimeError."""
    if isinstance(error, RuntimeError):
        return CPU_ALLOCATOR in str(error) or "MemoryError in DataLoader" in str(error)
    return isinstance(error, MemoryError)


def out_of_memory(error: Exception, args) -> str:
    """What to change so that a step fits, with this run's numbers."""
    advice = []
    if smaller := smaller_batch(args):
        accumulated = args.accum_steps * args.batch_size // smaller
        advice.append(f"--batch-size {smaller} --accum-steps {accumulated} keeps the whole batch and the learning rate")
    if not args.grad_checkpointing:
        advice.append("--grad-checkpointing recomputes activations instead of keeping them")
    if not args.if_amp:
        advice.append("--if_amp halves activations")
    what = f"memory with --batch-size {args.batch_size}"
    if main_memory_is_full(error):
        what = f"main {what} --num_workers {args.num_workers}"
        if args.num_workers:
            advice.append("fewer loader processes hold fewer batches")
    elif torch.cuda.is_available():
        what += f"; peak memory {torch.cuda.max_memory_allocated() / 2**30:.2f} GiB"
    advice = ", ".join(advice) or "take smaller images or a smaller model"
    return f"out of {what}: {advice} ({memory_reason(error)})"


def memory_reason(error: Exception) -> str:
    """What was too large, in the allocator's words, without those of a loader process around them."""
    _, *reason = str(error).rpartition(CPU_ALLOCATOR)
    return first_sentence("".join(reason)) or type(error).__name__


def too_little(error: Exception, args) -> str:
    """Shared memory or open files that loader processes lack, as torch and Python report it; "" if it is neither."""
    if isinstance(error, RuntimeError) and "unable to" in str(error) and "shared memory" in str(error):
        what, mend = "shared memory", "give it more (`docker run --shm-size 16g`, or a larger /dev/shm)"
    elif "Too many open files" in str(error):
        what, mend = "room for open files", "allow more (`ulimit -n 65536`)"
    else:
        return ""
    if args.num_workers:
        mend += ", or take fewer loader processes"
    *_, reason = str(error).split("Error: ")  # a loader process sends the traceback too
    return (
        f"too little {what} for --num_workers {args.num_workers} --batch-size {args.batch_size}: {mend} "
        f"({first_sentence(reason)})"
    )


def smaller_batch(args) -> int | None:
    """The largest batch below this one by which micro-batches make up the same whole; None if there is none."""
    pairs = any(vars(args).get(name) for name in ("mixup", "cutmix", "cutmix_minmax"))  # of images, see augment.py
    found = (size for size in range(args.batch_size // 2, 0, -1) if args.batch_size % size == 0)
    return next((size for size in found if not (pairs and size % 2)), None)


def loader_failure(error: RuntimeError, args) -> str:
    """A loader process that died or gives no batch, as torch's DataLoader reports them; "" if it is neither."""
    text = first_sentence(error)
    if not text.startswith("DataLoader"):
        return ""
    if "timed out" in text:
        return (
            f"no batch came for --loader-timeout {args.loader_timeout:g} seconds: the storage hangs or is too "
            "slow; --resume auto goes on from the last checkpoint"
        )
    return (
        f"a loader process died ({text}): often too little memory or /dev/shm for --num_workers "
        f"{args.num_workers}; --resume auto goes on from the last checkpoint"
    )


def lost_rank(error: RuntimeError) -> str:
    """Another rank that died or came too late, as gloo and NCCL report it; "" if it is not that."""
    if not isinstance(error, dist.DistError) and "gloo" not in str(error):
        return ""
    return (
        f"another rank died or did not answer in time ({first_sentence(error)}); its own log says why; "
        "--resume auto goes on from the last checkpoint"
    )
