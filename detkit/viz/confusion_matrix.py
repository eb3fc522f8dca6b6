"""Which class is taken for which."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from detkit.data.annotations import Annotations


def confusion_matrix(
    annotations: Annotations, predictions: Iterable[Mapping[str, Any]], *, score: float = 0.25, iou: float = 0.5
) -> np.ndarray:
    """Return (classes + 1, classes + 1) how often boxes of one class (rows) were found as another (columns).

    The last row counts what was found where nothing is labelled, the last column what was missed. In each image labels
    and predictions are paired whatever their class, those that overlap most first; a prediction left over that lies by
    at least ``iou`` of its area in a crowd does not count.

    Args:
        predictions: COCO results of the set.
        score: smallest that counts.
        iou: smallest of a pair.
    """
    background = len(annotations.class_names)
    counts = np.zeros((background + 1, background + 1), np.int64)
    label_of = {category: label for label, category in enumerate(annotations.category_ids)}
    found: dict[int, list[tuple[list[float], int]]] = {}
    for record in predictions:
        if record["score"] >= score:
            found.setdefault(record["image_id"], []).append((record["bbox"], label_of[record["category_id"]]))
    for index, image_id in enumerate(annotations.image_ids.tolist()):
        own = slice(*annotations.offsets[index : index + 2])
        crowd, records = annotations.crowd[own], found.get(image_id, [])
        truth, crowds, labels = annotations.boxes[own][~crowd], annotations.boxes[own][crowd], annotations.labels[own]
        labels = labels[~crowd]
        xywh = np.array([box for box, _ in records], float).reshape(-1, 4)
        boxes, classes = np.concatenate((xywh[:, :2], xywh[:, :2] + xywh[:, 2:]), 1), [label for _, label in records]
        pairs = _pair(_overlap(truth, boxes), iou)
        for t, p in pairs:
            counts[labels[t], classes[p]] += 1
        for t in {*range(len(truth))} - {t for t, _ in pairs}:
            counts[labels[t], background] += 1
        in_crowd = np.any(_overlap(crowds, boxes, of_second=True) >= iou, axis=0)
        for p in {*range(len(boxes))} - {p for _, p in pairs}:
            counts[background, classes[p]] += not in_crowd[p]
    return counts


def _pair(iou_tp: np.ndarray, least: float) -> list[tuple[int, int]]:
    """Return pairs of rows and columns, the largest overlap first, each row and column once."""
    rows, columns = np.nonzero(iou_tp >= least)
    order = np.argsort(-iou_tp[rows, columns], kind="stable")
    pairs: dict[int, int] = {}
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in pairs and column not in pairs.values():
            pairs[row] = column
    return [*pairs.items()]


def _overlap(first: np.ndarray, second: np.ndarray, of_second: bool = False) -> np.ndarray:
    """Return the (A, B) intersection over union of xyxy boxes, or the share of the second's area in the first."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    both = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    whole = areas[1][None] if of_second else areas[0][:, None] + areas[1][None] - both
    return both / np.maximum(whole, 1e-9)
