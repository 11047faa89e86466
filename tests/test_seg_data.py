"""Labelled images: the formats of ADE20K and of folders, views for training, and what a wrong data set says."""

import colorsys
import errno
import os
import random
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from errors import ConfigError, DataError, LostDataError
from helpers import sent
from samplers import SampleKey
from seg.arguments import parse
from seg.data import SCENE_CLASSES, build_datasets, collate, read_label, view_settings
from seg.views import IGNORED, ViewSettings, crop_corner, distorted, fitting, normalised, training_view
from seg_sets import picture, write_ade20k, write_folder, write_grey


def arguments(*flags):
    return parse(["--device", "cpu", *map(str, flags)])


@pytest.fixture
def ade20k(tmp_path):
    return write_ade20k(tmp_path / "ade")


@pytest.fixture
def folder(tmp_path):
    return write_folder(tmp_path / "set")


def build(root, *flags, kind="FOLDER"):
    return build_datasets(arguments("--data-set", kind, "--data-path", root, "--crop-size", 24, *flags))


def refused(root, *flags, kind="FOLDER"):
    """The one line of the first thing that is wrong, found when the set is opened or read."""
    with pytest.raises(DataError) as error:
        data = build(root, *flags, kind=kind)
        for dataset in (data.train, data.val):
            for i in range(len(dataset)):
                dataset[i]
    assert "\n" not in str(error.value)
    return str(error.value)


# --- formats


def test_ade20k_counts_from_one_and_ignores_zero(ade20k):
    data = build(ade20k, kind="ADE20K")
    assert (len(data.train), len(data.val), data.num_classes) == (6, 3, 150)
    assert data.class_names[:2] == ["thing 1", "thing 2"] and data.class_names[-1] == "thing 150"
    for i in range(3):
        image, label = data.val[i]
        _, classes = picture(100 + i, 40 + 2 * i, 32)
        expected = np.array([IGNORED, 0, 1, 149])[classes]
        assert image.shape == (3, 32, 40 + 2 * i) and image.dtype == torch.float32
        assert label.dtype == torch.int64 and (label.numpy() == expected).all()
    assert "6 train images and 3 val images in 150 classes; label 0 is ignored" in data.description


def test_ade20k_without_its_list_has_numbers_for_names(ade20k):
    (ade20k / "objectInfo150.txt").unlink()
    assert build(ade20k, kind="ADE20K").class_names[149] == "class 150"


def test_a_folder_has_its_classes_and_files_in_sub_folders(folder):
    data = build(folder)
    assert (len(data.train), len(data.val)) == (6, 3)
    assert data.class_names == ["ground", "red", "green", "blue"]
    name = data.val.name(0)
    assert name.endswith("images/val/north/1.png")
    _, label = data.val[0]
    assert (label.numpy() == picture(101, 36, 30)[1]).all()


def test_a_folder_may_ignore_255_and_reduce_zero(folder):
    path = folder / "annotations" / "val" / "north" / "1.png"
    values = np.array([0, 1, 255, 3], np.uint8)[picture(101, 36, 30)[1]]
    Image.fromarray(values).save(path)
    _, label = build(folder).val[0]
    assert set(label.unique().tolist()) == set(np.unique(values).tolist())
    _, label = build(folder, "--reduce-zero-label").val[0]
    assert (label.numpy() == np.array([255, 0, 255, 2])[picture(101, 36, 30)[1]]).all()


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_a_grey_label_of_few_bits_has_the_values_in_the_file(bits, tmp_path):
    """Pillow brightens them, so that the largest is 255: all would be classes of other numbers, or ignored."""
    values = (np.arange(3 * 7).reshape(3, 7) % 2**bits).astype(np.uint8)
    write_grey(tmp_path / "label.png", values, bits)
    assert (read_label(tmp_path / "label.png") == values).all()


def test_ade20k_counts_from_one_in_labels_of_four_bits_too(ade20k):
    classes = picture(100, 40, 32)[1]
    write_grey(ade20k / "annotations" / "validation" / "ADE_val_00000001.png", classes, 4)
    _, label = build(ade20k, kind="ADE20K").val[0]
    assert (label.numpy() == np.array([IGNORED, 0, 1, 2])[classes]).all()


