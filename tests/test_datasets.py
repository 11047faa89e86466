"""Data sets: labels, faults found before the first step, broken and odd images, loaders."""

import argparse
import errno
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder

import datasets
from augment import counter_randomness
from datasets import (
    BrokenImage,
    DataError,
    FileSource,
    ImageDataset,
    _outlive_signals,
    build_datasets,
    build_loader,
    decode_image,
    read_image,
    walk,
)
from errors import LostDataError
from helpers import random_image, run_args, sent, write_cifar, write_image_folder, write_inat
from samplers import EvalSampler, SampleKey, TrainSampler

IMNET = ("--data-set", "IMNET", "--input-size", "32")
CLASSES = ["ant", "bee", "cow"]


@pytest.fixture
def folder(tmp_path):
    return write_image_folder(tmp_path / "images")


def imnet(folder, *flags):
    return run_args(*IMNET, "--data-path", str(folder), *flags)


def refused(args) -> str:
    """The one line with which the data are refused."""
    with pytest.raises(DataError) as caught:
        build_datasets(args)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Labels and counts


def test_image_folder_numbers_classes_and_files_as_torchvision_does(folder):
    (folder / "train/bee/inner").mkdir()
    random_image(1).save(folder / "train/bee/inner/extra.PNG")
    (folder / "train/bee/notes.txt").write_text("not an image")
    bundle = build_datasets(imnet(folder))
    for split, dataset in (("train", bundle.train), ("val", bundle.val)):
        expected = ImageFolder(str(folder / split))
        found = [(dataset.name(i), int(label)) for i, label in enumerate(dataset.source.labels)]
        assert [(os.path.normpath(name), label) for name, label in found] == expected.samples
    assert bundle.class_names == CLASSES and bundle.num_classes == 3
    assert "25 train images (8 to 9 a class) and 24 val images in 3 classes" in bundle.description


def test_val_is_labelled_by_class_name_not_by_order(folder):
    shutil.rmtree(folder / "val/ant")
    bundle = build_datasets(imnet(folder))
    assert sorted(set(bundle.val.source.labels.tolist())) == [1, 2]
    assert "val has no images of 1 classes: ant" in bundle.description


def test_evaluation_needs_val_alone_and_keeps_trains_numbering_where_it_is_there(folder):
    shutil.rmtree(folder / "val/ant")
    bundle = build_datasets(imnet(folder, "--eval"))
    assert bundle.train is None and bundle.class_names == CLASSES
    shutil.rmtree(folder / "train")
    assert build_datasets(imnet(folder, "--eval")).class_names == ["bee", "cow"]


def test_more_classes_than_the_data_has_may_be_asked_for(folder):
    assert build_datasets(imnet(folder, "--num-classes", "10")).num_classes == 10


def test_items_are_normalised_tensors_with_int_labels(folder):
    for dataset in (build_datasets(imnet(folder)).train, build_datasets(imnet(folder)).val):
        for key in (9, SampleKey(3, 9, 1)):
            image, label = dataset[key]
            assert image.shape == (3, 32, 32) and image.dtype == torch.float32
            assert type(label) is int and label == 1
        assert dataset.raw(9).size == (40, 32) and dataset.name(9).endswith("bee/1.jpg")


@pytest.mark.parametrize("kind", [CIFAR10, CIFAR100])
def test_cifar_is_read_with_its_classes(kind, tmp_path, monkeypatch):
    write_cifar(tmp_path, kind, monkeypatch)
    name, classes = ("CIFAR10", 10) if kind is CIFAR10 else ("CIFAR", 100)
    args = run_args("--data-set", name, "--data-path", str(tmp_path), "--input-size", "32")
    bundle = build_datasets(args)
    original = kind(str(tmp_path), train=False)
    assert bundle.num_classes == classes
    assert len(bundle.train) == 12 * len(kind.train_list) and len(bundle.val) == 12
    for i in range(12):
        assert np.array_equal(np.asarray(bundle.val.raw(i)), original.data[i])
        assert bundle.val[i][1] == original.targets[i]
    test_file = tmp_path / kind.base_folder / kind.test_list[0][0]
    test_file.write_bytes(test_file.read_bytes()[:-1])
    assert "missing or damaged" in refused(args) and str(tmp_path) in refused(args)


