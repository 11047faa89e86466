"""Entry points of the Triton backend, loaded by `ops/backend.py`. ImportError where Triton is not installed."""

import torch

from mamba_ssm.ops.backend import argument_of_dtype
from mamba_ssm.ops.triton.bimamba import bimamba_backward, bimamba_forward, bimamba_saved_bytes
from mamba_ssm.ops.triton.common import DTYPES, unavailable_reason
from mamba_ssm.ops.triton.norm_kernels import MAX_WIDTH, add_norm_backward, add_norm_forward
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


def unsupported(
    op: str, dtype: torch.dtype, d_state: int | None = None, d_conv: int | None = None, width: int | None = None
) -> str | None:
    """Why these kernels do not serve such arguments, or None."""
    if dtype not in DTYPES:
        served = "the Triton kernels serve float32, bfloat16 and float16"
        return f"{op}: {argument_of_dtype(op, dtype)} of dtype {dtype}, {served}"
    if d_state is not None and not 1 <= d_state <= MAX_STATES:
        return f"{op}: A with d_state={d_state}, the Triton kernels serve 1 to {MAX_STATES}"
    if d_conv is not None and not 2 <= d_conv <= 4:
        return f"{op}: conv_weight with d_conv={d_conv}, the Triton kernels serve 2 to 4"
    if width is not None and width > MAX_WIDTH:
        return f"{op}: rows of width {width}, the Triton kernels serve at most {MAX_WIDTH}"
    return None
