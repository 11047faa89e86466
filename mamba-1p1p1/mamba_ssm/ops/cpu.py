"""The CPU backend: C++ kernels from csrc/ behind a plain C interface, called through ctypes.

The library is compiled at install time without torch's headers (setup.py), for three instruction sets; the best
one that the processor has runs, unless `MAMBA_SSM_CPU_ISA` = avx512 | avx2 | portable names one. It is loaded
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
import torch.nn.functional as F
from torch import Tensor

from mamba_ssm.ops.backend import argument_of_dtype
from mamba_ssm.ops.reference import collapsed_groups, common_groups, expanded_groups, matrix_groups

ISA_VARIABLE = "MAMBA_SSM_CPU_ISA"
ISAS = ("avx512", "avx2", "portable")
DTYPES = {torch.float32: 0, torch.bfloat16: 1}
MAX_WIDTH, MAX_STATES = 4, 256
_LIBRARY_STEM = "_cpu_kernels"
_ROOT = Path(__file__).parents[2]  # of the package, where an editable install has setup.py and csrc/
_floats = functools.partial(torch.empty, dtype=torch.float32, device="cpu")  # whatever torch's defaults are


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


class _BlockArguments(ctypes.Structure):
    """Mirrors BlockArguments of csrc/arguments.h."""

    _fields_ = [
        ("mixer", _BimambaArguments),
        *_fields(integers="embedding bf16_products"),
        *_fields("hidden in_proj out_proj out dout dhidden din_proj dout_proj"),
    ]


class _Sequence(ctypes.Structure):
    _fields_ = _fields("data", "batch channel token")


class _ScanArguments(ctypes.Structure):
    """Mirrors ScanArguments of csrc/arguments.h."""

    _fields_ = [
        *_fields(integers="batch length channels states groups dtype softplus threads"),
        *((name, _Sequence) for name in ("u", "delta", "z", "out")),
        *_fields("A B C D delta_bias", "constant_B constant_C"),
        *_fields("last_state saved"),
        *((name, _Sequence) for name in ("dout", "du", "ddelta", "dz")),
        *_fields("dlast_state dA dB dC dD ddelta_bias"),
    ]


class _NormArguments(ctypes.Structure):
    """Mirrors NormArguments of csrc/arguments.h."""

    _fields_ = [
        *_fields(integers="rows width dtype layer threads"),
        *_fields(doubles="eps"),
        *_fields("x residual", "residual_dtype"),
        *_fields("weight bias out residual_out", "residual_out_dtype"),
        *_fields("mean rstd dout dresidual_out dx dresidual dweight dbias"),
    ]


# --- the library


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
    if not hasattr(library, "mamba_ssm_sources"):
        return True
    library.mamba_ssm_sources.restype = ctypes.c_char_p
    return library.mamba_ssm_sources().decode() != digest


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


def unsupported(
    op: str, dtype: torch.dtype, d_state: int | None = None, d_conv: int | None = None, width: int | None = None
) -> str | None:
    """Why these kernels do not serve such arguments, or None."""
    if dtype not in DTYPES:
        return f"{op}: {argument_of_dtype(op, dtype)} of dtype {dtype}, the CPU kernels serve float32 and bfloat16"
    if d_state is not None and not 1 <= d_state <= MAX_STATES:
        return f"{op}: A with d_state={d_state}, the CPU kernels serve 1 to {MAX_STATES}"
    if d_conv is not None and not 1 <= d_conv <= MAX_WIDTH:
        return f"{op}: conv_weight with d_conv={d_conv}, the CPU kernels serve 1 to {MAX_WIDTH}"
    return None


def _pointer(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _plain(tensor: Tensor | None) -> Tensor | None:
    """As the kernels read parameters: contiguous float32."""
    return None if tensor is None else tensor.detach().to(torch.float32).contiguous()


def _round_up(value: int, step: int) -> int:
    return -(-value // step) * step


TILE = 32  # tokens between two states saved for backward, as in csrc/state.h


# --- selective scan


def selective_scan_saved_bytes(batch: int, channels: int, length: int, d_state: int, dtype: torch.dtype) -> int:
    """What forward saves for backward: the state before every tile, float32."""
    return 4 * batch * -(-length // TILE) * channels * d_state


def _sequence(tensor: Tensor | None) -> _Sequence:
    return _Sequence() if tensor is None else _Sequence(tensor.data_ptr(), *tensor.stride())


def _matrix_rows(matrix: Tensor) -> Tensor:
    """B or C as the kernels read it: (D, N), or (B, N, L) and (B, G, N, L) as padded rows (B, G, L, 8 k)."""
    if matrix.dim() == 2:
        return _plain(matrix)
    rows = (matrix.unsqueeze(1) if matrix.dim() == 3 else matrix).detach().transpose(-1, -2)
    padding = -rows.shape[-1] % 8
    return _plain(F.pad(rows, (0, padding)) if padding else rows)


def _matrix_like(rows: Tensor, matrix: Tensor) -> Tensor:
    """The gradient of `_matrix_rows` in the form of its argument."""
    if matrix.dim() == 2:
        return rows.to(matrix.dtype)
    grad = rows[..., : matrix.shape[-2]].transpose(-1, -2)  # (B, G, N, L)
    return grad.reshape(matrix.shape).to(matrix.dtype)


class _ScanCall:
    """The tensors of one call as the kernels read them, kept alive with the argument block that points at them."""

    def __init__(self, u, delta, A, B, C, D, z, delta_bias, delta_softplus):
        dtypes = {t.dtype for t in (u, delta, z) if t is not None}
        dtype = u.dtype if len(dtypes) == 1 else torch.float32
        self.u, self.delta, self.z = (None if t is None else t.detach().to(dtype) for t in (u, delta, z))
        self.groups = common_groups(B, C)
        self.A, self.D, self.bias = _plain(A), _plain(D), _plain(delta_bias)
        self.B, self.C = (expanded_groups(_matrix_rows(m), self.groups) for m in (B, C))
        batch, channels, length = u.shape
        self.arguments = _ScanArguments(
            batch=batch, length=length, channels=channels, states=A.shape[1], groups=self.groups,
            dtype=DTYPES[dtype], softplus=delta_softplus, threads=torch.get_num_threads(),
            u=_sequence(self.u), delta=_sequence(self.delta), z=_sequence(self.z),
            A=_pointer(self.A), B=_pointer(self.B), C=_pointer(self.C), D=_pointer(self.D),
            delta_bias=_pointer(self.bias), constant_B=B.dim() == 2, constant_C=C.dim() == 2,
        )  # fmt: skip


def selective_scan_forward(u, delta, A, B, C, D, z, delta_bias, delta_softplus, save):
    """`reference.selective_scan_forward`; out is contiguous (B, D, L)."""
    call = _ScanCall(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    (batch, channels, length), d_state = u.shape, A.shape[1]
    out = torch.empty(u.shape, dtype=call.u.dtype)
    last_state = _floats(batch, channels, d_state)
    size = selective_scan_saved_bytes(batch, channels, length, d_state, u.dtype) if save else 0
    saved = torch.empty(size, dtype=torch.uint8)
    call.arguments.out, call.arguments.last_state = _sequence(out), last_state.data_ptr()
    call.arguments.saved = saved.data_ptr() if save else None
    _call("selective_scan_forward", call.arguments)
    return out.to(u.dtype), last_state, saved


def selective_scan_backward(dout, dlast_state, u, delta, A, B, C, D, z, delta_bias, delta_softplus, saved):
    """Gradients of `selective_scan_forward` from the states it saved, None for an argument that was None."""
    call = _ScanCall(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    dtype = call.u.dtype
    dout, dlast_state = dout.to(dtype), _plain(dlast_state)
    du, ddelta = torch.empty(u.shape, dtype=dtype), torch.empty(u.shape, dtype=dtype)
    dz = None if z is None else torch.empty(u.shape, dtype=dtype)
    dA, dB, dC, dD, dbias = (
        None if t is None else torch.empty_like(t) for t in (call.A, call.B, call.C, call.D, call.bias)
    )
    arguments = call.arguments
    arguments.saved, arguments.dlast_state = saved.data_ptr(), _pointer(dlast_state)
    for name, tensor in {"dout": dout, "du": du, "ddelta": ddelta, "dz": dz}.items():
        setattr(arguments, name, _sequence(tensor))
    for name, tensor in {"dA": dA, "dB": dB, "dC": dC, "dD": dD, "ddelta_bias": dbias}.items():
        setattr(arguments, name, _pointer(tensor))
    _call("selective_scan_backward", arguments)
    dB, dC = (_matrix_like(collapsed_groups(d, matrix_groups(m)), m) for d, m in ((dB, B), (dC, C)))
    return tuple(
        None if grad is None else grad.to(t.dtype)
        for grad, t in zip((du, ddelta, dA, dB, dC, dD, dz, dbias), (u, delta, A, B, C, D, z, delta_bias))
    )


# --- bidirectional mixer


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


def _mixer_arguments(batch: int, length: int, dtype: torch.dtype, parameters, scale: float) -> _BimambaArguments:
    forward, backward = parameters
    channels, states = forward[5].shape
    arguments = _BimambaArguments(
        batch=batch, length=length, channels=channels, states=states, rank=forward[3].shape[1],
        width=forward[0].shape[1], dtype=DTYPES[dtype], threads=torch.get_num_threads(), scale=scale,
    )  # fmt: skip
    arguments.parameters = (_Direction * 2)(_direction(forward), _direction(backward))
    return arguments


def _bimamba_arguments(xz: Tensor, parameters, scale: float, saved: Tensor | None) -> _BimambaArguments:
    arguments = _mixer_arguments(*xz.shape[:2], xz.dtype, parameters, scale)
    arguments.xz, arguments.xz_batch, arguments.xz_token = xz.data_ptr(), xz.stride(0), xz.stride(1)
    arguments.saved = _pointer(saved)
    return arguments


def _empty_saved(batch: int, length: int, parameters, dtype: torch.dtype, save: bool) -> Tensor:
    if not save:
        return torch.empty(0, dtype=torch.uint8)
    (channels, d_state), rank, width = parameters[5].shape, parameters[3].shape[1], parameters[0].shape[1]
    size = bimamba_saved_bytes(batch, length, channels, d_state, rank, width, dtype)
    return torch.empty(size, dtype=torch.uint8)


def bimamba_forward(xz, forward_params, backward_params, scale, save):
    """`reference.bimamba_forward` fused: one pass per direction, nothing per token kept but its projected row."""
    xz = xz if xz.stride(2) == 1 else xz.contiguous()
    parameters = [[_plain(p) for p in params] for params in (forward_params, backward_params)]
    batch, length, double = xz.shape
    y = xz.new_empty(batch, length, double // 2)
    saved = _empty_saved(batch, length, parameters[0], xz.dtype, save)
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
    return dxz, *_cast_gradients(grads, originals)


def _cast_gradients(grads, originals) -> list[tuple]:
    return [tuple(None if g is None else g.to(p.dtype) for g, p in zip(*pair)) for pair in zip(grads, originals)]


# --- the mixer with its projections


def block_unsupported(embedding: int, channels: int) -> str | None:
    """Why `block_forward` does not serve these widths here, or None."""
    lanes = _lanes()
    if _isa() == "portable":
        return "the products of the portable kernels are slower than torch's"
    if embedding % lanes or channels % lanes:
        return f"widths {embedding} and {channels}: multiples of {lanes} are served"
    return None


def block_multiplies_bfloat16(embedding: int, channels: int) -> bool:
    """Whether `bf16_products` makes a difference here: it takes the processor's product of bfloat16 pairs."""
    both_even = embedding % (2 * _lanes()) == channels % (2 * _lanes()) == 0
    return _isa() == "avx512" and both_even and bool(_library().mamba_ssm_has_bf16_products())