@pytest.mark.parametrize(("name", "year"), [("INAT", 2018), ("INAT19", 2019)])
@pytest.mark.parametrize("keep_supercategory", [True, False])
def test_inat_numbers_labels_as_train_first_shows_them(name, year, keep_supercategory, tmp_path):
    write_inat(tmp_path, year, keep_supercategory)
    bundle = build_datasets(run_args("--data-set", name, "--data-path", str(tmp_path)))
    assert bundle.class_names == ["Apis 7", "Bos 3", "Bos 5"]
    assert bundle.train.source.labels.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert bundle.val.source.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert np.array_equal(np.asarray(bundle.val.raw(3)), np.asarray(Image.open(bundle.val.name(3))))


def test_inat_labels_follow_the_category_asked_for(tmp_path):
    write_inat(tmp_path, 2018)
    args = run_args("--data-set", "INAT", "--data-path", str(tmp_path), "--inat-category", "genus", "--eval")
    bundle = build_datasets(args)
    assert bundle.class_names == ["Apis", "Bos"] and bundle.train is None
    assert bundle.val.source.labels.tolist() == [0, 0, 1, 1, 1, 1]


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """os.walk would pass it over, and its images would be missing without a word."""
    root = write_image_folder(tmp_path, ("a", "b"), per_class=2)
    deep, scandir = root / "train" / "a" / "deep", os.scandir
    deep.mkdir()

    def refuse(path):
        if Path(path) == deep:
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    args = run_args("--data-set", "IMNET", "--data-path", str(root))
    assert f"{deep} cannot be read: Permission denied" in refused(args)


def test_digits_hold_out_a_fixed_stratified_fifth():
    bundle, again = (build_datasets(run_args("--data-set", "DIGITS", *s)) for s in ((), ("--seed", "5")))
    assert (len(bundle.train), len(bundle.val), bundle.num_classes) == (1437, 360, 10)
    assert np.bincount(bundle.val.source.labels).min() >= 34
    assert np.array_equal(bundle.val.source.images, again.val.source.images)
    train, val = ({image.tobytes() for image in part.source.images} for part in (bundle.train, bundle.val))
    assert not train & val


def test_digits_show_the_digit_enlarged():
    args = run_args("--data-set", "DIGITS", "--input-size", "8", "--in-chans", "1")
    dataset = build_datasets(args).val
    image, _ = dataset[0]
    original = np.asarray(dataset.raw(0).convert("L")) / 255
    assert image.shape == (1, 8, 8)
    assert np.allclose((image[0] * 0.226 + 0.449).numpy(), original, atol=1e-3)
    assert "small shifts are the only augmentation" in build_datasets(args).description


# Faults found before the first step


def unsort_val(root):
    for path in list((root / "val").glob("*/*.jpg")):
        path.rename(root / "val" / f"{path.parent.name}{path.name}")
    for name in CLASSES:
        (root / "val" / name).rmdir()


def empty_a_class(root):
    for path in list((root / "train/bee").iterdir()):
        path.rename(path.with_suffix(".jpx"))


def put_a_file_there(root):
    shutil.rmtree(root)
    root.write_text("")


FAULTS = {
    "path missing": (shutil.rmtree, "does not exist"),
    "path a file": (put_a_file_there, "is not a folder"),
    "no train": (lambda root: shutil.rmtree(root / "train"), "train does not exist; .* holds: val"),
    "no val": (
        lambda root: (root / "val").rename(root / "valid"),
        "val does not exist; .* holds: train, valid",
    ),
    "val without class folders": (unsort_val, "val holds no class folders"),
    "class without images": (empty_a_class, r"train: no images in class folder bee; .* \.jpg"),
    "class that train lacks": (lambda root: (root / "val/ant").rename(root / "val/fly"), "lacks: fly"),
}


@pytest.mark.parametrize(("spoil", "said"), FAULTS.values(), ids=FAULTS)
def test_fault_of_an_image_folder_is_one_line_that_names_the_path(spoil, said, folder):
    spoil(folder)
    message = refused(imnet(folder))
    assert message.startswith(str(folder))
    assert re.search(said, message)


def test_too_few_classes_asked_for(folder):
    assert refused(imnet(folder, "--num-classes", "2")) == (
        "--num-classes 2: the data has 3 classes; drop it or raise it"
    )


def test_missing_cifar_says_how_to_fetch_it(tmp_path):
    message = refused(run_args("--data-set", "CIFAR", "--data-path", str(tmp_path)))
    assert str(tmp_path / "cifar-100-python") in message and "download=True" in message


def edit_json(path, change):
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def drop_category_5(content):
    content["images"] = content["images"][:6]
    content["annotations"] = content["annotations"][:6]


