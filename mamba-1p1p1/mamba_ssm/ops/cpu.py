"""The CPU backend: C++ kernels from csrc/ behind a plain C interface, called through ctypes.

The library is compiled at install time without torch's headers (setup.py), for three instruction sets; the best
one that the processor has runs, unless `MAMBA_SSM_CPU_ISA` = avx512 | avx2 | portable names one. It is loaded
after torch so that both share one OpenMP runtime, and uses `torch.get_num_threads()` threads.
"""

import ctypes
import functools
import importlib.machinery
import os
from pathlib import Path

import torch
from torch import Tensor

ISA_VARIABLE = "MAMBA_SSM_CPU_ISA"
ISAS = ("avx512", "avx2", "portable")
OPS = ("bimamba",)
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MAX_WIDTH, MAX_STATES = 8, 256
_LIBRARY_STEM = "_cpu_kernels"


def _fields(pointers: str = "", integers: str = "", doubles: str = "") -> list:
    kinds = ((pointers, ctypes.c_void_p), (integers, ctypes.c_int64), (doubles, ctypes.c_double))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class _Direction(ctypes.Structure):
    _fields_ = _fields("conv_weight conv_bias x_proj dt_weight dt_bias A D")


class _BimambaArguments(ctypes.Structure):
    """Mirrors BimambaArguments of csrc/arguments.h."""

    _fields_ = [
        *_fields(integers="batch length channels states rank width dtype threads"),
        *_fields(doubles="scale"),
        *_fields("xz", "xz_batch xz_token"),
        *_fields("y saved"),
        ("parameters", _Direction * 2),
        *_fields("dy dxz"),
        ("gradients", _Direction * 2),
    ]


# ---- the library -------------------------------------------------------------------------------------------


def _library_path() -> Path | None:
    """Where the install put the compiled kernels, or None."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := folder / (_LIBRARY_STEM + suffix)).exists():
            return path
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_library_path()))


def unavailable_reason() -> str | None:
    """None if the kernels can run; else why not and how to mend it."""
    if _library_path() is None:
        return "its C++ kernels were not compiled: install g++ with OpenMP, then `pip install` the package again"
    _isa()
    return None


def available_isas() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for and this processor has, best first."""
    library = _library()
    compiled = [isa for isa in ISAS if hasattr(library, f"mamba_ssm_lanes_{isa}")]
    return tuple(isa for isa in compiled if isa == "portable" or getattr(library, f"mamba_ssm_has_{isa}")())


def _isa() -> str:
    """The instruction set that runs now. Raises ValueError if the environment names one that cannot."""
    available, wanted = available_isas(), os.environ.get(ISA_VARIABLE)
    if not wanted:
        return available[0]
    if wanted not in ISAS:
        raise ValueError(f"{ISA_VARIABLE}={wanted!r} is unknown: use {', '.join(ISAS)}, or unset it")
    if wanted not in available:
        raise ValueError(f"{ISA_VARIABLE}={wanted!r} cannot run here: this install and processor have {available}")
    return wanted


@functools.cache
def _function(name: str, isa: str):
    function = getattr(_library(), f"mamba_ssm_{name}_{isa}")
    function.restype = ctypes.c_int
    return function


def _call(name: str, arguments: ctypes.Structure) -> None:
    if _function(name, _isa())(ctypes.byref(arguments)):
        raise MemoryError(f"{name}: no memory for its workspace")


def _lanes() -> int:
    return _function("lanes", _isa())()


