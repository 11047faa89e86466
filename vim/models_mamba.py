"""Vision Mamba (Vim): an image as a sequence of patches, read in both directions by Mamba blocks.

Zhu et al., "Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model",
arXiv 2401.09417. Symbols, here and in the shape comments:

    B  images in the batch          M  patches = H * W of the grid          L  tokens: M and the class tokens
    E  embedding width              D  inner width = expand * E             N  states of a channel

A block is add, then norm, then mixer, and hands on two tensors: what its mixer gave (`hidden`), and the sum of
all before it (`residual`, the float32 stream).
"""

import difflib
import inspect
import math
import re
import warnings
from argparse import Namespace
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from numbers import Real

import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import DropPath, lecun_normal_, to_2tuple, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vim_pretrained import TAG, opening_weights, published_weights, read_copy, weights_in

try:
    from timm.models._input import update_model_input_size  # of what timm writes into an exported folder
except ImportError:  # an older timm, which has no such record

    def update_model_input_size(model: nn.Module, img_size: tuple[int, int]) -> None:
        pass


try:
    from mamba_ssm.modules.mamba_simple import BIMAMBA_TYPES, Mamba, check_values, is_count
    from mamba_ssm.ops.triton.layer_norm import layer_norm_fn, layer_norm_ref, rms_norm_ref
except ImportError as error:
    raise ImportError(
        "mamba_ssm is missing, or it is the registry's package and not this repository's: "
        "run `pip install -e causal_conv1d -e mamba-1p1p1` in the repository's root"
    ) from error

from vim_tokens import (
    CLS_TOKENS,
    PatchEmbed,
    choose,
    cls_token_positions,
    insert_cls_tokens,
    is_untraced,
    resample_pos_embed,
    split_cls_tokens,
    sum_tokens,
)

# timm's decorator adds the registered names.
__all__ = ["AddNorm", "Block", "PatchEmbed", "VisionMamba"]

GLOBAL_POOLS = ("token", "mean", "max", "last", "")
NORMS = ("rms", "layer")
BIDIRECTIONALS = (*BIMAMBA_TYPES, "layer")
IMAGE_SIZES = "a whole number of at least 1, or (height, width)"


def _is_size(value) -> bool:
    sides = value if isinstance(value, tuple | list) else (value, value)
    return len(sides) == 2 and all(map(is_count, sides))


def _is_share(value) -> bool:
    return isinstance(value, Real) and 0 <= value <= 1


