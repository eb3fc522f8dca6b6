"""Report on a data set and its problems: ``detkit check_data data=coco data.root=DIR``."""

import logging
import sys
from pathlib import Path

import numpy as np

from detkit.config.common import CommonConfig
from detkit.config.fields import Location, field, location
from detkit.config.schema import DataConfig
from detkit.data.annotations import Annotations
from detkit.data.audit import audit_images
from detkit.data.formats.writing import require_empty_dir, write_set
from detkit.data.issues import FIXED, NOTE, SKIPPED, UNFIXED, IssueLog
from detkit.data.loader import worker_count
from detkit.data.read import explain_empty, read_splits
from detkit.data.splits import REQUIRED_SPLITS
from detkit.errors import DetkitError
from detkit.registry import WRITERS
from detkit.tasks.runs.data import train_command
from detkit.tasks.runs.run_dir import make_run_dir
from detkit.viz.console import make_console
from detkit.viz.data_plots import plot_set
from detkit.viz.data_tables import print_classes, print_issues, print_splits, write_issues

logger = logging.getLogger(__name__)

MAX_LISTED = 100_000  # findings listed per kind; all are counted


class CheckDataConfig(CommonConfig):
    """Keys of ``configs/check_data.yaml``."""

    data: DataConfig
    fix: Location | None = location("new or empty folder in which to write a cleaned copy")
    format: str | None = field(
        "format of the cleaned copy; null keeps the format of the data set", "the name of a format"
    )


def run(cfg: CheckDataConfig) -> dict[str, IssueLog]:
    """Check the data set of ``cfg`` (configs/check_data.yaml, resolved); return the issues of each split.

    Prints tables and findings, and writes ``findings.csv``, ``plots/*.png`` and, if ``fix`` is set, a cleaned copy.

    Raises:
        DetkitError: a split cannot be read, or the findings or the copy cannot be written.
        SystemExit: with status 2 if the data set has errors.
    """
    console = make_console()
    copy = None if cfg.fix is None else Path(str(cfg.fix))
    if cfg.format is not None:
        WRITERS.get(cfg.format)
    if copy is not None:
        require_empty_dir(copy)
    splits = read_splits(cfg.data.as_dict(), MAX_LISTED)
    logs = {split: annotations.issues for split, annotations in splits.items()}
    for split, annotations in splits.items():
        if not len(annotations.labels):
            fault = split in REQUIRED_SPLITS and not cfg.data.allow_empty
            kind = "empty_split" if fault else "unlabelled_split"
            logs[split].add(kind, annotations.source, None, f"has no boxes: {explain_empty(annotations)}")
    run_dir = make_run_dir(cfg, "check_data", cfg.data.name)
    keep = audit_images(splits, logs, worker_count(cfg.workers))

    try:
        write_issues(logs, run_dir / "findings.csv")
        plot_set(splits, run_dir / "plots")
    finally:
        print_splits(splits, console)
        print_classes(splits, console)
        print_issues(logs, console)
    if copy is not None:
        own = cfg.data.name if cfg.data.name in WRITERS.names() else "coco"
        _write_copy(_cleaned(splits, keep), cfg.format or own, copy)
    errors, notes = (
        sum(sum(log.of(*outcomes).values()) for log in logs.values())
        for outcomes in ((SKIPPED, FIXED, UNFIXED), (NOTE,))
    )
    counts = ", ".join(
        f"{count or 'no'} {name}{'' if count == 1 else 's'}" for count, name in ((errors, "error"), (notes, "note"))
    )
    logger.info("%s: findings.csv and plots are in %s", counts, run_dir)
    if errors:
        sys.exit(2)
    return logs


def _cleaned(splits: dict[str, Annotations], keep: dict[str, np.ndarray]) -> dict[str, Annotations]:
    """Return each split reduced to the images to keep; splits without any are omitted.

    Raises:
        DetkitError: train or val would be empty.
    """
    cleaned: dict[str, Annotations] = {}
    for split, annotations in splits.items():
        reason = "would be empty in the cleaned copy: every image is damaged, or in another split"
        if keep[split].any():
            cleaned[split] = annotations.subset(keep[split])
        elif split in REQUIRED_SPLITS:
            raise DetkitError(f"{split} {reason}")
        else:
            logger.warning("%s is skipped: it %s", split, reason)
    return cleaned


def _write_copy(splits: dict[str, Annotations], form: str, folder: Path) -> None:
    """Write the cleaned copy and log the command that trains on it."""
    written = write_set(form, splits, folder)
    counts = ", ".join(f"{len(a)} {split} images with {len(a.labels)} boxes" for split, a in splits.items())
    logger.info("cleaned copy, %s: %s; train on it: %s", form, counts, train_command(written.data))
    for warning in written.warnings:
        logger.warning("warning: %s", warning)