def unsupported(op: str, dtype: torch.dtype, d_state: int | None, d_conv: int | None) -> str | None:
    """Why the kernels do not serve this kind of call, or None."""
    if op not in OPS:
        return f"{op} has no CPU kernel"
    if dtype not in DTYPES:
        return f"{op} of dtype {dtype}: the CPU kernels serve float32 and bfloat16"
    if d_state is not None and not 1 <= d_state <= MAX_STATES:
        return f"{op} with d_state={d_state}: the CPU kernels serve 1 to {MAX_STATES}"
    if d_conv is not None and not 1 <= d_conv <= MAX_WIDTH:
        return f"{op} with d_conv={d_conv}: the CPU kernels serve 1 to {MAX_WIDTH}"
    return None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _plain(tensor: Tensor | None) -> Tensor | None:
    """As the kernels read parameters: contiguous float32."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


# ---- bidirectional mixer -----------------------------------------------------------------------------------

TILE = 32  # tokens between two states saved for backward, as in csrc/state.h


def bimamba_saved_bytes(
    batch: int, length: int, channels: int, d_state: int, dt_rank: int, d_conv: int, dtype: torch.dtype
) -> int:
    """What forward saves: per direction the states between tiles and the projected rows; the directions' sum."""
    lanes, tiles = _lanes(), -(-length // TILE)
    padded, states = _round_up(channels, lanes), _round_up(d_state, 8)
    row = _round_up(dt_rank + 2 * states, lanes)
    return 4 * batch * (2 * (tiles * padded * states + length * row) + length * padded)


def _direction(parameters) -> _Direction:
    return _Direction(*(_pointer(p) for p in parameters))


def _bimamba_arguments(xz: Tensor, parameters, scale: float, saved: Tensor | None) -> _BimambaArguments:
    batch, length, double = xz.shape
    forward, backward = parameters
    arguments = _BimambaArguments(
        batch=batch, length=length, channels=double // 2, states=forward[5].shape[1], rank=forward[3].shape[1],
        width=forward[0].shape[1], dtype=DTYPES[xz.dtype], threads=torch.get_num_threads(), scale=scale,
        xz=xz.data_ptr(), xz_batch=xz.stride(0), xz_token=xz.stride(1), saved=_pointer(saved),
    )  # fmt: skip
    arguments.parameters = (_Direction * 2)(_direction(forward), _direction(backward))
    return arguments


def bimamba_forward(xz, forward_params, backward_params, scale, save):
    """`reference.bimamba_forward` fused: one pass per direction, nothing per token kept but its projected row."""
    xz = xz if xz.stride(2) == 1 else xz.contiguous()
    parameters = [[_plain(p) for p in params] for params in (forward_params, backward_params)]
    batch, length, double = xz.shape
    y = xz.new_empty(batch, length, double // 2)
    size = 0
    if save:
        d_state, rank, width = parameters[0][5].shape[1], parameters[0][3].shape[1], parameters[0][0].shape[1]
        size = bimamba_saved_bytes(batch, length, double // 2, d_state, rank, width, xz.dtype)
    saved = torch.empty(size, dtype=torch.uint8)
    arguments = _bimamba_arguments(xz, parameters, scale, saved if save else None)
    arguments.y = y.data_ptr()
    _call("bimamba_forward", arguments)
    return y, saved


def bimamba_backward(dy, xz, forward_params, backward_params, scale, saved):
    """`reference.bimamba_backward` from the states that forward saved: (dxz, forward and backward gradients)."""
    xz, dy = xz if xz.stride(2) == 1 else xz.contiguous(), dy.to(xz.dtype).contiguous()
    originals = (forward_params, backward_params)
    parameters = [[_plain(p) for p in params] for params in originals]
    grads = [[None if p is None else torch.empty_like(p) for p in params] for params in parameters]
    dxz = torch.empty(xz.shape, dtype=xz.dtype)
    arguments = _bimamba_arguments(xz, parameters, scale, saved)
    arguments.dy, arguments.dxz = dy.data_ptr(), dxz.data_ptr()
    arguments.gradients = (_Direction * 2)(*(_direction(g) for g in grads))
    _call("bimamba_backward", arguments)
    return dxz, *(
        tuple(None if g is None else g.to(p.dtype) for g, p in zip(*pair)) for pair in zip(grads, originals)
    )
