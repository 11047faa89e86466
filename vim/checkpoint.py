"""Training checkpoints: reading and writing them. `fitting.py` gives weights to models.

Reading runs no code: torch's safe loader with `argparse.Namespace` as the one extra class, or safetensors.
Every failure is one `CheckpointError` line. Writing is atomic, and a SHA-256 beside each file lets a resume
tell a whole file from a damaged one, which neither torch.load nor safetensors can.
"""

import argparse
import copy
import errno
import hashlib
import itertools
import json
import os
import pickletools
import re
import shutil
import sys
import threading
import zipfile
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import nn

import faults
from errors import CheckpointError, ConfigError, StorageError, check_choice, first_sentence, some_of
from vim_pretrained import PUBLISHED, refused_name, unwrap_state_dict

# The published weights that `hf-hub:REPO` alone stands for (`hf-hub:REPO/FILE` names any file).
HUB_FILES = {weights.repo: weights.file for name, weights in PUBLISHED.items() if "stride8" not in name}
EXPORTED_WEIGHTS = "model.safetensors"  # of an exported folder, and of any other repository of the Hub
DESCRIPTION = "config.json"  # of an exported folder, beside them

# A file's two sets of weights, as flags and logs call them: the name of their entry.
ENTRIES = {"raw": "model", "ema": "model_ema"}

# Exact types that the safe loader gives back: it would refuse subclasses, such as a numpy float or an enum.
PLAIN_TYPES = (type(None), bool, int, float, complex, str, torch.Size, torch.device, torch.dtype)
CHECKPOINT_NAME = re.compile(r"checkpoint-(\d+)\.pth")

# System errors after which writing again cannot succeed: no room, or none for such a file. Others, of storage on a
# network, may pass.
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
LASTING = (*FULL, errno.EFBIG, errno.EPERM, errno.ENAMETOOLONG, errno.EOPNOTSUPP)


@dataclass
class Checkpoint:
    """What a weight file holds; what it lacks is None.

    `model` and `model_ema` are state dicts without the prefixes of DistributedDataParallel and torch.compile.
    `is_best`: it was the best of its run when it was written, None where the file does not tell.
    `extra` are entries under other names, `keys` all names on the top level (none in a bare state dict). `exported`:
    a config.json beside the file describes it, as in a folder that `checkpoint.py export` wrote.
    """

    path: Path
    sha256: str
    model: dict[str, torch.Tensor] | None = None
    model_ema: dict[str, torch.Tensor] | None = None
    optimizer: dict | None = None
    lr_scheduler: dict | None = None
    scaler: dict | None = None
    epoch: int | None = None
    step: int | None = None
    args: argparse.Namespace | None = None
    best_metric: float | None = None
    is_best: bool | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    keys: list[str] = field(default_factory=list)
    exported: bool = False

    @property
    def label(self) -> str:
        """The file and the beginning of its digest, for a log."""
        return f"{self.path} (SHA-256 {self.sha256[:16]}...)"

    @property
    def preferred_entry(self) -> str:
        """The name of the raw weights' entry, or of the averaged ones' where the file has no others."""
        return ENTRIES["raw" if self.model is not None else "ema"]

    @property
    def class_names(self) -> list[str]:
        """Of its run's data, in the order of their numbers; [] where the file does not tell."""
        return list(map(str, self.extra.get("class_names") or []))

    @property
    def preferred_weights(self) -> dict[str, torch.Tensor]:
        return getattr(self, self.preferred_entry)

    def weights(self, which: str = "model") -> dict[str, torch.Tensor]:
        """The state dict "model" or "model_ema". Raises CheckpointError if the file lacks it."""
        check_choice("which", which, ENTRIES.values())
        found = getattr(self, which)
        if found is None:
            held = some_of(self.keys) or "a state dict alone"
            raise CheckpointError(f"{self.path} holds no {which!r}; it holds: {held}")
        return found


