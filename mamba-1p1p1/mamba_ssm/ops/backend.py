"""Which implementation runs: the tensor's device decides, one environment variable overrides.

CUDA tensors go to the CUDA backend (the mixer in CUDA C++, the rest in Triton) and, where that cannot run, as on
ROCm, to Triton; CPU tensors to the C++ library if it was built; anything else to the reference.
`MAMBA_SSM_BACKEND=reference|cpu|triton|cuda` forces one; a forced backend that cannot run raises.
"""

import functools
import importlib
import logging
import os
from types import ModuleType

import torch
from torch.autograd import forward_ad

ENVIRONMENT_VARIABLE = "MAMBA_SSM_BACKEND"
MODULES = {
    "reference": "mamba_ssm.ops.reference",
    "cpu": "mamba_ssm.ops.cpu",
    "triton": "mamba_ssm.ops.triton.kernels",
    "cuda": "mamba_ssm.ops.cuda.kernels",
}
_logger = logging.getLogger("mamba_ssm")


@functools.cache
def load(name: str) -> tuple[ModuleType | None, str | None]:
    """Import a backend once. Returns (module, None), or (None, the reason why it cannot run)."""
    try:
        module = importlib.import_module(MODULES[name])
    except ImportError as error:
        return None, str(error)
    reason = module.unavailable_reason()
    return (None, reason) if reason else (module, None)


def forced() -> str | None:
    """The backend named by the environment, or None. Raises ValueError for an unknown name."""
    name = os.environ.get(ENVIRONMENT_VARIABLE) or None
    if name is not None and name not in MODULES:
        raise ValueError(f"{ENVIRONMENT_VARIABLE}={name!r} is unknown: use {', '.join(MODULES)}, or unset it")
    return name


def _interpreted() -> bool:
    """As Triton reads it."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _emulated() -> bool:
    return bool(os.environ.get("MAMBA_SSM_CUDA_EMULATION"))


def _forced_module(name: str, device_type: str) -> ModuleType:
    module, reason = load(name)
    if module is None:
        raise RuntimeError(f"{ENVIRONMENT_VARIABLE}={name} cannot run here: {reason}")
    on_gpu = device_type == "cuda"
    serves = {
        "reference": True,
        "cpu": device_type == "cpu",
        "triton": on_gpu or _interpreted(),
        "cuda": on_gpu or _emulated(),
    }
    if not serves[name]:
        raise RuntimeError(
            f"{ENVIRONMENT_VARIABLE}={name} does not serve {device_type!r} tensors: move them, or unset it"
        )
    return module


@functools.cache
def _automatic(device_type: str) -> tuple[str, ModuleType]:
    """The best backend that can run for a device, said once in the log."""
    candidates = {"cuda": ("cuda", "triton"), "cpu": ("cpu",)}.get(device_type, ())
    reasons = []
    for wanted in candidates:
        module, reason = load(wanted)
        if module is not None:
            _logger.info("%s tensors: %s backend%s", device_type, wanted, "".join(reasons))
            return wanted, module
        reasons.append(f"; the {wanted} one cannot run: {reason}")
    say = _logger.warning if candidates else _logger.info
    say("%s tensors: reference backend%s", device_type, f", slow{''.join(reasons)}" if candidates else "")
    return "reference", load("reference")[0]


def choose(
    op: str,
    device: torch.device,
    dtype: torch.dtype,
    d_state: int | None = None,
    d_conv: int | None = None,
    width: int | None = None,
) -> ModuleType:
    """The backend module for an op ("selective_scan", "bimamba", "add_norm") on tensors of this kind.

    What a fast backend does not serve (float64, a complex A or a norm of very wide rows, say) goes to the reference
    when the choice is automatic, and raises NotImplementedError when the backend is forced.
    """
    name = forced()
    if name is None:
        module = _automatic(device.type)[1]
        return load("reference")[0] if module.unsupported(op, dtype, d_state, d_conv, width) else module
    module = _forced_module(name, device.type)
    problem = module.unsupported(op, dtype, d_state, d_conv, width)
    if problem:
        raise NotImplementedError(f"{ENVIRONMENT_VARIABLE}={name}: {problem}; unset it, or use reference")
    return module


@torch.compiler.assume_constant_result  # torch 2.11 does not trace the question
def has_autocast(device_type: str) -> bool:
    """Whether autocast is of such devices; "meta" has none."""
    return torch.amp.is_autocast_available(device_type)


def differentiable_once(backward_operation) -> None:
    """Let second derivatives end with what to do: torch's own error names an operation of ours alone."""

    def refuse(ctx, *gradients):
        raise NotImplementedError(
            "fused operations have first derivatives alone; for second ones use plain torch: "
            "Mamba(use_fast_path=False), a VisionMamba's set_fast_path(False), or the functions that end in _ref"
        )

    backward_operation.register_autograd(refuse)


def argument_of_dtype(op: str, dtype: torch.dtype) -> str:
    """The argument of an op that has the dtype which `choose` was asked about."""
    return "A" if dtype.is_complex else {"selective_scan": "u", "bimamba": "xz", "add_norm": "x"}[op]


def differentiated_beyond_autograd() -> bool:
    """Whether more than autograd differentiates this call: `torch.func`, or forward mode (torch.autograd.forward_ad).

    Registered operations have formulas for autograd alone: forward mode would take their derivatives for zero. The
    reference, plain torch, has them all. Raises NotImplementedError where another backend is forced.
    """
    # torch.compile traces this: what it reads here it guards, and it guards torch.func's stack by itself
    return (forward_ad._current_level >= 0 or _transformed()) and _reference_is_allowed()


@torch.compiler.assume_constant_result
def _transformed() -> bool:
    kinds = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
    return any(level.key() in kinds for level in torch._C._functorch.get_interpreter_stack() or ())


@torch.compiler.assume_constant_result
def _reference_is_allowed() -> bool:
    if forced() not in (None, "reference"):
        raise NotImplementedError(
            f"{ENVIRONMENT_VARIABLE}={forced()}: autograd alone has derivatives of it; unset it, or use reference"
        )
    return True


def _choice(device_type: str) -> str:
    """In words, what tensors of a device get."""
    name = forced()
    if name is None:
        return _automatic(device_type)[0]
    try:
        _forced_module(name, device_type)
    except RuntimeError as error:
        return f"an error: {error}"
    return name


def report() -> str:
    """One line per backend: what can run here and why the others cannot; then what a CPU's and a GPU's tensors get."""
    lines = []
    for name in MODULES:
        module, reason = load(name)
        lines.append(f"  {name:<10} {'available' if module else 'not available: ' + reason}")
    lines.append(f"  {ENVIRONMENT_VARIABLE} = {forced() or 'unset (the tensor device decides)'}")
    devices = ["cpu"] + ([torch.accelerator.current_accelerator().type] if torch.accelerator.is_available() else [])
    lines += [f"  {device} tensors -> {_choice(device)}" for device in devices]
    return "\n".join(lines)
