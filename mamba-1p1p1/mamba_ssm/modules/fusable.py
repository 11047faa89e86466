"""Whether a mixer's modules are their parameters and no more: the fused operations take these, and call no module."""

from types import MethodType

from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

FUSED_MODULES = {"conv1d": nn.Conv1d, "x_proj": nn.Linear, "dt_proj": nn.Linear}  # of each direction


def why_not_fusable(module: nn.Module, kind: type[nn.Module]) -> str | None:
    """What a `kind` of the module's parameters would leave out, in words that follow its name, or None.

    A parametrization leaves nothing out: it computes the parameter where that is read.
    """
    if type(module).forward is not kind.forward:
        return f"is a {type(module).__module__}.{type(module).__qualname__}"
    own_forward = vars(module).get("forward")
    if own_forward is not None and own_forward != MethodType(kind.forward, module):
        return "has a forward of its own"
    if has_hooks(module):
        return "has hooks"
    for parameter in module._parameters.values():  # quantised ones and DTensors know torch's operations alone
        wrapper = type(parameter)  # asked of the type, which a compiler sees, too
        if wrapper not in (nn.Parameter, Tensor) and hasattr(wrapper, "__tensor_flatten__"):
            return f"has a {wrapper.__qualname__}"
    return None


def has_hooks(module: nn.Module) -> bool:
    forward = module._forward_hooks or module._forward_pre_hooks
    return bool(forward or module._backward_hooks or module._backward_pre_hooks)


def is_plain_linear(linear: nn.Module) -> bool:
    """Whether calling this projection is a product with its weight and nothing else: no adapter, bias or hook."""
    if type(linear) is not nn.Linear or linear.bias is not None or linear._compiled_call_impl is not None:
        return False
    return "forward" not in vars(linear) and not _has_any_global_hook() and why_not_fusable(linear, nn.Linear) is None


def check_convolution(name: str, conv: nn.Module) -> None:
    """Raise TypeError for an nn.Conv1d that is not causal, depthwise, and of every token. Others know what they do."""
    if type(conv).forward is not nn.Conv1d.forward:
        return
    names = ("stride", "dilation", "padding", "groups", "padding_mode")
    given = (conv.stride, conv.dilation, conv.padding, conv.groups, conv.padding_mode)
    needed = ((1,), (1,), (conv.kernel_size[0] - 1,), conv.in_channels, "zeros")
    if given == needed:
        return
    what, value, right = next(three for three in zip(names, given, needed) if three[1] != three[2])
    raise TypeError(f"{name} has {what}={value!r}, which this mixer ignores: use {right!r}")
