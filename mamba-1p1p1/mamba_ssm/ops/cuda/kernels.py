"""Entry points of the CUDA backend, loaded by `ops/backend.py` on NVIDIA GPUs.

The bidirectional mixer with 16-bit activations runs in CUDA C++ (`bimamba.py`), everything else in Triton.
ImportError where Triton is not installed.
"""

from mamba_ssm.ops.cuda.bimamba import (
    bimamba_backward,
    bimamba_forward,
    bimamba_saved_bytes,
    half_block_backward,
    half_block_forward,
    serves_block,
)
from mamba_ssm.ops.cuda.runtime import unavailable_reason
from mamba_ssm.ops.triton.kernels import (
    add_norm_backward,
    add_norm_forward,
    selective_scan_backward,
    selective_scan_forward,
    selective_scan_saved_bytes,
    unsupported,
)

__all__ = [
    "add_norm_backward",
    "add_norm_forward",
    "bimamba_backward",
    "bimamba_forward",
    "bimamba_saved_bytes",
    "half_block_backward",
    "half_block_forward",
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_scan_saved_bytes",
    "serves_block",
    "unavailable_reason",
    "unsupported",
]
