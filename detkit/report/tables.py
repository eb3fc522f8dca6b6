"""Tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_metrics(metrics: Mapping[str, Any], console: Console) -> None:
    """Print COCO metrics: the whole set in the first row, then every class, in percent."""
    names = [name for name in metrics if name.startswith(("AP", "AR"))]
    table = Table(header_style="bold")
    table.add_column("class")
    for name in ("boxes", *names):
        table.add_column(name, justify="right")
    per_class = metrics["per_class"]
    boxes = sum(row["boxes"] for row in per_class.values())
    table.add_row("all", str(boxes), *(_percent(metrics[name]) for name in names), style="bold")
    for name, row in per_class.items():
        table.add_row(name, str(row["boxes"]), _percent(row["AP"]), _percent(row["AP50"]))
    console.print(table, soft_wrap=False)


def _percent(value: float) -> str:
    """Return 0.5 as ``50.0``; COCO's -1, for nothing to measure, as a dash."""
    return "-" if value < 0 else f"{100 * value:.1f}"
