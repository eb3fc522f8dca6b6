"""Grid points of a dense head."""

from collections.abc import Sequence

import torch
from torch import Tensor


def make_grid_points(
    sizes: Sequence[tuple[int, ...]], strides: Sequence[int], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the centres of the cells of several feature maps, by level, row and column.

    Args:
        sizes: (height, width) of each level.
        strides: pixels per cell of each level.
        device: device of the result.

    Returns:
        Points (A, 2) as (x + 0.5, y + 0.5) in units of their stride, and strides (A, 1), both float32.
    """
    points, point_strides = [], []
    for (h, w), stride in zip(sizes, strides, strict=True):
        y, x = torch.meshgrid(torch.arange(h, device=device), torch.arange(w, device=device), indexing="ij")
        points.append(torch.stack((x, y), -1).reshape(-1, 2) + 0.5)
        point_strides.append(torch.full((h * w, 1), float(stride), device=device))
    return torch.cat(points), torch.cat(point_strides)
