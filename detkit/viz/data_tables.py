"""What an image set holds and what is wrong with it, for the terminal and as csv."""

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

AREAS = (32**2, 96**2)  # pixels: COCO's bounds of small and medium
SHOWN = 3  # findings of a kind and split


def print_splits(splits: Mapping[str, Annotations], console: Console) -> None:
    """Print a column a split: images and their sizes, boxes by COCO area in pixels of the files, crowds apart."""
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
        "without boxes": _share((np.diff(annotations.offsets) == 0).sum(), images),
        "boxes": str(boxes),
        "boxes an image": f"{boxes / images:.1f}",
        "small, below 32x32": _share(small, boxes),
        "medium": _share(medium, boxes),
        "large, from 96x96": _share(large, boxes),
        "crowds": str(annotations.crowd.sum()),
    }


def print_classes(splits: Mapping[str, Annotations], console: Console) -> None:
    """Print a row a class: boxes (no crowds), their share of the split's and how many an image holds on average."""
    table = Table(header_style="bold")
    table.add_column("class", overflow="fold")
    for split in splits:
        table.add_column(f"{split} boxes", justify="right")
        table.add_column("an image", justify="right")
    table.add_column("")
    counts = {split: class_counts(annotations) for split, annotations in splits.items()}
    for k, name in enumerate(next(iter(splits.values())).class_names):
        cells: list[str] = []
        for split, annotations in splits.items():
            boxes = counts[split][k]
            cells += [_share(boxes, counts[split].sum()), f"{boxes / len(annotations):.2f}"]
        labelled = [split for split in splits if counts[split].any()]
        absent = [split for split in labelled if not counts[split][k]]
        remark = "" if not absent else "none" if absent == labelled else f"none in {', '.join(absent)}"
        table.add_row(shorten(name), *cells, remark, style="yellow" if absent else None)
    console.print(table, soft_wrap=False)


def class_counts(annotations: Annotations) -> np.ndarray:
    """Return (C,) int: the boxes of each class that are no crowds."""
    return np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.class_names))


def print_problems(logs: Mapping[str, IssueLog], console: Console) -> None:
    """Print every kind of finding with its count in each split, what training does about it, and the first places."""
    for name, kind in KINDS.items():
        counts = {split: log.counts[name] for split, log in logs.items() if log.counts[name]}
        if not counts:
            continue
        numbers = ", ".join(f"{count} in {split}" for split, count in counts.items())
        console.print(f"{kind.outcome}: {kind.title}: {numbers}", style=STYLES[kind.outcome])
        for split, count in counts.items():
            for issue in [p for p in logs[split].issues if p.kind == name][:SHOWN]:
                console.print(f"  {split}: {issue}")
            if count > SHOWN:
                console.print(f"  {split}: and {count - SHOWN} more")


STYLES = {SKIPPED: "bold red", UNFIXED: "bold red", FIXED: "yellow", NOTE: "dim"}


def write_findings(logs: Mapping[str, IssueLog], file: Path) -> None:
    """Write every finding that was kept, a row each; a last row tells of those beyond the limit."""
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(("kind", "outcome", "split", "file", "line", "detail"))
    for split, log in logs.items():
        for p in log.issues:
            writer.writerow((p.kind, KINDS[p.kind].outcome, split, printable(p.file), p.line, printable(p.detail)))
        for name, count in log.counts.items():
            if count > log.limit:
                writer.writerow((name, KINDS[name].outcome, split, "", "", f"{count - log.limit} more, not listed"))
    write_atomically(file, text.getvalue().encode())


def _share(count: int, whole: int) -> str:
    return f"{count} ({100 * count / whole:.1f} %)" if whole else str(count)
