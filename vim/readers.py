"""Data sets as others keep them, found by timm's readers: webdataset shards and Hugging Face datasets.

    wds/           tar shards below --data-path, listed by its _info.json or by a split such as "train-{00..31}.tar"
    hfds/NAME      a Hugging Face data set, or a folder of one, prepared on disk
    hfids/NAME     the same, streamed once and kept in memory as the compressed files it consists of

timm finds and opens them. From then on every image is read by its number, so that order, resuming and several
processes work as for folders.
"""

import io
import json
import pickle
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path

import numpy as np
from PIL import Image
from torchvision.datasets.folder import IMG_EXTENSIONS

from datasets import Packed, Sources, as_broken_image, decode_image
from errors import DataError, import_optional, one_line, raise_unless_of_file, some_of

WDS_IMAGES = tuple(ending.removeprefix(".") for ending in IMG_EXTENSIONS)

_foreign_modules: dict = {}


@contextmanager
def huggingface_datasets() -> Iterator[None]:
    """Let `import datasets` mean Hugging Face's package, not this folder's module of that name, for a while.

    Raises ConfigError where the package is not installed.
    """

    def take_out() -> dict:
        names = [name for name in sys.modules if name.split(".")[0] == "datasets"]
        return {name: sys.modules.pop(name) for name in names}

    ours, path, here = take_out(), sys.path.copy(), Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in path if Path(entry).resolve() != here]
    sys.modules.update(_foreign_modules)  # a second import of its extension types would clash with the first
    try:
        import_optional("datasets", "--data-set hfds/ and hfids/")
        yield
    finally:
        _foreign_modules.update(take_out())
        sys.modules.update(ours)
        sys.path[:] = path


class BytesSource:
    """Compressed images that `read_bytes(index)` returns, with their labels."""

    def __init__(self, labels):
        self.labels = np.asarray(labels, dtype=np.int64)

    def read_bytes(self, index: int) -> bytes:
        raise NotImplementedError

    def name(self, index: int) -> str:
        raise NotImplementedError

    def read(self, index: int) -> Image.Image:
        with as_broken_image(self.name(index)):
            return decode_image(io.BytesIO(self.read_bytes(index)))


class TarSource(BytesSource):
    """Members of tar files: (tar's number, member's name, offset, size) of each image."""

    def __init__(self, tars: list[Path], members: list[tuple[int, str, int, int]], labels):
        super().__init__(labels)
        self.tars = tars
        self.names = np.array([member[1].encode() for member in members])
        self.places = np.array([(number, offset, size) for number, _, offset, size in members], dtype=np.int64)

    def read_bytes(self, index: int) -> bytes:
        number, offset, size = self.places[index].tolist()
        with open(self.tars[number], "rb") as file:
            file.seek(offset)
            return file.read(size)

    def name(self, index: int) -> str:
        return f"{self.tars[self.places[index, 0]]}:{bytes(self.names[index]).decode()}"


class ArrowSource(BytesSource):
    """An Arrow table's column of images, each {"bytes", "path"}; rows by number, in the data set's order.

    table: of the `datasets` package, which pickles the names of the files that it maps. The column alone would be
    sent with all its images to every loader process that is not forked.
    """

    def __init__(self, title: str, table, key: str, labels, rows: np.ndarray | None):
        super().__init__(labels)
        self.title, self.table, self.key, self.rows = title, table, key, rows

    def __getstate__(self) -> dict:
        with huggingface_datasets():
            return self.__dict__ | {"table": pickle.dumps(self.table)}

    def __setstate__(self, state: dict) -> None:
        with huggingface_datasets():
            self.__dict__ |= state | {"table": pickle.loads(state["table"])}

    def read_bytes(self, index: int) -> bytes:
        row = index if self.rows is None else int(self.rows[index])
        return image_bytes(self.table.table.column(self.key)[row].as_py())

    def name(self, index: int) -> str:
        return f"{self.title} #{index}"


def image_bytes(image: dict | None) -> bytes:
    """What a cell of a column of images holds, in itself or in a file that it names. Raises OSError, ValueError."""
    if not image or not (image["bytes"] or image["path"]):
        raise ValueError("there is no image")
    return image["bytes"] or Path(image["path"]).read_bytes()


class MemorySource(BytesSource):
    """Compressed images in memory."""

    def __init__(self, title: str, images: Packed, labels):
        super().__init__(labels)
        self.title, self.images = title, images

    def read_bytes(self, index: int) -> bytes:
        return self.images[index]

    def name(self, index: int) -> str:
        return f"{self.title} #{index}"


