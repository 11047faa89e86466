"""What a run is for: the few things in which classification, segmentation and detection differ.

The loop in `engine.py` knows optimisers, ranks, checkpoints and signals; a `Task` knows batches, losses and
measures. `classification.py` holds the first one, `seg/` and `det/` hold theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import torch
from torch import nn

if TYPE_CHECKING:
    from datasets import DataBundle
    from distributed import World
    from engine import Run
    from report import RunLog


class Result(Protocol):
    """How good a model is."""

    score: float  # in percent, the higher the better: what the best checkpoint follows
    words: str  # a one-line summary

    def row(self, prefix: str) -> dict[str, float]:
        """Columns of an epoch's log, their names beginning with `prefix`."""


class Task(Protocol):
    """Batches in, losses and measures out.

    score_name, score_column: of `Result.score`, as people call it and as the log's columns end.
    collate: from a list of the dataset's items to a batch; None is torch's own.
    """

    score_name: str
    score_column: str
    collate: Callable[[list], object] | None

    def loss(self, run: Run, batch, micro: int) -> torch.Tensor:
        """The loss of one batch on its way from the loader; called under autocast, before the division by the
        number of accumulated batches.

        The model is called as `run.net`, once. `micro` numbers the run's micro-batches: with `run.world.rank`
        and the seed it is what randomness may depend on; torch's generator has been seeded from them.
        """

    def evaluate(self, model: nn.Module, loader, args, world: World) -> Result:
        """Over all of the loader's items, and over all ranks with `--dist-eval`; leaves `model` in eval mode."""

    def pictures(self, log: RunLog, result: Result, data: DataBundle) -> None:
        """Leave what a person wants to see in `log.dir`, if there is one."""


def in_words(results: dict[str, Result]) -> str:
    """A one-line summary, of "raw" and "ema" weights."""
    return ", ".join(f"{name} weights: {result.words}" for name, result in results.items())
