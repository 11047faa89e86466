"""Weight files: published and own forms, hostile and damaged ones, atomic saving."""

import argparse
import os
import pickle
import random
import re
import resource
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

import checkpoint
from checkpoint import (
    Checkpoint,
    CheckpointError,
    compare_classes,
    file_digest,
    latest_checkpoint,
    read_checkpoint,
    save_checkpoint,
    store_checkpoint,
)
from errors import ConfigError
from fitting import load_weights
from small_weights import equal, filled, vim


def published(model: torch.nn.Module, **entries) -> dict:
    """A training checkpoint as the published ones are."""
    return {
        "model": filled(model, 1),
        "optimizer": {"state": {}, "param_groups": [{"lr": 1e-3, "params": [0]}]},
        "lr_scheduler": {"base_values": [1e-3]},
        "epoch": 299,
        "model_ema": filled(model, 2),
        "scaler": {"scale": 65536.0},
        "args": argparse.Namespace(model="vim", lr=5e-4, opt_betas=None, aa="rand-m9"),
    } | entries


def refused(path, **options) -> str:
    """The one line with which a file is refused; it begins with the path."""
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path, **options)
    message = str(caught.value)
    assert "\n" not in message and message.startswith(str(path))
    return message


# Forms of files


def test_none_in_words_is_none(tmp_path):
    """The published program writes its scaler so where it trained without mixed precision."""
    model = torch.nn.Linear(2, 2)
    torch.save(published(model, scaler="none", lr_scheduler="none", optimizer="none"), tmp_path / "x.pth")
    found = read_checkpoint(tmp_path / "x.pth")
    assert (found.scaler, found.lr_scheduler, found.optimizer) == (None, None, None)


def test_published_form(tmp_path):
    content = published(vim())
    torch.save(content, tmp_path / "vim.pth")
    found = read_checkpoint(tmp_path / "vim.pth")
    assert equal(found.weights(), content["model"]) and equal(found.weights("model_ema"), content["model_ema"])
    assert (found.epoch, found.step, found.best_metric) == (299, None, None)
    assert found.args == content["args"] and found.optimizer == content["optimizer"]
    assert found.lr_scheduler == content["lr_scheduler"] and found.scaler == content["scaler"]
    assert found.keys == list(content) and found.sha256 == file_digest(tmp_path / "vim.pth")


def test_legacy_torch_format(tmp_path):
    torch.save(published(vim()), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert equal(read_checkpoint(tmp_path / "old.pth").weights(), filled(vim(), 1))


def test_bare_state_dict_and_safetensors(tmp_path):
    weights = filled(vim())
    torch.save(weights, tmp_path / "bare.pth")
    save_file(weights, tmp_path / "bare.safetensors")
    for name in ("bare.pth", "bare.safetensors"):
        found = read_checkpoint(tmp_path / name)
        assert equal(found.weights(), weights) and found.model_ema is None and found.keys == []


def test_timm_names(tmp_path):
    torch.save({"state_dict": filled(vim(), 1), "state_dict_ema": filled(vim(), 2)}, tmp_path / "timm.pth")
    found = read_checkpoint(tmp_path / "timm.pth")
    assert equal(found.weights(), filled(vim(), 1)) and equal(found.weights("model_ema"), filled(vim(), 2))


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module."])
def test_wrappers_prefixes_are_taken_off(prefix, tmp_path):
    wrapped = {prefix + name: value for name, value in filled(vim()).items()}
    torch.save({"model": wrapped, "model_ema": wrapped}, tmp_path / "wrapped.pth")
    found = read_checkpoint(tmp_path / "wrapped.pth")
    assert equal(found.weights(), filled(vim())) and equal(found.weights("model_ema"), filled(vim()))
    model = vim()
    load_weights(model, wrapped)
    assert equal(model.state_dict(), filled(vim()))


def test_other_entries_are_kept(tmp_path):
    torch.save(published(vim(), progress={"samples": 12}, step=7), tmp_path / "own.pth")
    found = read_checkpoint(tmp_path / "own.pth")
    assert found.extra == {"progress": {"samples": 12}} and found.step == 7


def test_weights_that_are_not_there(tmp_path):
    torch.save({"model": filled(vim()), "epoch": 3}, tmp_path / "raw.pth")
    with pytest.raises(CheckpointError, match="holds no 'model_ema'; it holds: model, epoch"):
        read_checkpoint(tmp_path / "raw.pth").weights("model_ema")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"epoch": 3, "args": None}, "holds no weights under 'model' or 'model_ema', only: epoch, args"),
        ({}, "holds no weights under 'model' or 'model_ema', only: nothing"),
        ([torch.zeros(1)], "holds a list, expected a dict"),
        ({"model": {"weight": 3.0}}, "'model' is a dict, expected a dict of tensors"),
    ],
    ids=["no weights", "empty", "list", "numbers"],
)
def test_files_that_hold_something_else(content, said, tmp_path):
    torch.save(content, tmp_path / "other.pth")
    assert said in refused(tmp_path / "other.pth")