def _block_arguments(mixer: _BimambaArguments, bf16_products: bool, **tensors: Tensor) -> _BlockArguments:
    embedding = tensors["in_proj"].shape[1]
    pointers = {name: _pointer(tensor) for name, tensor in tensors.items()}
    return _BlockArguments(mixer=mixer, embedding=embedding, bf16_products=bf16_products, **pointers)


def block_forward(hidden, in_proj, out_proj, forward_params, backward_params, scale, save, bf16_products=False):
    """out_proj(mixer(in_proj(hidden))) in float32, a tile of tokens at a time: (out (B, L, E), xz, saved).

    `bf16_products` allows bfloat16 where the processor multiplies it faster: what in_proj multiplies, and in backward
    both projections' products, is rounded to it.
    """
    bf16_products = bf16_products and block_multiplies_bfloat16(*out_proj.shape)
    hidden, in_proj, out_proj = map(_plain, (hidden, in_proj, out_proj))
    parameters = [[_plain(p) for p in params] for params in (forward_params, backward_params)]
    batch, length, _ = hidden.shape
    out = torch.empty_like(hidden)
    xz = _floats(batch, length, in_proj.shape[0]) if save else _floats(0)
    saved = _empty_saved(batch, length, parameters[0], hidden.dtype, save)
    mixer = _mixer_arguments(batch, length, hidden.dtype, parameters, scale)
    if save:
        mixer.xz, mixer.saved = xz.data_ptr(), saved.data_ptr()
    tensors = {"hidden": hidden, "in_proj": in_proj, "out_proj": out_proj, "out": out}
    _call("block_forward", _block_arguments(mixer, bf16_products, **tensors))
    return out, xz, saved


