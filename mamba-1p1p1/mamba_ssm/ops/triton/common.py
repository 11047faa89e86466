# ruff: noqa: RUF005 - Triton's compiler adds tuples but does not unpack them
"""What the Triton kernels of this package share: availability, launch options, small device functions.

Importing this module raises ImportError where Triton is not installed; `ops/backend.py` reports that reason.
Kernels are written for 1, 2 or 4 adjacent channels per thread in one warp, and keep every state in registers.
"""

import functools

import torch
import triton
import triton.language as tl

MINIMUM_TRITON = (3, 6)
MINIMUM_CAPABILITY = (8, 0)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@functools.cache
def unavailable_reason() -> str | None:
    """Why these kernels cannot run here, or None."""
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < MINIMUM_TRITON:
        wanted = ".".join(map(str, MINIMUM_TRITON))
        return f"Triton {triton.__version__} is too old: install triton >= {wanted}"
    if interpreted():
        return None
    if not torch.cuda.is_available():
        return "no CUDA or ROCm device was found (TRITON_INTERPRET=1 runs the kernels on CPU tensors, slowly)"
    if torch.version.hip is None and torch.cuda.get_device_capability() < MINIMUM_CAPABILITY:
        return (
            f"the GPU's compute capability {torch.cuda.get_device_capability()} is below {MINIMUM_CAPABILITY}: "
            "use an Ampere or newer GPU, or the reference backend"
        )
    return None


def interpreted() -> bool:
    """Whether Triton's interpreter runs the kernels, on CPU tensors."""
    return triton.knobs.runtime.interpret


def is_amd() -> bool:
    """Whether kernels are compiled for an AMD GPU, with 64 lanes per warp."""
    return not interpreted() and triton.runtime.driver.active.get_current_target().backend == "hip"


def backward_block() -> tuple[int, int]:
    """Channels of a program of the scan's backward, and of each of its threads: as many as registers allow."""
    if is_amd():
        return 64, 1
    if interpreted() or triton.runtime.driver.active.get_current_target().arch >= 90:
        return 128, 4
    return 64, 2


def dot_precision(dtype: torch.dtype) -> str:
    """How tl.dot multiplies float32 operands: TF32 suffices beside 16-bit activations, three passes otherwise."""
    if is_amd() or interpreted():
        return "ieee"
    return "tf32x3" if dtype == torch.float32 else "tf32"


def options(num_warps: int = 1) -> dict:
    """Launch options. One stage: the kernels order their own loads. Fused multiply-adds, whatever the default."""
    return {"num_warps": num_warps, "num_stages": 1, "enable_fp_fusion": True}


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def contiguous(*tensors: torch.Tensor | None) -> tuple[torch.Tensor | None, ...]:
    """The tensors as kernels read what they are given no strides of."""
    return tuple(None if tensor is None else tensor.contiguous() for tensor in tensors)


def own_memory(view: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """A contiguous copy: what a registered op returns may share memory with nothing."""
    return view.to(dtype, copy=True, memory_format=torch.contiguous_format)


def on_its_device(form):
    """A backend form whose launches go to its first tensor's GPU: Triton launches on the current one."""

    @functools.wraps(form)
    def guarded(first: torch.Tensor, *args, **options):
        if not first.is_cuda or first.get_device() == torch.cuda.current_device():
            return form(first, *args, **options)
        with torch.cuda.device(first.device):
            return form(first, *args, **options)

    return guarded


@functools.cache
def parallel_programs(device: torch.device) -> int:
    """How many one-warp programs fill the device: two for each of a multiprocessor's four schedulers."""
    if device.type != "cuda":
        return 1
    return 8 * torch.cuda.get_device_properties(device).multi_processor_count


@triton.jit
def softplus_and_slope(v):
    """log(1 + e^v) = max(v, 0) + log(1 + u) with u = e^-|v|, and its derivative e^(v - softplus(v)).

    The polynomial is log(1 + u) / u on [0, 1], minimax, to 2e-7 relative: the logarithm of a rounded 1 + u would
    lose the digits of small steps, and 1 - e^-softplus(v) those of small slopes.
    """
    u = tl.exp2(tl.abs(v) * -LOG2_E)
    p = 0.0440892386 - u * 0.0085390965
    p = p * u - 0.1076811710
    p = p * u + 0.1774520437
    p = p * u - 0.2449544979
    p = p * u + 0.3327547759
    p = p * u - 0.4999740526
    p = p * u + 0.9999998057
    value = tl.maximum(v, 0.0) + p * u
    return value, tl.exp2((v - value) * LOG2_E)


@triton.jit
def sigmoid(v):
    return 1 / (1 + tl.exp2(v * -LOG2_E))


@triton.jit
def _low(word):
    return (word & 0xFFFFFFFF).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def _high(word):
    return (word >> 32).to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def load_pair(pointer, stride, n: tl.constexpr, N: tl.constexpr, PACKED: tl.constexpr):
    """Elements n and n + 1 of the N behind `pointer`, in float32: one 64-bit load where they are adjacent."""
    if PACKED:
        word = tl.load((pointer + n).to(tl.pointer_type(tl.uint64)))
        return _low(word), _high(word)
    else:
        first = tl.load(pointer + n * stride).to(tl.float32)
        if n + 1 < N:
            return first, tl.load(pointer + (n + 1) * stride).to(tl.float32)
        else:
            return first, first


@triton.jit
def vectors(pointer, stride, mask, N: tl.constexpr, scale):
    """A tuple of N vectors: element n of every channel, times `scale`."""
    out = ()
    for n in tl.static_range(N):
        if mask is None:
            value = tl.load(pointer + n * stride)
        else:
            value = tl.load(pointer + n * stride, mask=mask, other=0.0)
        out = out + (value.to(tl.float32) * scale,)
    return out


@triton.jit
def columns(values, K: tl.constexpr):
    """K vectors [M], K a power of two up to 64, as the columns of a matrix [M, K]."""
    for _ in tl.static_range(6):
        if len(values) > 1:
            joined = ()
            for i in tl.static_range(len(values) // 2):
                joined = joined + (tl.join(values[i], values[i + len(values) // 2]),)
            values = joined
    return tl.reshape(values[0], [values[0].shape[0], K])


@triton.jit
def int64(value):
    """`value`, which the interpreter may hold as a Python int, as a 64-bit scalar."""
    return tl.zeros([], tl.int64) + value
