"""Weights of a file given to a model: all of them as they are, or fitted to another head, grid or channel number."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from timm.layers import resample_abs_pos_embed
from timm.models import adapt_input_conv
from torch import nn

from errors import CheckpointError, check_choice, some_of
from vim_pretrained import unwrap_state_dict
from vim_tokens import resample_pos_embed

# What to do with weights whose grid nothing tells.
TELL_THE_SIZE = (
    'save it again as {"model": weights, "args": argparse.Namespace(model=NAME, input_size=(HEIGHT, WIDTH))} '
    "with the size of its images in pixels"
)


@dataclass
class LoadReport:
    """What loading weights into a model changed or left out; `str()` of it belongs in the log."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    remade_head: str = ""
    head_classes: int | None = None  # of the file's head that was left out
    pos_embed: str = ""
    input_conv: str = ""

    @property
    def problems(self) -> str:
        """The three lists in words, "" when all are empty."""
        lists = (("missing", self.missing), ("unexpected", self.unexpected), ("mismatched", self.mismatched))
        return "; ".join(f"{len(names)} {word}: {some_of(names)}" for word, names in lists if names)

    def __str__(self) -> str:
        said = (self.problems, self.remade_head, self.pos_embed, self.input_conv)
        return "; ".join(filter(None, said)) or "every weight loaded"


def load_weights(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    mode: str = "strict",
    pos_embed_resize: str = "grid",
    old_grid: tuple[int, int] | None = None,
    hints: Mapping[str, str] | None = None,
    source: str | Path = "",
) -> LoadReport:
    """Copy a state dict into `model`; nothing is copied when an error is raised.

    Args:
        mode: "strict" wants exactly the model's names, shapes and grid. "finetune" resamples `pos_embed` to the
            model's grid, leaves the head as the model made it where the file's does not fit, fits the first
            convolution of an RGB model to other channels, and is strict otherwise.
        pos_embed_resize: see `resize_pos_embed`; a same grid is the identity.
        old_grid: (H, W) of the file's `pos_embed`, where known; "finetune" takes a square unless given.
        hints: by "head" and "pos_embed", advice appended to the error when the head or pos_embed are the only
            mismatches; "{classes}" in it is the number of classes of the file's head.
        source: the weights' file, which begins an error's line.

    Raises CheckpointError that lists missing, unexpected and mismatched names.
    """
    check_choice("mode", mode, ("strict", "finetune"))
    state_dict = unwrap_state_dict(state_dict)
    report, of_file = LoadReport(), {name: tuple(value.shape) for name, value in state_dict.items()}
    prefix = f"{source}: " if source else ""
    if mode == "finetune":
        report.pos_embed = _fit_pos_embed(model, state_dict, pos_embed_resize, old_grid, prefix)
        report.remade_head, report.head_classes = _drop_unfit_head(model, state_dict)
        report.input_conv = _fit_input_conv(model, state_dict)
    left_out = set(head_parameter_names(model)) if report.remade_head else set()
    own = model.state_dict()
    report.missing = [name for name in own if name not in state_dict and name not in left_out]
    report.unexpected = [name for name in state_dict if name not in own]
    report.mismatched = [
        f"{name} (file {of_file[name]}, model {tuple(own[name].shape)})"
        for name in own
        if name in state_dict and state_dict[name].shape != own[name].shape
    ]
    if mode == "strict" and old_grid is not None:
        report.mismatched += _other_grid(model, old_grid)
    if report.problems:
        advice = _advice(model, state_dict, report, hints or {})
        raise CheckpointError(f"{prefix}the weights do not fit the model: {report.problems}{advice}")
    model.load_state_dict(state_dict, strict=False)
    return report


def _advice(model: nn.Module, state_dict: Mapping, report: LoadReport, hints: Mapping[str, str]) -> str:
    """Of `hints` what would make these weights fit, in brackets; "" where that is not enough."""
    names, heads = [each.partition(" ")[0] for each in report.mismatched], head_parameter_names(model)
    wrong = dict.fromkeys("head" if name in heads else name for name in names)
    if report.missing or report.unexpected or not wrong.keys() <= hints.keys():
        return ""
    classes = next((len(state_dict[name]) for name in names if name in heads), None)
    return f" ({'; '.join(hints[each].format(classes=classes) for each in wrong)})"


def grid_of_model(model: nn.Module) -> tuple[int, int] | None:
    """(H, W) of a model's patches, None where it tells none."""
    grid = getattr(getattr(model, "patch_embed", None), "grid_size", None)
    return None if grid is None else tuple(grid)