def compare_classes(checkpoint: Checkpoint, names: list[str], way_out: str) -> str:
    """In words, how the classes that a run was trained on differ from `names`, the data's; "" where they do not.

    Raises ConfigError, ending with `way_out`, where a class has another number: every label would be taken for
    another one's.
    """
    there = checkpoint.class_names or names
    # ImageNet's words have two classes "crane": such names tell nothing.
    times, there_times = Counter(names), Counter(there)
    numbers = {name: number for number, name in enumerate(there) if there_times[name] == times[name] == 1}
    for number, name in enumerate(names):
        if numbers.get(name, number) != number:
            raise ConfigError(
                f"{checkpoint.path} was trained with other numbers of classes: {name!r} is {number} in the data and "
                f"{numbers[name]} there; {way_out}"
            )
    others = [f"{name!r} for {old!r}" for old, name in zip(there, names) if old != name]
    return f"classes have other names than in training: {some_of(others, limit=2)}" if others else ""


def read_checkpoint(path: str | Path, trust: bool = False) -> Checkpoint:
    """Read a published or own training checkpoint, a bare state dict or a safetensors file, onto the CPU.

    Args:
        path: a file, an exported folder, https://..., hf-hub:OWNER/REPO or hf-hub:OWNER/REPO/FILE.
        trust: unpickle without the safe loader. A pickle can run any code: only for files of your own making.

    Raises CheckpointError when the file is missing, damaged, would run code, or holds no weights.
    """
    file = fetch(str(path))
    digest = file_digest(file)
    _check_digest(file, digest)
    content = _load_safetensors(file) if file.suffix == ".safetensors" else _load_pickle(file, trust)
    checkpoint = _as_checkpoint(content, file, digest)
    described = file.name == EXPORTED_WEIGHTS and not str(path).startswith("hf-hub:")  # whose cache may have it, or not
    if described and file.with_name(DESCRIPTION).is_file():
        _take_description(checkpoint, file.with_name(DESCRIPTION))
    return checkpoint


def fetch(address: str) -> Path:
    """The local file of a path, an exported folder, an https:// address or an hf-hub: name, downloaded unless there."""
    if address.startswith("hf-hub:"):
        return _fetch_from_hub(address.removeprefix("hf-hub:"))
    if address.startswith("https://"):
        return _fetch_from_web(address)
    path = Path(address).expanduser()
    if (path / EXPORTED_WEIGHTS).is_file():
        return path / EXPORTED_WEIGHTS
    if not path.is_file():
        what = "is a folder, not a file" if path.is_dir() else "does not exist"
        ways = "a checkpoint file, an exported folder, an https:// address or hf-hub:OWNER/REPO"
        raise CheckpointError(f"{path} {what}; give {ways}")
    return path


def _fetch_from_hub(name: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    parts = name.split("/", 2)
    if len(parts) < 2:
        raise CheckpointError(f"hf-hub:{name}: expected hf-hub:OWNER/REPO or hf-hub:OWNER/REPO/FILE")
    repo = "/".join(parts[:2])
    file = parts[2] if len(parts) == 3 else HUB_FILES.get(repo, EXPORTED_WEIGHTS)
    try:
        return Path(hf_hub_download(repo, file))
    except LocalEntryNotFoundError as error:
        raise CheckpointError(
            f"hf-hub:{repo}/{file} is not in the local cache and the Hub cannot be reached; "
            f"where there is a network run `hf download {repo} {file}`, then copy the file and give its path"
        ) from error
    except (HfHubHTTPError, HFValidationError) as error:
        raise CheckpointError(f"hf-hub:{repo}/{file} cannot be downloaded: {_reason(error)}") from error


def _fetch_from_web(url: str) -> Path:
    folder = Path(torch.hub.get_dir()) / "checkpoints" / hashlib.sha256(url.encode()).hexdigest()[:16]
    file = folder / Path(urlparse(url).path).name  # many a file is called best_checkpoint.pth
    if file.is_file():
        return file
    folder.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(url, str(file), progress=sys.stderr.isatty())
    except (OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{url} cannot be downloaded: {_reason(error)}; fetch it elsewhere and give its path"
        ) from error
    return file


def _load_safetensors(path: Path) -> dict:
    try:
        return load_file(path)
    except Exception as error:  # the library's own error class and OSError alike
        raise CheckpointError(f"{path} is damaged or no safetensors file: {_reason(error)}") from error


def _load_pickle(path: Path, trust: bool) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=not trust)
    except Exception as error:  # a damaged pickle raises nearly anything, and all of it means the same
        refused = _refused_names(path, str(error))
        if refused and not trust:
            raise CheckpointError(
                f"{path} was not loaded: its pickle asks for {refused}, which may run code; if you made the "
                "file yourself, --trust-checkpoint loads it"
            ) from error
        raise CheckpointError(f"{path} is damaged or no checkpoint (cut short?): {_reason(error)}") from error


