"""What holds for every test of the program."""

import signal
from functools import partial
from importlib.util import find_spec

import pytest
from huggingface_hub import constants

from distributed import StopSignal
from helpers import write_hub_file

WITHOUT_COCO = find_spec("pycocotools") is None  # as where only the GPU's tests are to be run
collect_ignore = ["test_det_data.py", "test_det_evaluation.py", "test_det_program.py"] if WITHOUT_COCO else []


def pytest_report_header():
    return f"left out, for want of pycocotools: {', '.join(collect_ignore)}" if WITHOUT_COCO else None


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """No network and an empty Hub cache; returns what puts a file of a repository into it, see `write_hub_file`."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return partial(write_hub_file, tmp_path / "hub")


@pytest.fixture(autouse=True)
def signals_from_outside_end_the_tests(monkeypatch):
    """A run under test would take a signal to pytest for its own: stop, save, and let the next test begin.

    The tests' own signals come from `signal.raise_signal`.
    """
    own, true_raise, true_remember = [], signal.raise_signal, StopSignal._remember

    def raise_signal(number):
        own.append(number)
        true_raise(number)

    def remember(self, number, frame):
        if number not in own:
            raise KeyboardInterrupt(signal.Signals(number).name)
        own.remove(number)
        true_remember(self, number, frame)

    monkeypatch.setattr(signal, "raise_signal", raise_signal)
    monkeypatch.setattr(StopSignal, "_remember", remember)
