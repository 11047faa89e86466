"""The pictures of a run: curves over epochs, the confusion matrix, the most confident mistakes."""

from __future__ import annotations

import re
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from datasets import DataBundle
from evaluation import Evaluation

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# More names than this on an axis cannot be read.
MOST_NAMES = 40
# What matplotlib warns of each character that its fonts lack, in each picture.
LACKING = re.compile(r"Glyph \d+ .*missing from font\(s\) (.*)\.")


def draw_curves(rows: list[dict], path: Path, score: tuple[str, str]) -> None:
    """Loss, score and learning rate over epochs, side by side."""
    name, column = score
    figure = new_figure(12, 3.5)
    panels = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.04, right=0.99, bottom=0.15, top=0.91, wspace=0.18)
    wanted = (
        ("loss", {"train_loss": "training", "test_loss": "held-out", "test_ema_loss": "held-out, EMA"}),
        (f"{name}, %", {f"test_{column}": "held-out", f"test_ema_{column}": "held-out, EMA"}),
        ("learning rate", {"train_lr": ""}),
    )
    for panel, (title, columns) in zip(panels, wanted):
        for key, label in columns.items():
            points = [(row["epoch"] + 1, row[key]) for row in rows if row.get(key) is not None]
            if points:
                panel.plot(*zip(*points), marker="o", markersize=3, label=label)
        panel.set(title=title, xlabel="epoch")
        panel.grid(alpha=0.3)
        if len(panel.lines) > 1:
            panel.legend()
    figure.savefig(path, dpi=120)


def draw_confusion(confusion: torch.Tensor, names: list[str], path: Path) -> None:
    """Counts (C, C) of (label, predicted), each row as shares of its label's images."""
    shares = confusion.double() / confusion.sum(dim=1, keepdim=True).clamp_min(1)
    size = min(4 + 0.3 * len(confusion), 14)
    figure = new_figure(size + 1, size, layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="viridis", vmin=0, vmax=1)
    axes.set(xlabel="predicted", ylabel="label", title="share of each label's images")
    if len(names) <= MOST_NAMES:
        shown = [literal(name) for name in names]
        axes.set_xticks(range(len(names)), shown, rotation=90 if max(map(len, names)) > 2 else 0)
        axes.set_yticks(range(len(names)), shown)
    if len(confusion) <= 20:
        for row, column in confusion.nonzero().tolist():
            color, count = "black" if shares[row, column] > 0.5 else "white", confusion[row, column].item()
            axes.text(column, row, count, ha="center", va="center", color=color, fontsize=8)
    figure.colorbar(image, shrink=0.8)
    save_figure(figure, path)


def draw_mistakes(evaluation: Evaluation, data: DataBundle, path: Path, columns: int = 6) -> None:
    """The images that the model was surest about and wrong, with label, prediction and confidence."""
    mistakes, names = evaluation.mistakes, data.class_names
    lines = max(1, -(-len(mistakes) // columns))
    figure = new_figure(columns * 1.9, 0.6 + lines * 2.3, layout="constrained")
    figure.suptitle(f"most confident mistakes; {evaluation.top1:.2f} % of {evaluation.images:,} images are right")
    for panel in figure.subplots(lines, columns, squeeze=False).flat:
        panel.axis("off")
    for panel, mistake in zip(figure.axes, mistakes):
        panel.imshow(data.val.raw(mistake.index))
        label, predicted = names[mistake.label], class_name(names, mistake.predicted)
        title = f"{label}\ntaken for {predicted}, {100 * mistake.confidence:.0f} %"
        panel.set_title(literal(title), fontsize=8)
    save_figure(figure, path)


def new_figure(width: float, height: float, layout: str | None = None) -> Figure:
    """An empty figure of so many inches. matplotlib is imported for the first one: it takes a second of every rank."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout=layout)


def save_figure(figure: Figure, path: Path, dpi: int = 120) -> None:
    """Write a PNG; of characters that the font lacks there is one line in all."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", LACKING.pattern)
        figure.savefig(path, dpi=dpi)
    for warning in caught:
        lacking = LACKING.match(str(warning.message))
        if lacking:
            say_lacking(lacking[1])
        else:
            warnings.showwarning(warning.message, warning.category, warning.filename, warning.lineno)


@cache  # once a process
def say_lacking(fonts: str) -> None:
    print(
        f"pictures: the font {fonts} lacks characters of the names, boxes stand for them; a matplotlibrc file with "
        f"`font.family: {fonts}, OTHER` takes them from an installed font OTHER",
        file=sys.stderr,
        flush=True,
    )


def literal(text: str) -> str:
    """For matplotlib, which would read a formula between two dollars, and takes no name that is not UTF-8."""
    return text.encode("utf-8", "replace").decode().replace("$", r"\$")


def class_name(names: list[str], label: int) -> str:
    """The name of a class; a model may have more classes than the data."""
    return names[label] if label < len(names) else f"class {label}"
