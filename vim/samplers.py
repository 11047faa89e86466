"""Which image comes when: training order and evaluation shards as pure functions of counters.

Nothing here has state that a checkpoint would have to carry. The order of an epoch follows from (seed, epoch)
alone, a resumed epoch starts at `start_batch`, and a rank takes its turn of one global order, so that
another number of ranks sees the same images at the same step.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch.utils.data import Sampler

from errors import ConfigError

# Sets this stream of random numbers apart from those of augment.py: SeedSequence pads with zeros, so
# [seed, epoch] alone would be the same stream as [seed, epoch, 0, 0].
ORDER_STREAM = 1


class SampleKey(NamedTuple):
    """One view of one image: what a dataset needs to draw its augmentation from counters."""

    epoch: int
    index: int
    repeat: int


class TrainSampler(Sampler[SampleKey]):
    """Shuffled training order, dealt out to ranks in whole batches.

    Batch s of all ranks together is the s-th run of `batch_size * num_ranks` entries of one global order;
    rank r takes every num_ranks-th entry of it from r on. An epoch has a multiple of `accum_steps` batches: the
    order's tail that fills no whole optimiser step is left out (another one each epoch). So every rank runs the
    same number of batches, and fewer ranks with more batches a step take the same steps.

    With `repeats` = 3 each image stands three times in a row, each time under another augmentation, and the
    epoch keeps its length: about a third of the images, three times each (Hoffer et al., "Augment your
    batch", arXiv 1901.09335; DeiT, arXiv 2012.12877, section 6). Neighbours go to different ranks where
    there are several, and to the same batch in one process.

    Raises ConfigError when the images do not fill one step, ValueError for `repeats` or `rank` out of range.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        num_ranks: int = 1,
        rank: int = 0,
        seed: int = 0,
        repeats: int = 1,
        accum_steps: int = 1,
    ):
        if repeats not in (1, 3):
            raise ValueError(f"repeats={repeats}: expected 1, or 3 for repeated augmentation")
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank={rank}: expected 0 <= rank < num_ranks={num_ranks}")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size}: expected at least 1")
        if accum_steps < 1:
            raise ValueError(f"accum_steps={accum_steps}: expected at least 1")
        self.size = size
        self.batch_size = batch_size
        self.num_ranks = num_ranks
        self.rank = rank
        self.seed = seed
        self.repeats = repeats
        self.epoch = 0
        self.start_batch = 0
        whole = size // (batch_size * num_ranks)
        self.num_batches = whole - whole % accum_steps
        if self.num_batches == 0:
            batches = "one batch" if accum_steps == 1 else f"{accum_steps} batches (--accum-steps)"
            lower = f"--accum-steps to at most {whole}"
            if whole == 0:
                lower = f"--batch-size to at most {max(1, size // (num_ranks * accum_steps))}"
            raise ConfigError(
                f"{size} training images do not fill {batches} of {batch_size} on each of {num_ranks} rank(s): "
                f"lower {lower}"
            )

    def set_epoch(self, epoch: int, start_batch: int = 0) -> None:
        """Choose the epoch, and the batch of it that comes first (that many are taken as done)."""
        if not 0 <= start_batch <= self.num_batches:
            raise ValueError(f"start_batch={start_batch}: the epoch has {self.num_batches} batches")
        self.epoch = epoch
        self.start_batch = start_batch

    def __len__(self) -> int:
        """Keys that iteration will yield: those of the batches left in the epoch."""
        return (self.num_batches - self.start_batch) * self.batch_size

    def __iter__(self) -> Iterator[SampleKey]:
        order = self._global_order()
        step = self.batch_size * self.num_ranks
        for position in range(self.start_batch * step + self.rank, self.num_batches * step, self.num_ranks):
            image, repeat = divmod(position, self.repeats)
            yield SampleKey(self.epoch, int(order[image]), repeat)

    def _global_order(self) -> np.ndarray:
        seeds = np.random.SeedSequence([self.seed, self.epoch], spawn_key=(ORDER_STREAM,))
        return np.random.default_rng(seeds).permutation(self.size)


class EvalSampler(Sampler[int]):
    """Every image exactly once over all ranks: rank r takes r, r + num_ranks, ...; sizes differ by one."""

    def __init__(self, size: int, num_ranks: int = 1, rank: int = 0):
        if not 0 <= rank < num_ranks:
            raise ValueError(f"rank={rank}: expected 0 <= rank < num_ranks={num_ranks}")
        self.indices = range(rank, size, num_ranks)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)
