"""From an image to the tokens of a Vim: patches, class tokens, position embeddings.

Zhu et al., arXiv 2401.09417, section 3.2 and table 5. Symbols in the shape comments: B images, C channels, M = H * W
patches of the grid, L tokens (M and the class tokens), E embedding width; height and width are an image's, in pixels.
A GPU takes quicker ways to the same numbers; some of them only where nothing is traced and no gradient is needed.
"""

import math
from contextlib import nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F
from timm.layers import to_2tuple
from torch import Tensor, nn

from mamba_ssm.ops.backend import has_autocast

# Where class tokens stand among M patches (table 5 of the paper), and the parameters that hold them.
CLS_TOKENS = {
    "middle": ("cls_token",),
    "head": ("cls_token",),
    "double": ("cls_token_head", "cls_token_tail"),
    "none": (),
}


def choose(name: str, value: str, accepted) -> str:
    """`value`, if it is among the accepted ones. Raises ValueError, which names them."""
    if value not in accepted:
        raise ValueError(f"{name}={value!r} is unknown: use one of {', '.join(map(repr, accepted))}")
    return value


def cls_token_positions(cls_token: str, num_patches: int) -> tuple[int, ...]:
    """Indices of the class tokens in the whole sequence."""
    return {
        "middle": (num_patches // 2,),
        "head": (0,),
        "double": (0, num_patches + 1),
        "none": (),
    }[choose("cls_token", cls_token, CLS_TOKENS)]


def split_cls_tokens(x: Tensor, cls_token: str) -> tuple[Tensor, Tensor]:
    """Take the class tokens out of a sequence (B, L, E): patches (B, M, E) and class tokens (B, 0 to 2, E)."""
    num_patches = x.shape[1] - len(CLS_TOKENS[choose("cls_token", cls_token, CLS_TOKENS)])
    positions = cls_token_positions(cls_token, num_patches)
    edges = (-1, *positions, x.shape[1])
    patches = [x[:, before + 1 : after] for before, after in pairwise(edges)]
    return torch.cat(patches, dim=1), x[:, list(positions)]


def insert_cls_tokens(patches: Tensor, cls_tokens: Tensor, cls_token: str) -> Tensor:
    """Put class tokens (B, 0 to 2, E) into their places among patches (B, M, E): (B, L, E)."""
    if choose("cls_token", cls_token, CLS_TOKENS) == "none":
        return patches
    if cls_token == "head":
        return torch.cat([cls_tokens, patches], dim=1)
    if cls_token == "double":
        return torch.cat([cls_tokens[:, :1], patches, cls_tokens[:, 1:]], dim=1)
    half = patches.shape[1] // 2
    return torch.cat([patches[:, :half], cls_tokens, patches[:, half:]], dim=1)


def resample_pos_embed(
    pos_embed: Tensor,
    new_grid: tuple[int, int],
    cls_token: str = "middle",
    old_grid: tuple[int, int] | None = None,
) -> Tensor:
    """Position embeddings for another grid of patches.

    The class tokens' slots are taken out at their true indices, the grid is resampled (bicubic, no antialias),
    and the slots are put back where the new sequence has them.

    Args:
        pos_embed: (1, L, E). new_grid, old_grid: (H, W); old_grid None means square.

    Returns (1, L', E); the very same tensor if the grids are equal. Raises ValueError if `pos_embed` does not
    fit `old_grid`, or no square.
    """
    grid, cls = split_cls_tokens(pos_embed, cls_token)  # (1, M, E)
    side = math.isqrt(grid.shape[1])
    height, width = old_grid or (side, side)
    if height * width != grid.shape[1]:
        raise ValueError(
            f"pos_embed holds {grid.shape[1]} patches, which is not {height} x {width}: pass old_grid=(H, W)"
        )
    if (height, width) == tuple(new_grid):
        return pos_embed
    grid = grid.unflatten(1, (height, width)).permute(0, 3, 1, 2)  # (1, E, H, W)
    grid = F.interpolate(grid.float(), size=tuple(new_grid), mode="bicubic", antialias=False)
    grid = grid.flatten(2).transpose(1, 2).to(pos_embed.dtype)  # (1, M', E)
    return insert_cls_tokens(grid, cls, cls_token)


def sum_tokens(patches: Tensor, cls_tokens: Tensor, pos_embed: Tensor, cls_token: str) -> Tensor:
    """insert_cls_tokens(patches, cls_tokens, cls_token) + pos_embed, each token written once. Without a gradient."""
    positions = cls_token_positions(cls_token, patches.shape[1])
    shape = (len(patches), *pos_embed.shape[1:])
    out = patches.new_empty(shape, dtype=torch.result_type(patches, pos_embed))  # (B, L, E)
    done = 0
    for before, after in pairwise((-1, *positions, out.shape[1])):
        places, count = slice(before + 1, after), after - before - 1
        torch.add(patches[:, done : done + count], pos_embed[:, places], out=out[:, places])
        done += count
    for i, position in enumerate(positions):
        torch.add(cls_tokens[:, i], pos_embed[:, position], out=out[:, position])
    return out


def gather_patches(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """Pixels (B, C, height, width) by patch, what is left of the sides cut off: (B, H, W, C * patch)."""
    height, width = (side // size for side, size in zip(x.shape[2:], patch))
    x = x[:, :, : height * patch[0], : width * patch[1]]
    x = x.unflatten(3, (width, patch[1])).unflatten(2, (height, patch[0]))  # (B, C, H, ., W, .)
    return x.permute(0, 2, 4, 1, 3, 5).flatten(3)


def gather_patches_by_16_bytes(x: Tensor, patch: tuple[int, int]) -> Tensor:
    """The same of whole rows of pixels in groups of 16 bytes, where they can be read so. Without a gradient.

    A GPU spends its time on computing addresses: 566 us on an H200 for 32 images of 1248 px, whose bytes move in 280.
    """
    group = 16 // x.element_size()
    if not x.is_contiguous() or x.data_ptr() % 16 or x.shape[3] % group or patch[1] % group:
        return gather_patches(x, patch)
    # complex128: the one dtype of 16 bytes, copied without being computed with
    return gather_patches(x.view(torch.complex128), (patch[0], patch[1] // group)).view(x.dtype)


def embed_disjoint_patches(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.conv2d with a stride of the patch size, as a product of pixels gathered by patch: (B, E, H, W) channels-last.

    x (B, C, height, width), its sides cut to whole patches; weight (E, C, patch height, patch width). For a GPU,
    where cuDNN would convert the image to channels-last: 0.29 of the 0.57 ms that 128 images of 224 px took on an H200.
    """
    gather = gather_patches_by_16_bytes if is_untraced(x) and not x.requires_grad else gather_patches
    pixels = gather(x, tuple(weight.shape[2:]))
    return F.conv2d(pixels.permute(0, 3, 1, 2), weight.flatten(1)[:, :, None, None], bias)


def is_untraced(x: Tensor) -> bool:
    """Whether x has memory to be written into: it is not traced, and no `torch.func` is at work."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._functorch.get_interpreter_stack()
    return type(x) is Tensor and not traced


class PatchEmbed(nn.Module):
    """Image (B, C, height, width) to patches (B, M, E), overlapping if the stride is below the patch size."""

    def __init__(self, img_size, patch_size, stride, in_chans: int, embed_dim: int, dynamic_img_size: bool = False):
        super().__init__()
        self.img_size, self.patch_size = to_2tuple(img_size), to_2tuple(patch_size)
        self.stride = self.patch_size if stride is None else to_2tuple(stride)
        self.dynamic_img_size = dynamic_img_size
        self.grid_size = self.grid_of(*self.img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, self.patch_size, self.stride)

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def grid_of(self, height: int, width: int) -> tuple[int, int]:
        """Patches along each side of an image."""
        if height < self.patch_size[0] or width < self.patch_size[1]:
            raise ValueError(
                f"an image of {height} x {width} is smaller than a patch of {self.patch_size[0]} x "
                f"{self.patch_size[1]}: use a larger image or a smaller patch_size"
            )
        sides = zip((height, width), self.patch_size, self.stride)
        return tuple((side - patch) // stride + 1 for side, patch, stride in sides)

    def forward(self, x: Tensor) -> Tensor:
        if not self.dynamic_img_size and tuple(x.shape[-2:]) != self.img_size:
            raise ValueError(
                f"the image is {x.shape[-2]} x {x.shape[-1]} and the model's img_size {self.img_size}: build the "
                "model with this img_size, or with dynamic_img_size=True"
            )
        # The patches start the float32 residual stream: under bfloat16 autocast this layer alone cost a third of
        # the logits' error, at 2 % of the arithmetic.
        kind = x.device.type
        with torch.autocast(kind, enabled=False) if has_autocast(kind) else nullcontext():
            x = x.to(self.proj.weight.dtype)
            if x.is_cuda and self.stride == self.patch_size:
                patches = embed_disjoint_patches(x, self.proj.weight, self.proj.bias)
            else:
                patches = self.proj(x)
            return patches.flatten(2).transpose(1, 2)
