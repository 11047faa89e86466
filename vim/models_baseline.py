"""Transformers to stand beside the small Vims: timm's VisionTransformer at the same width and depth."""

from __future__ import annotations

from timm.models import register_model
from timm.models.vision_transformer import VisionTransformer


@register_model
def deit_nano_patch4_32(pretrained: bool = False, img_size: int = 32, **arguments) -> VisionTransformer:
    """A DeiT of vim_nano_patch4_32's width and depth: 64 wide, 4 blocks, 4 heads, patches of 4 pixels."""
    if pretrained:
        raise ValueError("deit_nano_patch4_32 has no pretrained weights; train it, which takes minutes")
    for setting in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir"):  # timm's, about such weights
        arguments.pop(setting, None)
    return VisionTransformer(img_size=img_size, patch_size=4, embed_dim=64, depth=4, num_heads=4, **arguments)