def block_backward(
    dout, hidden, in_proj, out_proj, forward_params, backward_params, scale, xz, saved, bf16_products=False
):
    """Gradients of `block_forward`: (dhidden, din_proj, dout_proj, forward gradients, backward gradients)."""
    bf16_products = bf16_products and block_multiplies_bfloat16(*out_proj.shape)
    dout, hidden, in_proj, out_proj = map(_plain, (dout, hidden, in_proj, out_proj))
    originals = (forward_params, backward_params)
    parameters = [[_plain(p) for p in params] for params in originals]
    grads = [[None if p is None else torch.empty_like(p) for p in params] for params in parameters]
    dhidden = torch.empty_like(hidden)
    mixer = _bimamba_arguments(xz, parameters, scale, saved)
    mixer.gradients = (_Direction * 2)(*(_direction(g) for g in grads))
    tensors = {"hidden": hidden, "in_proj": in_proj, "out_proj": out_proj, "dout": dout, "dhidden": dhidden}
    if bf16_products:
        y, dxz = _floats(*hidden.shape[:2], out_proj.shape[1]), torch.empty_like(xz)
        mixer.y, mixer.dxz = y.data_ptr(), dxz.data_ptr()
        _call("block_backward", _block_arguments(mixer, bf16_products, **tensors))
        din_proj, dout_proj = _over_tokens(dxz, hidden), _over_tokens(dout, y)
    else:
        din_proj, dout_proj = torch.empty_like(in_proj), torch.empty_like(out_proj)
        tensors |= {"din_proj": din_proj, "dout_proj": dout_proj}
        _call("block_backward", _block_arguments(mixer, bf16_products, **tensors))
    return dhidden, din_proj, dout_proj, *_cast_gradients(grads, originals)