def _refused_names(path: Path, message: str) -> str:
    """What the safe loader would not build, "" if that was not the reason to fail."""
    if named := refused_name(message):
        return named
    if "Unsupported operand" not in message or zipfile.is_zipfile(path):
        return ""
    return ", ".join(_pickle_globals(path))


def _pickle_globals(path: Path) -> list[str]:
    """Names that a bare pickle would import, found without running it.

    For protocols other than 2: the safe loader stops at their opcodes before it comes to a name.
    """
    names, strings = [], []
    with open(path, "rb") as file:
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name in ("GLOBAL", "INST"):
                    names.append(argument.replace(" ", "."))
                elif opcode.name == "STACK_GLOBAL":
                    names.append(".".join(strings[-2:]))
                elif isinstance(argument, str):
                    strings.append(argument)
        except ValueError:  # not a pickle from here on; what came before stands
            pass
    return names


def _as_checkpoint(content: Any, path: Path, digest: str) -> Checkpoint:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected a dict of weights")
    checkpoint = Checkpoint(path, digest)
    if content and all(isinstance(value, torch.Tensor) for value in content.values()):
        checkpoint.model = unwrap_state_dict(content)
        return checkpoint
    entries = dict(content)
    checkpoint.keys = [str(key) for key in entries]
    for name, aliases in (("model", ("model", "state_dict")), ("model_ema", ("model_ema", "state_dict_ema"))):
        setattr(checkpoint, name, _take_state_dict(entries, aliases, path))
    for name in ("epoch", "step", "args", "best_metric", "is_best"):
        setattr(checkpoint, name, entries.pop(name, None))
    for name in ("optimizer", "lr_scheduler", "scaler"):  # a published file says "none" of what its run did without
        found = entries.pop(name, None)
        setattr(checkpoint, name, found if isinstance(found, Mapping) else None)
    checkpoint.extra = entries
    if checkpoint.model is None and checkpoint.model_ema is None:
        only = some_of(checkpoint.keys) or "nothing"
        raise CheckpointError(f"{path} holds no weights under 'model' or 'model_ema', only: {only}")
    return checkpoint


def describes_model(config) -> bool:
    """Whether the content of a config.json is what timm writes beside exported weights, and not another library's."""
    return isinstance(config, dict) and {"architecture", "pretrained_cfg"} <= config.keys()