INAT_FAULTS = {
    "no file": (lambda root: (root / "val2018.json").unlink(), "val2018.json cannot be read"),
    "not JSON": (lambda root: (root / "train2018.json").write_text("{"), "train2018.json is not valid JSON"),
    "no annotation": (
        lambda root: edit_json(root / "val2018.json", lambda c: c["annotations"].pop()),
        "val2018.json has no annotation for train_val2018/Animalia/5/val1.jpg",
    ),
    "annotation without a category": (
        lambda root: edit_json(root / "val2018.json", lambda c: c["annotations"][0].clear()),
        "val2018.json: unreadable labels: an entry lacks 'image_id'",
    ),
    "no images": (
        lambda root: edit_json(root / "val2018.json", lambda c: c["images"].clear()),
        "val2018.json lists no images",
    ),
    "unknown category": (
        lambda root: edit_json(root / "train2018.json", lambda c: c["annotations"][0].update(category_id=99)),
        "categories.json and train2018.json do not fit: no 99",
    ),
    "category that train lacks": (
        lambda root: edit_json(root / "train2018.json", drop_category_5),
        "val2018.json has categories that train lacks: Bos 5",
    ),
    "images elsewhere": (lambda root: (root / "train_val2018").rename(root / "other"), "not below"),
}


@pytest.mark.parametrize(("spoil", "said"), INAT_FAULTS.values(), ids=INAT_FAULTS)
def test_fault_of_inat_is_one_line_that_names_the_path(spoil, said, tmp_path):
    write_inat(tmp_path, 2018)
    spoil(tmp_path)
    message = refused(run_args("--data-set", "INAT", "--data-path", str(tmp_path)))
    assert message.startswith(str(tmp_path)) and said in message


def test_inat_category_that_the_data_lacks(tmp_path):
    write_inat(tmp_path, 2018)
    args = run_args("--data-set", "INAT", "--data-path", str(tmp_path), "--inat-category", "order")
    assert "no 'order'" in refused(args)


# Broken images

BREAKAGES = {
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-300]),
    "no bytes": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("<html>404</html>"),
    "gone": lambda path: path.unlink(),
}


@pytest.mark.parametrize("spoil", BREAKAGES.values(), ids=BREAKAGES)
def test_broken_image_stops_the_run_and_is_named(spoil, folder):
    dataset = build_datasets(imnet(folder)).train
    spoil(folder / "train/bee/3.jpg")
    with pytest.raises(DataError, match=r"train/bee/3\.jpg: .*--bad-image replace") as caught:
        dataset[11]
    assert "\n" not in str(caught.value)
    dataset[12]


def test_image_too_large_to_be_meant_is_broken(folder, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 500)
    with pytest.raises(BrokenImage, match="decompression bomb"):
        read_image(folder / "train/ant/0.jpg")


def spoil_two_of(folder):
    for name in ("bee/7", "cow/0"):
        (folder / f"train/{name}.jpg").write_text("broken")


def said_lines(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if line.startswith("unreadable image")]


def test_broken_training_image_is_replaced_by_the_next_readable_one(folder, capfd):
    spoil_two_of(folder)
    dataset = build_datasets(imnet(folder, "--bad-image", "replace", "--bad-image-share", "0.1")).train
    for epoch in range(2):
        image, label = dataset[SampleKey(epoch, 15, 0)]
        assert label == 2, "the replacement comes with its own label"
        with counter_randomness(0, epoch, 15, 0):
            assert torch.equal(image, dataset.transform(dataset.raw(17)))
    assert dataset.num_replaced == 2
    lines = said_lines(capfd)
    assert len(lines) == 2 and "bee/7.jpg" in lines[0] and "cow/0.jpg" in lines[1]


def test_broken_validation_image_counts_as_grey_under_its_own_label(folder):
    (folder / "val/bee/7.jpg").write_text("broken")
    dataset = build_datasets(imnet(folder, "--bad-image", "replace", "--bad-image-share", "0.1")).val
    image, label = dataset[15]
    assert label == 1 and image.abs().max() < 0.02
    assert dataset.num_replaced == 1


@pytest.mark.parametrize("workers", [0, 2])
def test_replacements_are_the_same_and_counted_whatever_the_workers(workers, folder, capfd):
    spoil_two_of(folder)
    args = imnet(folder, "--bad-image", "replace", "--bad-image-share", "0.1", "--batch-size", "4")
    expected = loaded(args, epochs=1)
    args.num_workers = workers
    bundle = build_datasets(args)
    assert loaded(args, bundle, epochs=1) == expected
    assert bundle.train.num_replaced == 2
    capfd.readouterr()


