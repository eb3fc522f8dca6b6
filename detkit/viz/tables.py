"""Console tables of metrics and of rows."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from detkit.errors import printable, shorten


def print_metrics(metrics: Mapping[str, Any], console: Console) -> None:
    """Print COCO metrics (0 to 1): all classes in the first row, then each class."""
    names = [name for name in metrics if name.startswith(("AP", "AR"))]
    table = Table(header_style="bold")
    table.add_column("class", overflow="fold")
    for name in ("boxes", *names):
        table.add_column(name, justify="right")
    per_class = metrics["per_class"]
    boxes = sum(row["boxes"] for row in per_class.values())
    table.add_row("all", str(boxes), *(_number(metrics[name]) for name in names), style="bold")
    for name, row in per_class.items():
        table.add_row(shorten(name), str(row["boxes"]), _number(row["AP"]), _number(row["AP50"]))
    console.print(table, soft_wrap=False)


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], console: Console) -> None:
    """Print ``columns`` of the rows, text left-aligned, numbers right-aligned; missing cells are empty."""
    table = Table(header_style="bold")
    for name in columns:
        is_text = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(name, justify="left" if is_text else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    console.print(table, soft_wrap=False)


def _cell(value: object) -> str:
    """Format a cell: floats with four digits, None as an empty string."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _number(value: float) -> str:
    """Format a metric with three decimals; COCO's -1 (not defined) as a dash."""
    return "-" if value < 0 else f"{value:.3f}"