def _over_tokens(dout: Tensor, x: Tensor) -> Tensor:
    """The gradient of a projection's weight, rounded operands and float32: (B, L, M) and (B, L, N) to (M, N)."""
    dout, x = (t.flatten(0, 1).to(torch.bfloat16) for t in (dout, x))
    return (dout.t() @ x).float()


# --- add and norm


def _norm_call(name: str, width: int, rows: int, kind: str, eps: float, tensors: dict, dtypes: dict) -> None:
    integers = {f"{key}_dtype" if key else "dtype": DTYPES[dtype] for key, dtype in dtypes.items()}
    pointers = {key: _pointer(tensor) for key, tensor in tensors.items()}
    arguments = _NormArguments(
        rows=rows, width=width, layer=kind == "layer", eps=eps, threads=torch.get_num_threads(), **integers, **pointers
    )
    _call(name, arguments)


def _io(tensor: Tensor | None) -> Tensor | None:
    """Rows as the kernels read them: contiguous, and float32 unless bfloat16."""
    if tensor is None:
        return None
    return tensor.detach().to(tensor.dtype if tensor.dtype in DTYPES else torch.float32).contiguous()


def _io_dtype(dtype: torch.dtype | None) -> torch.dtype:
    return dtype if dtype in DTYPES else torch.float32


def add_norm_forward(x, residual, weight, bias, eps, kind, residual_dtype):
    """`reference.add_norm_forward` in one pass over the rows: (out, sum, mean or None, rstd)."""
    rows, width = x.shape
    x, residual = _io(x), _io(residual)
    out = torch.empty_like(x)
    total = torch.empty(x.shape, dtype=_io_dtype(residual_dtype))
    rstd = _floats(rows)
    mean = _floats(rows) if kind == "layer" else None
    tensors = {
        "x": x, "residual": residual, "weight": _plain(weight), "bias": _plain(bias),
        "out": out, "residual_out": total, "mean": mean, "rstd": rstd,
    }  # fmt: skip
    dtypes = {"": x.dtype, "residual": _io_dtype(None if residual is None else residual.dtype)}
    _norm_call("add_norm_forward", width, rows, kind, eps, tensors, dtypes | {"residual_out": total.dtype})
    return out, total.to(residual_dtype), mean, rstd


def add_norm_backward(dout, dresidual_out, residual_out, weight, bias, mean, rstd, kind, x_dtype, residual_dtype):
    """Gradients of `add_norm_forward`: (dx, dresidual or None, dweight, dbias or None)."""
    rows, width = dout.shape
    total = _io(residual_out)
    dx = torch.empty(dout.shape, dtype=x_dtype)
    dresidual = None if residual_dtype is None else torch.empty(dout.shape, dtype=_io_dtype(residual_dtype))
    dweight = _floats(width)
    dbias = None if bias is None else _floats(width)
    tensors = {
        "dout": dout.to(x_dtype).contiguous(), "residual_out": total, "weight": _plain(weight), "bias": _plain(bias),
        "dresidual_out": None if dresidual_out is None else dresidual_out.to(total.dtype).contiguous(),
        "mean": mean, "rstd": rstd, "dx": dx, "dresidual": dresidual, "dweight": dweight, "dbias": dbias,
    }  # fmt: skip
    dtypes = {"": x_dtype, "residual": _io_dtype(residual_dtype), "residual_out": total.dtype}
    _norm_call("add_norm_backward", width, rows, kind, 0.0, tensors, dtypes)
    dresidual = None if dresidual is None else dresidual.to(residual_dtype)
    return dx, dresidual, dweight.to(weight.dtype), None if bias is None else dbias.to(bias.dtype)
