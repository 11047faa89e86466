"""A Vim of two blocks, by which the reliability tests train in seconds. Importing it registers it with timm."""

from timm.models import build_model_with_cfg, register_model

from models_mamba import VisionMamba


@register_model
def vim_two_blocks(pretrained: bool = False, **arguments) -> VisionMamba:
    size = {"patch_size": 4, "embed_dim": 16, "depth": 2}
    return build_model_with_cfg(VisionMamba, "vim_two_blocks", pretrained, **size, **arguments)
