"""Compound scaling of the YOLO family: one depth and one width make n, s, m, l and x of the same plan."""

import math


def scaled_width(channels: int, width: float, max_channels: int) -> int:
    """Scale ``min(channels, max_channels)`` by ``width``, up to the next multiple of 8."""
    return math.ceil(min(channels, max_channels) * width / 8) * 8


def scaled_depth(repeats: int, depth: float) -> int:
    """Scale a number of repeats by ``depth``; at least 1, and 1 stays 1."""
    return max(round(repeats * depth), 1) if repeats > 1 else repeats
