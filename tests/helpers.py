"""Small data sets and arguments for the program's tests."""

import hashlib
import json
import pickle
from argparse import Namespace
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from arguments import build_parser

# Everything random in the recipe off, for tests that compare pixels.
PLAIN = ("--aa", "none", "--color-jitter", "0", "--reprob", "0")


def run_args(*flags: str) -> Namespace:
    """The program's own defaults with `flags` on top, in one process without loader workers."""
    return build_parser().parse_args(["--num_workers", "0", *flags])


def sent(thing):
    """`thing` as it arrives in a process that is not forked, and the bytes that were sent."""
    pickled = bytes(ForkingPickler.dumps(thing))
    return pickle.loads(pickled), pickled


def scalars(folder: Path, name: str) -> dict[int, float]:
    """What TensorBoard shows under a name, by step.

    It reads files in the order of their names, which hold the second and a process's count without zeros: those of
    runs within a second are given names in order here.
    """
    files = sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.stat().st_mtime_ns)
    for i, path in enumerate(files):
        path.rename(path.with_name(f"events.out.tfevents.{i:03d}"))
    return {event.step: event.value for event in EventAccumulator(str(folder)).Reload().Scalars(name)}


def random_image(seed: int, width: int = 40, height: int = 32) -> Image.Image:
    """Smooth coloured noise: it survives JPEG, and no flip or shift of it looks like another."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def write_image_folder(root: Path, classes=("ant", "bee", "cow"), per_class: int = 8, **size) -> Path:
    """`root`/{train,val}/CLASS/N.jpg."""
    for split, name in ((split, name) for split in ("train", "val") for name in classes):
        folder = root / split / name
        folder.mkdir(parents=True)
        for i in range(per_class):
            seed = int.from_bytes(hashlib.sha256(f"{split}/{name}/{i}".encode()).digest()[:4], "big")
            random_image(seed, **size).save(folder / f"{i}.jpg")
    return root


def write_hub_file(cache: Path, repo: str, file: str, state: dict) -> Path:
    """`state` in the Hub's cache, as a download of `file` from `repo` leaves it there."""
    folder, commit = cache / f"models--{repo.replace('/', '--')}", "0" * 40
    snapshot = folder / "snapshots" / commit
    for place in (folder / "refs", snapshot):
        place.mkdir(parents=True, exist_ok=True)
    (folder / "refs" / "main").write_text(commit)
    torch.save(state, snapshot / file)
    return snapshot / file


def write_cifar(root: Path, kind: type, monkeypatch, size: int = 12) -> Path:
    """A CIFAR of `size` images a file in the layout that torchvision reads, with digests that fit."""
    folder = root / kind.base_folder
    folder.mkdir(parents=True)
    names = [f"class {i}" for i in range(100 if kind.meta["key"] == "fine_label_names" else 10)]
    label_key = "fine_labels" if len(names) == 100 else "labels"

    def write(file: str, content: dict) -> str:
        (folder / file).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / file).read_bytes()).hexdigest()

    def batch(seed: int) -> dict:
        rng = np.random.default_rng(seed)
        data = rng.integers(0, 256, (size, 3 * 32 * 32), dtype=np.uint8)
        return {"data": data, label_key: rng.integers(0, len(names), size).tolist()}

    for attribute in ("train_list", "test_list"):
        files = [file for file, _ in getattr(kind, attribute)]
        digests = [[file, write(file, batch(seed))] for seed, file in enumerate(files)]
        monkeypatch.setattr(kind, attribute, digests)
    digest = write(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": digest})
    return root


def write_inat(root: Path, year: int, keep_supercategory: bool = True) -> Path:
    """iNaturalist with categories 7, 3, 5, the last two of one genus; 3 train and 2 val images of each."""
    root.mkdir(parents=True, exist_ok=True)
    genus_of = {7: "Apis", 3: "Bos", 5: "Bos"}
    categories = [{"id": i, "name": f"{genus} {i}", "genus": genus} for i, genus in genus_of.items()]
    (root / "categories.json").write_text(json.dumps(categories))
    between = ("Animalia",) if keep_supercategory else ()
    for split, per_category in (("train", 3), ("val", 2)):
        images, annotations = [], []
        for category in genus_of:
            for i in range(per_category):
                number = len(images)
                folder = root.joinpath(f"train_val{year}", *between, str(category))
                folder.mkdir(parents=True, exist_ok=True)
                random_image(1000 * category + i).save(folder / f"{split}{i}.jpg")
                name = f"train_val{year}/Animalia/{category}/{split}{i}.jpg"
                images.append({"id": number, "file_name": name})
                annotations.append({"image_id": number, "category_id": category})
        content = {"images": images, "annotations": annotations}
        (root / f"{split}{year}.json").write_text(json.dumps(content))
    return root