@pytest.mark.parametrize("workers", ["0", "2"])
def test_too_many_broken_images_stop_the_run_with_one_line(workers, folder):
    spoil_two_of(folder)
    flags = ("--bad-image", "replace", "--bad-image-share", "0.05", "--num_workers", workers)
    said = r"^2 of 24 images cannot be read, more than --bad-image-share 0\.05; one is [^\n]+\Z"
    with pytest.raises(DataError, match=said) as caught:
        loaded(imnet(folder, "--batch-size", "4", *flags), epochs=1)
    traceback.clear_frames(caught.tb)  # ends the workers now, and not whenever the garbage is collected


@pytest.mark.parametrize("workers", ["0", "1"])
@pytest.mark.parametrize(
    ("number", "kind", "said"),
    [
        (errno.ESTALE, LostDataError, r"^\S+val/bee/3\.jpg could not be read: Stale file handle\Z"),
        (errno.EIO, LostDataError, r"^\S+val/bee/3\.jpg could not be read: Input/output error\Z"),
        (errno.EMFILE, OSError, "Too many open files"),
    ],
)
def test_a_storage_or_process_at_its_end_makes_no_image_broken(number, kind, said, workers, folder, monkeypatch):
    """One passing fault would give a resumed run other images than an undisturbed one has."""

    def decode(path):
        if path.endswith("val/bee/3.jpg"):
            raise OSError(number, os.strerror(number), path)
        return decode_image(path)

    monkeypatch.setattr(datasets, "decode_image", decode)
    args = imnet(folder, "--bad-image", "replace", "--num_workers", workers)
    data = build_datasets(args).val
    with pytest.raises(kind, match=said) as caught:
        list(build_loader(data, EvalSampler(len(data)), args, train=False))
    assert data.num_replaced == 0
    traceback.clear_frames(caught.tb)


def test_a_folder_on_storage_that_fails_for_now_can_be_tried_again(folder, monkeypatch):
    def scandir(path):
        raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(LostDataError, match="train could not be read: Stale file handle"):
        list(walk(folder / "train"))


def test_nothing_readable_at_all(tmp_path):
    source = FileSource(tmp_path, ["a.jpg", "b.jpg"], [0, 0])
    with pytest.raises(DataError, match=r"none of 2 images .*a\.jpg"):
        ImageDataset(source, None, on_broken="next", max_bad_share=1.0)[0]


# Odd images that are not broken


def saved(image, path, **options):
    image.save(path, **options)
    return np.asarray(read_image(path)).astype(int)


def test_exif_rotation_is_applied(tmp_path):
    image = random_image(1, 40, 32)
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show the image rotated by 90 degrees clockwise
    found = saved(image, tmp_path / "a.png", exif=exif)
    assert np.array_equal(found, np.rot90(np.asarray(image), k=-1))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK"])
def test_modes_become_rgb(mode, tmp_path):
    image = random_image(2).convert(mode)
    expected = image.convert("RGB")
    suffix = "tiff" if mode == "CMYK" else "png"
    assert np.array_equal(saved(image, tmp_path / f"a.{suffix}"), np.asarray(expected))


def test_cmyk_jpeg_looks_like_its_rgb_original(tmp_path):
    image = random_image(3)
    found = saved(image.convert("CMYK"), tmp_path / "a.jpg", quality=100)
    assert np.abs(found - np.asarray(image)).mean() < 4


