"""Hugging Face transformers, which takes this package's functions by their import names where it is installed.

It calls them by keyword, and leaves out without a word what their signatures do not have.
"""

import pytest
import torch

from mamba_ssm.ops import selective_scan_interface

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 50, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 3}


def new(name):
    torch.manual_seed(0)
    return getattr(transformers, f"{name}ForCausalLM")(getattr(transformers, f"{name}Config")(**SIZES))


@pytest.fixture
def mixers(monkeypatch):
    """A list that grows with every call of our fused mixer."""
    calls, inner = [], selective_scan_interface._inner

    def counted(*arguments):
        calls.append(1)
        return inner(*arguments)

    monkeypatch.setattr(selective_scan_interface, "_inner", counted)
    return calls


def test_mamba_trains_the_function_that_it_evaluates(mixers):
    """It trains by `mamba_inner_fn`, and evaluates by convolution, projections and scan apart."""
    model, tokens = new("Mamba"), torch.randint(2, 50, (2, 11))
    trained = model.train()(tokens, use_cache=False).logits
    if not mixers:
        pytest.skip(f"transformers {transformers.__version__} does not take mamba_ssm by its import name")
    torch.testing.assert_close(trained, model.eval()(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)
    assert len(mixers) == SIZES["num_hidden_layers"]


def test_falcon_mamba_does_not_train_without_its_norms(mixers):
    """Either it says so, or (another version) it does not train by `mamba_inner_fn`."""
    model, tokens = new("FalconMamba"), torch.randint(2, 50, (2, 11))
    try:
        trained = model.train()(tokens, use_cache=False).logits
    except NotImplementedError as error:
        assert "b_rms_weight, c_rms_weight, dt_rms_weight: this mixer has no norms" in str(error)
    else:
        torch.testing.assert_close(trained, model.eval()(tokens, use_cache=False).logits, rtol=1e-5, atol=1e-5)