def _take_description(checkpoint: Checkpoint, path: Path) -> None:
    """Read from an exported folder's config.json what a training checkpoint says itself: model, images, classes."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
        if not describes_model(config):
            return
        settings, names = config["pretrained_cfg"], config.get("label_names") or []
        channels, *size = settings["input_size"]
        size = (config.get("model_args") or {}).get("img_size") or size
        height, width = size if isinstance(size, list) else (size, size)
        said = {
            "model": str(config["architecture"]),
            "input_size": int(height) if height == width else (int(height), int(width)),
            "in_chans": int(channels),
            "num_classes": int(config["num_classes"]),
            "eval_crop_ratio": float(settings.get("crop_pct") or 0.875),
            "model_args": dict(config.get("model_args") or {}),
        }
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{path} is damaged: {_reason(error)}; export the folder again") from error
    checkpoint.args, checkpoint.exported = argparse.Namespace(**said), True
    # timm's own are a list, or by the classes' numbers
    checkpoint.extra["class_names"] = list(names.values()) if isinstance(names, dict) else list(names)


def _take_state_dict(entries: dict, names: tuple[str, ...], path: Path) -> dict | None:
    for name in names:
        found = entries.pop(name, None)
        if found is None:
            continue
        if not isinstance(found, Mapping) or not all(isinstance(value, torch.Tensor) for value in found.values()):
            raise CheckpointError(f"{path}: {name!r} is a {type(found).__name__}, expected a dict of tensors")
        return unwrap_state_dict(found)
    return None


def file_digest(path: Path) -> str:
    """SHA-256 of a file as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def digest_path(path: Path) -> Path:
    """Where the digests of a weight file are noted."""
    path = path.resolve()
    return path.with_name(path.name + ".sha256")


def _check_digest(path: Path, digest: str) -> None:
    """Compare with the digests noted beside the file, if any were."""
    side = digest_path(path)
    if side.is_file() and digest not in side.read_text(errors="replace").lower().split():
        raise CheckpointError(f"{path} is damaged: its SHA-256 is not the one noted in {side.name}")


def save_checkpoint(path: str | Path, state: dict) -> str:
    """Write `state` so that `path` always is one whole checkpoint, the old or the new; return its SHA-256.

    A temporary file in the same folder is written, synced and renamed. `PATH.sha256` notes both digests while
    the rename happens, so that a crash at any moment leaves a file that its digest fits.

    Raises TypeError naming an entry that the safe loader would refuse, CheckpointError when the disk is full,
    StorageError for what may pass.
    """
    path = Path(path)
    needed = _storage_size(state, "state")
    try:
        _require_space(path, needed)
        return _write_atomically(path, state)
    except (OSError, RuntimeError) as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: Exception) -> CheckpointError:
    """What to raise for it. torch's writer hides the system's error behind one of its own."""
    system = error if isinstance(error, OSError) else error.__context__
    transient = isinstance(system, OSError) and system.errno not in LASTING
    kind = StorageError if transient else CheckpointError
    return kind(f"{path} was not written: {_reason(system or error)}; the last checkpoint is untouched")


def _require_space(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free
    if needed > free:
        raise CheckpointError(
            f"{path} was not written: it takes {needed / 2**20:.1f} MiB, {free / 2**20:.1f} MiB are free; "
            "the last checkpoint is untouched. Free some space or choose another --output_dir"
        )


def _write_atomically(path: Path, state: dict) -> str:
    temporary = path.with_name(f".{path.name}.tmp")
    side = path.with_name(path.name + ".sha256")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            faults.while_writing(state.get("step", -1))
            _sync(file)
        digest = file_digest(temporary)
        known = _noted_digests(path, side)
        _write_text(side, f"{digest}  {path.name}\n{known}")
        os.replace(temporary, path)
        _sync_folder(path.parent)
        if known:
            _write_text(side, f"{digest}  {path.name}\n")
    finally:
        temporary.unlink(missing_ok=True)
    return digest


def _noted_digests(path: Path, side: Path) -> str:
    """Lines with the digests that the file at `path`, if any, may have now."""
    if not path.exists():
        return ""
    return side.read_text(errors="replace") if side.exists() else f"{file_digest(path)}  {path.name}\n"


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "w") as file:
            file.write(text)
            _sync(file)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    _sync_folder(path.parent)


