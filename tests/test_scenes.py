"""Generated scenes: exact annotations, digits that are held out, and nothing but counters behind them."""

import numpy as np
import pytest

from datasets import digits_sources
from scenes import SPLITS, Scenes, _digits, background, covered, ink

ALL = [(split, size) for split in SPLITS for size in (48, 96, 129)]


@pytest.mark.parametrize(("split", "size"), ALL)
def test_a_scene_has_the_shapes_and_types_that_it_says(split, size):
    for image, masks, boxes, labels in (Scenes(split, size, 20, seed=1)[i] for i in range(20)):
        count = len(labels)
        assert 1 <= count <= 5
        assert image.shape == (size, size, 3) and image.dtype == np.uint8
        assert masks.shape == (count, size, size) and masks.dtype == bool
        assert boxes.shape == (count, 4) and boxes.dtype == np.float32
        assert labels.dtype == np.int64 and set(labels) <= set(range(10))


def test_boxes_are_tight_and_masks_do_not_overlap():
    for scene in (Scenes("train", 96, 200)[i] for i in range(200)):
        assert scene.masks.sum(axis=0).max() == 1
        for mask, (left, top, right, bottom) in zip(scene.masks, scene.boxes.astype(int)):
            assert mask.sum() >= 20
            inside = mask[top:bottom, left:right]
            assert inside.sum() == mask.sum()
            assert inside[0].any() and inside[-1].any() and inside[:, 0].any() and inside[:, -1].any()


def test_a_mask_is_the_digit_that_its_label_says(monkeypatch):
    """On a black canvas, what is not black is in a mask, and each mask looks most like a digit of its class."""
    monkeypatch.setattr("scenes.background", lambda rng, size: np.zeros((size, size, 3), np.float32))
    digits, labels = _digits("val")
    for scene in (Scenes("val", 120, 30)[i] for i in range(30)):
        bright = scene.image.astype(int).max(axis=2) > 90
        assert (bright & ~scene.masks.any(axis=0)).mean() < 0.02
        for mask, label, (left, top, right, bottom) in zip(scene.masks, scene.labels, scene.boxes.astype(int)):
            side = max(right - left, bottom - top)
            alike = []
            for digit in digits[labels == label]:
                whole = ink(digit, side) > 0.5
                rows, columns = np.flatnonzero(whole.any(1)), np.flatnonzero(whole.any(0))
                whole = whole[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
                part = mask[top:bottom, left:right]
                height, width = (min(a, b) for a, b in zip(whole.shape, part.shape))
                alike.append((whole[:height, :width] == part[:height, :width]).mean())
            assert max(alike) > 0.75


def test_a_scene_follows_from_its_counters():
    first, again = Scenes("train", 64, 10, seed=3), Scenes("train", 64, 10, seed=3)
    for a, b in zip(first[7], again[7]):
        np.testing.assert_array_equal(a, b)
    for other in (first[6], Scenes("train", 64, 10, seed=4)[7], Scenes("val", 64, 10, seed=3)[7]):
        assert not np.array_equal(first[7].image, other.image)
    np.testing.assert_array_equal(first.at(5).image, first[5].image)
    assert first.at(1000).image.shape == (64, 64, 3)


def test_the_digits_of_the_two_splits_are_those_of_the_data_set_and_disjoint():
    sources = digits_sources(need_train=True)
    for split, source in (("train", sources.train), ("val", sources.val)):
        digits, labels = _digits(split)
        np.testing.assert_array_equal(np.round(digits * 255), source.images)
        np.testing.assert_array_equal(labels, source.labels)
    train, val = ({digit.tobytes() for digit in _digits(split)[0]} for split in SPLITS)
    assert not train & val and len(train) + len(val) == 1797


def test_scenes_use_the_digits_of_their_split_alone(monkeypatch):
    used = []
    monkeypatch.setattr("scenes.ink", lambda digit, side: used.append(digit.tobytes()) or ink(digit, side))
    for split in SPLITS:
        used.clear()
        for i in range(40):
            Scenes(split, 48, 40)[i]
        assert len(used) > 60 and set(used) <= {digit.tobytes() for digit in _digits(split)[0]}


def test_the_background_holds_no_ink_of_digits_but_much_else():
    canvases = [background(np.random.default_rng(i), 96) for i in range(20)]
    assert all(canvas.shape == (96, 96, 3) and canvas.std() > 5 for canvas in canvases)


def test_the_classes_of_pixels_are_digits_and_background():
    scene = Scenes("val", 96, 5)[4]
    classes = scene.classes()
    assert set(np.unique(classes)) == {0, *(label + 1 for label in scene.labels)}
    for mask, label in zip(scene.masks, scene.labels):
        assert (classes[mask] == label + 1).all()
    assert (scene.classes(background=255) == np.where(classes == 0, 255, classes)).all()


def test_what_others_cover_is_counted_for_each_square():
    assert covered([(0, 0, 10), (5, 0, 20), (100, 100, 4)]) == [0.5, 50 / 400, 0]


def test_light_digits_are_lighter_than_what_is_behind_them():
    for scene in (Scenes("train", 96, 20, ink="light")[i] for i in range(20)):
        grey, inked = scene.image.mean(axis=2), scene.masks.any(axis=0)
        assert np.percentile(grey[inked], 20) > np.percentile(grey[~inked], 90)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"ink": "red"}, "ink='red' is unknown: use one of 'any', 'light'"),
        ({"split": "test"}, "split='test' is unknown: use one of 'train', 'val'"),
        ({"size": 20}, "size=20"),
    ],
)
def test_a_wrong_argument_is_said(arguments, words):
    with pytest.raises(ValueError, match=words):
        Scenes(**{"split": "train"} | arguments)


def test_the_length_is_an_end():
    scenes = Scenes("train", 64, 3)
    assert len(scenes) == 3 and len(list(iter(scenes))) == 3