def test_two_images_of_one_label_are_refused(folder):
    shutil.copy(folder / "images" / "val" / "north" / "1.png", folder / "images" / "val" / "north" / "1.tif")
    with pytest.raises(DataError, match=r"north/1\.png, \S+north/1\.tif have one label, \S+north/1\.png; give each"):
        build(folder)


def test_a_label_on_storage_that_fails_for_now_is_not_a_broken_one(folder, monkeypatch):
    data = build(folder)

    def open_image(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

    monkeypatch.setattr(Image, "open", open_image)
    with pytest.raises(LostDataError, match=r"1\.png could not be read: Stale file handle"):
        read_label(folder / "annotations" / "val" / "north" / "1.png")
    with pytest.raises(LostDataError, match=r"1\.png could not be read: Stale file handle"):
        data.val[0]


def test_evaluation_needs_no_training_images(folder):
    shutil.rmtree(folder / "images" / "train")
    data = build(folder, "--eval", "--resume", "x")
    assert data.train is None and len(data.val) == 3


def test_scenes_are_new_each_epoch_and_held_out_ones_are_fixed():
    args = arguments("--scene-size", 48, "--train-scenes", 5, "--val-scenes", 4)
    data = build_datasets(args)
    assert (len(data.train), len(data.val), data.class_names) == (5, 4, SCENE_CLASSES)
    first, again, later = (data.train[SampleKey(epoch, 2, 0)][0] for epoch in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, later)
    image, label = data.val[3]
    assert image.shape == (3, 48, 48) and label.shape == (48, 48) and 0 < label.max() <= 10
    other = build_datasets(arguments("--scene-size", 48, "--val-scenes", 4, "--seed", 9))
    assert torch.equal(other.val[3][0], image), "the held-out scenes are the same for every seed"


@pytest.mark.parametrize("kind", ["FOLDER", "SCENES"])
def test_loader_processes_need_not_be_forked(kind, folder):
    scenes = build_datasets(arguments("--scene-size", 48, "--train-scenes", 2, "--val-scenes", 2))
    data = build(folder) if kind == "FOLDER" else scenes
    for here, key in ((data.train, SampleKey(1, 1, 0)), (data.val, 1)):
        there, _ = sent(here)
        assert all(torch.equal(*pair) for pair in zip(there[key], here[key], strict=True))


# --- what is wrong is one line


def test_a_link_to_a_folder_above_adds_no_images(folder):
    before = len(build(folder).train)
    link = folder / "images" / "train" / "link"
    link.symlink_to(folder / "images" / "train")
    assert len(build(folder).train) == before


def test_an_image_without_label_is_named(folder):
    (folder / "annotations" / "train" / "north" / "1.png").unlink()
    line = refused(folder)
    assert "1 of 6 images have no label" in line and "images/train/north/1.png" in line


def test_label_values_above_the_classes_are_named(folder):
    path = folder / "annotations" / "train" / "south" / "0.png"
    Image.fromarray(np.full((30, 36), 4, np.uint8)).save(path)
    line = refused(folder)
    assert f"{path} has the label value 4: 4 classes are numbered 0 to 3, and 255 is ignored" in line
    assert "151: 150 classes are numbered 1 to 150" in refused_151(folder)


def refused_151(folder):
    root = write_ade20k(folder / "ade")
    path = next((root / "annotations" / "validation").iterdir())
    values = np.asarray(Image.open(path)).copy()
    values[0, 0] = 151
    Image.fromarray(values).save(path)
    return refused(root, kind="ADE20K")


def test_a_label_of_another_size_is_named(folder):
    Image.fromarray(np.zeros((30, 35), np.uint8)).save(folder / "annotations" / "train" / "south" / "0.png")
    line = refused(folder)
    assert "0.png is 35 x 30 and its image" in line and "36 x 30" in line


@pytest.mark.parametrize(
    ("kind", "value", "said"),
    [(np.int32, -2, "has the label value -2: "), (np.float32, 0.5, "holds fractions (mode F)")],
)
def test_a_label_that_no_png_could_hold_is_named(kind, value, said, folder):
    """Pillow opens a file by what is in it, whatever its name."""
    path = folder / "annotations" / "train" / "south" / "0.png"
    values = np.asarray(Image.open(path)).astype(kind)
    values[0, 0] = value
    Image.fromarray(values).save(path, format="TIFF")
    assert said in refused(folder)


def test_a_label_in_colour_is_named(folder):
    path = folder / "annotations" / "train" / "south" / "0.png"
    Image.open(path).convert("RGB").save(path)
    assert "is a colour picture (RGB): a label is a grey or palette PNG" in refused(folder)


@pytest.mark.parametrize("kind", ["images", "annotations"])
def test_a_damaged_file_is_named(folder, kind):
    path = folder / kind / "train" / "south" / "0.png"
    path.write_bytes(path.read_bytes()[:60])
    line = refused(folder)
    assert str(path) in line and ("repair the file" in line or "write it again" in line)


def test_empty_and_missing_folders_are_named(folder, tmp_path):
    for path in (folder / "images" / "val").rglob("*.png"):
        path.unlink()
    assert "images/val holds no images" in refused(folder)
    shutil.rmtree(folder / "images" / "val")
    assert "has neither validation nor val; it holds: train" in refused(folder)
    assert "does not exist; --data-path takes the folder" in refused(tmp_path / "nowhere")


def test_a_folder_must_say_its_classes(tmp_path):
    root = write_folder(tmp_path / "set", names=())
    assert "classes.txt does not exist" in refused(root)
    assert build(root, "--num-classes", 4).class_names[3] == "class 3"
    (root / "classes.txt").write_text("a\nb\n")
    assert "--num-classes 4" in refused(root, "--num-classes", 4)


def test_a_label_whose_image_is_not_seen_is_said(folder):
    """The image is there, in a format that is none of those read: it must not be left out in silence."""
    image = folder / "images" / "train" / "south" / "0.png"
    image.rename(image.with_suffix(".gif"))
    said = build(folder).description
    assert f"5 train images and 3 val images in 4 classes; 1 labels in {folder}/annotations/train have no image" in said
    assert said.endswith("the first is south/0.png")


def test_more_classes_than_a_label_can_hold_are_refused(tmp_path):
    """A value of 280 would be stored as 24."""
    root = write_folder(tmp_path / "set", names=())
    Image.fromarray(np.full((30, 36), 280, np.uint16)).save(root / "annotations" / "train" / "south" / "0.png")
    assert "300 classes; labels have 8 bits and 255 is ignored, so 255 at most" in refused(root, "--num-classes", 300)
    assert "the label value 280" in refused(root, "--num-classes", 255)
    assert "so 254 at most" in refused(root, "--num-classes", 255, "--reduce-zero-label")


def test_a_list_of_classes_in_another_encoding_or_empty_is_named(folder):
    (folder / "classes.txt").write_bytes(b"caf\xe9\n")
    assert "classes.txt is not UTF-8 text" in refused(folder)
    (folder / "classes.txt").write_text("\n")
    assert "classes.txt names no class" in refused(folder)


def test_a_byte_order_mark_is_no_part_of_the_first_class(folder):
    """Windows writes one; a "background" behind it would be painted."""
    (folder / "classes.txt").write_text("background\nred\ngreen\nblue\n", encoding="utf-8-sig")
    assert build(folder).class_names == ["background", "red", "green", "blue"]


def test_ade20ks_list_in_another_encoding_is_named(ade20k):
    path = ade20k / "objectInfo150.txt"
    path.write_bytes(path.read_bytes().replace(b"thing 5,", b"caf\xe9,"))
    assert f"{path} is not UTF-8 text" in refused(ade20k, kind="ADE20K")


def test_windows_must_not_leave_gaps(folder):
    """What no window covers would be a prediction out of nothing."""
    flags = ("--data-path", folder, "--crop-size", "32x24", "--window-stride")
    assert arguments(*flags, 24).window_stride == 24
    with pytest.raises(ConfigError, match="--window-stride 25: windows of 24 pixels every 25 leave gaps; give 24 at"):
        arguments(*flags, 25)


@pytest.mark.parametrize(("crop", "stride"), [("512", 341), ("24", 16), ("96x48", 32), ("1", 1)])
def test_windows_overlap_by_a_third_unless_told(crop, stride):
    assert arguments("--crop-size", crop).window_stride == stride


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--data-set", "ADE20K"], "--data-set ADE20K needs --data-path"),
        (["--eval-scales", "0", "1"], "--eval-scales 0: expected scales above 0"),
        (["--eval-scales", "1", "nan"], "--eval-scales nan: expected"),
        (["--eval-scales", "inf"], "--eval-scales inf: expected"),
        (["--scale-range", "2", "0.5"], "--scale-range 2 0.5: expected two scales above 0, the smaller one first"),
        (["--scale-range", "1", "inf"], "--scale-range 1 inf: expected"),
        (["--scale-range", "nan", "2"], "--scale-range nan 2: expected"),
        (["--scene-size", "20"], "--scene-size: size=20"),
        (["--num-classes", "4"], "--num-classes 4: scenes have 11"),
    ],
)
def test_flags_that_cannot_be_are_one_line(flags, words):
    with pytest.raises(ConfigError, match=words):
        build_datasets(arguments(*flags))


