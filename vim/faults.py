"""The one switch by which the tests break a run on purpose. Nothing else reads it, and unset it does nothing.

    VIM_FAULT=KIND@STEP         on every rank, when step STEP (of the whole run, from 0) comes
    VIM_FAULT=KIND@STEP:RANK    on one rank alone

| kind | what happens |
|---|---|
| `raise-before` | an error before the ranks exchange gradients |
| `raise-inside` | an error in the backward pass, while gradients are being exchanged |
| `raise-after` | an error after the ranks have agreed on the step |
| `nan` | the loss is not a number |
| `oom` | torch's out-of-memory error |
| `hang` | the rank never comes back |
| `kill` | SIGKILL in mid-step |
| `sigterm`, `sigusr1`, `sigint` | the signal, to the process itself |
| `disk-full` | "no space left on device" half way through writing the checkpoint of this step |
| `kill-writing` | SIGKILL half way through writing the checkpoint of this step |
| `kill-evaluating` | SIGKILL in the evaluation that follows this many steps |

A process that a launcher has started again is left in peace, else no run would get past its fault.
"""

from __future__ import annotations

import errno
import os
import signal
import time
from dataclasses import dataclass

import torch

VARIABLE = "VIM_FAULT"
SIGNALS = {"sigterm": "SIGTERM", "sigusr1": "SIGUSR1", "sigint": "SIGINT", "kill": "SIGKILL"}  # Windows lacks two
BEFORE = ("raise-before", "oom", "hang", *SIGNALS)
WRITING = ("disk-full", "kill-writing")
KINDS = (*BEFORE, "raise-inside", "raise-after", "nan", *WRITING, "kill-evaluating")


class InjectedError(RuntimeError):
    """The error that `raise-*` raises."""


@dataclass(frozen=True)
class Fault:
    """What breaks, and when; `rank` None means every one."""

    kind: str
    step: int
    rank: int | None


def planned() -> Fault | None:
    """The fault that the environment asks for. Raises ValueError for one that does not exist."""
    text = os.environ.get(VARIABLE)
    if not text or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)):
        return None
    kind, _, place = text.partition("@")
    step, _, rank = place.partition(":")
    if kind not in KINDS or not step.isdecimal() or not (rank.isdecimal() or not rank):
        raise ValueError(f"{VARIABLE}={text}: expected KIND@STEP or KIND@STEP:RANK, KIND one of {', '.join(KINDS)}")
    return Fault(kind, int(step), int(rank) if rank else None)


def due(kinds: tuple[str, ...], step: int, rank: int) -> str:
    """Which of `kinds` is to happen now, "" for none."""
    fault = planned()
    if fault is None or fault.step != step or fault.rank not in (None, rank):
        return ""
    return fault.kind if fault.kind in kinds else ""


def before_exchange(step: int, rank: int, loss: torch.Tensor) -> torch.Tensor:
    """Break what comes before the ranks exchange gradients, or while they do; returns the loss to go on with."""
    kind = due((*BEFORE, "raise-inside", "nan"), step, rank)
    if kind in SIGNALS:
        signal.raise_signal(signal.Signals[SIGNALS[kind]])
    elif kind == "raise-before":
        raise InjectedError(f"{VARIABLE}: before the exchange of step {step}")
    elif kind == "oom":
        raise torch.OutOfMemoryError(f"{VARIABLE}: tried to allocate more than there is")
    elif kind == "hang":
        time.sleep(10**6)
    elif kind == "raise-inside":
        loss.register_hook(_raise_inside)
    return loss * float("nan") if kind == "nan" else loss


def _raise_inside(gradient: torch.Tensor) -> None:
    raise InjectedError(f"{VARIABLE}: inside the exchange")


def after_exchange(step: int, rank: int) -> None:
    """Break what comes after the ranks have agreed on a step."""
    if due(("raise-after",), step, rank):
        raise InjectedError(f"{VARIABLE}: after the exchange of step {step}")


def while_evaluating(step: int, rank: int) -> None:
    """Break the evaluation of a model of `step` steps."""
    if due(("kill-evaluating",), step, rank):
        signal.raise_signal(signal.SIGKILL)


def while_writing(step: int) -> None:
    """Break the writing of a checkpoint half way; rank 0 alone writes."""
    kind = due(WRITING, step, 0)
    if kind == "disk-full":
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    if kind == "kill-writing":
        signal.raise_signal(signal.SIGKILL)
