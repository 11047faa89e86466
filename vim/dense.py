"""What segmentation and detection share: any timm model as a backbone that gives feature maps at any image size.

The maps of a Vim are the residual stream with what the block added, its class tokens taken out at their true
places. Weights of a trained classifier fit in; what of them a backbone has no use for is said.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from arguments import size_of
from build import check_model_name, checkpoint_gradients, create_model, vim_arguments
from checkpoint import Checkpoint, read_checkpoint
from errors import CheckpointError, ConfigError, as_config_error
from failures import main_memory_is_full
from fitting import LoadReport, grid_of_model, head_modules, load_weights
from identity import DENSE_BACKBONE, grid_of
from vim_tokens import cls_token_positions

# Sizes of the levels that are made of a plain backbone's one map, over the map's, unless flags say others.
SCALES = (4.0, 2.0, 1.0, 0.5)
PREFIX = DENSE_BACKBONE.removesuffix("model.")


def are_falling(scales: Sequence[float]) -> bool:
    """Whether each is there once, the largest first."""
    return list(scales) == sorted(set(scales), reverse=True)


class Backbone(nn.Module):
    """Images (B, C, height, width) of any size -> feature maps (B, E_i, H_i, W_i), the finest first.

    An image that fills no whole number of cells is padded with zeros to the right and below. Where patches
    overlap it is padded all around as well, so that each map has one vector a `stride` and its middle is there.

    Attributes:
        channels, strides: of every map; a plain backbone, such as a Vim, has the same stride everywhere.
        only_size: (height, width) of the images, where the model takes no others (`build_backbone` finds out).

    Args:
        model: a timm model that has `forward_intermediates`; it loses what comes after the last map.
        taps: how many maps, spread evenly over a plain model's blocks or the last stages of a staged one, all of
            them where it has fewer; or the numbers of the blocks or stages.
    """

    only_size: tuple[int, int] | None = None

    def __init__(self, model: nn.Module, taps: int | list[int]):
        super().__init__()
        named = set(model.state_dict())
        self.heads = head_names(model)
        taps = choose_taps([info["reduction"] for info in model.feature_info], taps)
        features = FeatureGetterNet(model, taps)
        self.taps, self.model = list(features.out_indices), features.model
        self.channels, self.strides = features.feature_info.channels(), features.feature_info.reduction()
        self.pruned = named - set(model.state_dict())
        self.cell = max(self.strides)
        patch = getattr(getattr(model, "patch_embed", None), "patch_size", self.cell)
        self.overlap = max(0, max(patch if isinstance(patch, tuple | list) else (patch,)) - self.cell)

    @property
    def plain(self) -> bool:
        """Whether all maps have one stride."""
        return len(set(self.strides)) == 1

    def padding(self, height: int, width: int) -> tuple[int, int, int, int]:
        """Pixels to add on the left, right, top and bottom of an image."""
        before = self.overlap // 2
        right, bottom = (-width % self.cell, -height % self.cell)
        return before, right + self.overlap - before, before, bottom + self.overlap - before

    def forward(self, x: Tensor) -> list[Tensor]:
        padding = self.padding(*x.shape[-2:])
        if any(padding):
            x = F.pad(x, padding)
        return self.model.forward_intermediates(x, indices=self.taps, output_fmt="NCHW", intermediates_only=True)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.model.set_grad_checkpointing(enable)

    def no_weight_decay(self, prefix: str = "") -> set[str]:
        """Parameters that are never decayed, as they are called in a model that holds this one as `prefix`."""
        names = self.model.no_weight_decay() if hasattr(self.model, "no_weight_decay") else ()
        return {f"{prefix}model.{name}" for name in names}

    def group_matcher(self, coarse: bool = False, prefix: str = "") -> dict | Callable[[str], float]:
        """Groups for layer-wise learning rates, in a model that holds this one as `prefix`; the rest is the head."""
        groups, prefix = self.model.group_matcher(coarse=coarse), f"{prefix}model."
        if callable(groups):  # from a parameter's name to its group, as CaiT's
            return lambda name: groups(name.removeprefix(prefix)) if name.startswith(prefix) else float("inf")
        return {name: _moved(group, prefix) for name, group in groups.items()}


def head_names(model: nn.Module) -> tuple[str, ...]:
    """What the names of a classifier's parameters begin with, there or not."""
    try:
        return tuple(f"{name}." for name in head_modules(model))
    except AttributeError:  # some look for it inside the head that a model without classes has not
        raise ValueError("it cannot tell its head from the rest; take another backbone") from None


def _moved(group, prefix: str):
    """Patterns of a timm group matcher, for names that begin with `prefix`."""
    if isinstance(group, list | tuple):
        return [(_moved(pattern, prefix), suffix) for pattern, suffix in group]
    return None if group is None else f"^{re.escape(prefix)}(?:{group.replace('^', '')})"


