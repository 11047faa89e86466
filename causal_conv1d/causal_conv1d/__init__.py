"""Short causal depthwise 1-D convolution: `causal_conv1d_fn`, its one-step update, and backends."""

from causal_conv1d.causal_conv1d_interface import (
    causal_conv1d_fn,
    causal_conv1d_ref,
    causal_conv1d_update,
    causal_conv1d_update_ref,
)
from causal_conv1d.causal_conv1d_varlen import causal_conv1d_varlen_states

__version__ = "1.1.0+vim"

__all__ = [
    "causal_conv1d_fn",
    "causal_conv1d_ref",
    "causal_conv1d_update",
    "causal_conv1d_update_ref",
    "causal_conv1d_varlen_states",
]
