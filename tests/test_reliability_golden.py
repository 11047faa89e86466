"""Golden runs: the losses of 50 steps are those on file (tests/golden; record.py writes them anew).

The file is recorded with the reference scan, so that a faster kernel has to agree with it rather than redefine it.
"""

import json

import pytest

from golden.record import FILE, RUNS, STEPS, losses, machine

GOLDEN = json.loads(FILE.read_text())
SAME_MACHINE = {name: GOLDEN[name] for name in machine()} == machine()


def agree(found: list[float], expected: list[float], exactly: bool) -> None:
    assert len(found) == STEPS
    assert found == (expected if exactly else pytest.approx(expected, rel=1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("name", RUNS)
def test_the_losses_of_fifty_steps_are_those_on_file(name, monkeypatch):
    monkeypatch.setenv("MAMBA_SSM_BACKEND", "reference")
    monkeypatch.setenv("CAUSAL_CONV1D_BACKEND", "reference")
    agree(losses(RUNS[name]), GOLDEN[name], exactly=SAME_MACHINE)


@pytest.mark.slow
def test_the_kernels_of_this_machine_give_the_same_losses(monkeypatch):
    for variable in ("MAMBA_SSM_BACKEND", "CAUSAL_CONV1D_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    agree(losses(RUNS["vim"]), GOLDEN["vim"], exactly=False)


@pytest.mark.parametrize(("change", "exactly"), [(1e-4, False), (1e-7, True)])
def test_the_comparison_sees_one_other_loss(change, exactly):
    """The control."""
    found = list(GOLDEN["vim"])
    found[-1] *= 1 + change
    with pytest.raises(AssertionError):
        agree(found, GOLDEN["vim"], exactly)
