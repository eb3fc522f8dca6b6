"""Mosaic and affine augmentation in one step: every tile goes from its file's pixels straight to its place.

The classic recipe draws four images, each resized so that its longer side is s, around a random centre of a
2s x 2s canvas, then scales and shifts that canvas into an s x s picture. Here the canvas exists on paper only: a
tile's place in the output is worked out first, and one crop and one resize put it there. Without a mosaic the
canvas is s x s and holds a single, centred image.
"""

from collections.abc import Sequence

import numpy as np

from detkit.ops.image import FILL, resize
from detkit.structures import Sample

MIN_SIDE = 2.0  # pixels: a box must keep more than this on both sides,
MIN_VISIBLE = 0.1  # more than this share of its area,
MAX_ASPECT = 100.0  # and an aspect ratio below this


def compose(
    samples: Sequence[Sample], size: int, rng: np.random.Generator, scale: tuple[float, float], translate: float
) -> Sample:
    """Make one ``size`` x ``size`` training sample of one image, or of four as a mosaic.

    Args:
        samples: the image, or the image and three partners.
        size: side of the result in pixels.
        scale: range of the canvas' scale factor.
        translate: the canvas' centre lands in the middle of the picture, give or take this share of ``size``.
    """
    mosaic = len(samples) == 4
    canvas = 2 * size if mosaic else size
    centre = rng.uniform(size / 2, 3 * size / 2, 2)
    factor = rng.uniform(*scale)
    shift = rng.uniform(0.5 - translate, 0.5 + translate, 2) * size - factor * canvas / 2
    image = np.full((size, size, 3), FILL, np.uint8)
    bounds = np.clip(np.concatenate((shift, factor * canvas + shift)), 0, size)  # the canvas, seen in the output
    boxes, labels = [], []
    for k, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        fit = size / max(height, width)
        extent = np.array((width, height)) * fit
        # tiles 0 to 3 touch the centre from the upper left, upper right, lower left, lower right
        corner = centre - extent * ((k + 1) % 2, 1 - k // 2) if mosaic else (size - extent) / 2
        tile_scale, tile_offset, window = _paste(image, sample.image, factor * fit, factor * corner + shift, bounds)
        kept, keep = clip_boxes(sample.boxes * np.tile(tile_scale, 2) + np.tile(tile_offset, 2), window)
        boxes.append(kept)
        labels.append(sample.labels[keep])
    return Sample(image, np.concatenate(boxes).astype(np.float32), np.concatenate(labels), samples[0].origin)


def clip_boxes(boxes: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip (N, 4) xyxy boxes to an xyxy window, (4,) or one each (N, 4), and drop what is too little to learn from.

    Returns:
        the boxes kept (K, 4), and which they are, (N,) bool.
    """
    low, high = window[..., (0, 1, 0, 1)], window[..., (2, 3, 2, 3)]
    clipped = np.minimum(np.maximum(boxes, low), high)
    x1, y1, x2, y2 = boxes.T
    w, h = (clipped[:, 2:] - clipped[:, :2]).T
    long, short = np.maximum(w, h), np.minimum(w, h)
    keep = (short > MIN_SIDE) & (w * h > MIN_VISIBLE * (x2 - x1) * (y2 - y1)) & (long < MAX_ASPECT * short)
    return clipped[keep], keep


def _paste(
    output: np.ndarray, image: np.ndarray, scale: float, offset: np.ndarray, bounds: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draw ``image`` at ``x * scale + offset`` into ``output``, inside ``bounds`` (xyxy).

    The place is rounded to whole pixels of both pictures, so that a crop and a resize draw it; the mapping that
    comes back is the one that was drawn, not the one asked for: they differ by up to a pixel of either picture.

    Returns:
        scale (2,), offset (2,) of the mapping drawn, and the window painted, xyxy pixels of ``output``.
    """
    source_size = np.array(image.shape[1::-1])
    low = np.round(np.maximum(offset, bounds[:2])).astype(int)
    high = np.round(np.minimum(offset + source_size * scale, bounds[2:])).astype(int)
    if (high <= low).any():
        return np.full(2, scale), offset, np.concatenate((low, low))
    crop_low = np.clip(np.round((low - offset) / scale), 0, source_size - 1).astype(int)
    crop_high = np.clip(np.round((high - offset) / scale), crop_low + 1, source_size).astype(int)
    crop = image[crop_low[1] : crop_high[1], crop_low[0] : crop_high[0]]
    width, height = (int(n) for n in high - low)
    output[low[1] : high[1], low[0] : high[0]] = resize(crop, width, height)
    drawn = (high - low) / (crop_high - crop_low)
    return drawn, low - crop_low * drawn, np.concatenate((low, high))
