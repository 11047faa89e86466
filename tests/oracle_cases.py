"""Rebuild the inputs behind the numbers in `tests/oracle/`: weights, images and op arguments, from names alone."""

import functools
import json
import zlib
from pathlib import Path

import numpy as np
import torch

FOLDER = Path(__file__).parent / "oracle"


@functools.cache
def load_json(name: str):
    return json.loads((FOLDER / name).read_text())


@functools.cache
def load_arrays(name: str) -> dict[str, torch.Tensor]:
    with np.load(FOLDER / name) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


@functools.cache
def op_arrays() -> dict[str, torch.Tensor]:
    """Outputs and gradients of all op cases, under `case/what`."""
    return load_arrays("ops-scan-real.npz") | load_arrays("ops-scan-complex.npz") | load_arrays("ops-rest.npz")


def _normal(name: str, shape) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tuple(shape))


def _filled(name: str, shape) -> np.ndarray:
    n = _normal(name, shape)
    if name.endswith(("A_log", "A_b_log")):
        return np.log(np.arange(1, shape[-1] + 1)) + 0.05 * n
    if name.endswith((".D", ".D_b", "norm.weight", "norm_f.weight", ".gamma")):
        return 1 + 0.1 * n
    if name.endswith(("dt_proj.bias", "dt_proj_b.bias")):
        return -4 + 0.5 * n
    if name.endswith(".weight") and len(shape) >= 2:
        return n / np.sqrt(np.prod(shape[1:]))
    return 0.02 * n


def fill(module: torch.nn.Module, prefix: str = "") -> torch.nn.Module:
    """Give every entry of the state dict its weights, float32 values widened to the module's dtype."""
    state = {
        name: torch.from_numpy(_filled(prefix + name, tensor.shape).astype(np.float32)).to(tensor.dtype)
        for name, tensor in module.state_dict().items()
    }
    module.load_state_dict(state)
    return module


def image(B: int, C: int, H: int, W: int) -> torch.Tensor:
    """The input image of a model case, float32."""
    return torch.from_numpy(np.random.default_rng(7).standard_normal((B, C, H, W)).astype(np.float32))


def gradient_numbers(name: str, grad: torch.Tensor) -> tuple[float, float]:
    """The norm of a gradient, and its projection on a fixed direction."""
    probe = torch.from_numpy(_normal("grad:" + name, grad.shape))
    grad = grad.cpu().double()
    return grad.norm().item(), (grad * probe).sum().item()


def argument(case: str, name: str, *shape: int) -> torch.Tensor:
    """A standard normal op argument, float64. Round it after the case's formula was applied to it."""
    return torch.from_numpy(_normal(f"{case}/{name}", shape))


def rounded(tensor: torch.Tensor) -> torch.Tensor:
    """Rounded to single precision and widened again, as the recorded runs received every argument."""
    if tensor.is_complex():
        return tensor.to(torch.complex64).to(torch.complex128)
    return tensor.float().double()
