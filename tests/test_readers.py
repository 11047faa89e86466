"""Data as people keep it: webdataset shards, Hugging Face datasets, ImageNet's relatives, ReaL labels."""

import io
import json
import subprocess
import sys
import tarfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch

import readers
import subsets
from classification import Classification
from datasets import build_datasets
from errors import DataError
from helpers import random_image, run_args, sent
from main import main

ROOT = Path(__file__).resolve().parents[1]
TRAIN, VAL = 9, 5
NAMES = ["ant", "bee", "cow"]


def png(seed: int) -> bytes:
    file = io.BytesIO()
    random_image(seed, 20, 20).save(file, "PNG")
    return file.getvalue()


def thirds(seed: int) -> int:
    return seed % 3


def write_shards(root: Path, in_json: bool = False, label_of=thirds, class_names=NAMES) -> Path:
    """Two shards of training images and one of validation images, with the _info.json that timm reads."""
    root.mkdir(parents=True, exist_ok=True)
    splits = {}
    for split, shards in (("train", [(0, 5), (5, TRAIN)]), ("validation", [(100, 100 + VAL)])):
        names = []
        for i, (first, last) in enumerate(shards):
            names.append(f"set-{split}-{i:02d}.tar")
            with tarfile.open(root / names[-1], "w") as tar:
                for seed in range(first, last):
                    number = label_of(seed)
                    label = ("json", json.dumps({"kind": number}).encode()) if in_json else ("cls", b"%d" % number)
                    for ending, content in (("png", png(seed)), label):
                        member = tarfile.TarInfo(f"{seed:05d}.{ending}")
                        member.size = len(content)
                        tar.addfile(member, io.BytesIO(content))
        lengths = [last - first for first, last in shards]
        splits[split] = {
            "name": split, "filenames": names, "shard_lengths": lengths, "num_samples": sum(lengths)
        }  # fmt: skip
    info = {"splits": splits} | ({"class_names": class_names} if class_names else {})
    (root / "_info.json").write_text(json.dumps(info))
    return root


def write_huggingface(root: Path, label_of=thirds, class_names=NAMES) -> Path:
    """A folder of Parquet files as the Hub keeps them, with named classes."""
    with readers.huggingface_datasets():
        import datasets as huggingface

        label = huggingface.ClassLabel(names=class_names) if class_names else huggingface.Value("int64")
        features = huggingface.Features(image=huggingface.Image(), label=label)
        for split, seeds in (("train", range(TRAIN)), ("validation", range(100, 100 + VAL))):
            images, labels = [random_image(seed, 20, 20) for seed in seeds], [label_of(seed) for seed in seeds]
            rows = {"image": images, "label": labels}
            (root / "data").mkdir(parents=True, exist_ok=True)
            table = huggingface.Dataset.from_dict(rows, features=features)
            table.to_parquet(root / "data" / f"{split}-00000-of-00001.parquet")
    return root


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """A name that is no folder fails at once."""
    import huggingface_hub.constants as constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


@pytest.fixture(params=["wds", "wds json", "hfds", "hfids"])
def write(request, tmp_path):
    """Writes images in each kind of place; returns the flags that read them."""

    def written(**what) -> list[str]:
        if request.param.startswith("wds"):
            in_json = request.param == "wds json"
            root = write_shards(tmp_path / "shards", in_json, **what)
            return ["--data-set", "wds/", "--data-path", str(root), *(["--label-key", "kind"] if in_json else [])]
        pytest.importorskip("pyarrow")
        root = write_huggingface(tmp_path / "set", **what)
        return ["--data-set", f"{request.param}/{root}", "--data-path", str(tmp_path / "cache")]

    return written


@pytest.fixture
def flags(write):
    """Flags that read the same images from each kind of place."""
    return write()


def test_readers_find_images_labels_and_names(flags):
    data = build_datasets(run_args(*flags, "--input-size", "16"))
    assert (len(data.train), len(data.val), data.class_names) == (TRAIN, VAL, ["ant", "bee", "cow"])
    assert data.train.source.labels.tolist() == [seed % 3 for seed in range(TRAIN)]
    for dataset, first in ((data.train, 0), (data.val, 100)):
        for i in (0, len(dataset) - 1):
            assert np.array_equal(np.asarray(dataset.raw(i)), np.asarray(random_image(first + i, 20, 20)))
    image, label = data.val[2]
    assert image.shape == (3, 16, 16) and label == 102 % 3
    assert data.train.name(3)


