"""Selective state spaces for vision: the Mamba block, one- and bidirectional, and the operations it is made of."""

from mamba_ssm.modules.bimamba import BiMamba
from mamba_ssm.modules.mamba_simple import Mamba
from mamba_ssm.ops.selective_scan_interface import (
    bimamba_inner_fn,
    mamba_inner_fn,
    mamba_inner_fn_no_out_proj,
    selective_scan_fn,
)

__version__ = "1.1.1+vim"

__all__ = ["BiMamba", "Mamba", "bimamba_inner_fn", "mamba_inner_fn", "mamba_inner_fn_no_out_proj", "selective_scan_fn"]
