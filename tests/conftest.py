"""What holds for every test of the program."""

import signal

import pytest

from distributed import StopSignal


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
