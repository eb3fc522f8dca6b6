"""Sizes of letterboxed frames and positions of tiles, in training, evaluation and prediction alike."""

import numpy as np


def tile_starts(length: int, size: int, overlap: float) -> np.ndarray:
    """Return the first pixel of each tile along a side of ``length`` pixels, evenly spaced, (K,) int64.

    Args:
        length: of the side.
        size: of a tile.
        overlap: minimum overlap of adjacent tiles as a fraction of ``size``.
    """
    if length <= size:
        return np.zeros(1, np.int64)
    step = max(size - int(np.ceil(overlap * size)), 1)
    last = length - size
    count = -(-last // step) + 1
    return np.arange(count) * last // (count - 1)


def image_windows(image_size: tuple[int, int], size: int, overlap: float) -> np.ndarray:
    """Return the tiles of an image of (height, width), by rows: (T, 4) int64 xyxy; smaller than ``size`` if it is."""
    height, width = image_size
    y, x = np.meshgrid(tile_starts(height, size, overlap), tile_starts(width, size, overlap), indexing="ij")
    x1y1 = np.stack((x.ravel(), y.ravel()), 1)
    return np.concatenate((x1y1, np.minimum(x1y1 + size, (width, height))), 1)


def rect_frames(sizes: np.ndarray, size: int, stride: int = 32) -> np.ndarray:
    """Return the smallest frame (height, width) that holds each image, (N, 2); it depends on that image only.

    Args:
        sizes: (N, 2) height and width of the images.
        size: longer side of every scaled image, a multiple of ``stride``.
        stride: divisor of the sides of a frame.
    """
    sizes = sizes.astype(np.int64)
    longest = sizes.max(1, keepdims=True)
    return -(-sizes * size // (longest * stride)) * stride  # in integers, so that rounding cannot add a stride