@pytest.mark.parametrize("step", [64, 0.25])
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_keeps_its_range(suffix, step, tmp_path):
    """Also where no value is above 255: how bright a picture looks depends on no other pixel of it."""
    values = (np.arange(1024) * step).astype(np.uint16).reshape(32, 32)
    found = saved(Image.fromarray(values), tmp_path / f"a.{suffix}")
    assert np.array_equal(found, np.repeat((values // 256)[:, :, None], 3, axis=2))


def test_floating_point_image_is_refused(tmp_path):
    Image.fromarray(np.zeros((8, 8), np.float32)).save(tmp_path / "a.tiff")
    with pytest.raises(BrokenImage, match=r"a\.tiff: floating-point"):
        read_image(tmp_path / "a.tiff")


# Loaders


def loaded(args, bundle=None, epochs=2, start_batch=0) -> list[bytes]:
    """The bytes of every training batch of some epochs, the first one from `start_batch` on."""
    bundle = bundle or build_datasets(args)
    sampler = TrainSampler(len(bundle.train), args.batch_size, seed=args.seed, repeats=3)
    loader = build_loader(bundle.train, sampler, args, train=True)
    batches = []
    for epoch in range(epochs):
        sampler.set_epoch(epoch, start_batch if epoch == 0 else 0)
        batches += [images.numpy().tobytes() + labels.numpy().tobytes() for images, labels in loader]
    return batches


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    """The whole DeiT recipe with repeated augmentation, and its batches without worker processes."""
    args = imnet(write_image_folder(tmp_path_factory.mktemp("images")), "--batch-size", "6", "--input-size", "48")
    return args, loaded(args)


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker processes")
@pytest.mark.parametrize("workers", [1, 2, 3])
def test_batches_are_the_same_bytes_with_any_number_of_workers(workers, recipe):
    args, expected = recipe
    assert len(set(expected)) == len(expected) == 8, "no two batches are alike, or equality would prove nothing"
    args = argparse.Namespace(**vars(args) | {"num_workers": workers})
    assert loaded(args) == expected


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_batches_are_the_same_bytes_from_workers_that_are_not_forked(method, recipe, monkeypatch):
    """On macOS and Windows none are."""
    args, expected = recipe
    monkeypatch.setattr(datasets, "START_METHOD", method)
    args = argparse.Namespace(**vars(args) | {"num_workers": 2})
    assert loaded(args) == expected
    assert loaded(args, start_batch=2) == expected[2:]


def test_a_data_set_arrives_whole_in_a_process_that_is_not_forked(recipe):
    for here in (build_datasets(recipe[0]).train, build_datasets(run_args("--data-set", "DIGITS")).val):
        there, _ = sent(here)
        assert torch.equal(there[5][0], here[5][0]) and there.name(5) == here.name(5)
        there.replaced[3] = True
        assert here.num_replaced == 1, "what a worker could not read is counted here"


@pytest.mark.parametrize("workers", [0, 2])
def test_resumed_epoch_gives_the_same_bytes(workers, recipe):
    args, expected = recipe
    args = argparse.Namespace(**vars(args) | {"num_workers": workers})
    assert loaded(args, start_batch=2) == expected[2:]


def test_another_seed_gives_other_bytes(recipe):
    args, expected = recipe
    args = argparse.Namespace(**vars(args) | {"seed": 1})
    assert not set(loaded(args, epochs=1)) & set(expected)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_epoch_leaves_the_global_generators_alone(workers, recipe):
    args = argparse.Namespace(**vars(recipe[0]) | {"num_workers": workers})
    before = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    loaded(args, epochs=1)
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[:2]
    assert torch.equal(torch.get_rng_state(), before[2])


def test_a_sample_depends_on_epoch_and_repeat(recipe):
    dataset = build_datasets(recipe[0]).train
    views = [dataset[SampleKey(epoch, 5, repeat)][0] for epoch in range(2) for repeat in range(3)]
    assert len({view.numpy().tobytes() for view in views}) == 6
    assert torch.equal(dataset[5][0], dataset[SampleKey(0, 5, 0)][0])


def test_evaluation_keeps_the_last_batch_and_the_order(folder):
    args = imnet(folder, "--batch-size", "7")
    dataset = build_datasets(args).val
    shards = [build_loader(dataset, EvalSampler(24, 2, rank), args, train=False) for rank in range(2)]
    assert [[len(labels) for _, labels in shard] for shard in shards] == [[7, 5], [7, 5]]
    labels = [label for shard in shards for _, batch in shard for label in batch.tolist()]
    assert sorted(labels) == [0] * 8 + [1] * 8 + [2] * 8


class Sleeper(torch.utils.data.Dataset):
    """A file system that hangs."""

    def __len__(self):
        return 1

    def __getitem__(self, index):
        time.sleep(3)


def test_a_worker_that_hangs_ends_in_an_error():
    args = run_args("--batch-size", "1", "--num_workers", "1", "--loader-timeout", "1")
    loader = build_loader(Sleeper(), EvalSampler(1), args, train=False)
    with pytest.raises(RuntimeError, match="timed out after 1"):
        next(iter(loader))


def hang(ready) -> None:
    _outlive_signals(0)
    ready.set()
    time.sleep(1000)


@pytest.mark.skipif(not hasattr(signal, "sigwaitinfo"), reason="who sent a signal cannot be asked, as on macOS")
def test_a_worker_is_ended_by_its_parent_alone():
    """SIGTERM goes to every process of a job; a worker is needed until its parent has saved."""
    context = multiprocessing.get_context("fork")
    ready = context.Event()
    worker = context.Process(target=hang, args=(ready,))
    worker.start()
    try:
        assert ready.wait(60)
        subprocess.run(["sh", "-c", f"kill -TERM {worker.pid}"], check=True)
        worker.join(1)
        assert worker.is_alive()
        worker.terminate()
        worker.join(60)
        assert worker.exitcode == 0
    finally:
        worker.kill()
