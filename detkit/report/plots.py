"""Curves of a run as PNG."""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


def plot_history(rows: Sequence[Mapping[str, float]], losses: Collection[str], path: Path) -> None:
    """Draw the losses, the AP and the learning rate of every epoch side by side; rows as in ``history.csv``."""
    panels = (
        ("training loss", losses),
        ("validation", ("AP", "AP50", "AP75")),
        ("learning rate", ("lr",)),
    )
    figure = Figure(figsize=(13, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    epochs = [row["epoch"] for row in rows]
    for axes, (title, columns) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for column in columns:
            axes.plot(epochs, [row[column] for row in rows], marker="." if len(rows) < 40 else None, label=column)
        axes.set(title=title, xlabel="epoch")
        axes.grid(alpha=0.3)
        axes.legend()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)
