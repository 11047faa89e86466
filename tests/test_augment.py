"""Transforms and mixup: what they do to pixels, and that only counters decide it."""

import itertools
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from torchvision import transforms

import augment
from augment import (
    MIXUP_STREAM,
    SAMPLE_STREAM,
    CountedMixup,
    ResizeToCover,
    _operations,
    build_mixup,
    build_transform,
    channel_statistics,
    counter_randomness,
    posterize,
)
from errors import ConfigError
from helpers import PLAIN, random_image, run_args


def draws() -> tuple:
    return random.random(), np.random.rand(), torch.rand(()).item()


def pixels(tensor: torch.Tensor) -> np.ndarray:
    """Undo the normalisation: (C, H, W) float -> (H, W, C) uint8."""
    mean, std = (torch.tensor(values)[:, None, None] for values in channel_statistics(len(tensor)))
    return ((tensor * std + mean) * 255).round().clamp(0, 255).byte().permute(1, 2, 0).numpy()


def arguments(*flags: str, input_size=None, data_set="IMNET"):
    args = run_args("--data-set", data_set, *flags)
    args.input_size = input_size or args.input_size
    return args


def augmented(transform, image: Image.Image, number: int) -> list[torch.Tensor]:
    outputs = []
    for i in range(number):
        with counter_randomness(i):
            outputs.append(transform(image))
    return outputs


def test_counters_decide_and_the_global_generators_go_on_as_if_nothing_was_drawn():
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    undisturbed = [draws(), draws()]
    torch.manual_seed(0), np.random.seed(0), random.seed(0)
    first = draws()
    with counter_randomness(0, 1, 2, 3):
        inside = draws()
    with counter_randomness(0, 1, 2, 3):
        assert draws() == inside
    assert [first, draws()] == undisturbed


def test_state_comes_back_after_an_error():
    before = random.getstate()
    with pytest.raises(KeyError):
        with counter_randomness(1):
            raise KeyError
    assert random.getstate() == before


def test_neighbouring_counters_and_the_two_streams_share_no_number():
    seen = []
    for counters in itertools.product(range(2), repeat=4):
        for stream in (SAMPLE_STREAM, MIXUP_STREAM):
            with counter_randomness(*counters, stream=stream):
                seen += draws()
    assert len(set(seen)) == len(seen) == 16 * 2 * 3


@pytest.mark.parametrize("size", [(40, 32), (300, 200), (200, 301), (31, 97), (930, 30)], ids=str)
@pytest.mark.parametrize("side", [48, 224])
def test_evaluation_is_resize_by_the_crop_ratio_and_centre_crop(size, side):
    image = random_image(0, *size)
    expected = transforms.Compose(
        [
            transforms.Resize(int(side / 0.875), transforms.InterpolationMode.BICUBIC),
            transforms.CenterCrop(side),
            transforms.ToTensor(),
            transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )(image)
    assert torch.equal(build_transform(arguments(input_size=side), train=False)(image), expected)


@pytest.mark.parametrize("side", [32, 224])
def test_a_crop_ratio_that_cannot_be_is_refused_where_all_is_kept_too(side):
    with pytest.raises(ConfigError, match=r"--eval-crop-ratio -1\.0: expected a share above 0"):
        build_transform(arguments("--eval-crop-ratio", "-1", input_size=side), train=False)


@pytest.mark.parametrize("size", [(1, 20_000), (20_001, 1)], ids=str)
@pytest.mark.parametrize("flags", [(), ("--ThreeAugment", "--src")], ids=["evaluation", "training's simple crop"])
def test_an_image_of_one_row_or_column_costs_no_more_than_others(size, flags, monkeypatch):
    """A file of 163 bytes, which whole and enlarged would be 256 x 5,120,000 pixels."""
    resize = transforms.functional.resize

    def bounded(image, target, *options):
        assert target[0] * target[1] <= 33 * 256 * 256
        return resize(image, target, *options)

    monkeypatch.setattr(transforms.functional, "resize", bounded)
    transform = build_transform(arguments(*flags, input_size=224), train=bool(flags))
    assert transform(Image.new("RGB", size)).shape == (3, 224, 224)


@pytest.mark.parametrize("size", [(128, 4), (129, 4), (1000, 4), (4, 1001)], ids=str)
def test_the_centre_of_a_long_image_is_as_if_all_of_it_were_enlarged(size, monkeypatch):
    image, centre = random_image(0, *size), transforms.CenterCrop(32)
    found = centre(ResizeToCover((32, 32))(image))
    monkeypatch.setattr(augment, "LONGEST", 10**6)
    assert found.tobytes() == centre(ResizeToCover((32, 32))(image)).tobytes()


@pytest.mark.parametrize("data_set", ["IMNET", "CIFAR", "DIGITS"])
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (24, 72)], ids=str)
def test_evaluation_draws_nothing(data_set, size):
    transform = build_transform(arguments(input_size=size, data_set=data_set), train=False)
    state = torch.get_rng_state(), random.getstate()
    first, second = (transform(random_image(1, 90, 70)) for _ in range(2))
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), state[0]) and random.getstate() == state[1]