def test_loader_processes_that_are_not_forked_are_sent_no_images(flags):
    """All images of a data set, as often as there are processes, would fill the memory."""
    data = build_datasets(run_args(*flags))
    there, pickled = sent(data.train)
    for i in (0, len(data.train) - 1):
        assert np.array_equal(np.asarray(there.raw(i)), np.asarray(random_image(i, 20, 20)))
        assert data.train.source.read_bytes(i) not in pickled
    assert there.name(1) == data.train.name(1) and there.source.labels.tolist() == data.train.source.labels.tolist()


def test_shards_by_their_names_alone(tmp_path):
    root = write_shards(tmp_path)
    (root / "_info.json").unlink()
    splits = ["--train-split", "set-train-{00..01}.tar", "--val-split", "set-validation-00.tar"]
    data = build_datasets(run_args("--data-set", "wds/", "--data-path", str(root), *splits))
    assert (len(data.train), len(data.val), data.class_names) == (TRAIN, VAL, ["0", "1", "2"])


def test_the_program_trains_on_them(flags, tmp_path, capsys):
    small = "--model vim_nano_patch4_32 --input-size 8 --device cpu --epochs 1 --batch-size 4 --mixup 0 --cutmix 0"
    assert main([*small.split(), "--no-repeated-aug", "--num_workers", "0", *flags]) == 0
    assert "9 train images" in capsys.readouterr().out


# --- classes without images


def test_classes_that_nothing_names_and_no_image_has_are_refused(write):
    """Labels 0, 1 and a stray 1000 are no thousand and one classes; evaluation takes val's labels as they are."""
    flags = write(label_of=lambda seed: (0, 1, 1000)[seed % 3], class_names=None)
    with pytest.raises(DataError, match=r"label is 1000, and 998 lower .* such as 2, 3, 4; number") as raised:
        build_datasets(run_args(*flags))
    assert "split 'train'" in str(raised.value) and "\n" not in str(raised.value)
    assert build_datasets(run_args(*flags, "--eval")).num_classes == 1001


@pytest.mark.parametrize("names", [None, NAMES])
def test_labels_that_only_val_has_are_refused(write, names):
    flags = write(label_of=lambda seed: seed % 3 if seed >= 100 else seed % 2, class_names=names)
    with pytest.raises(DataError, match=r"split 'validation' has .* that split 'train' lacks: 2; remove") as raised:
        build_datasets(run_args(*flags))
    assert "\n" not in str(raised.value)
    assert len(build_datasets(run_args(*flags, "--eval")).val) == VAL


def test_named_classes_may_be_empty_and_are_said(write):
    flags = write(label_of=lambda seed: 2 * (seed % 2) if seed < 100 else 0, class_names=[*NAMES, "dog"])
    data = build_datasets(run_args(*flags))
    absent = "val has no images of 3 classes: bee, cow, dog"
    assert data.num_classes == 4
    assert data.description.endswith(f"in 4 classes; train has no images of 2 classes: bee, dog; {absent}")
    assert build_datasets(run_args(*flags, "--eval")).description.endswith(f"in 4 classes; {absent}")


