"""CUDA C++ kernels compiled at run time: no compiler and no headers of CUDA are needed, nothing links against torch.

    kernel = runtime.load("conv.cu", "conv_forward", (("WIDTH", 4), ("HALF_IS_BF16", 1)))
    kernel((blocks, batch, 1), 128, shared_bytes, x, None, length, scale)

NVRTC, which torch's wheels bring along with `cuda.bindings`, compiles a source file of this folder for the device's
architecture; the machine code is kept in `~/.cache/mamba_ssm` (MAMBA_SSM_CACHE names another folder). A kernel is
declared at a line's start as `extern "C" __global__ void`, launch bounds, name and parameters: pointers (a tensor's
memory; None is the null pointer), `long long` or a typedef of it named int64, `int`, `float`. It is launched on the
current stream of the tensors' device, so that CUDA graphs capture it.

For tests only, MAMBA_SSM_CUDA_EMULATION=/path/to/tests/cuda_emulation.h compiles the same sources with g++ and runs
them on CPU tensors, thread by thread; MAMBA_SSM_CUDA_EMULATION_FLAGS adds flags, such as -fsanitize=address.
"""

import contextlib
import ctypes
import functools
import hashlib
import os
import re
import struct
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import NamedTuple

import torch

FOLDER = Path(__file__).resolve().parent
MINIMUM_CAPABILITY = (8, 0)
STATIC_SHARED = 48 * 1024  # bytes of dynamic shared memory that need no permission
_SHARED_LIMIT_ATTRIBUTE = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_INVALID_CONTEXT = 201  # CUDA_ERROR_INVALID_CONTEXT: this thread has no context yet
# How an argument is packed, each into 8 bytes; a pointer is told by its star.
_FORMATS = {"long long": "q", "int64": "q", "int": "i4x", "float": "f4x"}


class CompileError(RuntimeError):
    """A kernel's source does not compile; the message is the compiler's."""


# --- availability


def emulation() -> Path | None:
    """The header that lets g++ compile the kernels for the CPU, where a test has named it."""
    path = os.environ.get("MAMBA_SSM_CUDA_EMULATION")
    return Path(path) if path else None


def unavailable_reason() -> str | None:
    """Why these kernels cannot run here, or None."""
    return None if emulation() else _device_problem()


@functools.cache
def _device_problem() -> str | None:
    if torch.version.hip is not None:
        return "the CUDA kernels need an NVIDIA GPU; this torch was built for ROCm"
    if not torch.cuda.is_available():
        return "no CUDA device was found"
    if torch.cuda.get_device_capability() < MINIMUM_CAPABILITY:
        return (
            f"the GPU's compute capability {torch.cuda.get_device_capability()} is below {MINIMUM_CAPABILITY}: "
            "use an Ampere or newer GPU"
        )
    try:
        nvrtc_version()
    except ImportError as error:
        return f"cuda.bindings cannot be imported ({error}): pip install cuda-bindings"
    except RuntimeError as error:  # cuda.bindings raises it where it does not find the library
        return f"NVRTC cannot be loaded ({error}): pip install nvidia-cuda-nvrtc"
    return None


# --- sources


class Source(NamedTuple):
    """A source file and the headers beside it and beside this module: all that a compiler reads."""

    path: Path
    text: str
    headers: tuple[tuple[str, str], ...]  # name, text

    def digest(self, *more: str) -> str:
        """A name for what is made of this source: its text and everything that `more` says about the making."""
        parts = [self.text, *(part for header in self.headers for part in header), *more]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def read_source(file: str) -> Source:
    """`file`: a name in this folder, or an absolute path."""
    path = FOLDER / file
    headers = {found.name: found for folder in (FOLDER, path.parent) for found in sorted(folder.glob("*.cuh"))}
    return Source(path, path.read_text(), tuple((name, found.read_text()) for name, found in headers.items()))


_KERNEL = re.compile(
    r'^extern "C" __global__ void (?:__launch_bounds__\((?:[^()]|\([^()]*\))*\)\s+)?(\w+)\(([^()]*)\)', re.M
)


def kernels(text: str) -> dict[str, list[str]]:
    """{kernel: its parameters' declarations} of a source."""
    uncommented = re.sub(r"//[^\n]*", "", text)
    return {
        name: [" ".join(part.split()) for part in parameters.split(",") if part.strip()]
        for name, parameters in _KERNEL.findall(uncommented)
    }


def parameter_formats(source: Source, name: str) -> list[str]:
    """How to pack every parameter of a kernel, by its declaration."""
    found = kernels(source.text)
    if name not in found:
        raise ValueError(f"{source.path.name} declares no kernel {name!r}; it declares {', '.join(found)}")
    return [_format(declaration, name) for declaration in found[name]]


