"""Mosaic and affine augmentation in one step, without an intermediate canvas.

The standard mosaic places four images, each resized to a longer side of s, around a random centre of a 2s x 2s canvas,
then transforms that canvas to an s x s image. Here, the position of each tile in the output is computed first, and
the tile is drawn with one crop and one resize, or one warp if the canvas is rotated or sheared. Without a mosaic, the
canvas is s x s and holds a single centred image.

Coordinates refer to pixel edges, like those of boxes: pixel k covers k to k + 1.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np

from detkit.ops.image import PAD_VALUE, resize
from detkit.structures import Sample

# A clipped box is kept if
MIN_SIDE = 2.0  # its shorter side is larger than this, in pixels,
MIN_VISIBLE = 0.1  # more than this fraction of its area is left,
MAX_ASPECT = 100.0  # and its aspect ratio is below this.


@dataclass(frozen=True)
class Affine:
    """Parameters of the random transform of the canvas, ``augment.affine`` of the configuration.

    Attributes:
        scale: range of the scale factor.
        translate: maximum offset of the canvas' centre from that of the image, as a fraction of its side.
        degrees: maximum rotation in either direction.
        shear: maximum shear in degrees along x and along y, in either direction.
    """

    scale: tuple[float, float] = (1.0, 1.0)
    translate: float = 0.0
    degrees: float = 0.0
    shear: float = 0.0

    def draw(self, rng: np.random.Generator, size: int, canvas: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw a transform ``xy_image = matrix @ xy_canvas + shift``.

        Args:
            rng: random generator.
            size: side of the image in pixels.
            canvas: side of the canvas in pixels.

        Returns:
            matrix (2, 2) and shift (2,) in pixels.
        """
        matrix = rng.uniform(*self.scale) * np.eye(2)
        middle = rng.uniform(0.5 - self.translate, 0.5 + self.translate, 2) * size
        if self.degrees or self.shear:
            angle = math.radians(rng.uniform(-self.degrees, self.degrees))
            shear_x, shear_y = np.tan(np.radians(rng.uniform(-self.shear, self.shear, 2)))
            turn = np.array(((math.cos(angle), math.sin(angle)), (-math.sin(angle), math.cos(angle))))
            matrix = np.array(((1, shear_x), (shear_y, 1))) @ turn @ matrix
        return matrix, middle - matrix @ np.full(2, canvas / 2)


