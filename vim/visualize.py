"""Look into a trained Vim: `python visualize.py --checkpoint CKPT IMAGE_OR_FOLDER ... --output_dir DIR`.

For each image a PNG of panels: what the class score depends on (Grad-CAM and saliency), and what a layer's
class token reads, forward and backward ("hidden attention"). For all images together receptive_field.png.
Exit codes: 0 done, 2 wrong flag, 4 an image or a checkpoint that cannot be used.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor, nn
from tqdm import tqdm

from arguments import OneLineParser, positive_int
from augment import channel_statistics
from drawing import literal, save_figure
from errors import ConfigError, DataError
from failures import run_cli
from inference import Classifier, add_device_flag, add_model_flags, find_images, load_classifier
from models_mamba import VisionMamba
from vim_tokens import split_cls_tokens

# Beyond this length the whole matrix takes minutes and shows nothing; the class token's row is always drawn.
LONGEST_MATRIX = 800
DECADES = 4  # of the matrices' colour scale
DIRECTIONS = {"forward": "", "backward": "_b"}
SPANS = {"forward": "tokens up to its own", "backward": "tokens from its own on"}


# --- hidden attention


class ScanTerms(NamedTuple):
    """What one direction's scan works on, in the order in which it reads the tokens."""

    x: Tensor  # (B, L, D), after the convolution
    delta: Tensor  # (B, L, D)
    A: Tensor  # (D, N)
    B: Tensor  # (B, L, N)
    C: Tensor  # (B, L, N)


