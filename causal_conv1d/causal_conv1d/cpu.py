"""The CPU backend: C++ kernels from csrc/ behind a plain C interface, called through ctypes.

The library is compiled at install time without torch's headers (setup.py), for three instruction sets; the best
one that the processor has runs, unless `CAUSAL_CONV1D_CPU_ISA` = avx512 | avx2 | portable names one. It is loaded
after torch so that both share one OpenMP runtime, and uses `torch.get_num_threads()` threads.
"""

import ctypes
import functools
import hashlib
import importlib.machinery
import os
import sys
from pathlib import Path

import torch
from torch import Tensor

ISA_VARIABLE = "CAUSAL_CONV1D_CPU_ISA"
ISAS = ("avx512", "avx2", "portable")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
WIDTHS = (2, 3, 4)
_LIBRARY_STEM = "_cpu_kernels"
_ROOT = Path(__file__).parents[1]  # of the package, where an editable install has setup.py and csrc/
_floats = functools.partial(torch.empty, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


class _Sequence(ctypes.Structure):
    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("batch", "channel", "token"))]


class _Arguments(ctypes.Structure):
    """Mirrors Arguments of csrc/kernels.cpp."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "channels", "length", "width")),
        *((name, ctypes.c_int64) for name in ("dtype", "silu", "channels_last", "threads")),
        *((name, _Sequence) for name in ("x", "out")),
        *((name, ctypes.c_void_p) for name in ("weight", "bias", "initial")),
        *((name, _Sequence) for name in ("dout", "dx")),
        *((name, ctypes.c_void_p) for name in ("dweight", "dbias", "dinitial")),
    ]


def _library_path() -> Path | None:
    """Where the install put the compiled kernels, or None."""
    folder = Path(__file__).parent
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        if (path := folder / (_LIBRARY_STEM + suffix)).exists():
            return path
    return None


@functools.cache
def _library() -> ctypes.CDLL:
    if sys.platform == "darwin":  # where the kernels find OpenMP: among global symbols (setup.py)
        ctypes.CDLL(str(_openmp_of_torch()), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(_library_path()))


def _openmp_of_torch() -> Path:
    """The OpenMP library that torch on macOS brings, or that of torch's environment."""
    ours = Path(torch.__file__).parent / "lib" / "libomp.dylib"
    return ours if ours.exists() else Path(sys.prefix) / "lib" / "libomp.dylib"


def _is_outdated(library: ctypes.CDLL) -> bool:
    """Whether an editable install's sources have changed since they were compiled, as after `git pull`."""
    digest = _sources_digest()
    if digest is None:
        return False
    if not hasattr(library, "causal_conv1d_sources"):
        return True
    library.causal_conv1d_sources.restype = ctypes.c_char_p
    return library.causal_conv1d_sources().decode() != digest


@functools.cache
def _sources_digest() -> str | None:
    """As setup.py computes it; None where there are no sources, as beside a wheel."""
    if not (_ROOT / "csrc" / "library.cpp").is_file():
        return None
    files = [_ROOT / "setup.py", *sorted((_ROOT / "csrc").glob("*.[ch]*"))]
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


def unavailable_reason() -> str | None:
    """None if the kernels can run; else why not and how to mend it."""
    if _library_path() is None:
        return (
            "its C++ kernels were not compiled: install a C++ compiler (g++, clang with libomp, or on macOS Xcode's "
            "command line tools), then `pip install` the package again"
        )
    try:
        library = _library()
    except OSError as error:
        return f"its C++ kernels cannot be loaded ({error}): `pip install` the package again"
    if _is_outdated(library):
        return f"its C++ kernels were compiled before {_ROOT / 'csrc'} changed: `pip install` the package again"
    _isa()
    return None


def available_isas() -> tuple[str, ...]:
    """The instruction sets that the library was compiled for and this processor has, best first."""
    library = _library()
    compiled = [isa for isa in ISAS if hasattr(library, f"causal_conv1d_forward_{isa}")]
    return tuple(isa for isa in compiled if isa == "portable" or getattr(library, f"causal_conv1d_has_{isa}")())


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