def reader_sources(args, need_train: bool) -> Sources:
    """The data set of `args.data_set` with one of `READERS`. Raises DataError.

    Reads `data_set, data_path, train_split, val_split, image_key, label_key`.
    """
    opened = {"wds": _open_wds, "hfds": _open_hfds, "hfids": _open_hfids}[args.data_set.partition("/")[0]]
    splits = {"train": args.train_split, "val": args.val_split} if need_train else {"val": args.val_split}
    found = {part: opened(args, split) for part, split in splits.items()}
    labels = {part: set(np.unique(source.labels).tolist()) for part, (source, _) in found.items()}
    names = next((names for _, names in found.values() if names), [])
    if need_train:
        _check_classes(args, labels["train"], labels["val"], named=bool(names or args.num_classes))
    names = names or [str(number) for number in range(max({0}.union(*labels.values())) + 1)]
    remark = "".join(_absent_classes(part, there, names) for part, there in labels.items())
    return Sources(found["train"][0] if need_train else None, found["val"][0], names, remark)


def _check_classes(args, train: set[int], val: set[int], named: bool) -> None:
    """Raise DataError for labels that training cannot learn. Classes that the data or a flag names may be empty."""
    largest = max(train, default=0)
    absent = largest - sum(0 <= label < largest for label in train)
    if absent and not named:
        some = ", ".join(str(label) for label in islice((n for n in range(largest) if n not in train), 3))
        raise DataError(
            f"--data-set {args.data_set}, split {args.train_split!r}: the largest label is {largest}, and {absent} "
            f"lower one(s) have no image, such as {some}; number the classes 0, 1, 2, ... or name them in the data set "
            "(class_names in _info.json, a ClassLabel column), or give --num-classes"
        )
    unknown = [str(label) for label in sorted(val - train)]
    if unknown:
        raise DataError(
            f"--data-set {args.data_set}, split {args.val_split!r} has label(s) that split {args.train_split!r} lacks: "
            f"{some_of(unknown)}; remove their images, or add some for training"
        )


def _absent_classes(part: str, labels: set[int], names: list[str]) -> str:
    absent = [name for number, name in enumerate(names) if number not in labels]
    return f"; {part} has no images of {len(absent)} classes: {some_of(absent)}" if absent else ""


def _reader(args, split: str, root: str | None, **options):
    """timm's reader. Raises DataError for what it cannot open."""
    from timm.data.readers import create_reader  # its modules bind `datasets` when they are first imported

    try:
        return create_reader(args.data_set, root=root, split=split, **options)
    except Exception as error:  # the libraries raise what they like; all of it means the same to a user
        reason = one_line(error, 300) or type(error).__name__
        where = f" --data-path {root}" if root else ""
        raise DataError(f"--data-set {args.data_set}{where}, split {split!r}: {reason}") from error


# --- webdataset


def _open_wds(args, split: str) -> tuple[TarSource, list[str]]:
    root = Path(args.data_path or "").expanduser()
    if not args.data_path or not root.is_dir():
        raise DataError(f"--data-set wds/ needs --data-path, the folder with the shards; {root} is not a folder")
    names_shards = "tar" in split or ".." in split  # as timm tells them from a split's name
    if not names_shards and not any((root / name).is_file() for name in ("_info.json", "info.json")):
        raise DataError(
            f"--data-set wds/ --data-path {root} holds no _info.json to say which shards split {split!r} has: write "
            "one, or name the shards, as in --train-split 'train-{0000..0099}.tar'"
        )
    reader = _reader(args, split, str(root))
    tars = [root / file for file in reader.split_info.filenames]
    label_key = args.label_key or reader.split_info.alt_label
    members, labels = [], []
    for number, tar in enumerate(tars):
        for member, label in _index_tar(tar, label_key):
            members.append((number, *member))
            labels.append(label)
    told = 0 if names_shards else reader.split_info.num_samples
    if told and told != len(labels):
        raise DataError(
            f"{root}: the shards of split {split!r} hold {len(labels):,} samples, and _info.json says {told:,}: find "
            "the missing ones, or correct the number"
        )
    return TarSource(tars, members, labels), list(reader.info.get("class_names", []))


def _index_tar(tar: Path, label_key: str) -> Iterator[tuple[tuple[str, int, int], int]]:
    """((image's name, offset, size), label) of each sample: members of one stem, the label in .cls or .json."""
    try:
        with tarfile.open(tar, "r:") as file:
            samples: dict[str, dict[str, tarfile.TarInfo]] = {}
            for member in filter(tarfile.TarInfo.isfile, file):
                stem, _, ending = member.name.rpartition("/")[2].partition(".")
                key = member.name[: len(member.name) - len(ending)]
                samples.setdefault(key or stem, {})[ending.lower()] = member
            _check_end(file, tar)
            for key, parts in samples.items():
                image = next((parts[ending] for ending in WDS_IMAGES if ending in parts), None)
                if image is None:
                    raise DataError(f"{tar}: sample {key} has no image: expected one of .{' .'.join(WDS_IMAGES)}")
                label = _wds_label(file, tar, key, parts, label_key)
                yield (image.name, image.offset_data, image.size), label
    except (OSError, tarfile.TarError) as error:
        raise_unless_of_file(error, tar)
        raise DataError(f"{tar} is missing or no uncompressed tar file: {error}") from error


