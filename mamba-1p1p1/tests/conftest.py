"""What the tests of several kinds of kernels share."""

import pytest
import torch


@pytest.fixture
def poisoned():
    """Memory from torch.empty holds NaN, so that what a kernel does not write is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)
