"""Reading the splits of the configured data set."""

import logging
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import detkit.data.formats  # noqa: F401  (registers them)
from detkit.data.annotations import Annotations
from detkit.data.issues import FIXED, SKIPPED, IssueLog
from detkit.data.splits import REQUIRED_SPLITS, MissingSplit, splits_of
from detkit.errors import DetkitError
from detkit.registry import DATASETS

logger = logging.getLogger(__name__)

# Keys of data that are not arguments of the reader.
DATA_OPTIONS = ("preset", "strict", "allow_empty", "cache", "sampling", "repeat_threshold", "tiles")


def read_split(data: Mapping[str, Any], split: str, log: IssueLog | None = None) -> Annotations:
    """Read one split of the configured data set.

    Args:
        data: the ``data`` group of a configuration.
        split: its name.
        log: receives all problems; if given, the index and ``data.strict`` are ignored.

    Raises:
        DetkitError: the split cannot be read, or has problems and ``data.strict`` is set.
    """
    if log is not None:
        return DATASETS.build(_reader_arguments(data), split, log=log)
    annotations = DATASETS.build(_reader_arguments(data), split)
    if data.get("strict"):
        annotations.issues.raise_if_any()
    return annotations


def read_splits(data: Mapping[str, Any], issue_limit: int | None = None) -> dict[str, Annotations]:
    """Read every split of the configured data set.

    Other splits than train and val are skipped with a warning if their files are missing or their classes differ.

    Args:
        data: the ``data`` group of a configuration.
        issue_limit: if given, ignore the index and store at most this many problems of each kind.

    Raises:
        DetkitError: a split cannot be read, train or val is missing, or their classes differ.
    """
    splits: dict[str, Annotations] = {}
    for split in splits_of(_reader_arguments(data)):
        try:
            splits[split] = read_split(data, split, None if issue_limit is None else IssueLog(issue_limit))
        except MissingSplit as error:
            if split in REQUIRED_SPLITS:
                raise
            logger.warning("%s is skipped: %s", split, error)
    train_set = splits["train"]
    for split, annotations in list(splits.items()):
        if not annotations.class_names:  # images without labels
            ids = train_set.category_ids
            splits[split] = replace(annotations, class_names=train_set.class_names, category_ids=ids)
        try:
            check_classes(train_set, splits[split])
        except DetkitError as error:
            if split in REQUIRED_SPLITS:
                raise
            logger.warning("%s is skipped: %s", split, error)
            del splits[split]
    return splits


def read_training(data: Mapping[str, Any]) -> tuple[Annotations, Annotations]:
    """Read train and val.

    Raises:
        DetkitError: a split cannot be read, their classes differ, or one has no boxes and ``data.allow_empty`` is not
            set.
    """
    train_set, val_set = (read_split(data, split) for split in REQUIRED_SPLITS)
    check_classes(train_set, val_set)
    for split, annotations in zip(REQUIRED_SPLITS, (train_set, val_set), strict=True):
        if not len(annotations.labels) and not data.get("allow_empty"):
            hint = "correct this, or set data.allow_empty=true to train anyway (check_data lists all problems)"
            raise DetkitError(f"{split} has no boxes: {explain_empty(annotations)}; {hint}")
    return train_set, val_set


def explain_empty(annotations: Annotations) -> str:
    """Describe where the labels of a split without boxes were searched, and what was found."""
    issues, count = annotations.issues, len(annotations)
    without = issues.counts["unlabelled_image"]
    parts = [f"{count} images in {annotations.source}"]
    if without:
        first = next(issue for issue in issues.issues if issue.kind == "unlabelled_image")
        parts += [f"label files found: {max(count - without, 0)} of {count}", f"the first image without: {first}"]
    if issues.summary():
        parts += [issues.summary(), f"the first problem: {issues.first(SKIPPED, FIXED)}"]
    return "; ".join(parts)


def _reader_arguments(data: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in data.items() if key not in DATA_OPTIONS}


def check_classes(train_set: Annotations, other: Annotations) -> None:
    """Check that two splits define the same classes.

    Raises:
        DetkitError: the classes differ.
    """
    if train_set.class_names != other.class_names:
        raise DetkitError(f"{other.source} and {train_set.source} have different classes: give both the same")
