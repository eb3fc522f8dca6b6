"""The bounding box of a COCO ``segmentation``: polygons, or a run-length encoded mask."""

from collections.abc import Mapping
from typing import Any

import numpy as np

XYWH = tuple[float, float, float, float]


def segmentation_box(segmentation: Any) -> XYWH:
    """Return x, y, width and height of the bounding box of a COCO segmentation.

    Args:
        segmentation: polygons [[x, y, x, y, ...], ...], one polygon [x, y, x, y, ...], or a mask {"size": [height,
            width], "counts": run lengths or their COCO string}.

    Raises:
        TypeError, ValueError, LookupError: it is invalid or empty.
    """
    if isinstance(segmentation, Mapping):
        return _mask_box(segmentation["size"], segmentation["counts"])
    polygons = [segmentation] if isinstance(segmentation[0], (int, float)) else segmentation
    xs = numbers([v for polygon in polygons for v in polygon[0::2]])
    ys = numbers([v for polygon in polygons for v in polygon[1::2]])
    return min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)


def numbers(values: Any) -> list[float]:
    """Return a list of numbers as floats.

    Raises:
        ValueError: it is anything else, for example a list of numeric strings.
    """
    if not isinstance(values, (list, tuple)) or not all(type(v) in (int, float) for v in values):
        raise ValueError(values)
    return [float(v) for v in values]


def _mask_box(size: list[int], counts: list[int] | str) -> XYWH:
    """Return the bounding box of a mask of alternating background and foreground runs, in column-major order."""
    height, width = (int(v) for v in numbers(size))
    runs = _runs(counts) if isinstance(counts, str) else [int(v) for v in numbers(counts)]
    if min(height, width, *runs) < 0 or sum(runs) > height * width or height * width >= 2**62:
        raise ValueError("the runs do not fit the size")
    ends = np.cumsum(np.array(runs, np.int64))
    stops = ends[1::2]
    starts = ends[0::2][: len(stops)]
    first, last = starts[stops > starts], stops[stops > starts] - 1
    x1, x2 = int((first // height).min()), int((last // height).max()) + 1
    if (first // height < last // height).any():  # a run that continues in the next column: assume all rows
        y1, y2 = 0, height
    else:
        y1, y2 = int((first % height).min()), int((last % height).max()) + 1
    return x1, y1, x2 - x1, y2 - y1


def _runs(text: str) -> list[int]:
    """Decode the run lengths of a COCO string: 5 bits per character, lowest first, delta-coded at a distance of two."""
    runs: list[int] = []
    value = shift = 0
    for code in text.encode("ascii"):
        bits = code - 48
        if not 0 <= bits < 64 or shift > 60:
            raise ValueError(text)
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:
            value -= (bits & 16) << shift - 4  # the highest bit is the sign
            runs.append(value + (runs[-2] if len(runs) > 2 else 0))
            value = shift = 0
    return runs
