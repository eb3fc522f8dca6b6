"""Figures of a run's history and of evaluations."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from detkit.data.annotations import Annotations
from detkit.errors import shorten
from detkit.ops.atomic_write import write_atomically
from detkit.ops.curves import RECALLS, THRESHOLDS, Curves
from detkit.viz.confusion_matrix import confusion_matrix
from detkit.viz.drawing import encode_figure

MAX_LINES = 20  # classes with a line of their own
MAX_NUMBERED = 30  # classes up to which the cells of a confusion matrix show numbers
MIN_SCORE = 0.25  # of predictions in a confusion matrix


def plot_history(rows: Sequence[Mapping[str, float]], losses: Collection[str], path: Path) -> None:
    """Plot losses, AP and learning rate by epoch, side by side; rows as in ``history.csv``."""
    panels = (
        ("training loss", losses),
        ("validation", ("AP", "AP50", "AP75")),
        ("learning rate", ("lr",)),
    )
    figure = new_figure(13, 3.6)
    epochs = [row["epoch"] for row in rows]
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for column in columns:
            axes.plot(epochs, [row[column] for row in rows], marker="." if len(rows) < 40 else None, label=column)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    save_figure(figure, path)


def draw_evaluation(
    curves: Curves, predictions: Sequence[Mapping[str, Any]], annotations: Annotations, min_score: float = 0.0
) -> dict[str, Figure]:
    """Return the figures of an evaluation by name: ``precision_recall`` and ``confusion_matrix``.

    Args:
        curves: precision and recall.
        predictions: COCO results.
        annotations: ground truth.
        min_score: score threshold of the evaluation.
    """
    names, score = annotations.class_names, max(MIN_SCORE, min_score)
    counts = confusion_matrix(annotations, predictions, score=score)
    return {
        "precision_recall": draw_curves(curves, names),
        "confusion_matrix": draw_confusion(counts, names, score),
    }


def draw_curves(curves: Curves, class_names: Sequence[str]) -> Figure:
    """Plot precision over recall, and F1 over the score threshold, for each class and their mean (black).

    The legends list the classes with the most boxes, with AP50 and the best F1.
    """
    figure = new_figure(13, 5.4)
    left, right = figure.subplots(1, 2)
    labelled, ap50 = curves.labelled(), curves.ap50()
    if labelled:
        areas = [f"{area:.3f}" for area in ap50]
        _draw_classes(left, "lower left", RECALLS, curves.precision_rc, curves, class_names, areas)
        f1 = curves.f1()
        best = [f"{f1[k, c]:.3f} at {THRESHOLDS[k]:.2f}" for c, k in enumerate(f1.argmax(0))]
        _draw_classes(right, "lower center", THRESHOLDS, f1, curves, class_names, best)
        mean = f1[:, labelled].mean(1)
        left.set_title(f"precision and recall at IoU 0.5: mean AP50 {ap50[labelled].mean():.3f}")
        right.set_title(f"F1 at IoU 0.5: mean {mean.max():.3f} at score {THRESHOLDS[mean.argmax()]:.2f}")
    left.set(xlabel="recall", ylabel="precision", xlim=(0, 1), ylim=(0, 1.02))
    right.set(xlabel="score threshold", ylabel="F1", xlim=(0, 1), ylim=(0, 1.02))
    return figure


def _draw_classes(
    axes: Axes,
    loc: Literal["lower left", "lower center"],
    x: np.ndarray,
    y_xc: np.ndarray,
    curves: Curves,
    class_names: Sequence[str],
    values: Sequence[str],
) -> None:
    """Plot one line per class and their mean over ``x`` (X,); ``values`` are shown in the legend at ``loc``."""
    labelled, named = curves.labelled(), curves.labelled(MAX_LINES)
    axes.plot(x, y_xc[:, sorted({*labelled} - {*named})], color="0.8", linewidth=0.5)
    lines = [axes.plot(x, y_xc[:, c], color=f"C{k}" if k < 10 else None, linewidth=1)[0] for k, c in enumerate(named)]
    names = [f"{shorten(class_names[c], 30)} {values[c]}" for c in named]
    axes.plot(x, y_xc[:, labelled].mean(1), color="black", linewidth=2.5)
    legend = axes.legend(lines, names, fontsize=8, loc=loc)
    for text in legend.get_texts():
        text.set_parse_math(False)
    axes.grid(alpha=0.3)


def draw_confusion(counts: np.ndarray, class_names: Sequence[str], score: float = MIN_SCORE) -> Figure:
    """Plot a confusion matrix (C + 1, C + 1): labelled classes in rows, predicted ones in columns, background last.

    Colours are fractions of a row, numbers are counts. ``score``, the minimum score, is shown in the title.
    """
    names = [*(shorten(name, 25) for name in class_names), "background"]
    side = min(max(0.42 * len(names) + 2.5, 5), 24)
    figure = new_figure(side + 1, side)
    axes = figure.subplots()
    fractions = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    image = axes.imshow(fractions, cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, ax=axes, label="fraction of the row", fraction=0.046)
    if len(names) <= MAX_NUMBERED:
        for row, column in np.argwhere(counts):
            text_colour = "white" if fractions[row, column] > 0.6 else "black"
            axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=text_colour, fontsize=8)
    size = 9 if len(names) <= MAX_NUMBERED else 6
    ticks = np.arange(len(names)) if len(names) <= 200 else np.array([len(names) - 1])
    chosen = [names[k] for k in ticks]
    axes.set_xticks(ticks, chosen, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(ticks, chosen, fontsize=size, parse_math=False)
    axes.set(xlabel="predicted class", ylabel="labelled class", title=f"boxes with score >= {score:g}, IoU 0.5")
    return figure


def new_figure(width: float, height: float) -> Figure:
    """Return an empty figure of ``width`` x ``height`` inches that does not need a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, encode_figure(figure))
