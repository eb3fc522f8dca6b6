"""Tables for the terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table


def print_metrics(metrics: Mapping[str, Any], console: Console) -> None:
    """Print COCO metrics, 0 to 1: the whole set in the first row, then every class."""
    names = [name for name in metrics if name.startswith(("AP", "AR"))]
    table = Table(header_style="bold")
    table.add_column("class")
    for name in ("boxes", *names):
        table.add_column(name, justify="right")
    per_class = metrics["per_class"]
    boxes = sum(row["boxes"] for row in per_class.values())
    table.add_row("all", str(boxes), *(_number(metrics[name]) for name in names), style="bold")
    for name, row in per_class.items():
        table.add_row(name, str(row["boxes"]), _number(row["AP"]), _number(row["AP50"]))
    console.print(table, soft_wrap=False)


def _number(value: float) -> str:
    """Three decimals; COCO's -1, for nothing to measure, is a dash."""
    return "-" if value < 0 else f"{value:.3f}"
