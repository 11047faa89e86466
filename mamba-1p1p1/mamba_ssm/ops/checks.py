"""What the public functions ask of every tensor they are given."""

from collections.abc import Collection, Mapping

from torch import Tensor


def check_tensors(tensors: Mapping[str, object], optional: Collection[str] = ()) -> None:
    """Raise TypeError for an argument that is no tensor; those named in `optional` may be None."""
    for name, value in tensors.items():
        if not isinstance(value, Tensor) and not (value is None and name in optional):
            accepted = "a tensor or None" if name in optional else "a tensor"
            raise TypeError(f"{name} must be {accepted}, not {'None' if value is None else type(value).__name__}")


def check_kinds(what: str, name: str, like: Tensor, others: Mapping[str, Tensor | None]) -> None:
    """Raise ValueError unless `like`, argument `name` of `what`, and the others are floating point on one device."""
    for other, tensor in {name: like, **others}.items():
        if tensor is None:
            continue
        if not tensor.is_floating_point():
            raise ValueError(f"{other} has dtype {tensor.dtype}: {what} takes floating-point tensors")
        if tensor.device != like.device:
            raise ValueError(f"{other} is on {tensor.device} and {name} on {like.device}: move them to one device")