def unsupported(dtype: torch.dtype, width: int) -> str | None:
    """Why these kernels do not serve such arguments, or None."""
    if dtype not in DTYPES:
        return f"x of dtype {dtype}, the CPU kernels serve float32 and bfloat16"
    if width not in WIDTHS:
        return f"weight: a filter of width {width}, the CPU kernels serve {WIDTHS[0]} to {WIDTHS[-1]}"
    return None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _sequence(tensor: Tensor) -> _Sequence:
    return _Sequence(tensor.data_ptr(), *tensor.stride())


def _dense(x: Tensor) -> Tensor:
    """x itself if its channels or its tokens are contiguous, else a copy whose tokens are."""
    return x if 1 in (x.stride(1), x.stride(2)) else x.contiguous()


def _tokens_first(tensor: Tensor | None) -> Tensor | None:
    """As the kernels read filters (D, W) and states (B, D, W-1): float32 with channels last."""
    return None if tensor is None else tensor.detach().to(torch.float32).transpose(-1, -2).contiguous()


class _Call:
    """The tensors of one call as the kernels read them, kept alive with the argument block that points at them."""

    def __init__(self, x, weight, bias, initial_states, silu):
        self.x = _dense(x)
        self.weight, self.initial = _tokens_first(weight), _tokens_first(initial_states)
        self.bias = None if bias is None else bias.detach().to(torch.float32).contiguous()
        batch, channels, length = x.shape
        self.channels_last = self.x.stride(1) == 1
        self.arguments = _Arguments(
            batch=batch, channels=channels, length=length, width=weight.shape[1], dtype=DTYPES[x.dtype], silu=silu,
            channels_last=self.channels_last, threads=torch.get_num_threads(), x=_sequence(self.x),
            weight=_pointer(self.weight), bias=_pointer(self.bias), initial=_pointer(self.initial),
        )  # fmt: skip

    def empty(self) -> Tensor:
        """A new (B, D, L) tensor in the kernels' layout of x; no view, which could not be changed in place."""
        batch, channels, length = self.x.shape
        if self.channels_last:
            return self.x.new_empty_strided((batch, channels, length), (length * channels, 1, channels))
        return self.x.new_empty(batch, channels, length)

    def run(self, name: str) -> None:
        function = getattr(_library(), f"causal_conv1d_{name}_{_isa()}")
        if function(ctypes.byref(self.arguments)):
            raise NotImplementedError(unsupported(self.x.dtype, self.weight.shape[0]))


def _in_layout_of(x: Tensor, result: Tensor) -> Tensor:
    """The result with the memory layout that `empty_like(x)` has."""
    like = torch.empty_like(x, device="meta")
    return result if like.stride() == result.stride() else torch.empty_like(x).copy_(result)


def conv_forward(x, weight, bias, initial_states, silu):
    """`reference.conv_forward`: (B, D, L) in x's dtype and memory layout."""
    call = _Call(x, weight, bias, initial_states, silu)
    out = call.empty()
    call.arguments.out = _sequence(out)
    call.run("forward")
    return _in_layout_of(x, out)


def conv_backward(dout, x, weight, bias, initial_states, silu):
    """`reference.conv_backward`: (dx, dweight, dbias or None, dinitial_states or None)."""
    call = _Call(x, weight, bias, initial_states, silu)
    dx = call.empty()
    dout = dout if dout.dtype == dx.dtype and dout.stride() == dx.stride() else call.empty().copy_(dout)
    (batch, channels, _), width = x.shape, weight.shape[1]
    dweight, dbias = _floats(batch, width, channels), _floats(batch, channels)
    dinitial = None if initial_states is None else _floats(batch, width - 1, channels)
    arguments = call.arguments
    arguments.dout, arguments.dx = _sequence(dout), _sequence(dx)
    arguments.dweight, arguments.dbias = dweight.data_ptr(), dbias.data_ptr()
    arguments.dinitial = _pointer(dinitial)
    call.run("backward")
    dx = _in_layout_of(x, dx)
    dweight = torch.empty_like(weight).copy_(dweight.sum(0).t())
    dbias = None if bias is None else dbias.sum(0).to(bias.dtype)
    if dinitial is not None:
        dinitial = torch.empty_like(initial_states).copy_(dinitial.transpose(1, 2))
    return dx, dweight, dbias, dinitial
