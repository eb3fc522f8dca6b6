"""Multi-scale training: each batch has its own image size."""

from dataclasses import replace

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from detkit.structures import Batch


def draw_size(image_size: int, fraction: float, stride: int, seed: int, step: int) -> int:
    """Draw the image size of batch ``step`` in pixels, determined by (seed, step).

    Multiples of ``stride`` from ``image_size * (1 - fraction)`` to ``image_size * (1 + fraction)`` are equally likely.
    """
    low = max(int(np.ceil(image_size * (1 - fraction) / stride)), 1)
    high = max(int(image_size * (1 + fraction) / stride), low)
    return int(np.random.default_rng((seed, step)).integers(low, high + 1)) * stride


def resize_batch(images: Tensor, batch: Batch, size: int) -> tuple[Tensor, Batch]:
    """Resize square float images (B, 3, H, H) bilinearly to ``size``, and scale the boxes of the batch.

    Returns:
        the images (B, 3, size, size), and the batch with scaled boxes; its uint8 images are unchanged.
    """
    ratio = size / images.shape[-1]
    images = interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return images, replace(batch, boxes_bm4=batch.boxes_bm4 * ratio)
