"""Mixup: two pictures seen through each other (Zhang et al., arXiv 1710.09412; for detection arXiv 1902.04103)."""

import cv2
import numpy as np

from detkit.structures import Sample


def mixup(a: Sample, b: Sample, rng: np.random.Generator, alpha: float) -> Sample:
    """Blend two pictures of one size; the result has the boxes of both, each with its full label.

    Args:
        alpha: the share of ``a`` is drawn from Beta(alpha, alpha): near a half where alpha is large (32), anything
            from 0 to 1 where it is 1.
    """
    weight = rng.beta(alpha, alpha)
    image = cv2.addWeighted(a.image, weight, b.image, 1 - weight, 0)
    return Sample(image, np.concatenate((a.boxes, b.boxes)), np.concatenate((a.labels, b.labels)), a.meta)