def _other_grid(model: nn.Module, old: tuple[int, int]) -> list[str]:
    """Position embeddings of a grid unlike `model`'s with as many patches, which their shape does not tell.

    They are the model's own, or those of the backbone in it.
    """
    parts = ((name, part) for name, part in model.named_modules() if getattr(part, "pos_embed", None) is not None)
    prefix, part = next(parts, ("", None))
    old, new = tuple(old), grid_of_model(part)
    if new is None or old == new or math.prod(old) != math.prod(new):
        return []
    name = f"{prefix}.pos_embed".lstrip(".")
    return [f"{name} (file {old[0]} x {old[1]} patches, model {new[0]} x {new[1]})"]


def head_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The classifier's modules by name, whichever `get_classifier` returns."""
    heads = model.get_classifier()
    heads = heads if isinstance(heads, tuple | list) else [heads]
    return {name: module for name, module in model.named_modules() if any(module is head for head in heads)}


def head_parameter_names(model: nn.Module) -> list[str]:
    """Names of the classifier's parameters; none without a classifier."""
    if not hasattr(model, "get_classifier"):
        return []
    heads = head_modules(model).items()
    return [f"{prefix}.{name}" for prefix, module in heads for name, _ in module.named_parameters()]


def _drop_unfit_head(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> tuple[str, int | None]:
    """Take the head out of `state_dict` if it does not fit `model`, and say so; how many classes it had, if any."""
    own = model.state_dict()
    names = head_parameter_names(model)
    if all(name in state_dict and state_dict[name].shape == own[name].shape for name in names):
        return "", None
    found = [state_dict.pop(name) for name in names if name in state_dict]
    classes = len(found[0]) if found else None
    before = f"{classes} classes in the file" if found else "none in the file"
    return f"head re-made: {before}, {len(own[names[0]])} classes in the model", classes


def _fit_input_conv(model: nn.Module, state_dict: dict[str, torch.Tensor]) -> str:
    """Fit an RGB file's first convolution to `model`'s channels in place, as timm does, and say so."""
    name = f"{getattr(model, 'pretrained_cfg', {}).get('first_conv')}.weight"
    before, own = state_dict.get(name), model.state_dict().get(name)
    if before is None or own is None or before.dim() != 4 or before.shape[1] != 3 or own.shape[1] == 3:
        return ""
    state_dict[name] = adapt_input_conv(own.shape[1], before)
    return f"{name} adapted from 3 channels to {own.shape[1]}"


def _fit_pos_embed(
    model: nn.Module, state_dict: dict, method: str, old_grid: tuple[int, int] | None, prefix: str
) -> str:
    """Resample `state_dict`'s pos_embed to `model`'s grid in place, and say what was done."""
    before, own, new_grid = state_dict.get("pos_embed"), getattr(model, "pos_embed", None), grid_of_model(model)
    if before is None or own is None or new_grid is None or before.dim() != 3 or own.dim() != 3:
        return ""
    num_class_slots = own.shape[1] - math.prod(new_grid)
    old_grid = tuple(old_grid or _square_grid(before, num_class_slots, prefix))
    if hasattr(model, "cls_token_design"):
        resized = resize_pos_embed(before, old_grid, new_grid, model.cls_token_design, method)
    else:
        resized = resample_abs_pos_embed(
            before, new_grid, old_grid, num_class_slots, interpolation="bicubic", antialias=False
        )
    state_dict["pos_embed"] = resized
    if resized is before:
        return ""
    return f"pos_embed resampled from {old_grid[0]} x {old_grid[1]} to {new_grid[0]} x {new_grid[1]} ({method})"


def _square_grid(pos_embed: torch.Tensor, num_class_slots: int, prefix: str) -> tuple[int, int]:
    patches = pos_embed.shape[1] - num_class_slots
    side = math.isqrt(max(patches, 0))
    if side * side != patches or patches == 0:
        slots = f"{pos_embed.shape[1]} slots, {num_class_slots} of them for class tokens"
        raise CheckpointError(
            f"{prefix}pos_embed has {slots}: the rest is no square grid, and the file does not tell the image size; "
            f"{TELL_THE_SIZE}"
        )
    return side, side


def resize_pos_embed(
    pos_embed: torch.Tensor,
    old_grid: tuple[int, int],
    new_grid: tuple[int, int],
    cls_token: str = "middle",
    method: str = "grid",
) -> torch.Tensor:
    """A Vim's position embeddings (1, H*W + class slots, E) for another grid; same grid: the same tensor.

    Args:
        old_grid, new_grid: (H, W).
        cls_token: where class slots lie, as in `vim_tokens.CLS_TOKENS`.
        method: "grid" resamples the patches' slots and keeps the class slots' values at their places in the
            new order; "published" takes slot 0 for the class token even where that stands in the middle, as
            the published fine-tuning did, which shifts half of the grid by one patch.

    Raises ValueError for unknown names and for a `pos_embed` that is no `old_grid`.
    """
    check_choice("method", method, ("grid", "published"))
    if method == "published" and cls_token == "middle":
        cls_token = "head"
    return resample_pos_embed(pos_embed, new_grid, cls_token, old_grid)
