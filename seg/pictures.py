"""Predictions as colours laid over the image."""

from __future__ import annotations

import colorsys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image

from datasets import DataBundle
from drawing import literal, new_figure, save_figure
from seg.evaluation import Segmented
from seg.views import IGNORED

OPACITY = 0.55
MOST_ROWS = 8
MOST_BARS = 40


def palette(num_classes: int) -> np.ndarray:
    """A colour for each class, uint8 (256, 3): hues a golden ratio apart; grey for what is ignored."""
    colours = np.full((256, 3), 128, np.uint8)
    for i in range(num_classes):
        hue, light = i * 0.618034 % 1, (0.95, 0.7, 0.5)[i // 12 % 3]
        colours[i] = [round(255 * channel) for channel in colorsys.hsv_to_rgb(hue, 0.8, light)]
    return colours


def overlay(image: np.ndarray, classes: np.ndarray, colours: np.ndarray, bare: list[int] | None = None) -> np.ndarray:
    """An image (H, W, 3) under the colours of its pixels' classes (H, W), both uint8; `bare` ones stay as they are."""
    mixed = (1 - OPACITY) * image + OPACITY * colours[classes]
    painted = ~np.isin(classes, bare or [])
    return np.where(painted[:, :, None], mixed.round(), image).astype(np.uint8)


def backgrounds(names: list[str]) -> list[int]:
    """Labels of classes named "background": they stay uncoloured, because colour there would hide the rest."""
    return [label for label, name in enumerate(names) if name == "background"]


def write(folder: Path, result: Segmented, data: DataBundle) -> list[Path]:
    """overlays/NAME.png for every sample, and two pictures of all: samples.png and classes.png."""
    colours = palette(data.num_classes)
    (folder / "overlays").mkdir(exist_ok=True)
    for sample, name in zip(result.samples, file_names(result, data)):
        image = np.asarray(data.val.raw(sample.index))
        mixed = overlay(image, sample.predicted, colours, backgrounds(data.class_names))
        Image.fromarray(mixed).save(folder / "overlays" / name)
    draw_samples(result, data, colours, folder / "samples.png")
    draw_classes(result, data.class_names, folder / "classes.png")
    return [folder / "samples.png", folder / "classes.png", folder / "overlays"]


def file_names(result: Segmented, data: DataBundle) -> list[str]:
    """What the samples' overlays are called: as their images, with their numbers where two are called alike."""
    stems = [Path(data.val.name(sample.index)).stem.replace(" ", "-") for sample in result.samples]
    while len(times := Counter(stems)) < len(stems):  # a number may make a name that another image has
        stems = [stem if times[stem] == 1 else f"{stem}-{sample.index}" for stem, sample in zip(stems, result.samples)]
    return [f"{stem}.png" for stem in stems]


def draw_samples(result: Segmented, data: DataBundle, colours: np.ndarray, path: Path) -> None:
    """Image, label, prediction and what is wrong of the first samples, a row each."""
    from matplotlib.patches import Patch  # here, as in `drawing.new_figure`

    samples = result.samples[:MOST_ROWS]
    figure = new_figure(10, 0.9 + 2.5 * max(1, len(samples)), layout="constrained")
    figure.suptitle(f"{result.words}; {result.images:,} images")
    panels = figure.subplots(max(1, len(samples)), 4, squeeze=False)
    for panel, title in zip(panels[0], ("image", "label", "prediction", "wrong pixels")):
        panel.set_title(title, fontsize=9)
    for panel in panels.flat:
        panel.axis("off")
    shown, bare = set(), backgrounds(data.class_names)
    for row, sample in zip(panels, samples):
        image = np.asarray(data.val.raw(sample.index))
        wrong = (sample.label != sample.predicted) & (sample.label != IGNORED)
        label, predicted = (overlay(image, classes, colours, bare) for classes in (sample.label, sample.predicted))
        pictures = (image, label, predicted, wrong)
        for panel, picture in zip(row, pictures):
            panel.imshow(picture, interpolation="nearest", cmap="gray", vmin=0, vmax=1)
        shown |= set(np.unique(sample.label)) | set(np.unique(sample.predicted))
    handles = [
        Patch(color=colours[label] / 255, label=literal(data.class_names[label]))
        for label in sorted(shown - {IGNORED, *bare})
    ]
    if handles:
        figure.legend(handles=handles[:MOST_BARS], loc="outside lower center", ncols=8, fontsize=8)
    save_figure(figure, path, dpi=110)


def draw_classes(result: Segmented, names: list[str], path: Path) -> None:
    """Intersection over union of each class, the worst first where there are many."""
    iou = result.iou
    order = [label for label in iou.argsort().tolist() if not iou[label].isnan()][:MOST_BARS]
    order = sorted(order) if len(names) <= MOST_BARS else order
    figure = new_figure(7, 1.2 + 0.24 * len(order), layout="constrained")
    axes = figure.subplots()
    axes.barh(range(len(order)), [iou[label].item() for label in order], color="#4477aa")
    axes.set_yticks(range(len(order)), [literal(names[label]) for label in order])  # two may have the same name
    axes.axvline(result.score, color="black", linewidth=1, label=f"mean {result.score:.1f} %")
    axes.set(xlabel="intersection over union, %", xlim=(0, 100))
    axes.invert_yaxis()
    axes.legend(loc="lower left", fontsize=8)
    save_figure(figure, path, dpi=110)
