"""Mixed precision: what computes in which type."""

from __future__ import annotations

import torch


def autocast(args, device: torch.device):
    """Mixed precision as `--if_amp` and `--amp-dtype` say; the scan's state is float32 in any case."""
    return torch.autocast(device.type, getattr(torch, args.amp_dtype), enabled=args.if_amp)


def build_scaler(args, device: torch.device) -> torch.amp.GradScaler:
    """Loss scaling, which only float16 needs."""
    return torch.amp.GradScaler(device.type, enabled=args.if_amp and args.amp_dtype == "float16")
