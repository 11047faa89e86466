"""Golden runs: the losses of 50 steps are those on file (tests/golden; record.py writes them anew).

The file is recorded with the reference scan, so that a faster kernel has to agree with it rather than redefine it.
"""

import json

import pytest

from golden.record import EXACT, FILE, RUNS, STEPS, losses, recorded_anew

GOLDEN = json.loads(FILE.read_text())


def agree(found: list[float], expected: list[float], exactly: bool) -> None:
    assert len(found) == STEPS
    assert found == (expected if exactly else pytest.approx(expected, rel=1e-5))


@pytest.mark.slow
@pytest.mark.parametrize("name", EXACT)
def test_the_losses_of_fifty_steps_are_those_on_file(name):
    """Bit for bit where torch is the same build, which then runs the same code on any processor with AVX2."""
    found = recorded_anew([name])
    agree(found[name], GOLDEN[name], exactly=all(found[key] == GOLDEN[key] for key in ("torch", "cpu")))


@pytest.mark.slow
def test_the_kernels_of_this_machine_give_the_same_losses(monkeypatch):
    """AdamW's, whose last bits follow the processor."""
    for variable in ("MAMBA_SSM_BACKEND", "CAUSAL_CONV1D_BACKEND"):
        monkeypatch.delenv(variable, raising=False)
    agree(losses(RUNS["vim, AdamW"]), GOLDEN["vim, AdamW"], exactly=False)


@pytest.mark.parametrize(("change", "exactly"), [(1e-4, False), (1e-7, True)])
def test_the_comparison_sees_one_other_loss(change, exactly):
    """The control."""
    found = list(GOLDEN["vim"])
    found[-1] *= 1 + change
    with pytest.raises(AssertionError):
        agree(found, GOLDEN["vim"], exactly)