class AddNorm(nn.Module):
    """Norm of x + residual, float32 inside: returns (norm, sum), the sum being the float32 residual stream."""

    def __init__(self, dim: int, kind: str, eps: float):
        super().__init__()
        self.kind, self.eps = choose("norm", kind, NORMS), eps
        self.use_fast_path = True
        self.weight = nn.Parameter(torch.ones(dim))
        self.register_parameter("bias", nn.Parameter(torch.zeros(dim)) if kind == "layer" else None)

    def forward(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        if not self.use_fast_path:
            norm = rms_norm_ref if self.kind == "rms" else layer_norm_ref
            return norm(x, self.weight, self.bias, residual, self.eps, prenorm=True, upcast=True)
        return layer_norm_fn(
            x, self.weight, self.bias, residual, self.eps,
            prenorm=True, residual_in_fp32=True, is_rms_norm=self.kind == "rms",
        )  # fmt: skip

    def extra_repr(self) -> str:
        return f"{len(self.weight)}, kind={self.kind!r}, eps={self.eps}"


class Block(nn.Module):
    """Add, norm, mixer. Stochastic depth drops what the block before it gave (hence the shifted rates)."""

    def __init__(self, norm: AddNorm, mixer: nn.Module, drop_path: float):
        super().__init__()
        self.mixer, self.norm = mixer, norm
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, hidden: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """hidden, residual: (B, L, E); without a residual, hidden starts the stream."""
        if residual is not None:
            hidden = self.drop_path(hidden)
        hidden, residual = self.norm(hidden, residual)
        return self.mixer(hidden), residual


class VisionMamba(nn.Module):
    """Vision Mamba (arXiv 2401.09417).

    Args:
        img_size, patch_size: int or (height, width). stride: step between patches, default the patch size.
        in_chans, num_classes: channels of the image; classes of the head, 0 for features.
        global_pool: "token" exactly when there is a class token; otherwise "mean", "max" (the head on every
            token, then the maximum of each logit) or "last". "" pools nothing: the head on every token.
        embed_dim, depth: E, and the number of blocks.
        bidirectional: "v2" two full directions (all released weights), "v1" a second scan with its own A only,
            "none" forward only, "layer" blocks in pairs of which the second reads the sequence backwards (with an odd
            depth the last block has no partner: as in the published code it has weights, and does nothing).
        cls_token: "middle", "head", "double" (first and last, averaged) or "none".
        pos_embed: learned position embeddings, or none.
        norm, norm_eps: "rms" or "layer", and its epsilon.
        d_state, d_conv, expand, dt_rank, conv_bias, bias, dt_init_backward, layer_scale: of the mixer, see `Mamba`.
        drop_rate, drop_path_rate: dropout after the position embeddings; maximum of stochastic depth.
        dynamic_img_size: accept any image size, resampling the position embeddings on the fly.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "token",
        embed_dim: int = 192,
        depth: int = 24,
        bidirectional: str = "v2",
        cls_token: str = "middle",
        pos_embed: bool = True,
        norm: str = "rms",
        norm_eps: float = 1e-5,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        dt_rank: int | str = "auto",
        conv_bias: bool = True,
        bias: bool = False,
        dt_init_backward: str = "published",
        layer_scale: float | None = None,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = False,
    ):
        super().__init__()
        self.bidirectional = choose("bidirectional", bidirectional, BIDIRECTIONALS)
        self.cls_token_design = choose("cls_token", cls_token, CLS_TOKENS)
        global_pool = self._checked_pool(global_pool)
        size, count = IMAGE_SIZES, "a whole number of at least 1"
        check_values(
            (
                ("img_size", img_size, _is_size(img_size), size),
                ("patch_size", patch_size, _is_size(patch_size), size),
                ("stride", stride, stride is None or _is_size(stride), f"None, {size}"),
                ("in_chans", in_chans, is_count(in_chans), count),
                ("num_classes", num_classes, is_count(num_classes, 0), f"{count}, or 0 for no head"),
                ("embed_dim", embed_dim, is_count(embed_dim), count),
                ("depth", depth, is_count(depth), count),
                ("norm_eps", norm_eps, isinstance(norm_eps, Real) and norm_eps >= 0, "0 or a positive number"),
                ("drop_rate", drop_rate, _is_share(drop_rate), "a number between 0 and 1"),
                ("drop_path_rate", drop_path_rate, _is_share(drop_path_rate), "a number between 0 and 1"),
                ("pos_embed", pos_embed, pos_embed in (True, False), "True or False"),
                ("dynamic_img_size", dynamic_img_size, dynamic_img_size in (True, False), "True or False"),
                ("layer_scale", layer_scale, layer_scale is None or isinstance(layer_scale, Real), "None or a number"),
            )
        )
        self.global_pool, self.num_classes, self.in_chans = global_pool, num_classes, in_chans
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.dynamic_img_size, self.grad_checkpointing = dynamic_img_size, False

        for name in CLS_TOKENS[cls_token]:
            self.register_parameter(name, nn.Parameter(torch.zeros(1, 1, embed_dim)))
        patch_embed = PatchEmbed(img_size, patch_size, stride, in_chans, embed_dim, dynamic_img_size)
        tokens = patch_embed.num_patches + len(CLS_TOKENS[cls_token])
        self.register_parameter("pos_embed", nn.Parameter(torch.zeros(1, tokens, embed_dim)) if pos_embed else None)
        self.patch_embed = patch_embed
        self.pos_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        # The rate of block i is that of the mixer before it: block 0 has none before it, norm_f follows the last.
        rates = [0.0, *(drop_path_rate * i / max(depth - 1, 1) for i in range(depth))]
        mixers = (
            Mamba(
                embed_dim, d_state, d_conv, expand, dt_rank, conv_bias=conv_bias, bias=bias, layer_idx=i,
                bimamba_type="none" if bidirectional == "layer" else bidirectional,
                if_divide_out=bidirectional == "v2", init_layer_scale=layer_scale, dt_init_backward=dt_init_backward,
            )
            for i in range(depth)
        )  # fmt: skip
        self.layers = nn.ModuleList(
            Block(AddNorm(embed_dim, norm, norm_eps), mixer, rate) for mixer, rate in zip(mixers, rates)
        )
        for idle in self.layers[self._stage_count * self._stage_size :]:
            warnings.warn(
                f"depth={depth}: bidirectional='layer' pairs its blocks and leaves the last one out: use an even depth",
                stacklevel=2,
            )
            idle.requires_grad_(False)  # ranks would wait for gradients that nobody makes
        self.norm_f = AddNorm(embed_dim, norm, norm_eps)
        self.drop_path = DropPath(drop_path_rate) if drop_path_rate > 0 else nn.Identity()
        self._describe_features()
        self._init_weights()

    def _checked_pool(self, global_pool: str) -> str:
        """The pool of that name, if it goes with the class tokens; "avg" is timm's name of "mean"."""
        global_pool = choose("global_pool", "mean" if global_pool == "avg" else global_pool, GLOBAL_POOLS)
        if global_pool and (global_pool == "token") != bool(CLS_TOKENS[self.cls_token_design]):
            raise ValueError(
                f"global_pool={global_pool!r} does not go with cls_token={self.cls_token_design!r}: use 'token' "
                "exactly when there is a class token, and 'mean', 'max' or 'last' with cls_token='none'"
            )
        return global_pool

    def _describe_features(self) -> None:
        reduction = max(self.patch_embed.stride)
        self.feature_info = [
            {"num_chs": self.embed_dim, "reduction": reduction, "module": f"layers.{last}"}
            for last in range(self._stage_size - 1, len(self.layers), self._stage_size)
        ]

    @property
    def _stage_size(self) -> int:
        """Blocks that make one step of the residual stream."""
        return 2 if self.bidirectional == "layer" else 1

    @property
    def _stage_count(self) -> int:
        return len(self.layers) // self._stage_size

    @torch.no_grad()
    def _init_weights(self) -> None:
        """As the published training started; what the mixers hold beyond this, `Mamba` initialises."""
        lecun_normal_(self.patch_embed.proj.weight)
        nn.init.zeros_(self.patch_embed.proj.bias)
        self._init_head()
        for name in (*CLS_TOKENS[self.cls_token_design], "pos_embed"):
            if getattr(self, name) is not None:
                trunc_normal_(getattr(self, name), std=0.02)
        for block in self.layers:
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            block.mixer.out_proj.weight /= math.sqrt(len(self.layers))
            for linear in (block.mixer.in_proj, block.mixer.out_proj):
                if linear.bias is not None:
                    nn.init.zeros_(linear.bias)

    def _init_head(self) -> None:
        if self.num_classes > 0:
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    # What timm's tools expect of a model.

    def no_weight_decay(self) -> set[str]:
        """Parameters that are never decayed."""
        return {"pos_embed", "cls_token", "cls_token_head", "cls_token_tail"}

    def group_matcher(self, coarse: bool = False) -> dict:
        """Groups for layer-wise learning rates: the stem, one a block (the last norm with the last), and the head."""
        return {
            "stem": r"^cls_token|^pos_embed|^patch_embed",
            "blocks": [(r"^layers\.(\d+)", None), (r"^norm_f", (99999,))],
        }

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def set_fast_path(self, enable: bool = True) -> None:
        """Registered, fused operations, or the same function in plain torch operations, as exports want it."""
        for module in self.modules():
            if isinstance(module, AddNorm | Mamba):
                module.use_fast_path = enable

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A fresh head for other classes, 0 for none."""
        accepted = "a whole number of at least 1, or 0 for no head"
        check_values([("num_classes", num_classes, is_count(num_classes, 0), accepted)])
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        like = self.patch_embed.proj.weight
        head = nn.Linear(self.embed_dim, num_classes) if num_classes > 0 else nn.Identity()
        self.head = head.to(like.device, like.dtype)
        self._init_head()

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Rebuild for another image size, resampling the position embeddings: a new parameter for another grid."""
        check_values([("img_size", img_size, _is_size(img_size), IMAGE_SIZES)])
        size, old_grid = to_2tuple(img_size), self.patch_embed.grid_size
        grid = self.patch_embed.grid_of(*size)
        if self.pos_embed is not None and grid != old_grid:
            resampled = resample_pos_embed(self.pos_embed.detach(), grid, self.cls_token_design, old_grid)
            self.pos_embed = nn.Parameter(resampled, requires_grad=self.pos_embed.requires_grad)
        self.patch_embed.img_size, self.patch_embed.grid_size = size, grid
        update_model_input_size(self, size)

    def cls_token_position(self, num_patches: int) -> tuple[int, ...]:
        """Indices of this model's class tokens among `num_patches` patches."""
        return cls_token_positions(self.cls_token_design, num_patches)

    # The forward pass.

    def _embed(self, x: Tensor) -> Tensor:
        """Image (B, C, height, width) -> tokens with class tokens and positions (B, L, E)."""
        if x.dim() != 4 or x.shape[1] != self.in_chans:
            raise ValueError(f"the model takes images (B, {self.in_chans}, height, width), not {tuple(x.shape)}")
        if not x.is_floating_point():
            raise ValueError(f"images are {x.dtype}: use floating point, scaled and normalised as in training")
        grid = self.patch_embed.grid_of(*x.shape[-2:])
        x = self.patch_embed(x)  # (B, M, E)
        tokens, design = [getattr(self, name) for name in CLS_TOKENS[self.cls_token_design]], self.cls_token_design
        cls = torch.cat(tokens, dim=1).expand(x.shape[0], -1, -1).to(x.dtype) if tokens else x[:, :0]
        if self.pos_embed is None:
            return self.pos_drop(insert_cls_tokens(x, cls, design))
        pos_embed = self.pos_embed
        if grid != self.patch_embed.grid_size:
            pos_embed = resample_pos_embed(pos_embed, grid, design, self.patch_embed.grid_size)
        if x.is_cuda and not torch.is_grad_enabled() and is_untraced(x):
            return self.pos_drop(sum_tokens(x, cls, pos_embed, design))
        return self.pos_drop(insert_cls_tokens(x, cls, design) + pos_embed)

    def _run(self, block: Block, hidden: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        if self.grad_checkpointing and torch.is_grad_enabled():
            return checkpoint(block, hidden, residual, use_reentrant=False)
        return block(hidden, residual)

    def _stages(self, hidden: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """(hidden, residual), (B, L, E) each, after every block, or after every pair of blocks with "layer"."""
        residual = None
        if self.bidirectional != "layer":
            for block in self.layers:
                hidden, residual = self._run(block, hidden, residual)
                yield hidden, residual
            return
        for ahead, behind in zip(self.layers[::2], self.layers[1::2]):
            hidden_f, residual_f = self._run(ahead, hidden, residual)
            backwards = None if residual is None else residual.flip(1)
            hidden_b, residual_b = self._run(behind, hidden.flip(1), backwards)
            hidden, residual = hidden_f + hidden_b.flip(1), residual_f + residual_b.flip(1)
            yield hidden, residual

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (B, C, height, width) -> all tokens after the last norm (B, L, E), class tokens in their places."""
        embedded = self._embed(x)
        hidden, residual = embedded, None
        for hidden, residual in self._stages(embedded):  # noqa: B007 - the last one counts
            pass
        return self.norm_f(self.drop_path(hidden), residual)[0]

    def _pool(self, x: Tensor) -> Tensor:
        """(B, L, E) -> (B, E), or as it is with global_pool=""."""
        if not self.global_pool:
            return x
        if self.global_pool == "token":
            positions = self.cls_token_position(x.shape[1] - len(CLS_TOKENS[self.cls_token_design]))
            return x[:, positions[0]] if len(positions) == 1 else x[:, list(positions)].mean(1)
        if self.global_pool == "mean":
            return x.mean(1)
        return x[:, -1] if self.global_pool == "last" else x.amax(1)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, L, E) -> logits (B, num_classes), or with `pre_logits` the pooled feature (B, E)."""
        if self.global_pool == "max" and not pre_logits:
            return self.head(x).amax(1)
        x = self._pool(x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """Image (B, C, height, width) -> logits (B, num_classes), or features (B, E) if there is no head."""
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
    ) -> list | tuple[Tensor, list] | dict[str, Tensor | list]:
        """Features after chosen blocks: the residual stream with what the block added, class tokens taken out.

        Args:
            x: image (B, C, height, width). indices: the last n blocks if an int, all if None, or a list.
            return_prefix_tokens: pair each feature with its class tokens (B, 0 to 2, E).
            norm: apply the last norm to each. stop_early: run no block after the last one asked for.
            output_fmt: "NCHW" (B, E, H, W) or "NLC" (B, M, E).
            intermediates_only: return the features alone.
            output_dict: return what is asked for by timm's names, "image_features" (all tokens),
                "image_intermediates" and "image_intermediates_prefix".

        Returns (all tokens after the last norm (B, L, E), features), or the features, or the dict.
        """
        choose("output_fmt", output_fmt, ("NCHW", "NLC"))
        take, last = feature_take_indices(self._stage_count, indices)
        grid = self.patch_embed.grid_of(*x.shape[-2:])
        features, prefixes = [], []
        embedded = self._embed(x)
        for i, (hidden, residual) in enumerate(self._stages(embedded)):
            if i in take:
                tokens = self.norm_f(hidden, residual)[0] if norm else (hidden + residual).to(embedded.dtype)
                patches, cls = split_cls_tokens(tokens, self.cls_token_design)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                features.append(patches)
                prefixes.append(cls)
            if i == last and stop_early:
                break
        found = {} if intermediates_only else {"image_features": self.norm_f(self.drop_path(hidden), residual)[0]}
        if output_dict:
            found["image_intermediates"] = features
            return found | ({"image_intermediates_prefix": prefixes} if return_prefix_tokens else {})
        features = list(zip(features, prefixes)) if return_prefix_tokens else features
        return features if intermediates_only else (found["image_features"], features)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last feature asked for, and the norm and head if told; returns the indices."""
        take, last = feature_take_indices(self._stage_count, indices)
        self.layers = self.layers[: (last + 1) * self._stage_size]
        if prune_norm:
            self.norm_f = _KeepAll()
        if prune_head:
            self.reset_classifier(0)
        return take


class _KeepAll(nn.Module):
    """In the place of a pruned norm: the sum, unnormed."""

    def forward(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return x + residual, residual


# name: (constructor arguments, image side). The long names are those of the published checkpoints.
_PUBLISHED = "bimambav2_final_pool_mean_abs_pos_embed_with_midclstok_div2"
_TINY, _SMALL, _BASE = ({"embed_dim": width, "depth": 24} for width in (192, 384, 768))
VARIANTS = {
    f"vim_tiny_patch16_224_{_PUBLISHED}": (_TINY, 224),
    f"vim_tiny_patch16_stride8_224_{_PUBLISHED}": (_TINY | {"stride": 8}, 224),
    f"vim_small_patch16_224_{_PUBLISHED}": (_SMALL, 224),
    f"vim_small_patch16_stride8_224_{_PUBLISHED}": (_SMALL | {"stride": 8}, 224),
    "vim_base_patch16_224_bimambav2_final_pool_mean_abs_pos_embed_with_middle_cls_token_div2": (_BASE, 224),
    "vim_tiny_patch16_224": (_TINY, 224),
    "vim_tiny_patch16_stride8_224": (_TINY | {"stride": 8}, 224),
    "vim_small_patch16_224": (_SMALL, 224),
    "vim_small_patch16_stride8_224": (_SMALL | {"stride": 8}, 224),
    "vim_base_patch16_224": (_BASE, 224),
    "vim_base_patch16_stride8_224": (_BASE | {"stride": 8}, 224),
    "vim_nano_patch4_32": ({"embed_dim": 64, "depth": 4, "patch_size": 4}, 32),
}


def _default_cfg(name: str, img_size: int) -> dict:
    """What timm's tools read off a model: weights, input and preprocessing, names of the first and last layer."""
    cfg = {
        "num_classes": 1000, "input_size": (3, img_size, img_size), "fixed_input_size": True,
        "crop_pct": 0.875, "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
        "first_conv": "patch_embed.proj", "classifier": "head", "license": "apache-2.0",
        "origin_url": "https://github.com/hustvl/Vim", "paper_ids": "arXiv:2401.09417",
    }  # fmt: skip
    weights = published_weights(name)
    return cfg | ({"hf_hub_id": weights.repo, "hf_hub_filename": weights.file} if weights else {})


default_cfgs = generate_default_cfgs(
    {
        f"{name}.{TAG}" if published_weights(name) else name: _default_cfg(name, img_size)
        for name, (_, img_size) in VARIANTS.items()
    }
)


def checkpoint_filter_fn(
    state_dict: dict, model: VisionMamba, entry: str = "model", img_size: tuple[int, int] | None = None
) -> dict[str, Tensor]:
    """A file's weights as `model` takes them: unwrapped, the position embeddings resampled to its grid.

    Args:
        state_dict: a state dict, or a training checkpoint that holds one under `entry`, "model" or "model_ema".
        img_size: of the file's model, where it is known.
    """
    content, state_dict = state_dict, weights_in(state_dict, entry)
    if model.pos_embed is None or "pos_embed" not in state_dict:
        return state_dict
    pos_embed, design = state_dict["pos_embed"], model.cls_token_design
    old_grid = _grid_of_file(pos_embed.shape[1] - len(CLS_TOKENS[design]), model, content.get("args"), img_size)
    state_dict["pos_embed"] = resample_pos_embed(pos_embed, model.patch_embed.grid_size, design, old_grid)
    return state_dict


def _grid_of_file(patches: int, model: VisionMamba, run: Namespace | None, img_size) -> tuple[int, int]:
    """(H, W) of a file's position embeddings: of the first candidate image size that has `patches` patches.

    Candidates, in order: the caller's `img_size`; the input_size in the arguments of the file's `run`; the one in
    timm's description of the pretrained model; for a published file the registered size; the model's own. If none
    of them fits, the grid is a square. Raises ValueError if there is no such square.
    """
    cfg = getattr(model, "pretrained_cfg", {})
    described, registered = getattr(model, "pretrained_model_args", {}).get("img_size"), cfg.get("input_size", ())[1:]
    own = model.patch_embed.img_size
    of_user = cfg.get("file") or not registered
    for size in (img_size, getattr(run, "input_size", None), described, *((own,) if of_user else (registered, own))):
        grid = size and model.patch_embed.grid_of(*to_2tuple(size))
        if grid and math.prod(grid) == patches:
            return grid
    side = math.isqrt(patches)
    if side * side == patches:
        return side, side
    raise ValueError(
        f"the file's pos_embed holds {patches} patches, no square nor those of the model's {own[0]} x {own[1]} pixels: "
        'name the size it is of, pretrained_cfg_overlay={"file": PATH, "input_size": (3, HEIGHT, WIDTH)}'
    )


@contextmanager
def naming_arguments(name: str) -> Iterator[None]:
    """A misspelt argument of a model is told with those that there are."""
    try:
        yield
    except TypeError as error:
        found = re.search(r"VisionMamba.* unexpected keyword argument '(\w+)'", str(error))
        if found is None:
            raise
        accepted = list(inspect.signature(VisionMamba).parameters)
        near = difflib.get_close_matches(found[1], accepted, n=1)
        meant = f" (did you mean {near[0]}?)" if near else ""
        raise TypeError(f"{name} has no argument {found[1]!r}{meant}; it takes {', '.join(accepted)}") from error


def _register(name: str, arguments: dict) -> None:
    weights = published_weights(name)
    take = partial(checkpoint_filter_fn, entry=weights.entry) if weights else checkpoint_filter_fn

    def entrypoint(pretrained: bool = False, pretrained_cfg_overlay: dict | None = None, **kwargs) -> VisionMamba:
        if kwargs.get("feature_cls", "getter") != "getter":
            raise ValueError(
                f"feature_cls={kwargs['feature_cls']!r} would give tokens that are no maps; use 'getter', the default"
            )
        with naming_arguments(name), opening_weights(name):
            copied = read_copy(pretrained_cfg_overlay) if pretrained else {}
            img_size = (pretrained_cfg_overlay or {}).get("input_size", ())[1:]
            model = build_model_with_cfg(
                VisionMamba, name, pretrained, pretrained_filter_fn=partial(take, img_size=img_size),
                pretrained_cfg_overlay=(pretrained_cfg_overlay or {}) | copied,
                feature_cfg={"out_indices": 3, "feature_cls": "getter"}, **(arguments | kwargs),
            )  # fmt: skip
        if copied:
            for module in model.modules():  # a feature extractor holds the model; neither keeps the file
                getattr(module, "pretrained_cfg", {}).pop("state_dict", None)
        return model

    entrypoint.__name__ = entrypoint.__qualname__ = name  # under which pickle finds it in this module
    entrypoint.__doc__ = f"`VisionMamba` with {arguments}, and whatever else its constructor takes."
    globals()[name] = register_model(entrypoint)


for _name, (_arguments, _) in VARIANTS.items():
    _register(_name, _arguments)
