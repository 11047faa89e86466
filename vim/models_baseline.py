"""Transformers to stand beside the small Vims: timm's VisionTransformer at the same width and depth."""

from __future__ import annotations

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.vision_transformer import VisionTransformer

default_cfgs = generate_default_cfgs(
    {
        "deit_nano_patch4_32": {
            "num_classes": 1000, "input_size": (3, 32, 32), "fixed_input_size": True, "crop_pct": 0.875,
            "interpolation": "bicubic", "mean": IMAGENET_DEFAULT_MEAN, "std": IMAGENET_DEFAULT_STD,
            "first_conv": "patch_embed.proj", "classifier": "head",
        }
    }
)  # fmt: skip


@register_model
def deit_nano_patch4_32(pretrained: bool = False, **arguments) -> VisionTransformer:
    """A DeiT of vim_nano_patch4_32's width and depth: 64 wide, 4 blocks, 4 heads, patches of 4 pixels."""
    size = {"patch_size": 4, "embed_dim": 64, "depth": 4, "num_heads": 4}
    return build_model_with_cfg(VisionTransformer, "deit_nano_patch4_32", pretrained, **size, **arguments)
