"""From a PIL image to a normalised tensor, and from a batch to a mixed batch.

The training recipe is DeiT's (arXiv 2012.12877, table 9) through timm's transforms, or DeiT III's
3-Augment (arXiv 2204.07118, section 3). Every random draw happens under `counter_randomness`, so an image's
augmentation depends on the counters it is called for and on nothing else.
"""

import math
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from PIL import Image, ImageFilter
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, Mixup, auto_augment, create_transform
from timm.data.random_erasing import RandomErasing
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from arguments import size_of
from errors import ConfigError, as_config_error

# At or below this many pixels a side, images are taken whole (CIFAR, digits): no zooming crop.
SMALL_SIDE = 32

# Longest side allowed, in multiples of what the crop shows; more is cut off before resizing, or 1 x 20000 pixels would
# fill gigabytes.
LONGEST = 32

# First words of timm's augmentation policies, such as rand-m9-mstd0.5-inc1.
AUTO_AUGMENT = ("rand", "augmix", "original", "originalr", "v0", "v0r", "3a")

# See samplers.ORDER_STREAM.
SAMPLE_STREAM = 2
MIXUP_STREAM = 3


@contextmanager
def counter_randomness(*counters: int, stream: int = SAMPLE_STREAM) -> Iterator[None]:
    """Seed Python's, numpy's and torch's global CPU generators from `counters`; put their states back after.

    The GPU's generator is left alone: torch.manual_seed would reset it too.
    """
    saved = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    words = np.random.SeedSequence(counters, spawn_key=(stream,)).generate_state(8)
    random.seed(words[:4].tobytes())
    np.random.seed(words[4:6])
    torch.default_generator.manual_seed(int(words[6]) << 32 | int(words[7]))
    try:
        yield
    finally:
        random.setstate(saved[0])
        np.random.set_state(saved[1])
        torch.default_generator.set_state(saved[2])