RECIPES = {
    "deit": (),
    "no auto-augment": ("--aa", "none"),
    "3-augment": ("--ThreeAugment",),
    "3-augment, simple crop": ("--ThreeAugment", "--src"),
}


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("size", [(32, 32), (64, 48), (48, 96)], ids=str)
@pytest.mark.parametrize("channels", [1, 3, 4])
def test_shape_and_type(flags, size, channels):
    for train in (True, False):
        transform = build_transform(arguments(*flags, input_size=size), train, channels)
        output = augmented(transform, random_image(2, 80, 60), 1)[0]
        assert output.shape == (channels, *size) and output.dtype == torch.float32


@pytest.mark.parametrize("flags", RECIPES.values(), ids=RECIPES)
def test_training_views_differ_and_repeat_with_their_counter(flags):
    transform = build_transform(arguments(*flags, input_size=48), train=True)
    first, again = (augmented(transform, random_image(3, 80, 60), 6) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    assert len({a.numpy().tobytes() for a in first}) == 6


def test_small_images_are_evaluated_whole():
    image = random_image(4, 32, 32)
    output = build_transform(arguments(input_size=32, data_set="CIFAR"), train=False)(image)
    assert np.array_equal(pixels(output), np.asarray(image))


def shifted(image: Image.Image, padding: int) -> set[bytes]:
    """Every crop of the image's own size from the image with black borders."""
    padded = np.pad(np.asarray(image), ((padding, padding), (padding, padding), (0, 0)))
    height, width = image.height, image.width
    offsets = [(y, x) for y in range(2 * padding + 1) for x in range(2 * padding + 1)]
    return {padded[y : y + height, x : x + width].tobytes() for y, x in offsets}


def test_small_images_are_shifted_by_up_to_4_pixels_and_flipped_instead_of_zoomed():
    image = random_image(5, 32, 32)
    transform = build_transform(arguments(*PLAIN, input_size=32, data_set="CIFAR"), train=True)
    views = [pixels(view).tobytes() for view in augmented(transform, image, 60)]
    upright, mirrored = shifted(image, 4), shifted(ImageOps.mirror(image), 4)
    assert set(views) <= upright | mirrored
    assert 15 < sum(view in upright for view in views) < 45
    assert len(set(views)) > 30


def test_digits_are_shifted_by_up_to_an_eighth_and_never_flipped():
    image = random_image(6, 32, 32)
    transform = build_transform(arguments(input_size=32, data_set="DIGITS"), train=True)
    views = {pixels(view).tobytes() for view in augmented(transform, image, 80)}
    assert views <= shifted(image, 4)
    assert len(views) > 40


def test_random_erasing_fills_one_rectangle():
    flags = ("--aa", "none", "--color-jitter", "0", "--remode", "const")
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    erased = build_transform(arguments(*flags, "--reprob", "1", input_size=64), train=True)
    for view in augmented(erased, white, 5):
        hole = view[0] == 0
        rows, columns = hole.any(dim=1), hole.any(dim=0)
        assert 0.01 < hole.float().mean() < 0.4
        assert int(hole.sum()) == int(rows.sum() * columns.sum())
    whole = build_transform(arguments(*flags, "--reprob", "0", input_size=64), train=True)
    assert not any((view == 0).any() for view in augmented(whole, white, 5))


@pytest.mark.parametrize("mode", ["const", "rand", "pixel"])
def test_an_erased_box_is_filled_as_told(mode):
    """With grey, with one colour, or with another one at every pixel."""
    args = arguments(*PLAIN, "--reprob", "1", "--remode", mode, input_size=64)
    white = Image.new("RGB", (64, 64), (255, 255, 255))
    normalised_white = build_transform(args, train=False)(white)
    for view in augmented(build_transform(args, train=True), white, 3):
        hole = view[:, (view != normalised_white).any(dim=0)]  # (3, erased pixels)
        colours = hole.unique(dim=1)
        assert colours.shape[1] == (hole.shape[1] if mode == "pixel" else 1)
        assert colours.any() == (mode != "const")


def test_as_many_boxes_are_erased_as_told():
    args = arguments(*PLAIN, "--reprob", "1", "--remode", "const", "--recount", "3", input_size=64)
    views = augmented(build_transform(args, train=True), Image.new("RGB", (64, 64), (255, 255, 255)), 10)
    holes = [(view == 0).all(dim=0) for view in views]
    assert any(hole.sum() < hole.any(dim=0).sum() * hole.any(dim=1).sum() for hole in holes)


def test_the_crops_interpolation_is_the_one_asked_for():
    views = [
        augmented(build_transform(arguments(*PLAIN, "--train-interpolation", name), train=True), random_image(9), 1)[0]
        for name in ("bilinear", "bicubic")
    ]
    assert not torch.equal(*views)


def test_three_augment_jitters_brightness_contrast_and_saturation():
    jitter = augment.three_augment((32, 32), 0.3, simple_crop=False)[-1]
    assert jitter.brightness == jitter.contrast == jitter.saturation == (0.7, 1.3) and jitter.hue is None


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "rand-m9", "augmix-m9", "original", "v0"])
def test_every_magnitude_of_a_policy_can_be_drawn(policy):
    """Posterising to no bit at all, the end of the recipe's range, is what Pillow refuses from version 13 on."""
    image, seen = random_image(0), set()
    steps = build_transform(run_args("--aa", policy), train=True).transforms
    for operation in (op for step in steps for op in _operations(step)):
        seen.add(operation.name)
        operation.prob, operation.magnitude_std = 1.0, 0
        for operation.magnitude in range(11):
            assert operation(image).size == image.size
    assert any(name.startswith("Posterize") for name in seen)
    assert posterize(image, 0).getextrema() == ((0, 0),) * 3