@pytest.mark.parametrize("folder", ["vim", "."])
def test_our_datasets_module_and_the_package_of_that_name_live_together(folder, tmp_path):
    """In a fresh process that starts in vim/, where `import datasets` finds our file."""
    pytest.importorskip("pyarrow")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "import datasets as ours, readers\n"
        "with readers.huggingface_datasets():\n"
        "    import datasets as theirs\n"
        "    from datasets import load_dataset\n"
        "with readers.huggingface_datasets():\n"
        "    import datasets\n"
        "    assert datasets is theirs and theirs.Dataset.from_dict({'a': [1]})[0] == {'a': 1}\n"
        "import datasets\n"
        "assert datasets is ours is sys.modules['datasets'] and ours.ImageDataset and theirs is not ours\n"
    )
    command = [sys.executable, "-c", code, str(ROOT / "vim")]
    result = subprocess.run(command, cwd=ROOT / folder, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


FAULTS = {
    "no folder": (["--data-set", "wds/", "--data-path", "nowhere"], "needs --data-path"),
    "no split": (["--val-split", "test"], "split 'test'"),
    "no label": (["--label-key", "colour"], "expected a .json with 'colour'"),
    "no shard": ([], "missing or no uncompressed tar file"),
    "no list": ([], "no _info.json to say which shards split 'train' has: write one, or name the shards"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_shards_are_one_line(tmp_path, fault):
    root = write_shards(tmp_path)
    if fault == "no shard":
        (root / "set-train-01.tar").unlink()
    if fault == "no list":
        (root / "_info.json").unlink()
    flags, expected = FAULTS[fault]
    with pytest.raises(DataError, match=expected) as raised:
        build_datasets(run_args("--data-set", "wds/", "--data-path", str(root), *flags))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("fault", ["damaged", "cut off", "fewer than told"])
def test_a_shard_that_lost_samples_is_refused(tmp_path, fault):
    """tarfile takes a damaged header for the archive's end, and what comes behind it for nothing."""
    root = write_shards(tmp_path)
    shard = root / "set-train-01.tar"
    with tarfile.open(shard) as file:
        header = file.getmembers()[-2].offset
    content = bytearray(shard.read_bytes())
    if fault == "damaged":
        content[header + 20] = 0xFF
    shard.write_bytes(content if fault == "damaged" else content[:header])
    expected = rf"set-train-01\.tar is {fault} at byte {header:,}: there is neither a file nor the archive's end"
    if fault == "fewer than told":
        shard.write_bytes(content[:header] + b"\0" * 10240)
        expected = f"'train' hold {TRAIN - 1} samples, and _info.json says {TRAIN}: find the missing ones"
    with pytest.raises(DataError, match=expected):
        build_datasets(run_args("--data-set", "wds/", "--data-path", str(root)))


def test_a_broken_image_in_a_shard_is_named(tmp_path):
    root = write_shards(tmp_path)
    data = build_datasets(run_args("--data-set", "wds/", "--data-path", str(root))).val
    data.source.places[1, 2] = 30  # cut short
    with pytest.raises(DataError, match=r"validation-00\.tar:00101\.png"):
        data[1]


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
@pytest.mark.parametrize(
    ("columns", "flags", "words"),
    [
        ({"kind": [0, 1]}, [], "split 'train' has no such column as --label-key label, but: image, kind"),
        ({"label": [0, 1]}, ["--image-key", "img"], "no such column as --image-key img, but: image"),
        ({"label": [0, 1]}, ["--image-key", "label"], "as --image-key label, but: image|Unsupported cast from int64"),
        ({"label": ["ant", "bee"]}, [], "label 'ant' of image 0 is no whole number; name another column"),
        ({"label": [0.0, 1.2]}, [], "label 0.0 of image 0 is no whole number"),
        ({"label": [0, None]}, [], "label None of image 1 is no whole number"),
    ],
)
def test_faults_of_tables_are_one_line(reader, columns, flags, words, tmp_path):
    pytest.importorskip("pyarrow")
    with readers.huggingface_datasets():
        import datasets as huggingface

        (tmp_path / "data").mkdir()
        table = huggingface.Dataset.from_dict({"image": [random_image(0), random_image(1)], **columns})
        table = table.cast_column("image", huggingface.Image())
        for split in ("train", "validation"):
            table.to_parquet(tmp_path / "data" / f"{split}-00000-of-00001.parquet")
    flags = [*flags, "--data-set", f"{reader}/{tmp_path}", "--data-path", str(tmp_path / "cache")]
    with pytest.raises(DataError, match=words) as raised:
        build_datasets(run_args(*flags))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("reader", ["hfds", "hfids"])
def test_a_cell_without_an_image_is_a_broken_image(reader, tmp_path):
    """None at all, an empty one, and one in a file that is gone."""
    parquet = pytest.importorskip("pyarrow.parquet")
    with readers.huggingface_datasets():
        import datasets as huggingface

        (tmp_path / "data").mkdir()
        images = [{"bytes": png(0), "path": None}, None, {"bytes": b"", "path": None}]
        images.append({"bytes": None, "path": str(tmp_path / "gone.png")})
        kind = huggingface.Image(decode=False)
        features = huggingface.Features(image=kind, label=huggingface.Value("int64"))
        table = huggingface.Dataset.from_dict({"image": images, "label": [0, 1, 2, 3]}, features=features)
        table = table.cast_column("image", huggingface.Image()).data.table  # its own writer looks for the files
        parquet.write_table(table, tmp_path / "data" / "validation-00000-of-00001.parquet")
    flags = ["--eval", "--data-set", f"{reader}/{tmp_path}", "--data-path", str(tmp_path / "cache")]
    dataset = build_datasets(run_args(*flags)).val
    assert dataset[0][1] == 0
    for index in (1, 2, 3):
        with pytest.raises(DataError, match=f"validation #{index}: .*; repair or remove the file"):
            dataset[index]


def test_a_package_that_the_data_sets_own_code_lacks_is_not_taken_for_theirs():
    with pytest.raises(ModuleNotFoundError, match="zstandard"), readers.huggingface_datasets():
        raise ModuleNotFoundError("No module named 'zstandard'")


def test_folders_in_a_shard_are_no_samples(tmp_path):
    """`tar -cf shard.tar -C folder .` has one."""
    root = write_shards(tmp_path)
    before = build_datasets(run_args("--data-set", "wds/", "--data-path", str(root)))
    with tarfile.open(root / "set-train-01.tar", "a") as tar:
        member = tarfile.TarInfo(".")
        member.type = tarfile.DIRTYPE
        tar.addfile(member)
    after = build_datasets(run_args("--data-set", "wds/", "--data-path", str(root)))
    assert len(after.train) == len(before.train)


def test_a_sample_without_an_image_is_refused(tmp_path):
    root = write_shards(tmp_path)
    with tarfile.open(root / "set-train-01.tar", "a") as tar:
        for ending, content in (("txt", b"an ant"), ("cls", b"0")):
            member = tarfile.TarInfo(f"00099.{ending}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    with pytest.raises(DataError, match=r"set-train-01\.tar: sample 00099\. has no image: expected one of \.jpg"):
        build_datasets(run_args("--data-set", "wds/", "--data-path", str(root)))


def test_a_hugging_face_name_that_is_not_there(tmp_path, capsys):
    pytest.importorskip("pyarrow")
    assert main(["--data-set", f"hfds/{tmp_path / 'absent'}", "--device", "cpu"]) == 4
    out, error = capsys.readouterr()
    assert "error: --data-set hfds/" in error and error.count("\n") == 1
    assert "digits" not in out, "those are for runs that name no data"


# --- ImageNet's relatives


def test_named_subsets_are_imagenets():
    for name, classes in (("imagenet-a", 200), ("imagenet-r", 200), ("imagenet-v2", 1000)):
        valid = subsets.valid_labels(name)
        assert len(set(valid)) == classes and max(valid) < 1000
    assert subsets.valid_labels("imagenet-v2")[:4] == [0, 1, 10, 100], "folders sort as text"


def test_class_numbers_from_a_file_of_windows(tmp_path):
    (tmp_path / "numbers").write_bytes("\ufeff0\r\n2\r\n".encode())
    assert subsets.valid_labels(str(tmp_path / "numbers")) == [0, 2]


def test_a_subset_answers_with_its_classes_alone():
    class Fixed(torch.nn.Module):
        def forward(self, images):
            return torch.tensor([[5.0, 1.0, 4.0, 3.0]])

    assert subsets.ClassSubset(Fixed(), [3, 1])(None).tolist() == [[3.0, 1.0]]


@pytest.fixture
def relatives(tmp_path):
    """Images in two class folders, six and four, without val/; weights that always answer 0, then 2, 3, 1."""
    for number in range(1, 11):
        folder = tmp_path / "set" / ("n1" if number <= 6 else "n2")
        folder.mkdir(parents=True, exist_ok=True)
        random_image(number).save(folder / f"ILSVRC2012_val_{number:08d}.png")
    model = timm.create_model("vim_nano_patch4_32", num_classes=4, img_size=8)
    torch.nn.init.zeros_(model.head.weight)
    model.head.bias.data = torch.tensor([9.0, 3.0, 8.0, 5.0])
    torch.save({"model": model.state_dict()}, tmp_path / "weights.pth")
    return tmp_path


def evaluate(folder: Path, *flags) -> int:
    fixed = "--eval --model vim_nano_patch4_32 --input-size 8 --device cpu --num_workers 0 --num-classes 4"
    return main([*fixed.split(), "--resume", str(folder / "weights.pth"), "--data-path", str(folder / "set"), *flags])


def test_evaluation_on_some_of_the_models_classes(relatives, capsys):
    """Between classes 1 and 3 it answers 3, so the right images are those of the folder that stands for 3."""
    for valid, share in (("3 1", "60.00"), ("1\n3", "40.00")):
        (relatives / "valid.txt").write_text(valid)
        assert evaluate(relatives, "--valid-labels", str(relatives / "valid.txt")) == 0
        text = capsys.readouterr().out
        assert f"top-1 {share} %" in text and "no val/, its folders are classes" in text


def test_rows_of_a_selection_are_read_in_its_order():
    pyarrow = pytest.importorskip("pyarrow")
    images = [{"bytes": data, "path": None} for data in (b"a", b"b", b"c")]
    table = SimpleNamespace(table=pyarrow.table({"image": images}))
    selected = readers.ArrowSource("selected", table, "image", [0, 1], np.array([2, 0]))
    assert [selected.read_bytes(i) for i in range(2)] == [b"c", b"a"]


def test_real_labels(relatives, capsys):
    """Image 3 has no label and does not count; of the other nine, three may be called 0."""
    labels = [[0], [1, 0], [], [2], [3], [1], [0, 3], [2], [1], [3]]
    (relatives / "real.json").write_text(json.dumps(labels))
    assert evaluate(relatives, "--real-labels", str(relatives / "real.json")) == 0
    text = capsys.readouterr().out
    assert "ReaL top-1 33.33 % of 9 images" in text and "top-1 60.00 %" in text and "SHA-256" in text


def test_the_built_in_real_labels_are_those_of_imagenets_validation_images():
    real = subsets.read_real_labels("imagenet")
    assert len(real) == 50_000 and sum(map(bool, real)) == 46_837  # arXiv 2006.07159, section 4


@pytest.mark.parametrize(
    "flags, content, expected",
    [
        (["--valid-labels", "FILE"], "1 2 3", "has 3 classes and the data 2"),
        (["--valid-labels", "FILE"], "1 9", "9 is not a class of the model"),
        (["--valid-labels", "FILE"], "-1 2", "-1 is not a class of the model; its classes are 0 to 3"),
        (["--valid-labels", "FILE"], "one two", "expected class numbers"),
        (["--valid-labels", "FILE"], b"\xff\xfe", "is no text; give one of imagenet-a"),
        (["--valid-labels", "imagenet-z"], "", "give one of imagenet-a"),
        (["--real-labels", "FILE"], "[[0]]", "go by the names ILSVRC2012_val_00000001 to 00000001"),
        (["--real-labels", "absent.json"], "", "--real-labels absent.json"),
        (
            ["--real-labels", "FILE"],
            '{"a": [0]}',
            "expected a list with an entry for each validation image, found a dict",
        ),
        (["--real-labels", "FILE"], '[[0], "5 6"]', "entry 1 is '5 6', not a list of class numbers from 0 to 999"),
        (["--real-labels", "FILE"], "[[3.7]]", "entry 0 is [3.7], not a list"),
        (["--real-labels", "FILE"], "[[5000]]", "entry 0 is [5000], not a list"),
        (["--real-labels", "FILE"], "[[-1]]", "entry 0 is [-1], not a list"),
        (["--valid-labels", "FILE"], "2 2", "--valid-labels: class 2 stands there twice"),
    ],
)
def test_mistakes_are_one_line_before_any_image_is_seen(relatives, capsys, monkeypatch, flags, content, expected):
    monkeypatch.setattr(Classification, "evaluate", lambda *_: pytest.fail("an image was seen"))
    (relatives / "file").write_bytes(content if isinstance(content, bytes) else content.encode())
    flags = [str(relatives / "file") if flag == "FILE" else flag for flag in flags]
    assert evaluate(relatives, *flags) == 4
    error = capsys.readouterr().err
    assert expected in error and error.count("\n") == 1