def _format(declaration: str, name: str) -> str:
    if "*" in declaration:
        return "Q"
    kind = re.sub(r"\bconst\b ?", "", declaration).rpartition(" ")[0].strip()
    if kind not in _FORMATS:
        raise ValueError(f"{name}: parameter `{declaration}` is no pointer, {', '.join(_FORMATS)}")
    return _FORMATS[kind]


def cache_folder() -> Path:
    """Where compiled kernels are kept. Raises RuntimeError where nothing names a folder and the user has no home."""
    if named := os.environ.get("MAMBA_SSM_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mamba_ssm"


def _write_atomically(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        made = Path(folder) / path.name
        made.write_bytes(content)
        os.replace(made, path)


# --- NVRTC


@functools.cache
def nvrtc_version() -> tuple[int, int]:
    """Raises ImportError without cuda.bindings, RuntimeError where it finds no libnvrtc."""
    from cuda.bindings import nvrtc

    return tuple(_checked(nvrtc.nvrtcVersion()))


def _checked(result: tuple) -> tuple:
    """What an NVRTC function returned, less its status."""
    if int(result[0]) != 0:
        raise RuntimeError(f"NVRTC failed: {result[0].name}")
    return result[1:]


def _text_of(size_function, function, program) -> bytes:
    (size,) = _checked(size_function(program))
    content = b" " * size
    _checked(function(program, content))
    return content


def architecture(capability: tuple[int, int]) -> str:
    """The newest architecture that NVRTC compiles for and a device of this capability runs."""
    from cuda.bindings import nvrtc

    (supported,) = _checked(nvrtc.nvrtcGetSupportedArchs())
    wanted = capability[0] * 10 + capability[1]
    usable = [number for number in supported if number // 10 == capability[0] and number <= wanted]
    if not usable:
        version = ".".join(map(str, nvrtc_version()))
        raise RuntimeError(f"NVRTC {version} does not know compute capability {capability}: install a newer torch")
    return f"sm_{max(usable)}"


def compile_cubin(source: Source, defines: tuple[tuple[str, int | str], ...], arch: str) -> bytes:
    """Machine code for an architecture such as "sm_90". Needs no GPU. Raises CompileError with NVRTC's log."""
    from cuda.bindings import nvrtc

    names = [name.encode() for name, _ in source.headers]
    texts = [text.encode() for _, text in source.headers]
    (program,) = _checked(
        nvrtc.nvrtcCreateProgram(source.text.encode(), str(source.path).encode(), len(names), texts, names)
    )
    try:
        options = [option.encode() for option in _options(defines, arch)]
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        if int(status) != 0:
            log = _text_of(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise CompileError(f"{source.path.name} does not compile ({status.name}):\n{log.decode().rstrip(chr(0))}")
        return _text_of(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
    finally:
        _checked(nvrtc.nvrtcDestroyProgram(program))


def _options(defines: tuple[tuple[str, int | str], ...], arch: str) -> list[str]:
    return [f"--gpu-architecture={arch}", "--std=c++17", "-default-device", *_define_flags(defines)]


def _define_flags(defines: tuple[tuple[str, int | str], ...]) -> list[str]:
    return [f"-D{name}={value}" for name, value in defines]


_DIGEST_BYTES = hashlib.sha256().digest_size


def cached_cubin(source: Source, defines: tuple[tuple[str, int | str], ...], arch: str) -> bytes:
    """compile_cubin, or what it gave an earlier process. A cache that cannot be read or written is done without.

    A cached file begins with the digest of what follows: a machine that crashed can leave one empty or cut short.
    """
    version = ".".join(map(str, nvrtc_version()))
    file = f"{source.path.stem}-{source.digest(version, *_options(defines, arch))}.cubin"
    with contextlib.suppress(OSError, RuntimeError):
        content = (cache_folder() / file).read_bytes()
        cubin = content[_DIGEST_BYTES:]
        if hashlib.sha256(cubin).digest() == content[:_DIGEST_BYTES]:
            return cubin
    cubin = compile_cubin(source, defines, arch)
    with contextlib.suppress(OSError, RuntimeError):
        _write_atomically(cache_folder() / file, hashlib.sha256(cubin).digest() + cubin)
    return cubin


# --- launching


@functools.cache
def _libcuda() -> ctypes.CDLL:
    return _declare(ctypes.CDLL("libcuda.so.1"))


def _declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """State the argument types of the driver's functions."""
    pointer, unsigned = ctypes.c_void_p, ctypes.c_uint
    library.cuLaunchKernel.argtypes = [pointer, *[unsigned] * 7, pointer, pointer, pointer]
    library.cuModuleLoadData.argtypes = [ctypes.POINTER(pointer), ctypes.c_char_p]
    library.cuModuleGetFunction.argtypes = [ctypes.POINTER(pointer), pointer, ctypes.c_char_p]
    library.cuFuncSetAttribute.argtypes = [pointer, ctypes.c_int, ctypes.c_int]
    library.cuDeviceGet.argtypes = [ctypes.POINTER(ctypes.c_int), ctypes.c_int]
    library.cuDevicePrimaryCtxRetain.argtypes = [ctypes.POINTER(pointer), ctypes.c_int]
    library.cuCtxSetCurrent.argtypes = [pointer]
    library.cuGetErrorName.argtypes = [ctypes.c_int, ctypes.POINTER(ctypes.c_char_p)]
    return library


def _check_driver(status: int, what: str) -> None:
    if status != 0:
        name = ctypes.c_char_p()
        _libcuda().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"{what}: the CUDA driver answered {(name.value or b'UNKNOWN').decode()} ({status})")


class Arguments:
    """A kernel's arguments as the driver wants them: an array of addresses, of values that each launch packs anew."""

    def __init__(self, name: str, formats: list[str]):
        self.name, self.count = name, len(formats)
        self._pointers = [i for i, code in enumerate(formats) if code == "Q"]
        self._struct = struct.Struct("<" + "".join(formats))
        self._values = ctypes.create_string_buffer(max(8 * self.count, 8))
        start = ctypes.addressof(self._values)
        self.addresses = (ctypes.c_void_p * max(self.count, 1))(*(start + 8 * i for i in range(self.count)))

    def pack(self, args: tuple) -> None:
        values = list(args)
        try:
            for i in self._pointers:
                values[i] = 0 if values[i] is None else values[i].data_ptr()
            self._struct.pack_into(self._values, 0, *values)
        except (struct.error, AttributeError, IndexError, TypeError) as error:
            kinds = ", ".join(type(arg).__name__ for arg in args)
            raise TypeError(f"{self.name}: ({kinds}) do not fit its {self.count} parameters: {error}") from None


def _primary_context(device: int) -> ctypes.c_void_p:
    """The context that torch uses on this device, made current for this thread."""
    number, context = ctypes.c_int(), ctypes.c_void_p()
    _check_driver(_libcuda().cuDeviceGet(ctypes.byref(number), device), "cuDeviceGet")
    _check_driver(_libcuda().cuDevicePrimaryCtxRetain(ctypes.byref(context), number), "cuDevicePrimaryCtxRetain")
    _check_driver(_libcuda().cuCtxSetCurrent(context), "cuCtxSetCurrent")
    return context


def _load_function(cubin: bytes, name: str) -> ctypes.c_void_p:
    """A kernel of this machine code in the current context, where it stays for the life of the process."""
    module, function = ctypes.c_void_p(), ctypes.c_void_p()
    _check_driver(_libcuda().cuModuleLoadData(ctypes.byref(module), cubin), f"loading the code of {name}")
    _check_driver(_libcuda().cuModuleGetFunction(ctypes.byref(function), module, name.encode()), f"finding {name}")
    return function


class CudaKernel:
    """A kernel of one device: its function handle and its arguments' memory, shared by all threads under a lock."""

    def __init__(self, source: Source, name: str, defines: tuple[tuple[str, int | str], ...], device: int):
        self._name, self._device = name, device
        self._arguments = Arguments(name, parameter_formats(source, name))
        self._shared_limit = STATIC_SHARED
        self._lock = threading.Lock()
        self._launch_kernel = _libcuda().cuLaunchKernel
        cubin = cached_cubin(source, defines, architecture(torch.cuda.get_device_capability(device)))
        with torch.cuda.device(device):
            self._context = _primary_context(device)
            self._function = _load_function(cubin, name)

    def launch(self, grid: tuple[int, int, int], block: int, shared: int, args: tuple) -> None:
        """On the device's current stream; the device must be the current one."""
        stream = torch.cuda.current_stream(self._device).cuda_stream
        with self._lock:
            if shared > self._shared_limit:
                self._allow_shared(shared)
            self._arguments.pack(args)
            call = (self._function, *grid, block, 1, 1, shared, stream, self._arguments.addresses, None)
            status = self._launch_kernel(*call)
            if status == _INVALID_CONTEXT:  # the first CUDA call of a thread, autograd's for instance
                _check_driver(_libcuda().cuCtxSetCurrent(self._context), "cuCtxSetCurrent")
                status = self._launch_kernel(*call)
        if status:
            _check_driver(status, f"launching {self._name} with grid {grid}, {block} threads, {shared} bytes shared")

    def _allow_shared(self, shared: int) -> None:
        status = _libcuda().cuFuncSetAttribute(self._function, _SHARED_LIMIT_ATTRIBUTE, shared)
        _check_driver(status, f"allowing {self._name} {shared} bytes of shared memory")
        self._shared_limit = shared


class Kernel:
    """A kernel of the package, compiled for each device when it is first launched there."""

    def __init__(self, source: Source, name: str, defines: tuple[tuple[str, int | str], ...]):
        self._made_of = (source, name, defines)
        self._of_device: dict[int, CudaKernel] = {}
        self._lock = threading.Lock()

    def __call__(self, grid: tuple[int, int, int], block: int, shared: int, *args) -> None:
        """Launch `grid` blocks of `block` threads with `shared` bytes; args: tensors, None, int, float."""
        device = next(arg.get_device() for arg in args if isinstance(arg, torch.Tensor))
        kernel = self._of_device.get(device) or self._compiled(device)
        if device == torch.cuda.current_device():
            kernel.launch(grid, block, shared, args)
        else:
            with torch.cuda.device(device):
                kernel.launch(grid, block, shared, args)

    def _compiled(self, device: int) -> CudaKernel:
        if device < 0:
            raise ValueError(f"{self._made_of[1]} takes CUDA tensors, and got one on the CPU")
        with self._lock:
            if device not in self._of_device:
                self._of_device[device] = CudaKernel(*self._made_of, device)
            return self._of_device[device]


# --- emulation, for tests


class EmulatedKernel:
    """The same source compiled by g++: blocks one after the other, their threads in turns, on CPU tensors."""

    def __init__(self, source: Source, name: str, defines: tuple[tuple[str, int | str], ...], header: Path):
        formats = parameter_formats(source, name)
        self._name, self._arguments = name, Arguments(name, formats)
        library = ctypes.CDLL(str(_emulated_library(source, defines, header)))
        signature, self._run = library[f"emulation_signature_{name}"], library[f"emulation_run_{name}"]
        signature.restype = ctypes.c_char_p
        compiled = signature().decode()
        if compiled != "".join(code[0] for code in formats):
            raise TypeError(f"{name}: its parameters are {compiled!r}, but the source was read as {formats}")
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [ctypes.c_int] * 5 + [ctypes.c_void_p]

    def __call__(self, grid: tuple[int, int, int], block: int, shared: int, *args) -> None:
        for arg in args:
            if isinstance(arg, torch.Tensor) and arg.device.type != "cpu":
                raise ValueError(f"{self._name} is emulated and takes CPU tensors, not {arg.device}")
        self._arguments.pack(args)
        problem = self._run(*grid, block, shared, self._arguments.addresses)
        if problem:
            raise RuntimeError(f"{self._name}: {problem.decode()}")


def _emulated_library(source: Source, defines: tuple[tuple[str, int | str], ...], header: Path) -> Path:
    """All kernels of a source, compiled by g++."""
    flags = ["-O1", "-std=c++17", "-fPIC", "-shared", "-U_FORTIFY_SOURCE", "-Wall", "-Wno-unknown-pragmas"]
    flags += ["-DVIM_EMULATION", *_define_flags(defines), *os.environ.get("MAMBA_SSM_CUDA_EMULATION_FLAGS", "").split()]
    version = subprocess.run(["g++", "-dumpfullversion"], capture_output=True, text=True, check=True).stdout
    digest = source.digest(header.read_text(), version, *flags)
    path = cache_folder() / f"{source.path.stem}-{digest}.so"
    if path.exists():
        return path
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        unit, library = Path(folder) / "unit.cpp", Path(folder) / "unit.so"
        entries = "".join(f"EMULATION_ENTRY({name})\n" for name in kernels(source.text))
        unit.write_text(f'#include "{header.resolve()}"\n#include "{source.path}"\n{entries}')
        command = ["g++", *flags, f"-I{FOLDER}", str(unit), "-o", str(library)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise CompileError(f"{source.path.name} does not compile for the CPU:\n{done.stderr}")
        os.replace(library, path)
    return path


@functools.cache
def load(file: str, name: str, defines: tuple[tuple[str, int | str], ...] = ()) -> Kernel | EmulatedKernel:
    """The kernel `name` of a source file in this folder, with preprocessor definitions (name, value)."""
    header = emulation()
    if header:
        return EmulatedKernel(read_source(file), name, defines, header)
    return Kernel(read_source(file), name, defines)