def channel_statistics(num_channels: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """ImageNet's mean and std for colour; for any other number of channels the averages of the three."""
    if num_channels == 3:
        return IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
    mean, std = sum(IMAGENET_DEFAULT_MEAN) / 3, sum(IMAGENET_DEFAULT_STD) / 3
    return (mean,) * num_channels, (std,) * num_channels


class ResizeToCover:
    """Scale an image (bicubic), keeping its proportions, to the smallest size that covers (height, width).

    For squares this is torchvision's Resize(side), which has no rectangular counterpart. Of an image more
    than LONGEST times as long as that the middle is taken.
    """

    def __init__(self, size: tuple[int, int]):
        self.size = size

    def __call__(self, image: Image.Image) -> Image.Image:
        height, width = self.size
        image = self._without_far_ends(image)
        if image.width * height >= image.height * width:
            target = height, image.width * height // image.height
        else:
            target = image.height * width // image.width, width
        return transforms.functional.resize(image, target, InterpolationMode.BICUBIC)

    def _without_far_ends(self, image: Image.Image) -> Image.Image:
        """As much off one as off the other, so that the centre stays; ordinary images as they are."""
        height, width = self.size
        seen = math.ceil(image.height * width / height), math.ceil(image.width * height / width)
        left, top = (max(0, side - LONGEST * part) // 2 for side, part in zip(image.size, seen))
        if left or top:
            image = image.crop((left, top, image.width - left, image.height - top))
        return image


class ToChannels:
    """An RGB image with another number of channels: its luminance, `num_channels` times (3: left as it is).

    Comes after the augmentations, which are written for RGB.
    """

    def __init__(self, num_channels: int):
        self.num_channels = num_channels

    def __call__(self, image: Image.Image) -> Image.Image | np.ndarray:
        if self.num_channels == 3:
            return image
        grey = np.asarray(image.convert("L"))
        return np.repeat(grey[:, :, None], self.num_channels, axis=2)  # (H, W, num_channels)


class GaussianBlur:
    """Blur by a radius drawn uniformly from [low, high] pixels."""

    def __init__(self, low: float = 0.1, high: float = 2.0):
        self.low = low
        self.high = high

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.filter(ImageFilter.GaussianBlur(random.uniform(self.low, self.high)))


def crop_ratio(args) -> float:
    """The share of a resized image that evaluation keeps: all of small ones and of digits. Raises ConfigError."""
    if not 0 < args.eval_crop_ratio <= 1:
        raise ConfigError(f"--eval-crop-ratio {args.eval_crop_ratio}: expected a share above 0 and up to 1")
    whole = max(size_of(args.input_size)) <= SMALL_SIDE or args.data_set == "DIGITS"
    return 1.0 if whole else args.eval_crop_ratio


def build_transform(args, train: bool, num_channels: int = 3) -> transforms.Compose:
    """PIL RGB image -> float32 tensor (num_channels, height, width), normalised.

    Training follows `args.data_set` (digits are shifted, never flipped), `args.ThreeAugment`, `args.src`,
    `args.aa`, `args.color_jitter`, `args.train_interpolation`, `args.reprob`, `args.remode`, `args.recount`;
    3-Augment has neither auto-augment nor erasing, as published. Evaluation is deterministic, and
    `args.eval_crop_ratio` alone matters. Raises ConfigError for values that make no sense.
    """
    size = size_of(args.input_size)
    to_tensor = [ToChannels(num_channels), transforms.ToTensor(), _normalize(num_channels)]
    if not train:
        return transforms.Compose(_centre(size, crop_ratio(args)) + to_tensor)
    if args.src and not args.ThreeAugment:
        raise ConfigError("--src (simple random crop) is part of 3-Augment: add --ThreeAugment or drop --src")
    if args.data_set == "DIGITS":
        return transforms.Compose(_small_shifts(size) + to_tensor)
    if args.ThreeAugment:
        return transforms.Compose(three_augment(size, args.color_jitter, args.src) + to_tensor)
    steps = _deit_steps(args, size) + to_tensor
    if args.reprob > 0:
        steps.append(RandomErasing(args.reprob, mode=args.remode, max_count=args.recount, device="cpu"))
    return transforms.Compose(steps)


def _normalize(num_channels: int) -> transforms.Normalize:
    return transforms.Normalize(*channel_statistics(num_channels))


def _centre(size: tuple[int, int], crop_ratio: float) -> list:
    """Resize to int(size / crop_ratio) and crop the centre."""
    height, width = size
    return [ResizeToCover((int(height / crop_ratio), int(width / crop_ratio))), transforms.CenterCrop(size)]


def _small_shifts(size: tuple[int, int]) -> list:
    """One digit stays that digit under a small shift; flipped or cut it may be another."""
    height, width = size
    padding = (max(1, width // 8), max(1, height // 8))
    return [ResizeToCover(size), transforms.RandomCrop(size, padding=padding)]


def _deit_steps(args, size: tuple[int, int]) -> list:
    """Random resized crop, flip, RandAugment (or colour jitter): the image part of DeiT's recipe."""
    policy, *sections = (args.aa or "none").split("-")
    if policy not in ("none", *AUTO_AUGMENT) or not all(re.fullmatch(r"[a-z]+\d.*", section) for section in sections):
        raise ConfigError(
            f"--aa {args.aa}: expected none, or one of {', '.join(AUTO_AUGMENT)} with timm's sections, as in "
            "rand-m9-mstd0.5-inc1"
        )
    with as_config_error(f"--aa {args.aa}: ", AssertionError):  # timm's way to refuse a section
        crop, augment, _ = _timm_transforms(args, size)
    for policy in augment.transforms:
        for operation in _operations(policy):
            if operation.aug_fn is auto_augment.posterize:
                operation.aug_fn = posterize
    geometry = crop.transforms
    if max(size) <= SMALL_SIDE:
        geometry = [ResizeToCover(size), transforms.RandomCrop(size, padding=4), *geometry[1:]]
    return geometry + augment.transforms


def _timm_transforms(args, size: tuple[int, int]):
    return create_transform(
        input_size=size,
        is_training=True,
        color_jitter=args.color_jitter,
        auto_augment=None if args.aa == "none" else args.aa,
        interpolation=args.train_interpolation,
        separate=True,
    )


def _operations(policy) -> Iterator[auto_augment.AugmentOp]:
    """The operations of one of timm's policies; none of a transform that is no policy."""
    for group in (getattr(policy, "ops", []), *getattr(policy, "policy", [])):
        yield from group


def posterize(image: Image.Image, bits_to_keep: int, **options) -> Image.Image:
    """timm's operation, also for no bit at all, which its recipes draw: black, as before Pillow 13, which refuses."""
    if bits_to_keep == 0:
        return image.point(lambda value: 0)
    return auto_augment.posterize(image, bits_to_keep, **options)


def three_augment(size: tuple[int, int], color_jitter: float | None, simple_crop: bool) -> list:
    """DeiT III's 3-Augment: crop, flip, one of {grey, solarise, blur}, colour jitter (arXiv 2204.07118, 3).

    Args:
        size: (height, width) that comes out.
        color_jitter: strength for brightness, contrast and saturation; None or 0 for none.
        simple_crop: `--src`: cover the size, pad 4 pixels by reflection, crop; else a random resized crop.
    """
    if simple_crop:
        padded_crop = transforms.RandomCrop(size, padding=4, padding_mode="reflect")
        crop = [ResizeToCover(size), padded_crop]
    else:
        crop = [transforms.RandomResizedCrop(size, interpolation=InterpolationMode.BICUBIC)]
    one_of_three = transforms.RandomChoice(
        [transforms.Grayscale(3), transforms.RandomSolarize(threshold=128, p=1.0), GaussianBlur()]
    )
    jitter = [transforms.ColorJitter(color_jitter, color_jitter, color_jitter)] if color_jitter else []
    return [*crop, transforms.RandomHorizontalFlip(), one_of_three, *jitter]


class CountedMixup:
    """timm's mixup and cutmix with random numbers drawn from (seed, step, rank) alone."""

    def __init__(self, mixup: Mixup, seed: int):
        self.mixup = mixup
        self.seed = seed

    def __call__(
        self, samples: torch.Tensor, targets: torch.Tensor, step: int, rank: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix `samples` (B, C, H, W) in place; labels (B,) int -> soft targets (B, num_classes)."""
        _require_even(len(samples))
        with counter_randomness(self.seed, step, rank, stream=MIXUP_STREAM):
            return self.mixup(samples, targets)


def build_mixup(args, num_classes: int) -> CountedMixup | None:
    """The batch mixer of `--mixup`, `--cutmix`, `--cutmix-minmax` and their options; None when all are off.

    Zhang et al., arXiv 1710.09412; Yun et al., arXiv 1905.04899. Raises ConfigError for an odd batch size.
    """
    if args.mixup <= 0 and args.cutmix <= 0 and args.cutmix_minmax is None:
        return None
    _require_even(args.batch_size)
    mixup = Mixup(
        mixup_alpha=args.mixup,
        cutmix_alpha=args.cutmix,
        cutmix_minmax=args.cutmix_minmax,
        prob=args.mixup_prob,
        switch_prob=args.mixup_switch_prob,
        mode=args.mixup_mode,
        label_smoothing=args.smoothing,
        num_classes=num_classes,
    )
    return CountedMixup(mixup, args.seed)


def _require_even(batch_size: int) -> None:
    if batch_size % 2:
        raise ConfigError(
            f"a batch of {batch_size}: mixup and cutmix pair the images of a batch; "
            "use an even --batch-size, or --mixup 0 --cutmix 0"
        )