def _sync(file) -> None:
    file.flush()
    os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _storage_size(value: Any, where: str) -> int:
    """Bytes of the tensors in a nested state. Raises TypeError naming what the safe loader would refuse."""
    if type(value) in (torch.Tensor, nn.Parameter):
        return value.numel() * value.element_size()
    if type(value) in (dict, OrderedDict):
        return sum(_storage_size(key, where) + _storage_size(value[key], f"{where}[{key!r}]") for key in value)
    if type(value) in (list, tuple):
        return sum(_storage_size(item, f"{where}[{i}]") for i, item in enumerate(value))
    if type(value) is argparse.Namespace:
        return sum(_storage_size(item, f"{where}.{name}") for name, item in vars(value).items())
    if type(value) in PLAIN_TYPES:
        return 0
    kind = type(value).__name__
    raise TypeError(f"{where} is a {kind}, which a checkpoint cannot hold; store plain values or tensors")


def store_checkpoint(output_dir: str | Path, state: dict, keep: int = 2, best: bool = False) -> Path:
    """Write checkpoint-STEP.pth (`state["step"]`), point `checkpoint.pth` at it, and drop old ones.

    The newest `keep` files stay, and the one that `best_checkpoint.pth` points at: this one if `best`. Files
    of later steps, which a run resumed from further back has abandoned, count as the oldest.
    """
    if keep < 2:
        raise ValueError(f"keep={keep}: at least 2, so that a damaged newest file leaves one to resume from")
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"checkpoint-{state['step']:08d}.pth"
    _remove_leftovers(folder)
    save_checkpoint(path, state | {"is_best": best})
    if best:  # first: killed in between, a resumed run repeats the epoch and comes here again, or goes by `keep_best`
        _point(folder / "best_checkpoint.pth", path.name)
    _point(folder / "checkpoint.pth", path.name)
    best_path = (folder / "best_checkpoint.pth").resolve()
    for old in _stored(folder)[keep:]:
        if old.resolve() != best_path:
            old.unlink()
            digest_path(old).unlink(missing_ok=True)
    return path


class CheckpointWriter:
    """Stores checkpoints in a thread, one at a time, so that training goes on meanwhile.

    `store` returns as soon as the state is copied. An error of the thread is kept: nothing is written after
    it, `failed` tells, and `wait` raises it. `check` is called before each, and raises where none is to be written.
    """

    def __init__(self, check: Callable[[], None] = lambda: None):
        self.check = check
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None

    def store(self, output_dir: str | Path, state: dict, keep: int, best: bool) -> None:
        """Copy `state` onto the CPU and begin to write it as `store_checkpoint` does."""
        self.join()
        if not self.failed:
            self._thread = threading.Thread(target=self._write, args=(output_dir, _copied(state), keep, best))
            self._thread.start()

    def _write(self, output_dir: str | Path, state: dict, keep: int, best: bool) -> None:
        try:
            self.check()
            store_checkpoint(output_dir, state, keep, best)
        except Exception as error:  # raised by `wait`, in the thread that can do something about it
            self._error = error

    @property
    def failed(self) -> bool:
        """Whether a checkpoint could not be written."""
        return self._error is not None

    def join(self) -> None:
        """Return when nothing is being written any more."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def wait(self) -> None:
        """`join`, then raise what went wrong with the last checkpoint, if anything did."""
        self.join()
        if self._error is not None:
            raise self._error


def _copied(value: Any) -> Any:
    """A nested state whose tensors, now on the CPU, no longer change while training goes on."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if type(value) in (dict, OrderedDict):
        return type(value)((key, _copied(item)) for key, item in value.items())
    if type(value) in (list, tuple):
        return type(value)(map(_copied, value))
    return copy.deepcopy(value)


def _remove_leftovers(folder: Path) -> None:
    """Temporary files of a process that was killed while it wrote."""
    for leftover in folder.glob(".*checkpoint*.tmp"):
        leftover.unlink()


