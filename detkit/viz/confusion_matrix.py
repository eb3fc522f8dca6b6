"""Confusion matrix of a detector."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from detkit.data.annotations import Annotations


def confusion_matrix(
    annotations: Annotations, predictions: Iterable[Mapping[str, Any]], *, score: float = 0.25, iou: float = 0.5
) -> np.ndarray:
    """Return (C + 1, C + 1) counts of labelled classes (rows) predicted as other classes (columns).

    The last row counts false positives, the last column missed boxes. In each image, labels and predictions are matched
    regardless of class, in order of decreasing IoU. An unmatched prediction is ignored if at least ``iou`` of its area
    lies in a crowd box.

    Args:
        annotations: ground truth of the set.
        predictions: COCO results of the set.
        score: minimum score of a prediction.
        iou: minimum IoU of a match.
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
        pairs = _match(_overlap(truth, boxes), iou)
        for t, p in pairs:
            counts[labels[t], classes[p]] += 1
        for t in {*range(len(truth))} - {t for t, _ in pairs}:
            counts[labels[t], background] += 1
        in_crowd = np.any(_overlap(crowds, boxes, of_second=True) >= iou, axis=0)
        for p in {*range(len(boxes))} - {p for _, p in pairs}:
            counts[background, classes[p]] += not in_crowd[p]
    return counts


def _match(iou_tp: np.ndarray, min_iou: float) -> list[tuple[int, int]]:
    """Match rows and columns one to one, in order of decreasing IoU."""
    rows, columns = np.nonzero(iou_tp >= min_iou)
    order = np.argsort(-iou_tp[rows, columns], kind="stable")
    pairs: dict[int, int] = {}
    for row, column in zip(rows[order].tolist(), columns[order].tolist(), strict=True):
        if row not in pairs and column not in pairs.values():
            pairs[row] = column
    return [*pairs.items()]


def _overlap(first: np.ndarray, second: np.ndarray, of_second: bool = False) -> np.ndarray:
    """Return the (A, B) IoU of xyxy boxes (A, 4) and (B, 4), or the fraction of the second's area in the first."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    intersection = (high - low).clip(0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).prod(1) for boxes in (first, second)]
    denominator = areas[1][None] if of_second else areas[0][:, None] + areas[1][None] - intersection
    return intersection / np.maximum(denominator, 1e-9)