def test_three_augment_chooses_one_of_grey_solarise_blur():
    # Above 128 everywhere: solarising turns all of it over, blurring changes nothing.
    colour = (250, 180, 140)
    results = {
        tuple(255 - channel for channel in colour): "solarise",
        colour: "blur",
        (ImageOps.grayscale(Image.new("RGB", (1, 1), colour)).getpixel((0, 0)),) * 3: "grey",
    }
    args = arguments("--ThreeAugment", "--color-jitter", "0", input_size=32)
    views = augmented(build_transform(args, train=True), Image.new("RGB", (40, 40), colour), 300)
    chosen = [results[tuple(int(value) for value in pixels(view)[7, 9])] for view in views]
    for name in results.values():
        assert 70 < chosen.count(name) < 130


def test_simple_crop_keeps_the_scale():
    """Resized to cover, padded by reflection and cropped: no pixel but the image's own."""
    image = random_image(7, 64, 48)
    args = arguments("--ThreeAugment", "--src", "--color-jitter", "0", input_size=48)
    grey = np.asarray(image.convert("L").convert("RGB"))
    padded = np.pad(grey, ((4, 4), (4, 4), (0, 0)), mode="reflect")
    crops = {padded[y : y + 48, x : x + 48].tobytes() for y in range(9) for x in range(25)}
    views = [pixels(view) for view in augmented(build_transform(args, train=True), image, 60)]
    greys = [view for view in views if np.ptp(view.astype(int), axis=2).max() == 0]
    assert len(greys) > 8
    for view in greys:
        assert view.tobytes() in crops or view[:, ::-1].tobytes() in crops


def test_grey_input_is_the_luminance():
    image = random_image(8, 32, 32)
    for channels in (1, 4):
        output = build_transform(arguments(input_size=32), train=False, num_channels=channels)(image)
        for channel in range(channels):
            assert np.array_equal(pixels(output)[:, :, channel], np.asarray(image.convert("L")))