# Files that cannot be had


def test_missing_file_and_folder(tmp_path):
    assert "does not exist; give a checkpoint file" in refused(tmp_path / "none.pth")
    assert "is a folder" in refused(tmp_path)


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_file_cut_short(suffix, share, tmp_path):
    path = tmp_path / f"cut.{suffix}"
    save_file(filled(vim()), path) if suffix == "safetensors" else torch.save(published(vim()), path)
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    assert "is damaged or no" in refused(path)


def test_text_file(tmp_path):
    (tmp_path / "page.pth").write_text("<!doctype html><title>404</title>")
    assert "is damaged or no checkpoint" in refused(tmp_path / "page.pth")


class RunsCode:
    """Unpickled, it makes a folder."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder),)


def hostile_files(tmp_path) -> dict[str, Path]:
    content = {"model": filled(vim()), "args": RunsCode(tmp_path / "ran")}
    paths = {f"pickle protocol {number}": tmp_path / f"{number}.pth" for number in range(6)}
    for number, path in enumerate(paths.values()):
        path.write_bytes(pickle.dumps(content["args"], protocol=number))
    paths |= {"zip": tmp_path / "zip.pth", "legacy": tmp_path / "legacy.pth"}
    torch.save(content, paths["zip"])
    torch.save(content, paths["legacy"], _use_new_zipfile_serialization=False)
    return paths


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_pickle_that_would_run_code_does_not_and_its_name_is_said(tmp_path):
    for form, path in hostile_files(tmp_path).items():
        assert re.search(r"asks for \w+\.mkdir, .* --trust-checkpoint", refused(path)), form
    assert not (tmp_path / "ran").exists()


def test_trusting_a_file_runs_it(tmp_path):
    """The control: without the safe loader these files do what they say."""
    read_checkpoint(hostile_files(tmp_path)["zip"], trust=True)
    assert (tmp_path / "ran").is_dir()


def test_only_namespace_is_allowed_and_only_while_loading(tmp_path):
    torch.save(published(vim(), best=np.float64(3.0)), tmp_path / "numpy.pth")
    assert "numpy._core.multiarray.scalar" in refused(tmp_path / "numpy.pth")
    torch.save(published(vim()), tmp_path / "vim.pth")
    read_checkpoint(tmp_path / "vim.pth")
    with pytest.raises(pickle.UnpicklingError, match=r"argparse\.Namespace"):
        torch.load(tmp_path / "vim.pth", weights_only=True)


def test_hub_names(hub_cache):
    repo, fine_tuned = "hustvl/Vim-tiny-midclstok", "vim_t_midclstok_ft_78p3acc.pth"
    hub_cache(repo, "vim_t_midclstok_76p1acc.pth", {"model": filled(vim(), 1)})
    hub_cache(repo, fine_tuned, {"model": filled(vim(), 2)})
    assert equal(read_checkpoint(f"hf-hub:{repo}").weights(), filled(vim(), 1))
    assert equal(read_checkpoint(f"hf-hub:{repo}/{fine_tuned}").weights(), filled(vim(), 2))


def test_hub_without_a_network_says_what_to_do(hub_cache):
    message = refused("hf-hub:hustvl/Vim-small-midclstok")
    assert "hf download hustvl/Vim-small-midclstok vim_s_midclstok_80p5acc.pth" in message
    assert "expected hf-hub:OWNER/REPO" in refused("hf-hub:vim")


def test_web_addresses_are_fetched_once(tmp_path, monkeypatch):
    fetched = []

    def download(url, file, progress):
        fetched.append(url)
        torch.save(published(vim()), file)

    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    for _ in range(2):
        found = read_checkpoint("https://example.org/weights/vim.pth?download=true")
        assert equal(found.weights(), filled(vim(), 1))
    assert fetched == ["https://example.org/weights/vim.pth?download=true"]
    read_checkpoint("https://example.org/other/vim.pth")
    assert len(fetched) == 2, "another file of the same name"


def test_web_address_that_cannot_be_reached(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    assert "cannot be downloaded" in refused("https://127.0.0.1:9/vim.pth")


def test_classes_of_one_name_are_no_other_numbers():
    """ImageNet's words have two cranes. What differs is told, and a number that is another one's is refused."""
    names = ["crane", "dog", "crane", "cat"]
    file = Checkpoint(path=Path("a.pth"), sha256="", model={}, extra={"class_names": names})
    assert compare_classes(file, names, "") == ""
    assert "'bird' for 'dog'" in compare_classes(file, ["crane", "bird", "crane", "cat"], "")
    with pytest.raises(ConfigError, match=r"'cat' is 1 in the data and 3 there; or else"):
        compare_classes(file, ["crane", "cat", "crane", "dog"], "or else")


# Saving

PLAIN_VALUES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.complex_numbers(allow_nan=False),
    st.text(max_size=5),
    st.sampled_from([torch.device("cpu"), torch.bfloat16, torch.Size([2, 3])]),
)
TENSORS = st.builds(
    lambda shape, dtype: torch.arange(int(np.prod(shape))).reshape(shape).to(dtype),
    st.lists(st.integers(0, 3), max_size=3),
    st.sampled_from([torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool]),
)
STATES = st.recursive(
    PLAIN_VALUES | TENSORS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=2).map(tuple)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
        | st.dictionaries(st.sampled_from("abc"), inner, max_size=2).map(lambda d: argparse.Namespace(**d))
    ),
    max_leaves=12,
)


def same(a, b) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict | argparse.Namespace):
        a, b = (value if isinstance(value, dict) else vars(value) for value in (a, b))
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


@given(STATES)
def test_any_nested_state_comes_back(tmp_path_factory, state):
    path = tmp_path_factory.getbasetemp() / "nested.pth"
    digest = save_checkpoint(path, {"model": {"weight": torch.ones(1)}, "state": state})
    found = read_checkpoint(path)
    assert same(found.extra["state"], state) and found.sha256 == digest == file_digest(path)


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"rng": [np.random.get_state()[1]]}, r"state\['rng'\]\[0\] is a ndarray"),
        ({"best": np.float64(1)}, r"state\['best'\] is a float64"),
        ({"args": argparse.Namespace(path=Path("x"))}, r"state\['args'\]\.path is a PosixPath"),
    ],
    ids=["array", "numpy number", "path"],
)
def test_what_the_safe_loader_would_refuse_is_not_written(entry, said, tmp_path):
    with pytest.raises(TypeError, match=said):
        save_checkpoint(tmp_path / "a.pth", entry)
    assert list(tmp_path.iterdir()) == []


def state_of(step: int, size: int = 1000) -> dict:
    return {"model": {"weight": torch.full((size,), float(step))}, "step": step}


def step_in(path: Path) -> int:
    found = read_checkpoint(path)
    assert (found.weights()["weight"] == found.step).all()
    return found.step


def test_a_digest_in_capitals_is_the_same(tmp_path):
    """As PowerShell's Get-FileHash writes it."""
    digest = save_checkpoint(tmp_path / "a.pth", {"model": {"w": torch.ones(2)}})
    (tmp_path / "a.pth.sha256").write_text(digest.upper())
    assert read_checkpoint(tmp_path / "a.pth").sha256 == digest


