"""Mixup: a blend of two images (Zhang et al., arXiv 1710.09412; for detection arXiv 1902.04103)."""

import cv2
import numpy as np

from detkit.structures import Sample


def mixup(a: Sample, b: Sample, rng: np.random.Generator, alpha: float) -> Sample:
    """Blend two images of equal size; the result has the boxes and labels of both.

    Args:
        a: first sample.
        b: second sample.
        rng: random generator.
        alpha: the weight of ``a`` is drawn from Beta(alpha, alpha): close to 0.5 for a large alpha (32), uniform for 1.
    """
    weight = rng.beta(alpha, alpha)
    image = cv2.addWeighted(a.image, weight, b.image, 1 - weight, 0)
    return Sample(image, np.concatenate((a.boxes, b.boxes)), np.concatenate((a.labels, b.labels)), a.meta)
