"""The Triton backend's door: what `ops/backend.py` loads. ImportError where Triton is not installed."""

import torch

from mamba_ssm.ops.backend import argument_of_dtype
from mamba_ssm.ops.triton.bimamba import bimamba_backward, bimamba_forward, bimamba_saved_bytes
from mamba_ssm.ops.triton.common import DTYPES, unavailable_reason
from mamba_ssm.ops.triton.norm_kernels import add_norm_backward, add_norm_forward
from mamba_ssm.ops.triton.selective_scan import (
    MAX_STATES,
    selective_scan_backward,
    selective_scan_forward,
    selective_scan_saved_bytes,
)

__all__ = [
    "add_norm_backward",
    "add_norm_forward",
    "bimamba_backward",
    "bimamba_forward",
    "bimamba_saved_bytes",
    "selective_scan_backward",
    "selective_scan_forward",
    "selective_scan_saved_bytes",
    "unavailable_reason",
    "unsupported",
]


def unsupported(op: str, dtype: torch.dtype, d_state: int | None, d_conv: int | None) -> str | None:
    """Why these kernels do not serve an op on such arguments, or None."""
    if dtype not in DTYPES:
        served = "only float32, bfloat16 and float16: use the reference backend"
        return f"{op}: {argument_of_dtype(op, dtype)} of dtype {dtype} is not served, {served}"
    if d_state is not None and d_state > MAX_STATES:
        return f"{op}: A with d_state = {d_state} has more than the {MAX_STATES} served: use the reference backend"
    if d_conv is not None and not 2 <= d_conv <= 4:
        return f"{op}: conv_weight with d_conv = {d_conv} is not served, only 2, 3 and 4: use the reference backend"
    return None
