"""Compound scaling of the YOLO family: depth and width turn one architecture into n, s, m, l and x."""

import math

from detkit.errors import DetkitError


def scaled_width(channels: int, width: float, max_channels: int) -> int:
    """Scale ``min(channels, max_channels)`` by ``width`` and round up to a multiple of 8.

    Raises:
        DetkitError: an argument is not positive.
    """
    if width <= 0 or channels <= 0 or max_channels <= 0:
        raise DetkitError(f"width={width} and max_channels={max_channels} must be above 0")
    return math.ceil(min(channels, max_channels) * width / 8) * 8


def scaled_depth(repeats: int, depth: float) -> int:
    """Scale a number of repeats by ``depth``; at least 1, and 1 stays 1.

    Raises:
        DetkitError: ``repeats`` is negative, or ``depth`` is not positive.
    """
    if depth <= 0 or repeats < 0:
        raise DetkitError(f"depth={depth} must be above 0 and repeats={repeats} 0 or more")
    return max(round(repeats * depth), 1) if repeats > 1 else repeats