# --- views


PLAIN = ViewSettings((24, 24), (30, 2048), ratios=(1.0, 1.0), flip_prob=0.0, photometric=False)


def coded(width=40, height=30, cell=4):
    """An image whose colours say which class the label has, in cells that survive resizing."""
    classes = np.random.default_rng(0).integers(0, 5, (-(-height // cell), -(-width // cell)), np.uint8)
    classes = classes.repeat(cell, 0).repeat(cell, 1)[:height, :width]
    grey = (40 + 40 * classes).astype(np.uint8)
    return Image.fromarray(np.stack([grey] * 3, axis=2)), classes


def decoded(view):
    """The classes that a view's colours stand for, float (H, W)."""
    mean, std = 0.485, 0.229
    return ((view[0] * std + mean) * 255 - 40) / 40


@pytest.mark.parametrize("changes", [{}, {"flip_prob": 1.0}, {"ratios": (2.0, 2.0)}, {"size": (60, 20)}])
def test_pixels_and_labels_go_the_same_way(changes):
    image, label = coded(cell=10)
    settings = ViewSettings(**(vars(PLAIN) | changes))
    for seed in range(5):
        random.seed(seed)
        pixels, found = training_view(image, label, settings)
        assert pixels.shape == (3, *settings.size) and found.shape == settings.size
        inside = found != IGNORED
        assert ((decoded(pixels) - found)[inside].abs() < 0.5).float().mean() > 0.85
        assert (pixels[:, ~inside] == 0).all()


def test_what_the_image_does_not_fill_is_ignored():
    image, label = coded(20, 12)
    settings = ViewSettings((24, 24), (12, 2048), ratios=(1.0, 1.0), flip_prob=0.0, photometric=False)
    pixels, found = training_view(image, label, settings)
    assert (found[:12, :20].numpy() == label).all()
    assert (found[12:] == IGNORED).all() and (found[:, 20:] == IGNORED).all()
    torch.testing.assert_close(pixels[:, :12, :20], normalised(torch.from_numpy(np.array(image)).permute(2, 0, 1)))


@pytest.mark.parametrize(
    ("size", "expected"), [((512, 683), (512, 683)), ((100, 100), (512, 512)), ((100, 1000), (205, 2048))]
)
def test_an_image_is_made_to_fit_its_sides(size, expected):
    assert fitting(size, (512, 2048)) == expected
    assert fitting(size[::-1], (512, 2048)) == expected[::-1]


def test_ratios_cover_their_range():
    image, label = coded(40, 30)
    sizes = []
    for seed in range(60):
        random.seed(seed)
        settings = ViewSettings((200, 200), (30, 2048), photometric=False)
        sizes.append((training_view(image, label, settings)[1] != IGNORED).sum().item())
    low, high = 0.25 * 40 * 30, 4 * 40 * 30
    assert 0.9 * low < min(sizes) < 1.6 * low and 0.6 * high < max(sizes) < 1.1 * high


def test_a_crop_avoids_what_one_class_fills():
    label = np.zeros((100, 100), np.uint8)
    label[:, 80:] = 1
    settings = ViewSettings((20, 20), (100, 100), class_share=0.75)
    mixed = []
    for seed in range(300):
        random.seed(seed)
        top, left = crop_corner(label, settings)
        mixed.append(0.25 <= (label[top : top + 20, left : left + 20] == 0).mean() <= 0.75)
    assert 0.6 < np.mean(mixed) < 0.9, "one crop of seven is mixed, ten trials find one of them three times in four"


def test_without_a_limit_every_crop_will_do():
    """A strip of 4 pixels at the left is in one crop of 35, were it searched for, in one of four."""
    label = np.zeros((200, 200), np.uint8)
    label[:, :4] = 1
    random.seed(0)
    settings = ViewSettings((64, 64), (200, 200), class_share=1.0)
    assert sum(crop_corner(label, settings)[1] < 4 for _ in range(1000)) < 60


def test_ignored_pixels_are_no_class_of_a_crop():
    """Half ignored, half one class: no crop is mixed enough, and the last trial is taken."""
    label = np.full((40, 40), IGNORED, np.uint8)
    label[:, 20:] = 3
    random.seed(0)
    corners = {crop_corner(label, ViewSettings((10, 10), (40, 40))) for _ in range(20)}
    assert len(corners) > 5


def test_colours_are_distorted_and_stay_in_range():
    pixels = torch.randint(0, 256, (3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    random.seed(0)
    views = [distorted(pixels) for _ in range(40)]
    assert all(view.dtype == torch.uint8 and view.shape == pixels.shape for view in views)
    unchanged = sum(torch.equal(view, pixels) for view in views)
    assert 0 < unchanged < 12  # one of sixteen on average


def test_colours_are_distorted_within_their_ranges():
    """Red's hue turns by a tenth at most; grey, which has none, shows 32 of brightness and half of contrast, once."""
    random.seed(0)
    red, grey = (torch.tensor(colour, dtype=torch.uint8).view(3, 1, 1) for colour in ((100, 0, 0), (128, 128, 128)))
    hues = [colorsys.rgb_to_hsv(*distorted(red).flatten().tolist())[0] for _ in range(300)]
    turns = [(hue + 0.5) % 1 - 0.5 for hue in hues]
    assert -0.11 < min(turns) < -0.08 and 0.08 < max(turns) < 0.11
    values = [distorted(grey)[0].item() for _ in range(2000)]
    assert 0.5 * 96 - 1 <= min(values) < 58 and 225 < max(values) <= 1.5 * 160


def test_the_flags_say_how_a_view_is_drawn():
    args = arguments(
        "--resize", "300x200", "--crop-size", "24x48", "--scale-range", 0.7, 1.3, "--crop-class-share", 0.6,
        "--flip-prob", 0.2, "--no-photometric", "--data-set", "FOLDER", "--data-path", "x",
    )  # fmt: skip
    assert view_settings(args) == ViewSettings((24, 48), (200, 300), (0.7, 1.3), 0.6, 0.2, False)


def test_a_view_follows_from_its_counters(folder):
    data = build(folder)
    key = SampleKey(3, 2, 0)
    state = random.getstate()
    first, again = data.train[key], data.train[key]
    assert random.getstate() == state
    assert all(torch.equal(a, b) for a, b in zip(first, again))
    others = [data.train[SampleKey(epoch, 2, 0)][0] for epoch in range(4, 8)]
    assert any(not torch.equal(first[0], other) for other in others)


def test_batches_of_one_size_are_stacked_and_others_listed():
    small, large = (torch.zeros(3, 4, 4), torch.zeros(4, 4)), (torch.zeros(3, 4, 6), torch.zeros(4, 6))
    images, labels = collate([small, small])
    assert images.shape == (2, 3, 4, 4) and labels.shape == (2, 4, 4)
    images, labels = collate([small, large])
    assert [image.shape[-1] for image in images] == [label.shape[-1] for label in labels] == [4, 6]
