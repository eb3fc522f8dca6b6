"""Precision, recall and F1 over the score threshold."""

from dataclasses import dataclass

import numpy as np

RECALLS = np.linspace(0, 1, 101)  # COCO's
THRESHOLDS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Curves:
    """Precision and recall at IoU 0.5 of every class, as the score above which boxes are kept falls.

    Attributes:
        precision_rc: (101, classes) COCO's interpolated precision at ``RECALLS``: 0 at a recall that is not reached, -1
            for a class without boxes.
        scores_rc: (101, classes) the score at which that recall is reached; 0 where it is not.
        boxes_c: (classes,) how many boxes are labelled.
    """

    precision_rc: np.ndarray
    scores_rc: np.ndarray
    boxes_c: np.ndarray

    def labelled(self, most: int | None = None) -> list[int]:
        """Return the classes that have boxes, in their order; of more than ``most``, those with the most boxes."""
        classes = np.flatnonzero(self.boxes_c)
        return sorted(classes[np.argsort(-self.boxes_c[classes], kind="stable")][:most].tolist())

    def ap50(self) -> np.ndarray:
        """Return (classes,) the average precision at IoU 0.5; -1 for a class without boxes."""
        return self.precision_rc.mean(0)

    def at_thresholds(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the (101, classes) precision and recall of the boxes that score at least ``THRESHOLDS``.

        Where a class has no such box its precision counts as 1; recall is rounded down to COCO's hundredths.
        """
        reached_trc = (self.scores_rc >= THRESHOLDS[:, None, None]) & (self.precision_rc > 0)
        last_tc = reached_trc.sum(1) - 1  # scores fall as recall grows
        precision_tc = np.take_along_axis(self.precision_rc, last_tc.clip(0), 0)
        return np.where(last_tc < 0, 1.0, precision_tc), np.where(last_tc < 0, 0.0, RECALLS[last_tc])

    def f1(self) -> np.ndarray:
        """Return (101, classes) the harmonic mean of precision and recall at ``THRESHOLDS``."""
        precision_tc, recall_tc = self.at_thresholds()
        return 2 * precision_tc * recall_tc / np.maximum(precision_tc + recall_tc, 1e-9)
