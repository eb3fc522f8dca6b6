"""Precision, recall and F1 over the score threshold."""

from dataclasses import dataclass

import numpy as np

RECALLS = np.linspace(0, 1, 101)  # COCO's
THRESHOLDS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Curves:
    """Precision-recall curves of every class at IoU 0.5.

    Attributes:
        precision_rc: (101, classes) COCO's interpolated precision at ``RECALLS``: 0 at a recall that is not reached, -1
            for a class without boxes.
        scores_rc: (101, classes) score threshold at which that recall is reached; 0 if it is not.
        boxes_c: (classes,) number of ground-truth boxes.
    """

    precision_rc: np.ndarray
    scores_rc: np.ndarray
    boxes_c: np.ndarray

    def labelled(self, most: int | None = None) -> list[int]:
        """Return the indices of classes that have boxes, ascending; at most ``most``, those with the most boxes."""
        classes = np.flatnonzero(self.boxes_c)
        return sorted(classes[np.argsort(-self.boxes_c[classes], kind="stable")][:most].tolist())

    def ap50(self) -> np.ndarray:
        """Return the average precision at IoU 0.5, (classes,); -1 for a class without boxes."""
        return self.precision_rc.mean(0)

    def at_thresholds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return precision and recall, (101, classes) each, of the boxes that score at least ``THRESHOLDS``.

        Precision is 1 if a class has no such box; recall is rounded down to COCO's hundredths.
        """
        reached_trc = (self.scores_rc >= THRESHOLDS[:, None, None]) & (self.precision_rc > 0)
        last_tc = reached_trc.sum(1) - 1  # scores fall as recall grows
        precision_tc = np.take_along_axis(self.precision_rc, last_tc.clip(0), 0)
        return np.where(last_tc < 0, 1.0, precision_tc), np.where(last_tc < 0, 0.0, RECALLS[last_tc])

    def f1(self) -> np.ndarray:
        """Return the harmonic mean of precision and recall at ``THRESHOLDS``, (101, classes)."""
        precision_tc, recall_tc = self.at_thresholds()
        return 2 * precision_tc * recall_tc / np.maximum(precision_tc + recall_tc, 1e-9)
