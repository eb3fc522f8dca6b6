"""Multi-scale training: every batch at a size of its own."""

from dataclasses import replace

import numpy as np
from torch import Tensor
from torch.nn.functional import interpolate

from detkit.structures import Batch


def draw_size(image_size: int, share: float, stride: int, seed: int, step: int) -> int:
    """Draw the side of batch ``step``'s images: a multiple of ``stride`` within ``share`` of ``image_size``.

    All multiples from ``image_size * (1 - share)`` to ``image_size * (1 + share)`` are equally likely, by (seed, step).
    """
    low = max(int(np.ceil(image_size * (1 - share) / stride)), 1)
    high = max(int(image_size * (1 + share) / stride), low)
    return int(np.random.default_rng((seed, step)).integers(low, high + 1)) * stride


def resize_batch(images: Tensor, batch: Batch, size: int) -> tuple[Tensor, Batch]:
    """Resize square images (B, 3, H, H) float bilinearly to ``size``, and the batch's boxes with them.

    Returns:
        the images (B, 3, size, size), and a batch whose boxes are in their pixels; its bytes stay as they were.
    """
    ratio = size / images.shape[-1]
    images = interpolate(images, (size, size), mode="bilinear", align_corners=False)
    return images, replace(batch, boxes_bm4=batch.boxes_bm4 * ratio)