def test_contradictory_and_unknown_augmentation_is_refused():
    with pytest.raises(ConfigError, match=r"--src.*--ThreeAugment"):
        build_transform(arguments("--src"), train=True)
    for policy in ("ramd-m9", "randfoo", "augmixx", "rand-foo", "v0x"):
        with pytest.raises(ConfigError, match=f"--aa {policy}: expected none, or one of rand, "):
            build_transform(arguments("--aa", policy), train=True)
    with pytest.raises(ConfigError, match="--aa rand-q9: Unknown RandAugment config section"):
        build_transform(arguments("--aa", "rand-q9"), train=True)
    for policy in ("v0r", "3a", "augmix-m5-w4-d2", "originalr-mstd0.5"):
        assert build_transform(arguments("--aa", policy), train=True)
    for ratio in ("0", "1.5"):
        with pytest.raises(ConfigError, match=f"--eval-crop-ratio {ratio}"):
            build_transform(arguments("--eval-crop-ratio", ratio), train=False)


def mixed(step: int, rank: int = 0, *flags: str) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.arange(6 * 3 * 16 * 16, dtype=torch.float32).reshape(6, 3, 16, 16)
    return build_mixup(run_args("--batch-size", "6", *flags), 5)(images, torch.arange(6) % 5, step, rank)


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_mixing_follows_from_seed_step_and_rank(mode):
    flags = ("--mixup-mode", mode)
    state = np.random.get_state()[1].copy()
    results = {}
    for key in [(0, 0), (1, 0), (0, 1)]:
        first, again = mixed(*key, *flags), mixed(*key, *flags)
        assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
        results[key] = first[0].numpy().tobytes()
    assert len(set(results.values())) == 3
    assert mixed(0, 0, *flags, "--seed", "1")[0].numpy().tobytes() != results[0, 0]
    assert np.array_equal(np.random.get_state()[1], state)


def test_mixing_shares_no_number_with_the_view_of_an_image():
    mixing = CountedMixup(lambda images, labels: draws(), seed=0)
    with counter_randomness(0, 1, 2, 0):  # seed, epoch, index, repeat
        assert not set(draws()) & set(mixing(torch.zeros(2), None, step=1, rank=2))


def test_mixed_labels_share_out_one_image_each():
    _, targets = mixed(0, 0, "--smoothing", "0.4")
    assert targets.shape == (6, 5)
    assert torch.allclose(targets.sum(dim=1), torch.ones(6))
    assert targets.min() == pytest.approx(0.4 / 5)


def test_images_may_stay_unmixed():
    images, _ = mixed(0, 0, "--mixup-prob", "0")
    assert torch.equal(images, torch.arange(images.numel()).reshape(images.shape))


def test_switching_is_between_mixup_and_cutmix():
    """Cutmix alone leaves every pixel that of one of the two images."""
    for step in range(5):
        for share, whole in (("0", False), ("1", True)):
            images, _ = mixed(step, 0, "--mixup-switch-prob", share)
            original = torch.arange(images.numel()).reshape(images.shape)
            assert ((images == original) | (images == original.flip(0))).all() == whole


@pytest.mark.parametrize(("mode", "number"), [("batch", 1), ("pair", 2), ("elem", 4)])
def test_a_ratio_is_of_a_batch_a_pair_or_an_image(mode, number):
    _, targets = mixed(0, 0, "--mixup-mode", mode, "--cutmix", "0", "--smoothing", "0")
    assert len({round(float(targets[i, i]), 5) for i in range(1, 5)}) == number  # images 0 and 5 are of one class


def test_cutmixs_box_is_as_large_as_told():
    for step in range(10):
        images, _ = mixed(step, 0, "--mixup", "0", "--cutmix-minmax", "0.25", "0.5")
        changed = (images != torch.arange(images.numel()).reshape(images.shape))[:, 0].sum(dim=(1, 2))
        assert (changed >= 4 * 4).all() and (changed <= 8 * 8).all()


def test_mixup_alone_is_a_weighted_sum_of_the_batch_and_its_reverse():
    images, targets = mixed(3, 0, "--cutmix", "0", "--smoothing", "0")
    original = torch.arange(6 * 3 * 16 * 16, dtype=torch.float32).reshape(6, 3, 16, 16)
    weight = float(targets[1, 1])  # labels 0 1 2 3 4 0 against 0 4 3 2 1 0: image 1 is mixed with image 4
    assert torch.allclose(images, weight * original + (1 - weight) * original.flip(0), rtol=1e-5)


def test_no_mixing_and_odd_batches():
    assert build_mixup(run_args("--mixup", "0", "--cutmix", "0"), 5) is None
    with pytest.raises(ConfigError, match=r"a batch of 5: .* even --batch-size"):
        build_mixup(run_args("--batch-size", "5"), 5)
    with pytest.raises(ConfigError, match="a batch of 3"):
        build_mixup(run_args(), 5)(torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long), 0, 0)