def mosaic_affine(samples: Sequence[Sample], size: int, rng: np.random.Generator, affine: Affine) -> Sample:
    """Make a ``size`` x ``size`` training sample from one image, or from four as a mosaic.

    Args:
        samples: the image, or the image and three partners; not modified.
        size: side of the result in pixels.
        rng: random generator.
        affine: parameters of the transform.
    """
    mosaic = len(samples) == 4
    canvas = 2 * size if mosaic else size
    centre = rng.uniform(size / 2, 3 * size / 2, 2)
    matrix, shift = affine.draw(rng, size, canvas)
    is_rotated = bool(matrix[0, 1] or matrix[1, 0])
    draw_tile = _warp if is_rotated else _paste
    output = np.full((size, size, 4 if is_rotated else 3), PAD_VALUE, np.uint8)
    boxes, labels, windows = [], [], []
    for k, sample in enumerate(samples):
        height, width = sample.image.shape[:2]
        fit = size / max(height, width)
        extent = np.array((width * fit, height * fit))
        # tiles 0 to 3 touch the centre from the upper left, upper right, lower left, lower right
        corner = centre - extent * ((k + 1) % 2, 1 - k // 2) if mosaic else (size - extent) / 2
        visible_range = ((-corner / fit).tolist(), ((canvas - corner) / fit).tolist())  # of the canvas, in image pixels
        tile_boxes, tile_labels, window = draw_tile(
            output, sample, fit * matrix, matrix @ corner + shift, visible_range
        )
        boxes.append(tile_boxes)
        labels.append(tile_labels)
        windows.append(window)
    windows_n4 = np.repeat(np.array(windows, np.float32), [len(tile_labels) for tile_labels in labels], axis=0)
    clipped, keep = clip_boxes(np.concatenate(boxes), windows_n4)
    image = cv2.cvtColor(output, cv2.COLOR_RGBA2RGB) if is_rotated else output
    return Sample(image, clipped.astype(np.float32), np.concatenate(labels)[keep], samples[0].meta)


def clip_boxes(boxes: np.ndarray, window: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Clip (N, 4) xyxy boxes to an xyxy window, (4,) or one per box (N, 4), and drop those that are too small.

    Returns:
        the boxes kept (K, 4), and a mask of them (N,) bool.
    """
    low, high = window[..., (0, 1, 0, 1)], window[..., (2, 3, 2, 3)]
    clipped = np.minimum(np.maximum(boxes, low), high)
    x1, y1, x2, y2 = boxes.T
    w, h = (clipped[:, 2:] - clipped[:, :2]).T
    long, short = np.maximum(w, h), np.minimum(w, h)
    keep = (short > MIN_SIDE) & (w * h > MIN_VISIBLE * (x2 - x1) * (y2 - y1)) & (long < MAX_ASPECT * short)
    return clipped[keep], keep


def _paste(
    output: np.ndarray,
    sample: Sample,
    matrix: np.ndarray,
    offset: np.ndarray,
    visible_range: tuple[list[float], list[float]],
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Draw the part ``visible_range`` (low, high; image pixels) at ``xy * scale + offset`` into ``output``.

    The part is resized once. Its ends are rounded to integer pixels of both images, outwards where the output cuts it,
    so that it is shifted by at most half an output pixel. The boxes are transformed in the same way.

    Returns:
        the boxes as drawn (K, 4), their labels (K,), and the drawn window (x1, y1, x2, y2) in pixels of ``output``.
    """
    scale = float(matrix[0, 0])
    spans = []  # along x and y: ends in the image, in the resized image, in the output
    for length, limit, start, first, last in zip(
        sample.image.shape[1::-1], output.shape[1::-1], offset.tolist(), *visible_range, strict=True
    ):
        low = max(round(max(first, 0.0) * scale + start), 0)
        high = min(round(min(last, length) * scale + start), limit)
        if high <= low:
            return sample.boxes[:0], sample.labels[:0], (0, 0, 0, 0)
        crop_low = max(math.floor((low - start) / scale), 0)
        crop_high = min(math.ceil((high - start) / scale), length)
        drawn_low = min(round(crop_low * scale + start), low)
        drawn_high = max(round(crop_high * scale + start), high)
        spans.append((crop_low, crop_high, drawn_low, drawn_high, low, high))
    (left, right, x1, x2, low_x, high_x), (top, bottom, y1, y2, low_y, high_y) = spans
    crop, window = sample.image[top:bottom, left:right], output[low_y:high_y, low_x:high_x]
    if window.shape[:2] == (y2 - y1, x2 - x1):
        resize(crop, x2 - x1, y2 - y1, window)
    else:
        window[:] = resize(crop, x2 - x1, y2 - y1)[low_y - y1 : high_y - y1, low_x - x1 : high_x - x1]
    scale_x, scale_y = (x2 - x1) / (right - left), (y2 - y1) / (bottom - top)
    shift = (x1 - left * scale_x, y1 - top * scale_y)
    boxes = sample.boxes * np.array((scale_x, scale_y) * 2, np.float32) + np.array(shift * 2, np.float32)
    return boxes, sample.labels, (low_x, low_y, high_x, high_y)


def _warp(
    output: np.ndarray,
    sample: Sample,
    matrix: np.ndarray,
    offset: np.ndarray,
    visible_range: tuple[list[float], list[float]],
) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """Draw the part ``visible_range`` (low, high; image pixels) at ``matrix @ xy + offset`` into ``output``.

    ``output`` has four channels, which OpenCV warps more than twice as fast as three.

    Returns:
        the boxes around the warped boxes (K, 4), their labels (K,), and the drawn window, as in ``_paste``.
    """
    height, width = sample.image.shape[:2]
    size = output.shape[0]
    inverse = np.linalg.inv(matrix)
    corners = np.array(((0, 0, size, size),))
    frame = _enclosing_boxes(corners, inverse, -inverse @ offset)[0]  # the output in image pixels
    visible = np.maximum(visible_range[0], frame[:2]), np.minimum(visible_range[1], frame[2:])
    # One more pixel at the edges of the output, for interpolation; none at the edges of the canvas.
    low = np.floor(np.maximum(np.maximum(visible_range[0], frame[:2] - 1), 0)).astype(int)
    high = np.ceil(np.minimum(np.minimum(visible_range[1], frame[2:] + 1), (width, height))).astype(int)
    crop = np.concatenate((low, high))
    window = np.clip(_enclosing_boxes(crop[None], matrix, offset)[0], 0, size)
    first, last = np.floor(window[:2]).astype(int), np.ceil(window[2:]).astype(int)
    if (high <= low).any() or (last <= first).any():
        return sample.boxes[:0], sample.labels[:0], (0, 0, 0, 0)
    # OpenCV's coordinates refer to pixel centres, those of boxes to edges.
    start = matrix @ (low + 0.5) + offset - first - 0.5
    cv2.warpAffine(
        cv2.cvtColor(sample.image[low[1] : high[1], low[0] : high[0]], cv2.COLOR_RGB2RGBA),
        np.column_stack((matrix, start)),
        tuple(int(n) for n in last - first),
        dst=output[first[1] : last[1], first[0] : last[0]],
        flags=cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_TRANSPARENT,
    )
    inside = np.clip(sample.boxes.reshape(-1, 2, 2), *visible).reshape(-1, 4)
    (w, h), (w_in, h_in) = ((boxes[:, 2:] - boxes[:, :2]).T for boxes in (sample.boxes, inside))
    keep = w_in * h_in > MIN_VISIBLE * w * h
    return _enclosing_boxes(inside[keep], matrix, offset), sample.labels[keep], tuple(window)


def _enclosing_boxes(boxes: np.ndarray, matrix: np.ndarray, offset: np.ndarray) -> np.ndarray:
    """Return the upright boxes (N, 4) around ``matrix @ xy + offset`` of the corners of xyxy ``boxes`` (N, 4)."""
    corners = boxes[:, ((0, 1), (2, 1), (2, 3), (0, 3))] @ matrix.T + offset  # (N, 4, 2)
    return np.concatenate((corners.min(1), corners.max(1)), 1)
