"""An image's patches to tokens in one pass, in Triton: product, bias, position embeddings and class tokens.

A matrix product whose left side, the pixels by patch, is never written: a program reads its patches where they are in
the image, as rows of adjacent pixels. For NVIDIA's GPUs, and without a gradient.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from mamba_ssm.ops.triton.common import ceil_div, contiguous, int64, interpreted, is_amd, on_its_device, options


class Tile(NamedTuple):
    """What a program multiplies in a step, and how many threads do it."""

    patches: int  # a power of two, as are the next three
    columns: int
    more_columns: int  # a second product with the same pixels, for widths like 192 = 128 + 64; or 0
    depth: int  # pixels of a patch in a step
    warps: int
    stages: int  # steps whose pixels and weights are on their way


# 96 KiB of shared memory: two programs on each of an H200's multiprocessors.
HOPPER_TILE = Tile(patches=64, columns=128, more_columns=64, depth=32, warps=4, stages=3)
TILE = Tile(patches=128, columns=64, more_columns=0, depth=32, warps=4, stages=3)
EXACT_TILE = Tile(patches=64, columns=64, more_columns=0, depth=16, warps=8, stages=3)  # without tensor cores


def tile_of(width: int, precision: str) -> Tile:
    """Of tokens of `width` channels: not many more columns than they have."""
    hopper = not interpreted() and triton.runtime.driver.active.get_current_target().arch == 90
    tile = EXACT_TILE if precision == "ieee" else HOPPER_TILE if hopper else TILE
    if width > tile.columns:
        return tile
    return tile._replace(columns=max(triton.next_power_of_2(width), 16), more_columns=0)


@triton.jit
def _load_weights(weight, column, k, width, K: tl.constexpr, WHOLE: tl.constexpr, FULL: tl.constexpr):
    """Rows `column` of the weight, as columns: [DEPTH, COLUMNS]."""
    pointers = weight + (column * K)[None, :] + k[:, None]
    if WHOLE and FULL:
        return tl.load(pointers)
    return tl.load(pointers, mask=(k < K)[:, None] & (column < width)[None, :], other=0.0)


@triton.jit
def _load_addends(bias, pos_embed, token, column, width, FULL: tl.constexpr):
    """Position embeddings and bias: [PATCHES, COLUMNS]."""
    pointers = pos_embed + (token * width)[:, None] + column[None, :]
    if FULL:
        value = tl.load(pointers)
    else:
        value = tl.load(pointers, mask=(column < width)[None, :], other=0.0)
    if bias is not None:
        value += tl.load(bias + column, mask=column < width, other=0.0)[None, :]
    return value


@triton.jit
def _store_tokens(out, row, column, width, product, FULL: tl.constexpr):
    pointers = out + row[:, None] + column[None, :]
    if FULL:
        tl.store(pointers, product)
    else:
        tl.store(pointers, product, mask=(column < width)[None, :])


@triton.jit
def _store_class_token(out, class_token, pos_embed, image, position, tokens, width, BLOCK: tl.constexpr):
    column = tl.arange(0, BLOCK)
    mask = column < width
    value = tl.load(class_token + column, mask=mask) + tl.load(pos_embed + position * width + column, mask=mask)
    tl.store(out + (int64(image) * tokens + position) * width + column, value, mask=mask)


# One compilation for images of all sizes: of the numbers, the width of tokens alone tells the compiler anything.
SIZES = ("count", "height", "width_by_4", "grid_height", "grid_width", "tokens", "first_position", "second_position")


@triton.jit(do_not_specialize=SIZES)
def embed_patches_kernel(
    images, weight, bias, pos_embed, first_token, second_token, out,
    count, height, width_by_4, grid_height, grid_width, tokens, width, first_position, second_position,
    CHANNELS: tl.constexpr, PATCH_HEIGHT: tl.constexpr, PATCH_WIDTH: tl.constexpr, PATCHES: tl.constexpr,
    COLUMNS: tl.constexpr, MORE_COLUMNS: tl.constexpr, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
    FULL: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """PATCHES patches of all images, COLUMNS + MORE_COLUMNS of their channels; of some images the class tokens.

    Programs of the same patches are neighbours: all but the first of them find the pixels in the L2 cache.
    """
    K: tl.constexpr = CHANNELS * PATCH_HEIGHT * PATCH_WIDTH
    WHOLE: tl.constexpr = K % DEPTH == 0
    pid = tl.program_id(0)
    column_blocks = tl.cdiv(width, COLUMNS + MORE_COLUMNS)
    column = (pid % column_blocks) * (COLUMNS + MORE_COLUMNS) + tl.arange(0, COLUMNS)
    more = (pid % column_blocks) * (COLUMNS + MORE_COLUMNS) + COLUMNS + tl.arange(0, MORE_COLUMNS or 1)
    patches = grid_height * grid_width  # of an image
    patch = (pid // column_blocks) * PATCHES + tl.arange(0, PATCHES)  # of all images
    patch = tl.minimum(patch, count * patches - 1)  # instead of a mask: what is left of PATCHES repeats the last one

    pixels_width = width_by_4 * 4  # which tells the compiler that rows can be read by 16 bytes
    image, inside = patch // patches, patch % patches
    corner = (inside // grid_width) * PATCH_HEIGHT * pixels_width + (inside % grid_width) * PATCH_WIDTH
    start = image.to(tl.int64) * (CHANNELS * height * pixels_width) + corner

    token = inside  # its place in the sequence
    if first_token is not None:
        token += (token >= first_position).to(tl.int32)
    if second_token is not None:
        token += (token >= second_position).to(tl.int32)

    # Sums begin with what is added to them: at the end it would need registers beside theirs.
    product = _load_addends(bias, pos_embed, token, column, width, FULL)
    if MORE_COLUMNS:
        more_product = _load_addends(bias, pos_embed, token, more, width, FULL)
    for step in range(0, K, DEPTH):
        k = step + tl.arange(0, DEPTH)  # pixel of a patch, in the weight's order: channel, row, column
        line = k // PATCH_WIDTH
        offset = ((line // PATCH_HEIGHT) * height + line % PATCH_HEIGHT) * pixels_width + k % PATCH_WIDTH
        pointers = images + start[:, None] + offset[None, :]
        if WHOLE:
            pixels = tl.load(pointers)
        else:
            pixels = tl.load(pointers, mask=(k < K)[None, :], other=0.0)
        weights = _load_weights(weight, column, k, width, K, WHOLE, FULL)
        product = tl.dot(pixels, weights, product, input_precision=PRECISION)
        if MORE_COLUMNS:
            weights = _load_weights(weight, more, k, width, K, WHOLE, FULL)
            more_product = tl.dot(pixels, weights, more_product, input_precision=PRECISION)

    row = (image.to(tl.int64) * tokens + token) * width
    _store_tokens(out, row, column, width, product, FULL)
    if MORE_COLUMNS:
        _store_tokens(out, row, more, width, more_product, FULL)
    if first_token is not None:
        for i in range(pid, count, tl.num_programs(0)):
            _store_class_token(out, first_token, pos_embed, i, first_position, tokens, width, BLOCK)
            if second_token is not None:
                _store_class_token(out, second_token, pos_embed, i, second_position, tokens, width, BLOCK)


def serves_patches(images: Tensor, patch: tuple[int, int], *parameters: Tensor | None) -> bool:
    """Whether `embed_patches` takes images (B, C, height, width), cut into such patches, and such parameters."""
    if images.dtype != torch.float32 or not images.is_contiguous() or images.data_ptr() % 16:
        return False
    if images.shape[3] % 4 or patch[1] % 4 or images.numel() == 0 or images[0].numel() >= 2**31:
        return False
    tensors = [tensor for tensor in parameters if tensor is not None]
    alike = all(tensor.dtype == torch.float32 and tensor.device == images.device for tensor in tensors)
    return alike and (interpreted() or (images.is_cuda and not is_amd()))


@on_its_device
def embed_patches(
    images: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    pos_embed: Tensor,
    class_tokens: tuple[Tensor, ...],
    positions: tuple[int, ...],
    precision: str,
) -> Tensor:
    """Images to tokens: patches @ weight^T + bias + pos_embed, and each class token + its pos_embed in its place.

    All float32, and as `serves_patches` wants them. What is left of the sides is cut off.

    Args:
        images: (B, C, height, width). weight: (E, C, patch height, patch width). bias: (E,).
        pos_embed: (1, L, E), of patches and class tokens.
        class_tokens: none, one or two of E values each. positions: where in L they stand, ascending.
        precision: "tf32", the tensor cores, or "ieee".

    Returns (B, L, E).
    """
    weight, bias, pos_embed, *class_tokens = contiguous(weight, bias, pos_embed, *class_tokens)
    (count, channels, height, width), (embed_dim, _, *patch) = images.shape, weight.shape
    grid = height // patch[0], width // patch[1]
    tokens = pos_embed.shape[1]
    if tokens != grid[0] * grid[1] + len(class_tokens):
        raise ValueError(f"pos_embed {tuple(pos_embed.shape)} is not of {grid} patches and {len(class_tokens)} tokens")
    first, second = (*class_tokens, None, None)[:2]
    first_position, second_position = (*positions, 0, 0)[:2]
    tile = tile_of(embed_dim, precision)
    columns = tile.columns + tile.more_columns
    programs = ceil_div(count * grid[0] * grid[1], tile.patches) * ceil_div(embed_dim, columns)
    out = images.new_empty(count, tokens, embed_dim)
    embed_patches_kernel[(programs,)](
        images, weight, bias, pos_embed, first, second, out,
        count, height, width // 4, *grid, tokens, embed_dim, first_position, second_position,
        CHANNELS=channels, PATCH_HEIGHT=patch[0], PATCH_WIDTH=patch[1], PATCHES=tile.patches,
        COLUMNS=tile.columns, MORE_COLUMNS=tile.more_columns, DEPTH=tile.depth,
        BLOCK=triton.next_power_of_2(embed_dim), FULL=embed_dim % columns == 0, PRECISION=precision,
        **(options(tile.warps) | {"num_stages": tile.stages}),
    )  # fmt: skip
    return out