def scan_terms(mixer: nn.Module, hidden: Tensor, direction: str) -> ScanTerms:
    """The terms of a "v2" mixer's scan, from the mixer's input (B, L, E)."""
    suffix = DIRECTIONS[direction]
    conv, x_proj, dt_proj = (getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj"))
    x = mixer.in_proj(hidden)[..., : mixer.d_inner]  # (B, L, D)
    if direction == "backward":
        x = x.flip(1)
    x = F.silu(conv(x.transpose(1, 2))[..., : x.shape[1]]).transpose(1, 2)
    dt, B, C = x_proj(x).split([mixer.dt_rank, mixer.d_state, mixer.d_state], dim=-1)
    A_log = mixer.A_b_log if direction == "backward" else mixer.A_log
    return ScanTerms(x, F.softplus(dt_proj(dt)), -torch.exp(A_log), B, C)


def attention_row(terms: ScanTerms, t: int) -> Tensor:
    """How much token t of the scan's order reads of each token s, a channel: (B, D, L).

    alpha[t, s] = C[t] (prod_{k = s+1..t} exp(delta[k] A)) delta[s] B[s] for s <= t, else 0
    (Ali et al., "The Hidden Attention of Mamba Models", arXiv 2403.01590, eq. 11), so that the scan's output is
    y[t] = sum_s alpha[t, s] x[s] + D x[t].
    """
    past = terms.delta[:, : t + 1]  # (B, t+1, D)
    elapsed = past.flip(1).cumsum(1).flip(1) - past  # of tokens s+1..t
    decay = torch.exp(elapsed.unsqueeze(-1) * terms.A)  # (B, t+1, D, N)
    alpha = torch.einsum("bn,bsdn,bsd,bsn->bds", terms.C[:, t], decay, past, terms.B[:, : t + 1])
    return F.pad(alpha, (0, terms.x.shape[1] - t - 1))


def attention_map(terms: ScanTerms, rows: list[int], direction: str) -> Tensor:
    """Mean over channels of |alpha|: (rows, L), rows and columns numbered in the image's own order."""
    last = terms.x.shape[1] - 1
    backward = direction == "backward"
    found = [attention_row(terms, last - t if backward else t)[0].abs().mean(0) for t in rows]
    return torch.stack([row.flip(0) if backward else row for row in found])


# --- gradients


class LayerRecord:
    """What enters one block during a forward pass: `stream` with its gradient, and its mixer's input."""

    def __init__(self, model: VisionMamba, layer: int):
        block = model.layers[layer]
        self.stream = self.gradient_of = self.mixer_input = None
        self.hooks = [
            block.register_forward_pre_hook(self._enter),
            block.mixer.register_forward_pre_hook(self._mix),
        ]

    def _enter(self, block: nn.Module, inputs: tuple) -> None:
        hidden, residual = (*inputs, None)[:2]
        # The block adds both at once, so a gradient of `hidden` is one of the stream.
        hidden.retain_grad()
        self.gradient_of = hidden
        self.stream = (hidden if residual is None else hidden + residual).detach()

    def _mix(self, mixer: nn.Module, inputs: tuple) -> None:
        self.mixer_input = inputs[0].detach()

    def __enter__(self) -> "LayerRecord":
        return self

    def __exit__(self, *_) -> None:
        for hook in self.hooks:
            hook.remove()


def grad_cam(model: VisionMamba, record: LayerRecord) -> Tensor:
    """Grad-CAM (Selvaraju et al., arXiv 1610.02391, eq. 1-2) of the recorded stream after a backward pass: (H, W).

    The patches' features are weighed by their mean gradients; what argues against the class is cut off.
    """
    design = model.cls_token_design
    features, _ = split_cls_tokens(record.stream, design)  # (1, M, E)
    gradients, _ = split_cls_tokens(record.gradient_of.grad, design)
    cam = (features * gradients.mean(1, keepdim=True)).sum(-1).relu()
    return cam.unflatten(1, model.patch_embed.grid_size)[0]


def saliency(model: nn.Module, image: Tensor, number: int, samples: int = 16, noise: float = 0.15) -> Tensor:
    """SmoothGrad (Smilkov et al., arXiv 1706.03825) of a class score: (H, W).

    Mean over noisy copies of |d score / d pixel|, the largest over the channels of image (1, C, H, W).
    """
    generator = torch.Generator().manual_seed(0)
    deviation = noise * (image.max() - image.min())
    total = torch.zeros_like(image[0, 0])
    for _ in range(samples):
        noisy = image + deviation * torch.randn(image.shape, generator=generator).to(image.device)
        noisy.requires_grad_()
        (gradient,) = torch.autograd.grad(model(noisy)[0, number], noisy)
        total += gradient[0].abs().amax(0)
    return total / samples


def receptive_fields(model: VisionMamba, images: Tensor) -> dict[str, Tensor]:
    """Effective receptive fields (Luo et al., arXiv 1701.04128): title -> (H, W), 1 at its largest.

    Mean over images (B, C, H, W) and channels of |d token / d pixel|, for the token that the head reads and
    for the patch in the middle of the image.
    """
    height, width = model.patch_embed.grid_size
    middle = height // 2 * width + width // 2

    def head(tokens: Tensor) -> Tensor:
        return model.forward_head(tokens, pre_logits=True)

    def middle_patch(tokens: Tensor) -> Tensor:
        return split_cls_tokens(tokens, model.cls_token_design)[0][:, middle]

    return {
        "what the head reads": receptive_field(model, images, head),
        "the middle patch": receptive_field(model, images, middle_patch),
    }


def receptive_field(model: VisionMamba, images: Tensor, read: Callable[[Tensor], Tensor]) -> Tensor:
    """Of the token (1, E) that `read` takes from all tokens (1, L, E): (H, W), 1 at its largest."""
    total = torch.zeros_like(images[0, 0])
    for image in images.split(1):
        image = image.clone().requires_grad_()
        token = read(model.forward_features(image))
        (gradient,) = torch.autograd.grad(token.sum(), image)
        total += gradient[0].abs().sum(0)
    return total / total.max().clamp_min(1e-30)


# --- pictures


def displayable(image: Tensor) -> np.ndarray:
    """A preprocessed image (C, H, W) as (H, W, 3) in 0..1."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in channel_statistics(len(image)))
    image = (image.cpu() * std + mean).clamp(0, 1)
    return (image if len(image) == 3 else image.mean(0, keepdim=True).expand(3, -1, -1)).permute(1, 2, 0).numpy()


def draw_overlay(axes, picture: np.ndarray, values: Tensor, title: str) -> AxesImage:
    """A map (H', W') over the greyed picture (H, W, 3): the more, the brighter and the less of the picture is left."""
    axes.imshow(0.7 * picture.mean(-1), cmap="gray", vmin=0, vmax=1)
    values = F.interpolate(values[None, None].float().cpu(), picture.shape[:2], mode="nearest")[0, 0]
    share = (values / values.max().clamp_min(1e-30)).numpy()
    shown = axes.imshow(share, cmap="inferno", alpha=0.2 + 0.8 * share, vmin=0, vmax=1)
    axes.set_title(title if share.any() else f"{title}\n(zero everywhere)", fontsize=9)
    axes.axis("off")
    return shown


def draw_matrix(axes, matrix: Tensor, title: str, largest: float, marked: list[int]) -> AxesImage:
    """Attention (L, L), logarithmic, four decades down from `largest`; dotted lines at the rows `marked`."""
    values = matrix.cpu().clamp_min(1e-30).log10().numpy()
    shown = axes.imshow(values, cmap="viridis", vmax=math.log10(largest), vmin=math.log10(largest) - DECADES)
    for row in marked:
        axes.axhline(row, color="white", linewidth=0.8, linestyle=":")
    axes.set_title(title, fontsize=9)
    axes.set(xlabel="token read", ylabel="token that reads")
    return shown


class Explanation(NamedTuple):
    """What is known of one image."""

    image: Tensor  # (C, H, W)
    number: int  # the class explained
    probability: float
    cam: Tensor  # (H', W')
    saliency: Tensor  # (H, W)
    readers: list[int]  # the class tokens among all L tokens; none where the model has none
    reads: dict[str, Tensor]  # direction -> (H', W'), what the class tokens read, else all tokens, on average
    matrices: dict[str, Tensor]  # direction -> (L, L); empty where there are too many tokens


def explain(classifier: Classifier, image: Tensor, layer: int, number: int | None) -> Explanation:
    """Explain class `number`, by default the predicted one, of image (C, H, W) at block `layer`."""
    model, image = classifier.model, image[None].to(classifier.device)
    with LayerRecord(model, layer) as record:
        logits = model(image.clone().requires_grad_())
        number = int(logits.argmax()) if number is None else number
        model.zero_grad(set_to_none=True)
        logits[0, number].backward()
    reads, matrices = {}, {}
    length = record.mixer_input.shape[1]
    grid = model.patch_embed.grid_size
    readers = list(model.cls_token_position(grid[0] * grid[1]))
    with torch.no_grad():
        for direction in DIRECTIONS:
            terms = scan_terms(model.layers[layer].mixer, record.mixer_input, direction)
            row = attention_map(terms, readers or list(range(length)), direction).mean(0)  # (L,)
            patches, _ = split_cls_tokens(row[None, :, None], model.cls_token_design)
            reads[direction] = patches.view(grid)
            if length <= LONGEST_MATRIX:
                matrices[direction] = attention_map(terms, list(range(length)), direction)
    probability = logits.detach().softmax(dim=1)[0, number].item()
    maps = grad_cam(model, record), saliency(model, image, number)
    return Explanation(image[0], number, probability, *maps, readers, reads, matrices)


def explanation_figure(explanation: Explanation, title: str, layer: int) -> Figure:
    """The panels of one image."""
    picture = displayable(explanation.image)
    figure = Figure(figsize=(14, 7.4), layout="constrained")
    figure.suptitle(literal(title), fontsize=11)
    axes = figure.subplots(2, 4)
    axes[0, 0].imshow(picture)
    axes[0, 0].set_title("the image as the model gets it", fontsize=9)
    axes[0, 0].axis("off")
    cam = f"Grad-CAM of what enters block {layer}:\npatches that speak for the class"
    draw_overlay(axes[0, 1], picture, explanation.cam, cam)
    draw_overlay(axes[0, 2], picture, explanation.saliency, "saliency (SmoothGrad):\npixels that move the score")
    reader = "the class token reads" if explanation.readers else "all tokens read, on average"
    both = f"hidden attention of block {layer}:\nwhat {reader}"
    shown = draw_overlay(axes[0, 3], picture, sum(explanation.reads.values()), both)
    figure.colorbar(shown, ax=axes[0, 3], shrink=0.8, label="share of the largest value in the panel")
    for column, (direction, values) in enumerate(explanation.reads.items()):
        draw_overlay(axes[1, column], picture, values, f"its {direction} direction alone:\n{SPANS[direction]}")
    draw_matrices(figure, axes[1, 2:], explanation)
    return figure


def draw_matrices(figure: Figure, axes, explanation: Explanation) -> None:
    """The whole matrices of both directions on one colour scale, where there are any."""
    largest = max((matrix.max().item() for matrix in explanation.matrices.values()), default=0.0)
    note = "\n(dotted: the class token)" if explanation.readers else ""
    for panel, direction in zip(axes, explanation.reads):
        if largest == 0:
            panel.axis("off")
            continue
        matrix, title = explanation.matrices[direction], f"hidden attention, {direction}{note}"
        shown = draw_matrix(panel, matrix, title, largest, explanation.readers)
    if largest > 0:
        figure.colorbar(shown, ax=axes[-1], shrink=0.8, label="log10 of mean |alpha| over channels")


def receptive_field_figure(fields: dict[str, Tensor], images: int) -> Figure:
    """Side by side, on a logarithmic colour scale of three decades."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    count = "1 image" if images == 1 else f"mean of {images} images"
    figure.suptitle(f"effective receptive field: pixels that a token depends on ({count})", fontsize=10)
    panels = figure.subplots(1, len(fields))
    for axes, (title, field) in zip(panels, fields.items()):
        shown = axes.imshow(field.cpu().clamp_min(1e-30).log10().numpy(), cmap="inferno", vmin=-3, vmax=0)
        axes.set_title(title, fontsize=9)
        axes.axis("off")
    figure.colorbar(shown, ax=panels, shrink=0.8, label="log10 of |d token / d pixel|, largest = 0")
    return figure


# --- command


def build_parser() -> argparse.ArgumentParser:
    parser = OneLineParser(prog="visualize.py", description="Pictures of what a Vim looks at.")
    parser.add_argument("images", nargs="+", metavar="IMAGE_OR_FOLDER", help="images, or folders of images")
    add_model_flags(parser)
    add_device_flag(parser)
    add = parser.add_argument_group("pictures").add_argument
    add("--output_dir", "--output-dir", required=True, metavar="DIR", help="where the PNG files go")
    add("--layer", default=-1, type=int, help="the block to look into; negative ones count from the last")
    add("--class", dest="number", type=int, metavar="N", help="the class to explain; default: the predicted one")
    add("--limit", default=16, type=positive_int, metavar="K", help="look at the first K images alone")
    return parser


def check(args: argparse.Namespace, classifier: Classifier) -> int:
    """The block's number. Raises ConfigError for a model, block or class that cannot be shown."""
    model = classifier.model
    if not isinstance(model, VisionMamba) or model.bidirectional != "v2":
        kind = getattr(model, "bidirectional", type(model).__name__)
        raise ConfigError(f"the pictures are of a Vim with bidirectional='v2', and this model is {kind!r}")
    depth, classes = len(model.layers), len(classifier.class_names)
    if not -depth <= args.layer < depth:
        raise ConfigError(f"--layer {args.layer}: the model's blocks are 0 to {depth - 1}")
    if args.number is not None and not 0 <= args.number < classes:
        raise ConfigError(f"--class {args.number}: the model's classes are 0 to {classes - 1}")
    return args.layer % depth


def command(args: argparse.Namespace) -> None:
    files = find_images(args.images)[: args.limit]
    classifier = load_classifier(args)
    layer = check(args, classifier)
    folder = Path(args.output_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(f"--output_dir {folder}: {error.strerror}") from error
    print(f"{classifier.description}; {len(files)} images on {classifier.device}", file=sys.stderr)
    images = torch.stack([classifier.load_image(file) for file in files])  # (B, C, H, W)
    for i, file in enumerate(tqdm(files, unit="image", disable=not sys.stderr.isatty())):
        explanation = explain(classifier, images[i], layer, args.number)
        asked = "the predicted class" if args.number is None else f"class {args.number}"
        name = classifier.class_names[explanation.number]
        title = f"{file.name}: why {name!r}, {asked}, {100 * explanation.probability:.1f} % probable"
        save(explanation_figure(explanation, title, layer), folder / f"{i:03d}-{file.stem}.png")
    fields = receptive_fields(classifier.model, images.to(classifier.device))
    save(receptive_field_figure(fields, len(files)), folder / "receptive_field.png")


def save(figure: Figure, path: Path) -> None:
    """Write a PNG and print its path."""
    save_figure(figure, path, dpi=110)
    print(path)


def main(argv: list[str] | None = None) -> int:
    """Run the program; returns the exit code."""
    return run_cli(command, build_parser().parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
