"""Training order and evaluation shards: coverage, ranks, resuming, repeated augmentation."""

from collections import Counter
from itertools import chain

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from samplers import EvalSampler, SampleKey, TrainSampler

SIZES = st.integers(1, 300)
BATCHES = st.integers(1, 16)
RANKS = st.integers(1, 5)
ACCUMULATED = st.integers(1, 4)


def batches_of(sampler) -> list[list[SampleKey]]:
    keys = list(sampler)
    return [keys[i : i + sampler.batch_size] for i in range(0, len(keys), sampler.batch_size)]


def all_ranks(size, batch_size, num_ranks, accum_steps=1, **options) -> list[TrainSampler]:
    assume(size >= batch_size * num_ranks * accum_steps)
    options["accum_steps"] = accum_steps
    return [TrainSampler(size, batch_size, num_ranks, rank, **options) for rank in range(num_ranks)]


def steps_of(samplers, accum_steps) -> list[list[SampleKey]]:
    """What all ranks together see in each optimiser step, sorted; the last step may be short of batches."""
    shares = [batches_of(sampler) for sampler in samplers]
    batches = [list(chain(*of_all_ranks)) for of_all_ranks in zip(*shares, strict=True)]
    return [sorted(chain(*batches[i : i + accum_steps])) for i in range(0, len(batches), accum_steps)]


@given(SIZES, BATCHES, RANKS, ACCUMULATED, st.integers(0, 3))
def test_every_image_once_but_for_a_tail_shorter_than_a_step(size, batch_size, num_ranks, accum_steps, epoch):
    samplers = all_ranks(size, batch_size, num_ranks, accum_steps)
    for sampler in samplers:
        sampler.set_epoch(epoch)
    keys = [key for sampler in samplers for key in sampler]
    indices = {key.index for key in keys}
    assert len(indices) == len(keys)
    assert indices <= set(range(size))
    assert size - len(keys) < batch_size * num_ranks * accum_steps
    assert {(key.epoch, key.repeat) for key in keys} == {(epoch, 0)}


@given(SIZES, BATCHES, RANKS, st.sampled_from([1, 3]))
def test_every_rank_runs_the_same_whole_batches(size, batch_size, num_ranks, repeats):
    samplers = all_ranks(size, batch_size, num_ranks, repeats=repeats)
    lengths = {len(list(sampler)) for sampler in samplers}
    assert lengths == {samplers[0].num_batches * batch_size} == {len(samplers[0])}


@given(SIZES, BATCHES, RANKS, ACCUMULATED, st.sampled_from([1, 3]))
def test_step_sees_the_same_images_whatever_the_number_of_ranks(size, batch_size, num_ranks, accum_steps, repeats):
    """R15: ranks, batches a step and images a batch can be traded for each other, also where they divide no size."""
    together = steps_of(all_ranks(size, batch_size, num_ranks, accum_steps, repeats=repeats), accum_steps)
    parts = num_ranks * accum_steps
    whole = batch_size * parts
    assert together == steps_of(all_ranks(size, batch_size, 1, parts, repeats=repeats), parts)
    assert together == steps_of(all_ranks(size, whole, 1, repeats=repeats), 1)
    assert {len(step) for step in together} == {whole}, "none is shorter"


@given(SIZES, BATCHES, RANKS, st.sampled_from([1, 3]), st.data())
def test_resumed_epoch_is_the_rest_of_the_whole_one(size, batch_size, num_ranks, repeats, data):
    sampler = data.draw(st.sampled_from(all_ranks(size, batch_size, num_ranks, repeats=repeats)))
    sampler.set_epoch(2)
    whole = list(sampler)
    start = data.draw(st.integers(0, sampler.num_batches))
    sampler.set_epoch(2, start_batch=start)
    assert list(sampler) == whole[start * batch_size :]
    assert len(sampler) == len(whole) - start * batch_size


@given(SIZES, BATCHES, RANKS)
def test_repeated_augmentation_shows_a_third_of_the_images_three_times(size, batch_size, num_ranks):
    samplers = all_ranks(size, batch_size, num_ranks, repeats=3)
    keys = [key for sampler in samplers for key in sampler]
    assert len(set(keys)) == len(keys), "two equal keys would be the same augmentation twice"
    times = Counter(key.index for key in keys)
    assert sorted(times.values(), reverse=True) == [3] * (len(keys) // 3) + [len(keys) % 3] * (len(keys) % 3 > 0)
    assert size - len(keys) < batch_size * num_ranks, "the epoch keeps its length"


def test_three_ranks_get_one_copy_of_an_image_each():
    samplers = [TrainSampler(24, 4, 3, rank, repeats=3) for rank in range(3)]
    for keys in zip(*samplers):
        assert len({key.index for key in keys}) == 1
        assert [key.repeat for key in keys] == [0, 1, 2]


def test_one_process_gets_the_copies_in_one_batch():
    keys = list(TrainSampler(24, 6, repeats=3))
    assert all(len({key.index for key in keys[i : i + 3]}) == 1 for i in range(0, 24, 3))


def test_order_follows_from_seed_and_epoch():
    def order(seed, epoch):
        sampler = TrainSampler(100, 10, seed=seed)
        sampler.set_epoch(epoch)
        return [key.index for key in sampler]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert order(1, 1) == orders[-1]
    assert len({tuple(o) for o in orders}) == 4


@given(st.integers(0, 300), RANKS)
def test_evaluation_shards_hold_every_image_once(size, num_ranks):
    shards = [EvalSampler(size, num_ranks, rank) for rank in range(num_ranks)]
    assert sorted(index for shard in shards for index in shard) == list(range(size))
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"size": 7, "batch_size": 4, "num_ranks": 2}, "7 training images .* at most 3"),
        ({"repeats": 2}, "repeats=2"),
        ({"rank": 1}, "rank=1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"accum_steps": 0}, "accum_steps=0"),
        ({"accum_steps": 5}, r"8 .* images do not fill 5 batches \(--accum-steps\) .* --accum-steps to at most 4"),
        ({"batch_size": 9, "accum_steps": 3}, "lower --batch-size to at most 2"),
    ],
)
def test_arguments_that_make_no_sense_are_named(arguments, said):
    with pytest.raises(ValueError, match=said):
        TrainSampler(**{"size": 8, "batch_size": 2, **arguments})


def test_bad_start_and_bad_rank_are_named():
    with pytest.raises(ValueError, match="start_batch=5: the epoch has 4 batches"):
        TrainSampler(8, 2).set_epoch(0, start_batch=5)
    with pytest.raises(ValueError, match="rank=2"):
        EvalSampler(8, num_ranks=2, rank=2)
