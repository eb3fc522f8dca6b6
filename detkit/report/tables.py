"""Tables for the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from detkit.engine.properties import Finding
from detkit.engine.transfer import TransferReport
from detkit.errors import printable, shorten

STYLES = {"pass": "green", "fail": "bold red", "-": "dim"}


def print_metrics(metrics: Mapping[str, Any], console: Console) -> None:
    """Print COCO metrics, 0 to 1: the whole set in the first row, then every class."""
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


def print_findings(checks: Sequence[Finding], figures: Sequence[Finding], console: Console) -> None:
    """Print what came of every check, then the figures; a figure that could not be had shows as failed."""
    table = Table(header_style="bold")
    for name in ("check", "", "what was seen"):
        table.add_column(name, overflow="fold")
    for finding in checks:
        table.add_row(finding.title, finding.status, finding.words, style=STYLES[finding.status])
    table.add_section()
    for finding in figures:
        failed = finding.status == "fail"
        table.add_row(finding.title, "fail" if failed else "", finding.words, style=STYLES["fail"] if failed else None)
    console.print(table, soft_wrap=False)


def print_transfer(report: TransferReport, console: Console) -> None:
    """Print what of a detector came from a checkpoint, in percent of each part's numbers; the whole in the last row."""
    table = Table(header_style="bold")
    table.add_column("part")
    for name in ("parameters", "matched", "shape differs", "not in the file"):
        table.add_column(name, justify="right")
    for row in (*report.rows, report.total):
        shares = (_percent(count, row.parameters) for count in (row.matched, row.differs, row.missing))
        table.add_row(row.part, f"{row.parameters:,}", *shares, style="bold" if row is report.total else "")
    console.print(f"weights: {report.path}; what of the model comes from it, in percent of the parameters' numbers")
    console.print(table, soft_wrap=False)
    if report.unused:
        console.print(f"tensors of the file without a place in this model: {report.unused}")
    for warning in report.warnings:
        console.print(f"mind: {warning}")


def print_rows(rows: Sequence[Mapping[str, Any]], columns: Sequence[str], console: Console) -> None:
    """Print the ``columns`` of the rows that have them: text to the left, numbers to the right."""
    table = Table(header_style="bold")
    for name in columns:
        words = any(isinstance(row.get(name), str) for row in rows)
        table.add_column(name, justify="left" if words else "right", overflow="fold")
    for row in rows:
        table.add_row(*(_cell(row.get(name)) for name in columns))
    console.print(table, soft_wrap=False)


def _cell(value: object) -> str:
    """Floats to four digits; nothing for None."""
    return "" if value is None else f"{value:.4g}" if isinstance(value, float) else printable(str(value))


def _percent(count: int, whole: int) -> str:
    """One decimal; 0 and 100 only where that is exact."""
    if count in (0, whole):
        return "-" if not whole else f"{100 * count // whole} %"
    return f"{min(max(100 * count / whole, 0.1), 99.9):.1f} %"


def _number(value: float) -> str:
    """Three decimals; COCO's -1, for nothing to measure, is a dash."""
    return "-" if value < 0 else f"{value:.3f}"
