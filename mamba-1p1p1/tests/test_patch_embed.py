"""The embedding's Triton kernel against a strided convolution in float64, class tokens and positions added.

Without a GPU this file runs again in a process of its own, where Triton interprets the kernel on CPU tensors.
"""

import os
import subprocess
import sys

import pytest
import torch

pytest.importorskip("triton")
from mamba_ssm.ops.triton import patch_embed
from mamba_ssm.ops.triton.patch_embed import Tile, embed_patches, serves_patches

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
PRECISIONS = {"ieee": 1e-6, "tf32": 2e-3}
on_device = [
    pytest.mark.usefixtures("poisoned"),
    *([] if INTERPRETED else [pytest.mark.gpu]),
    pytest.mark.skipif(not INTERPRETED and not torch.cuda.is_available(), reason="no GPU here"),
]


@pytest.mark.skipif(INTERPRETED, reason="the other process")
@pytest.mark.usefixtures("triton_interpreter")
def test_the_kernel_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout


def case(count=1, size=(32, 32), patch=(16, 16), width=24, places=(), bias=True, channels=3):
    """`places`: from the number of patches to the class tokens' positions in the whole sequence."""
    return locals()


MIDDLE, HEAD, DOUBLE = (lambda m: m // 2,), (lambda m: 0,), (lambda m: 0, lambda m: m + 1)
CASES = {
    "one": case(places=MIDDLE),
    "several": case(count=3, places=MIDDLE),
    "no-class-token": case(count=2),
    "head": case(count=2, places=HEAD, width=40),
    "double": case(count=3, places=DOUBLE),
    "vim-tiny": case(count=2, size=(48, 32), width=192, places=MIDDLE),
    "masked-columns": case(count=2, size=(32, 64), width=320, places=DOUBLE),
    "odd-width": case(width=13, places=MIDDLE),
    "no-bias": case(count=2, bias=False, places=MIDDLE),
    "remainders": case(count=2, size=(41, 60), places=MIDDLE),
    "patch-8": case(count=2, size=(27, 44), patch=(8, 8), places=DOUBLE),
    "one-channel": case(count=5, size=(8, 20), patch=(8, 4), channels=1, places=HEAD),
    "depth-that-fills-no-step": case(count=2, size=(30, 40), patch=(5, 12), channels=2, places=MIDDLE),
    "more-patches-than-a-program": case(count=3, size=(80, 72), patch=(8, 8), places=MIDDLE),
}


def arguments(count, size, patch, width, places, bias, channels, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype)

    patches = (size[0] // patch[0]) * (size[1] // patch[1])
    weight = draw(width, channels, *patch) / (channels * patch[0] * patch[1]) ** 0.5
    tokens = tuple(draw(1, 1, width) for _ in places)
    images, bias, pos_embed = draw(count, channels, *size), draw(width) if bias else None, draw(1, patches, width)
    pos_embed = torch.cat([pos_embed, *(draw(1, 1, width) for _ in places)], dim=1)
    return images, weight, bias, pos_embed, tokens, tuple(place(patches) for place in places)


def in_float64(images, weight, bias, pos_embed, class_tokens, positions):
    images, weight, pos_embed = images.double(), weight.double(), pos_embed.double()
    tokens = torch.nn.functional.conv2d(images, weight, None if bias is None else bias.double(), weight.shape[2:])
    tokens = tokens.flatten(2).transpose(1, 2)
    for token, position in zip(class_tokens, positions):
        token = token.double().expand(len(images), 1, -1)
        tokens = torch.cat([tokens[:, :position], token, tokens[:, position:]], dim=1)
    return tokens + pos_embed


def expect_right(tensors, precision):
    out, expected = embed_patches(*tensors, precision), in_float64(*tensors)
    assert out.dtype == torch.float32 and out.shape == expected.shape and out.is_contiguous()
    error = ((out.double() - expected).abs().max() / expected.abs().max()).nan_to_num(float("inf")).item()
    assert error <= PRECISIONS[precision]


class TestOnDevice:
    pytestmark = on_device

    @pytest.mark.parametrize("precision", ["ieee"] if INTERPRETED else PRECISIONS)
    @pytest.mark.parametrize("name", CASES)
    def test_tokens(self, name, precision):
        tensors = arguments(**CASES[name])
        assert serves_patches(tensors[0], CASES[name]["patch"], *tensors[1:4], *tensors[4])
        expect_right(tensors, precision)

    @pytest.mark.skipif(not INTERPRETED, reason="on a GPU its architecture decides")
    @pytest.mark.parametrize("tile", [patch_embed.HOPPER_TILE, patch_embed.TILE, Tile(16, 32, 16, 64, 4, 3)])
    @pytest.mark.parametrize("width", [192, 320])
    def test_tiles(self, tile, width, monkeypatch):
        monkeypatch.setattr(patch_embed, "EXACT_TILE", tile)
        expect_right(arguments(**case(count=3, size=(32, 48), width=width, places=DOUBLE)), "ieee")

    def test_parameters_may_have_any_strides(self):
        images, weight, bias, pos_embed, tokens, positions = arguments(**CASES["several"])
        pos_embed = pos_embed.transpose(1, 2).contiguous().transpose(1, 2)
        weight = weight.to(memory_format=torch.channels_last)
        assert not pos_embed.is_contiguous() and not weight.is_contiguous()
        expect_right((images, weight, bias, pos_embed, tokens, positions), "ieee")

    def test_what_the_kernel_does_not_read_is_not_served(self):
        images, weight, bias, pos_embed, tokens, _ = arguments(**CASES["several"])
        parameters = (weight, bias, pos_embed, *tokens)
        assert serves_patches(images, (16, 16), *parameters)
        assert not serves_patches(images, (16, 14), *parameters)
        assert not serves_patches(images[..., :30].contiguous(), (16, 16), *parameters)
        assert not serves_patches(images.transpose(2, 3), (16, 16), *parameters)
        assert not serves_patches(images.to(memory_format=torch.channels_last), (16, 16), *parameters)
        assert not serves_patches(images[:0], (16, 16), *parameters)
        assert not serves_patches(images.bfloat16(), (16, 16), *parameters)
        assert not serves_patches(images, (16, 16), weight, bias, pos_embed.double())
        assert not serves_patches(images, (16, 16), weight.to("meta"), bias, pos_embed)
        behind_an_element = torch.cat([images.flatten()[:1], images.flatten()])[1:].view(images.shape)
        assert not serves_patches(behind_an_element, (16, 16), *parameters)

    def test_position_embeddings_of_another_grid_are_refused(self):
        images, weight, bias, pos_embed, tokens, positions = arguments(**CASES["one"])
        with pytest.raises(ValueError, match=r"pos_embed \(1, 4, 24\) is not of \(2, 2\) patches and 1"):
            embed_patches(images, weight, bias, pos_embed[:, 1:], tokens, positions, "ieee")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("precision", PRECISIONS)
def test_images_of_more_than_2_to_the_31_elements(precision):
    count = 2**31 // (3 * 64 * 64) + 2
    if torch.cuda.mem_get_info()[0] < 3 * 4 * 2**31:
        pytest.skip("too little memory is free")
    last, *parameters = arguments(**case(size=(64, 64), width=192, places=MIDDLE))
    images = torch.zeros(count, 3, 64, 64, device="cuda")
    images[-1] = last[0]
    out = embed_patches(images, *parameters, precision)
    assert torch.equal(out[-1:], embed_patches(last, *parameters, precision))