def test_digest_file_is_readable_by_sha256sum(tmp_path):
    for step in range(2):
        digest = save_checkpoint(tmp_path / "a.pth", state_of(step))
    assert (tmp_path / "a.pth.sha256").read_text() == f"{digest}  a.pth\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.pth.sha256"]


def test_overwriting_a_file_without_a_digest_never_makes_it_look_damaged(tmp_path, monkeypatch):
    path = tmp_path / "a.pth"
    torch.save(state_of(1), path)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.os, "replace", stop_before(path, os.replace))
        with pytest.raises(KeyboardInterrupt):
            save_checkpoint(path, state_of(2))
    assert step_in(path) == 1
    save_checkpoint(path, state_of(3))
    assert step_in(path) == 3


def stop_before(path: Path, replace):
    """os.replace that is interrupted when it is about to write `path`."""

    def interrupted(source, target):
        if Path(target) == path:
            raise KeyboardInterrupt
        replace(source, target)

    return interrupted


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    """Else the name could outlive a power failure, and what it stands for could not."""
    synced, true_sync, true_replace = set(), os.fsync, os.replace

    def sync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        true_sync(descriptor)

    def replace(source, target):
        assert os.stat(source).st_ino in synced
        synced.discard(tmp_path.stat().st_ino)
        true_replace(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", sync)
    monkeypatch.setattr(checkpoint.os, "replace", replace)
    save_checkpoint(tmp_path / "a.pth", state_of(1))
    assert tmp_path.stat().st_ino in synced, "the folder with the new name"


def test_one_flipped_bit_is_found(tmp_path):
    save_checkpoint(tmp_path / "a.pth", state_of(1))
    content = bytearray((tmp_path / "a.pth").read_bytes())
    content[content.find(np.float32(1).tobytes() * 8)] ^= 1
    (tmp_path / "a.pth").write_bytes(content)
    assert "is damaged: its SHA-256 is not the one noted in a.pth.sha256" in refused(tmp_path / "a.pth")
    (tmp_path / "a.pth.sha256").unlink()
    read_checkpoint(tmp_path / "a.pth")  # the control: torch itself sees nothing


@pytest.fixture
def no_file_larger_than():
    """Sets a limit on the size of files, which is how a full disk looks to a writer."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_write_that_fails_half_way_leaves_the_old_file(tmp_path, no_file_larger_than):
    path = tmp_path / "a.pth"
    save_checkpoint(path, state_of(1))
    no_file_larger_than(100_000)
    with pytest.raises(CheckpointError, match=r"a\.pth was not written: .*; the last checkpoint is untouched"):
        save_checkpoint(path, state_of(2, size=1_000_000))
    assert step_in(path) == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "a.pth.sha256"]


def test_too_little_space_is_found_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint.shutil, "disk_usage", lambda folder: argparse.Namespace(free=1000))
    with pytest.raises(CheckpointError, match=r"takes 3\.8 MiB, 0\.0 MiB are free; .* another --output_dir"):
        save_checkpoint(tmp_path / "a.pth", state_of(1, size=1_000_000))
    assert list(tmp_path.iterdir()) == []


def killed_while_saving(save, delay: float) -> None:
    """Run `save(1)`, `save(2)`, ... in a child process and kill it some seconds after the first is done."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # a forked process lacks OpenMP's other threads and would wait for them
        for step in range(1, 10_000):
            save(step)
            os.write(writer, b".")
        os._exit(0)
    os.close(writer)
    os.read(reader, 1)
    time.sleep(delay)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(reader)


KILLS = [random.Random(number).uniform(0, 0.03) for number in range(20)]


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_whole_file(tmp_path):
    path = tmp_path / "a.pth"
    for delay in KILLS:
        killed_while_saving(lambda step: save_checkpoint(path, state_of(step, size=100_000)), delay)
        assert step_in(path) >= 1


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_a_kill_at_any_moment_leaves_a_checkpoint_to_resume_from(tmp_path):
    last = 0
    for delay in KILLS:
        killed_while_saving(
            lambda step, last=last: store_checkpoint(tmp_path, state_of(last + step), best=step % 3 == 0),
            delay,
        )
        assert step_in(latest_checkpoint(tmp_path)) > last
        last = step_in(latest_checkpoint(tmp_path))
    store_checkpoint(tmp_path, state_of(10**6))
    assert not list(tmp_path.glob(".*")), "temporary files of killed writers are cleared away"


# A run's folder of checkpoints


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("checkpoint-*.pth"))


