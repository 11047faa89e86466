"""The published kernels as a peer: Vim's mixer composed from the public functions of mamba-ssm and causal-conv1d.

`benchmarks/build_published.sh` builds them into output/published, outside the environment, because one of them has
the import name of this repository's package; PUBLISHED_PREBUILT names another folder, built before. Here they are
imported from that folder while ours step aside; both then live in one process, and rivals are timed in turns.
"""

import contextlib
import functools
import importlib
import os
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from harness import ROOT

FOLDER = Path(os.environ.get("PUBLISHED_PREBUILT") or ROOT / "output" / "published").resolve()
PACKAGES = ("mamba_ssm", "causal_conv1d")
EXTENSIONS = ("selective_scan_cuda", "causal_conv1d_cuda")


class Kernels(NamedTuple):
    """The public functions, as their packages document them; tensors (B, D, L)."""

    scan: Callable  # (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    conv: Callable  # (x, weight, bias, activation=...)


def _of(names: tuple[str, ...]) -> list[str]:
    return [name for name in sys.modules if name.partition(".")[0] in names]


@contextlib.contextmanager
def packages_from(folder: Path) -> Iterator[None]:
    """Import the packages of these names from `folder`; those imported before come back afterwards."""
    ours = {name: sys.modules.pop(name) for name in _of(PACKAGES)}
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        # Not the package's own __init__: it imports language models and what they need.
        shell = types.ModuleType("mamba_ssm")
        shell.__path__ = [str(folder / "mamba_ssm")]
        sys.modules["mamba_ssm"] = shell
        yield
    finally:
        sys.path.remove(str(folder))
        for name in _of(PACKAGES):
            del sys.modules[name]
        sys.modules.update(ours)
        importlib.invalidate_caches()


@functools.cache
def kernels(folder: Path = FOLDER) -> Kernels:
    """The published functions; ImportError where they are not built, or built for another torch."""
    if not folder.is_dir():
        raise ImportError(f"not built (benchmarks/build_published.sh builds them into {folder})")
    with packages_from(folder):
        for name in EXTENSIONS:
            importlib.import_module(name)
        scan = importlib.import_module("mamba_ssm.ops.selective_scan_interface").selective_scan_fn
        conv = importlib.import_module("causal_conv1d").causal_conv1d_fn
    return Kernels(scan, conv)


def missing() -> str | None:
    """Why the published kernels take no part, or None."""
    try:
        kernels()
    except ImportError as error:
        return str(error)
    return None


class PublishedMixer(nn.Module):
    """The bidirectional mixer as the published Vim composes it: each direction on its own, one of them flipped.

    Holds the parameters of one of our `Mamba` modules of type "v2", so that both compute the same function.
    """

    def __init__(self, mixer: nn.Module, functions: Kernels):
        super().__init__()
        if mixer.bimamba_type != "v2" or mixer.init_layer_scale is not None:
            raise ValueError("the published composition is that of bimamba_type='v2' without layer scale")
        self.mixer, self.functions = mixer, functions

    def _direction(self, xz: Tensor, suffix: str) -> Tensor:
        """(B, 2 D, L) -> (B, D, L), gated."""
        conv, x_proj, dt_proj = (getattr(self.mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
        A_log = self.mixer.A_b_log if suffix else self.mixer.A_log
        x, z = xz.chunk(2, dim=1)
        x = self.functions.conv(x, conv.weight.squeeze(1).to(x.dtype), conv.bias.to(x.dtype), activation="silu")
        projected = F.linear(x.transpose(1, 2), x_proj.weight)  # (B, L, R + 2 N)
        states = A_log.shape[1]
        dt, B, C = projected.split([projected.shape[-1] - 2 * states, states, states], dim=-1)
        delta = torch.matmul(dt_proj.weight, dt.transpose(1, 2))  # (B, D, L)
        B, C = (m.transpose(1, 2).contiguous() for m in (B, C))  # (B, N, L)
        return self.functions.scan(
            x, delta, -torch.exp(A_log.float()), B, C, getattr(self.mixer, "D" + suffix).float(), z,
            dt_proj.bias.float(), True,
        )  # fmt: skip

    def forward(self, hidden: Tensor) -> Tensor:
        """(B, L, E) -> (B, L, E)."""
        xz = torch.matmul(self.mixer.in_proj.weight, hidden.transpose(1, 2))  # (B, 2 D, L)
        y = self._direction(xz, "") + self._direction(xz.flip(-1), "_b").flip(-1)
        if self.mixer.if_divide_out:
            y = y / 2
        return self.mixer.out_proj(y.transpose(1, 2))


def use_published_kernels(model: nn.Module, functions: Kernels) -> nn.Module:
    """Replace every mixer of a Vim in place; parameters stay the same objects."""
    for block in model.layers:
        block.mixer = PublishedMixer(block.mixer, functions)
    return model
