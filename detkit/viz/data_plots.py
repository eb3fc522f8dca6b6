"""Plots of data set statistics."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from detkit.data.annotations import Annotations
from detkit.errors import shorten
from detkit.viz.data_tables import AREAS, class_counts
from detkit.viz.plots import new_figure, save_figure

BINS = 60
MAX_CLASSES = 30  # in the plot of a training set


def plot_set(splits: Mapping[str, Annotations], folder: Path) -> None:
    """Plot classes, box sizes, box centres, image sizes and boxes per image, with one panel per split."""
    plot_classes(splits, folder / "classes.png")
    for name, draw in (
        ("box_sizes", draw_box_sizes),
        ("box_centres", draw_box_centres),
        ("image_sizes", draw_image_sizes),
        ("boxes_per_image", draw_boxes_per_image),
    ):
        figure = new_figure(6 * len(splits), 5)
        for axes, (split, annotations) in zip(
            np.atleast_1d(figure.subplots(1, len(splits))), splits.items(), strict=True
        ):
            title = f"{shorten(split, 40)}: {len(annotations)} images, {len(annotations.labels)} boxes"
            axes.set_title(title, parse_math=False)
            draw(axes, annotations)
        save_figure(figure, folder / f"{name}.png")


def draw_labels(annotations: Annotations) -> Figure:
    """Plot classes, box sizes, box centres and boxes per image of a training set in one figure."""
    figure = new_figure(12, 9)
    (classes, sizes), (centres, numbers) = figure.subplots(2, 2)
    figure.suptitle(f"{len(annotations)} images, {len(annotations.labels)} boxes")
    counts = class_counts(annotations)
    order = np.argsort(-counts, kind="stable")[:MAX_CLASSES]
    bars = classes.barh(np.arange(len(order)), counts[order])
    classes.bar_label(bars, [str(count) for count in counts[order]], padding=2, fontsize=7)
    names = [shorten(annotations.class_names[c], 25) for c in order]
    classes.set_yticks(np.arange(len(order)), names, fontsize=8, parse_math=False)
    more = f", {MAX_CLASSES} of {len(counts)}" if len(counts) > MAX_CLASSES else ""
    classes.set(title=f"boxes of each class{more}", ylim=(len(order) - 0.5, -0.5))
    classes.margins(x=0.12)
    draw_box_sizes(sizes, annotations)
    draw_box_centres(centres, annotations)
    draw_boxes_per_image(numbers, annotations)
    return figure


def plot_classes(splits: Mapping[str, Annotations], path: Path) -> None:
    """Plot the percentage of each class in each split as adjacent bars, which are similar if a set is split well."""
    names = [shorten(name, 40) for name in next(iter(splits.values())).class_names]
    figure = new_figure(8, min(max(0.22 * len(names) * len(splits), 3), 200))
    axes = figure.subplots()
    height = 0.8 / len(splits)
    for k, (split, annotations) in enumerate(splits.items()):
        counts = class_counts(annotations)
        bars = axes.barh(np.arange(len(names)) + k * height, 100 * counts / max(counts.sum(), 1), height)
        bars.set_label(shorten(split, 40))
        axes.bar_label(bars, [str(count) for count in counts], padding=2, fontsize=7)
    axes.set_yticks(np.arange(len(names)) + 0.4 - height / 2, names, parse_math=False)
    axes.set(title="boxes of each class", xlabel="percent of the split's boxes", ylim=(len(names), -0.6))
    axes.grid(axis="x", alpha=0.3)
    for text in axes.legend().get_texts():
        text.set_parse_math(False)
    save_figure(figure, path)


def draw_box_sizes(axes: Axes, annotations: Annotations) -> None:
    """Plot a histogram of box widths and heights, with COCO's limits of small and medium boxes."""
    w, h = (annotations.boxes[:, 2:] - annotations.boxes[:, :2]).T
    if len(w):
        low, high = max(min(w.min(), h.min()), 0.5), max(w.max(), h.max()) * 1.1
        edges = np.geomspace(low, high, BINS)
        axes.hist2d(w.clip(low), h.clip(low), bins=(edges, edges), norm=LogNorm(), cmap="viridis")
        for area in AREAS:
            axes.plot(edges, area / edges, "--", color="gray", linewidth=1, label=f"{area**0.5:.0f}²")
        axes.legend(title="area", loc="lower right")
        axes.set(xscale="log", yscale="log", xlim=(low, high), ylim=(low, high))
    axes.set(xlabel="box width, pixels", ylabel="box height, pixels")


def draw_box_centres(axes: Axes, annotations: Annotations) -> None:
    """Plot a histogram of box centres relative to the image size."""
    size = np.repeat(annotations.sizes[:, ::-1], np.diff(annotations.offsets), axis=0)
    x, y = ((annotations.boxes[:, :2] + annotations.boxes[:, 2:]) / 2 / size).T
    axes.hist2d(x, y, bins=BINS // 2, range=((0, 1), (0, 1)), cmap="viridis")
    axes.set(xlabel="box centre / image width", ylabel="box centre / image height", ylim=(1, 0))


def draw_image_sizes(axes: Axes, annotations: Annotations) -> None:
    """Plot the image sizes as dots, scaled by the number of images of that size."""
    sizes, counts = np.unique(annotations.sizes[:, ::-1], axis=0, return_counts=True)
    widths, heights = sizes.T
    axes.scatter(widths, heights, s=10 + 190 * counts / counts.max(), alpha=0.5)
    limit = sizes.max() * 1.1
    axes.plot((0, limit), (0, limit), "--", color="gray", linewidth=1)
    common = counts.argmax()
    axes.set(xlabel="image width, pixels", ylabel="image height, pixels", xlim=(0, limit), ylim=(0, limit))
    text = f"most common: {sizes[common][0]}x{sizes[common][1]} ({100 * counts.max() / counts.sum():.0f} %)"
    axes.text(0.02, 0.97, text, transform=axes.transAxes, va="top")


def draw_boxes_per_image(axes: Axes, annotations: Annotations) -> None:
    """Plot a histogram of the number of boxes per image."""
    counts = np.diff(annotations.offsets)
    step = max(-(-int(counts.max()) // BINS), 1)
    edges = np.arange(0, counts.max() + step + 1, step) - 0.5
    axes.hist(counts, bins=edges.tolist())
    axes.set(xlabel="boxes per image", ylabel="images")
    axes.grid(axis="y", alpha=0.3)