def test_the_best_one_is_pointed_at_first(tmp_path, monkeypatch):
    """Killed between the two links, a run repeats the epoch, but only if the newest one is still that before it."""
    pointed, point = [], checkpoint._point
    monkeypatch.setattr(checkpoint, "_point", lambda link, target: (pointed.append(link.name), point(link, target)))
    store_checkpoint(tmp_path, state_of(1), best=True)
    assert pointed == ["best_checkpoint.pth", "checkpoint.pth"]


def test_newest_two_and_best_stay(tmp_path):
    folder = tmp_path / "made" / "on demand"
    for step in range(1, 8):
        store_checkpoint(folder, state_of(step), best=step == 3)
    assert names(folder) == [f"checkpoint-0000000{step}.pth" for step in (3, 6, 7)]
    assert step_in(folder / "checkpoint.pth") == 7 and step_in(folder / "best_checkpoint.pth") == 3
    store_checkpoint(folder, state_of(8), best=True)
    assert names(folder) == [f"checkpoint-0000000{step}.pth" for step in (7, 8)]
    assert len(list(folder.glob("*.sha256"))) == 2


def test_keeping_fewer_than_two_is_refused(tmp_path):
    with pytest.raises(ValueError, match="keep=1: at least 2"):
        store_checkpoint(tmp_path, state_of(1), keep=1)


