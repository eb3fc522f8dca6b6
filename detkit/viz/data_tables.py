"""Console tables of data set statistics and issues; issues as CSV."""

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from detkit.data.annotations import Annotations
from detkit.data.issues import FIXED, KINDS, NOTE, SKIPPED, UNFIXED, IssueLog
from detkit.errors import printable, shorten
from detkit.ops.atomic_write import write_atomically

AREAS = (32**2, 96**2)  # pixels: COCO's limits of small and medium boxes
MAX_ISSUES = 3  # issues printed per kind and split


def print_splits(splits: Mapping[str, Annotations], console: Console) -> None:
    """Print one column per split: images and sizes, boxes by COCO area (in pixels of the files), and crowds."""
    table = Table("", *splits, header_style="bold")
    columns = [_describe(annotations) for annotations in splits.values()]
    for row in columns[0]:
        table.add_row(row, *(column[row] for column in columns))
    console.print(table, soft_wrap=False)


def _describe(annotations: Annotations) -> dict[str, str]:
    (h1, w1), (h2, w2) = annotations.sizes.min(0), annotations.sizes.max(0)
    areas = annotations.areas[~annotations.crowd]
    small, medium, large = np.bincount(np.digitize(areas, AREAS), minlength=3)
    boxes, images = len(areas), len(annotations)
    return {
        "images": str(images),
        "width, pixels": str(w1) if w1 == w2 else f"{w1} to {w2}",
        "height, pixels": str(h1) if h1 == h2 else f"{h1} to {h2}",
        "without boxes": _with_percent((np.diff(annotations.offsets) == 0).sum(), images),
        "boxes": str(boxes),
        "boxes per image": f"{boxes / images:.1f}",
        "small, below 32x32": _with_percent(small, boxes),
        "medium": _with_percent(medium, boxes),
        "large, from 96x96": _with_percent(large, boxes),
        "crowds": str(annotations.crowd.sum()),
    }


def print_classes(splits: Mapping[str, Annotations], console: Console) -> None:
    """Print one row per class: boxes (without crowds), their percentage in the split, and boxes per image."""
    table = Table(header_style="bold")
    table.add_column("class", overflow="fold")
    for split in splits:
        table.add_column(f"{split} boxes", justify="right")
        table.add_column("per image", justify="right")
    table.add_column("")
    counts = {split: class_counts(annotations) for split, annotations in splits.items()}
    for k, name in enumerate(next(iter(splits.values())).class_names):
        cells: list[str] = []
        for split, annotations in splits.items():
            boxes = counts[split][k]
            cells += [_with_percent(boxes, counts[split].sum()), f"{boxes / len(annotations):.2f}"]
        labelled = [split for split in splits if counts[split].any()]
        absent = [split for split in labelled if not counts[split][k]]
        remark = "" if not absent else "none" if absent == labelled else f"none in {', '.join(absent)}"
        table.add_row(shorten(name), *cells, remark, style="yellow" if absent else None)
    console.print(table, soft_wrap=False)


def class_counts(annotations: Annotations) -> np.ndarray:
    """Return the (C,) number of boxes per class, without crowds."""
    return np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.class_names))


def print_issues(logs: Mapping[str, IssueLog], console: Console) -> None:
    """Print each kind of issue with its outcome, its count per split, and the first places."""
    for name, kind in KINDS.items():
        counts = {split: log.counts[name] for split, log in logs.items() if log.counts[name]}
        if not counts:
            continue
        numbers = ", ".join(f"{count} in {split}" for split, count in counts.items())
        console.print(f"{kind.outcome}: {kind.title}: {numbers}", style=STYLES[kind.outcome])
        for split, count in counts.items():
            for issue in [i for i in logs[split].issues if i.kind == name][:MAX_ISSUES]:
                console.print(f"  {split}: {issue}")
            if count > MAX_ISSUES:
                console.print(f"  {split}: and {count - MAX_ISSUES} more")


STYLES = {SKIPPED: "bold red", UNFIXED: "bold red", FIXED: "yellow", NOTE: "dim"}


def write_issues(logs: Mapping[str, IssueLog], file: Path) -> None:
    """Write issues to a CSV file, one per row; a row per kind counts those beyond the limit of the log."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("kind", "outcome", "split", "file", "line", "detail"))
    for split, log in logs.items():
        for issue in log.issues:
            outcome = KINDS[issue.kind].outcome
            row = (issue.kind, outcome, split, printable(issue.file), issue.line, printable(issue.detail))
            writer.writerow(row)
        for name, count in log.counts.items():
            if count > log.limit:
                writer.writerow((name, KINDS[name].outcome, split, "", "", f"{count - log.limit} more, not listed"))
    write_atomically(file, text.getvalue().encode())


def _with_percent(count: int, total: int) -> str:
    return f"{count} ({100 * count / total:.1f} %)" if total else str(count)