def _check_end(file: tarfile.TarFile, tar: Path) -> None:
    """Raise DataError where the members did not end with the archive: tarfile takes a damaged header for the end."""
    file.fileobj.seek(file.offset)
    block = file.fileobj.read(tarfile.BLOCKSIZE)
    if block != tarfile.NUL * tarfile.BLOCKSIZE:
        what = "is damaged" if block else "is cut off"
        raise DataError(f"{tar} {what} at byte {file.offset:,}: there is neither a file nor the archive's end")


def _wds_label(file: tarfile.TarFile, tar: Path, key: str, parts: dict, label_key: str) -> int:
    try:
        if label_key:
            return int(json.load(file.extractfile(parts["json"]))[label_key])
        return int(file.extractfile(parts["cls"]).read())
    except (KeyError, ValueError, TypeError) as error:
        wanted = f"a .json with {label_key!r}" if label_key else "a .cls with a class number (or give --label-key)"
        raise DataError(f"{tar}: sample {key} has no label: expected {wanted}") from error


# --- Hugging Face datasets


def _check_column(args, split: str, flag: str, key: str, columns) -> None:
    """Raise DataError unless the key is one of those columns."""
    if key not in columns:
        raise DataError(
            f"--data-set {args.data_set}, split {split!r} has no such column as {flag} {key}, but: {', '.join(columns)}"
        )


def _whole_numbers(args, split: str, labels) -> np.ndarray:
    labels = list(labels)
    wrong = next((i for i, label in enumerate(labels) if not isinstance(label, int | np.integer)), None)
    if wrong is not None:
        raise DataError(
            f"--data-set {args.data_set}, split {split!r}: label {labels[wrong]!r} of image {wrong} is no whole "
            "number; name another column by --label-key, or number the classes"
        )
    return np.asarray(labels, dtype=np.int64)


def _open_hfds(args, split: str) -> tuple[ArrowSource, list[str]]:
    with huggingface_datasets():
        keys = {"input_key": args.image_key, "target_key": args.label_key or "label"}
        reader = _reader(args, split, args.data_path or None, **keys)
        table = reader.dataset.data
        images = table.table.column(args.image_key)
        # timm has added what it was told to take for images
        empty = {args.image_key} if images.null_count == len(images) else set()
        there = [name for name in table.column_names if name not in empty]
        _check_column(args, split, "--image-key", args.image_key, there)
        _check_column(args, split, "--label-key", keys["target_key"], there)
        labels = _whole_numbers(args, split, reader.dataset.with_format(None)[keys["target_key"]])
        rows = reader.dataset._indices
        rows = None if rows is None else rows.column(0).to_numpy()
        # The table alone goes on: the package's own code would import `datasets` again while it reads.
        names = [name for name, _ in sorted(reader.class_to_idx.items(), key=lambda item: item[1])]
    return ArrowSource(f"{args.data_set} {split}", table, args.image_key, labels, rows), names


def _open_hfids(args, split: str) -> tuple[MemorySource, list[str]]:
    title = f"{args.data_set} {split}"
    with huggingface_datasets():
        import datasets as huggingface

        keys = {"input_key": args.image_key, "target_key": args.label_key or "label"}
        # The number of samples only serves the reader's own loop.
        reader = _reader(args, split, args.data_path or None, num_samples=1, **keys)
        labels = []
        stream = reader.builder.as_streaming_dataset(split=split)
        # Files of unknown columns tell them when the first of them is read.
        features = stream.features or stream._resolve_features().features
        pictures = [name for name, feature in features.items() if isinstance(feature, huggingface.Image)]
        _check_column(args, split, "--image-key", args.image_key, pictures)
        _check_column(args, split, "--label-key", keys["target_key"], features)
        stream = stream.cast_column(args.image_key, huggingface.Image(decode=False))

        def read() -> Iterator[bytes]:
            for item in stream:
                labels.append(item[keys["target_key"]])
                try:
                    yield image_bytes(item[args.image_key])
                except (OSError, ValueError) as error:
                    raise_unless_of_file(error, f"{title} #{len(labels) - 1}")
                    yield b""  # a broken image, should it be asked for

        images = Packed(read())
    labels = _whole_numbers(args, split, labels)
    names = list(getattr(features[keys["target_key"]], "names", []))
    return MemorySource(title, images, labels), names