def test_newest_by_step_where_nothing_points(tmp_path):
    for step in (99, 10**8):
        store_checkpoint(tmp_path, state_of(step), keep=3)
    (tmp_path / "checkpoint.pth").unlink()
    assert step_in(latest_checkpoint(tmp_path)) == 10**8


def test_run_resumed_from_further_back_abandons_later_steps(tmp_path):
    for step in (10, 20, 30, 40):
        store_checkpoint(tmp_path, state_of(step), keep=4, best=step == 40)
    store_checkpoint(tmp_path, state_of(15))
    assert names(tmp_path) == [f"checkpoint-000000{step}.pth" for step in (10, 15, 40)], "40 is the best one"
    assert step_in(latest_checkpoint(tmp_path)) == 15


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])


def flip(path: Path, bit: int = 1) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= bit
    path.write_bytes(content)


DAMAGES = {
    "empty": lambda path: cut(path, 0),
    "cut at 30 %": lambda path: cut(path, 0.3),
    "cut at 90 %": lambda path: cut(path, 0.9),
    "cut at 99.9 %": lambda path: cut(path, 0.999),
    "one bit": flip,
    "deleted": lambda path: path.unlink(),
    "digest deleted": lambda path: path.with_name(path.name + ".sha256").unlink(),
    "the digest no longer text": lambda path: flip(path.with_name(path.name + ".sha256"), 0x80),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_newest_is_passed_over_aloud(damage, tmp_path):
    for step in (1, 2):
        path = store_checkpoint(tmp_path, state_of(step))
    damage(path)
    said = []
    assert step_in(latest_checkpoint(tmp_path, said.append)) == 1
    assert all(path.name in line for line in said) and len(said) == path.exists()


def test_warning_goes_to_stderr(tmp_path, capsys):
    for step in (1, 2):
        path = store_checkpoint(tmp_path, state_of(step))
    flip(path)
    latest_checkpoint(tmp_path)
    assert capsys.readouterr().err.startswith("warning: checkpoint passed over: ")


def test_nothing_usable_names_every_reason(tmp_path):
    for step in (1, 2):
        flip(store_checkpoint(tmp_path, state_of(step)))
    with pytest.raises(CheckpointError, match=r"no usable checkpoint .*00002\.pth is damaged.*00001\.pth is damaged"):
        latest_checkpoint(tmp_path, lambda message: None)


def test_no_checkpoint_at_all(tmp_path):
    assert latest_checkpoint(tmp_path) is None
    assert latest_checkpoint(tmp_path / "none") is None