def _point(link: Path, target: str) -> None:
    """Make `link` a symbolic link to `target` beside it; a file of another program in its place is kept."""
    temporary = link.with_name(f".{link.name}.tmp")
    try:
        if link.exists() and not link.is_symlink():
            names = (link.with_name(f"{link.stem}-before{number or ''}{link.suffix}") for number in itertools.count())
            link.rename(next(name for name in names if not name.exists()))
        temporary.unlink(missing_ok=True)
        temporary.symlink_to(target)
        os.replace(temporary, link)
        _sync_folder(link.parent)
    except OSError as error:
        raise _not_written(link, error) from error


def own_checkpoint(output_dir: str | Path, file: Path) -> bool:
    """Whether a file lies in `output_dir` under a name that a run gives its checkpoints."""
    file = file.resolve()
    named = _step_of(file.name) is not None or file.name in ("checkpoint.pth", "best_checkpoint.pth")
    return bool(output_dir) and named and file.parent == Path(output_dir).resolve()


def keep_best(checkpoint: Checkpoint) -> None:
    """Point `best_checkpoint.pth` at a run's own file that is the best, in case its process died before it did so."""
    file = checkpoint.path.resolve()
    link = file.with_name("best_checkpoint.pth")
    if not checkpoint.is_best or _step_of(file.name) is None:
        return
    if not link.exists() or (link.is_symlink() and link.resolve() != file):
        _point(link, file.name)


def set_back(file: Path, trust: bool = False) -> list[Path]:
    """Let a run's folder go on from one of its checkpoints; returns those of later steps, the newest first.

    `checkpoint.pth` and `best_checkpoint.pth` are files where a copy of the folder followed its links.
    """
    step = _step_of(file.name)
    if step is not None:
        _point(file.with_name("checkpoint.pth"), file.name)
    else:
        step = read_checkpoint(file, trust).step
    if step is None:  # another program's
        return []
    return [path for path in _stored(file.parent) if _step_of(path.name) > step]


def _stored(folder: Path) -> list[Path]:
    """Files checkpoint-STEP.pth, the newest first.

    That is the one `checkpoint.pth` points at, then back from there; last those of later steps, which a run
    that was resumed from further back has abandoned.
    """
    steps = {path: step for path in folder.iterdir() if (step := _step_of(path.name)) is not None}
    link = folder / "checkpoint.pth"
    current = _step_of(os.readlink(link)) if link.is_symlink() else None
    return sorted(steps, key=lambda path: (current is None or steps[path] <= current, steps[path]), reverse=True)


def _step_of(name: str) -> int | None:
    match = CHECKPOINT_NAME.fullmatch(name)
    return int(match[1]) if match else None


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr, flush=True)


def latest_checkpoint(output_dir: str | Path, on_rejected: Callable[[str], None] = _warn) -> Path | None:
    """The newest checkpoint-STEP.pth in a folder whose digest holds; None where there is none at all.

    `on_rejected` is told about each newer one that is damaged. Raises CheckpointError with every reason if
    there are checkpoints and all of them are damaged.
    """
    folder = Path(output_dir)
    reasons = []
    for path in _stored(folder) if folder.is_dir() else []:
        reason = _damage(path)
        if reason is None:
            return path
        reasons.append(reason)
        on_rejected(f"checkpoint passed over: {reason}")
    if reasons:
        raise CheckpointError(f"no usable checkpoint in {folder}: {'; '.join(reasons)}")
    return None


def _damage(path: Path) -> str | None:
    side = digest_path(path)
    if not side.is_file():
        return f"{path} has no {side.name} beside it, so nobody knows whether it is whole"
    try:
        _check_digest(path, file_digest(path))
    except (CheckpointError, OSError) as error:
        return _reason(error)
    return None


def _reason(error: Exception) -> str:
    """An error's first sentence; its class where that says nothing, and before a bare word such as a KeyError's."""
    first = first_sentence(error)
    return first if " " in first else ": ".join(filter(None, (type(error).__name__, first)))


if __name__ == "__main__":
    import hub  # the commands `python checkpoint.py inspect` and `export`, which read files by this module

    sys.exit(hub.main())