def choose_taps(strides: list[int], taps: int | list[int]) -> list[int]:
    """Numbers of the blocks or stages to take maps from: 4 of 24 blocks are 5, 11, 17, 23.

    Raises ValueError for more blocks than there are; of fewer stages all are taken.
    """
    count, plain = len(strides), len(set(strides)) == 1
    if isinstance(taps, int) and not plain:
        taps = min(taps, count)
    wanted = taps if isinstance(taps, int) else max(taps) + 1
    if not 0 < wanted <= count:
        raise ValueError(f"taps={taps}: the backbone has {count} blocks or stages, numbered from 0")
    if not isinstance(taps, int):
        return list(taps)
    if plain:
        return [count * (i + 1) // taps - 1 for i in range(taps)]
    return list(range(count - taps, count))


class DenseModel(nn.Module):
    """A model around `self.backbone`: what timm's optimiser factory asks for, with the backbone's names moved."""

    backbone: Backbone

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def no_weight_decay(self) -> set[str]:
        return self.backbone.no_weight_decay(PREFIX)

    def group_matcher(self, coarse: bool = False) -> dict | Callable[[str], float]:
        return self.backbone.group_matcher(coarse, PREFIX)


def build_backbone(args, img_size: int | tuple[int, int], taps: int | list[int], say=print) -> Backbone:
    """The backbone of `--model` with `--drop-path`, `--grad-checkpointing` and `--dt-init-backward`.

    Args:
        img_size: of the training images: the position embeddings get its grid; other sizes resample them.
        taps: see `Backbone`.

    Raises ConfigError for a model that is unknown, has no such features or takes no images of `img_size`.
    """
    check_model_name("--model", args.model)
    arguments = {"num_classes": 0, "img_size": img_size, "drop_path_rate": args.drop_path, "dynamic_img_size": True}
    model = create_model("--model", args.model, say, **arguments, **vim_arguments(args))
    if not hasattr(model, "forward_intermediates"):
        raise ConfigError(f"--model {args.model} gives no intermediate features; take a Vim, a ViT, a ResNet, ...")
    with as_config_error(f"--model {args.model}: "):
        backbone = Backbone(model, taps)
    height, width = size_of(img_size)
    if backbone.overlap:
        left, right, top, bottom = backbone.padding(height, width)
        model.set_input_size((top + height + bottom, left + width + right))
    if not takes_any_size(backbone) and not takes(backbone, height + backbone.cell, width):
        backbone.only_size = height, width
        if not takes(backbone, height, width):
            raise ConfigError(
                f"--model {args.model} takes no images of {height}x{width}: take another size, in multiples of "
                f"{backbone.cell}, or another backbone"
            )
    if args.grad_checkpointing:
        checkpoint_gradients(args, backbone)
    return backbone


def takes_any_size(backbone: Backbone) -> bool:
    """Whether images of any size are known to do, without the time that one of the training size may take."""
    model, cell = backbone.model, backbone.cell
    if getattr(model, "dynamic_img_size", False):
        return True
    # Odd numbers of cells: timm says nothing of models whose maps must be multiples of a block, such as HaloNet.
    return not model.pretrained_cfg.get("fixed_input_size") and takes(backbone, 3 * cell, 5 * cell)


@torch.no_grad()
def takes(backbone: Backbone, height: int, width: int) -> bool:
    """Whether it gives maps of such an image: what timm says of its models is true of only some."""
    backbone.eval()
    try:
        backbone(torch.zeros(1, 3, height, width))
    except Exception as error:  # models raise what they like
        if main_memory_is_full(error):
            raise
        return False
    finally:
        backbone.train()
    return True


def load_backbone(args, backbone: Backbone, say=print) -> None:
    """Give `backbone` the weights of `--finetune`, a classifier's or another dense model's; say what was done.

    Position embeddings are resampled to the backbone's grid, as `--pos-embed-resize` says. What comes after the
    last map (later blocks, last norm, head) is left out and named; anything else must fit.
    """
    checkpoint = read_checkpoint(args.finetune, args.trust_checkpoint)
    weights = checkpoint.preferred_weights
    averaged = "averaged weights, it has no others" if checkpoint.model is None else ""
    dense = backbone_weights(weights)
    if dense:
        useless = [name for name in weights if not name.startswith(DENSE_BACKBONE)]
        weights, grid = dense, known_grid(checkpoint, backbone)
    else:
        useless = [name for name in weights if name in backbone.pruned or name.startswith(backbone.heads)]
        weights = {name: value for name, value in weights.items() if name not in useless}
        grid = grid_of(checkpoint)
    before = weights.get("pos_embed")
    try:
        report = load_weights(backbone.model, weights, "finetune", args.pos_embed_resize, grid, source=checkpoint.path)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; is it of --model {args.model}?") from error
    left_out = ", ".join(dict.fromkeys(name.rpartition(".")[0] or name for name in useless))
    slots = moved_slots(backbone.model, before) if report.pos_embed and args.pos_embed_resize == "grid" else ""
    said = [averaged, str(report), slots, f"left out: {left_out}" if left_out else ""]
    say(f"backbone from {checkpoint.label}: {'; '.join(filter(None, said))}")


def backbone_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Those of a dense model's backbone, under the names that it has by itself; none of a classifier's."""
    inner = DENSE_BACKBONE
    return {name.removeprefix(inner): value for name, value in weights.items() if name.startswith(inner)}


def load_dense(args, model: DenseModel, checkpoint: Checkpoint, weights: dict[str, Tensor]) -> LoadReport:
    """Give `model` all `weights` of a dense model's checkpoint, its position embeddings resampled where need be."""
    own = backbone_weights(weights)
    if not own:
        raise ConfigError(f"--eval --finetune {args.finetune} is of a classifier; give a checkpoint of this program")
    grid, file = known_grid(checkpoint, model.backbone), checkpoint.path
    report = load_weights(model.backbone.model, own, "finetune", args.pos_embed_resize, grid, source=file)
    loaded = {name: value for name, value in model.state_dict().items() if name.startswith(DENSE_BACKBONE)}
    load_weights(model, weights | loaded, source=file)
    return report


def grid_in_file(checkpoint: Checkpoint, model: nn.Module) -> tuple[int, int] | None:
    """(H, W) of the position embeddings in a file for `model`, dense or not; None where the file does not tell."""
    return dense_grid(checkpoint, model.backbone) if isinstance(model, DenseModel) else grid_of(checkpoint)


def known_grid(checkpoint: Checkpoint, backbone: Backbone) -> tuple[int, int] | None:
    """`dense_grid` for resampling, which takes None for a square: raises CheckpointError where that is wrong."""
    grid, size = dense_grid(checkpoint, backbone), trained_size(checkpoint)
    if grid is not None or size is None or size[0] == size[1]:
        return grid
    if patches := patches_in_file(checkpoint, backbone):
        raise CheckpointError(
            f"{checkpoint.path}: its pos_embed has {patches} patches, which images of {size[0]}x{size[1]}, its run's, "
            "do not make; is it of another --model?"
        )
    return None


def dense_grid(checkpoint: Checkpoint, backbone: Backbone) -> tuple[int, int] | None:
    """(H, W) of the grid that a dense model's file was trained on; None where the file does not tell.

    The size is among the run's arguments. The stride is the backbone's or, for a file of another one, such as a
    fine-tuned Vim's before its stride was halved, the one that gives as many patches as there are.
    """
    size, patches = trained_size(checkpoint), patches_in_file(checkpoint, backbone)
    if size is None or patches is None:
        return None

    def grids(stride: int) -> set[tuple[int, int]]:
        """Models round down, but for overlapping patches `Backbone` pads."""
        rounded = (tuple(side // stride for side in size), tuple(-(-side // stride) for side in size))
        return {grid for grid in rounded if math.prod(grid) == patches}

    found = grids(backbone.cell) or set().union(*map(grids, range(1, max(size) + 1)))
    return found.pop() if len(found) == 1 else None


def trained_size(checkpoint: Checkpoint) -> tuple[int, int] | None:
    """(height, width) of the images that a dense model was built for; None where its file does not tell."""
    names = ("scene_size",) if getattr(checkpoint.args, "data_set", None) == "SCENES" else ("crop_size", "input_size")
    sizes = filter(None, (getattr(checkpoint.args, name, None) for name in names))
    return next(map(size_of, sizes), None)


def patches_in_file(checkpoint: Checkpoint, backbone: Backbone) -> int | None:
    """How many patches a dense model's file has position embeddings (1, L, E) of; None where there are none such."""
    before = checkpoint.preferred_weights.get(f"{DENSE_BACKBONE}pos_embed")
    own, grid = getattr(backbone.model, "pos_embed", None), grid_of_model(backbone.model)
    if before is None or own is None or grid is None or before.dim() != 3 or own.dim() != 3:
        return None
    return before.shape[1] - (own.shape[1] - math.prod(grid))  # as many slots without a patch in both


def moved_slots(model: nn.Module, before: Tensor) -> str:
    """Where a Vim's class tokens stood in position embeddings (1, L, E), and where they stand now; "" without any."""
    if not hasattr(model, "cls_token_design"):
        return ""
    places = []
    for length in (before.shape[1], model.pos_embed.shape[1]):
        patches = length - model.pos_embed.shape[1] + model.patch_embed.num_patches  # as many slots in both
        found = cls_token_positions(model.cls_token_design, patches)
        places.append(f"{' and '.join(map(str, found))} of {length}")
    return f"class token's slot {places[0]} taken out, now {places[1]}" if found else ""


def resize_maps(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Bilinear, (B, C, H, W) -> (B, C, *size), computed in float32: logits keep their sums."""
    with torch.autocast(x.device.type, enabled=False):
        return F.interpolate(x.float(), size=tuple(size), mode="bilinear", align_corners=False)
