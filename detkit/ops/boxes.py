"""Operations on boxes (..., 4). Formats: xyxy for corners, ltrb for distances from a point."""

import math

import torch
from torch import Tensor


def ltrb_to_xyxy(ltrb: Tensor, points: Tensor) -> Tensor:
    """Convert distances left, top, right, bottom (..., A, 4) from points (A, 2) to xyxy boxes in the same units."""
    lt, rb = ltrb.chunk(2, -1)
    return torch.cat((points - lt, points + rb), -1)


def xyxy_to_ltrb(xyxy: Tensor, points: Tensor) -> Tensor:
    """Convert xyxy boxes (..., A, 4) to distances left, top, right, bottom from points (A, 2) in the same units."""
    x1y1, x2y2 = xyxy.chunk(2, -1)
    return torch.cat((points - x1y1, x2y2 - points), -1)


def dfl_expectation(logits: Tensor, bins: Tensor) -> Tensor:
    """Return the expectation (..., 4) of each side's distribution: logits (..., 4 * K), side-major, over bins (K,)."""
    return logits.unflatten(-1, (4, len(bins))).softmax(-1) @ bins


def pairwise_overlap(a: Tensor, b: Tensor, over: str = "union") -> Tensor:
    """Return (N, M): the intersection of each of (N, 4) with each of (M, 4) xyxy boxes over their union, the IoU.

    ``over="smaller"`` divides by the smaller area of the two instead.
    """
    size = (torch.minimum(a[:, None, 2:], b[:, 2:]) - torch.maximum(a[:, None, :2], b[:, :2])).clamp(min=0)
    intersection = size.prod(-1)
    area_a, area_b = ((boxes[:, 2:] - boxes[:, :2]).prod(-1) for boxes in (a, b))
    union = area_a[:, None] + area_b - intersection
    divisor = torch.minimum(area_a[:, None], area_b) if over == "smaller" else union
    return intersection / divisor.clamp(min=1e-9)


def unletterbox(xyxy: Tensor, scale: tuple[float, float], offset: tuple[float, float], size: tuple[int, int]) -> Tensor:
    """Map boxes (N, 4) from a letterboxed frame to pixels of the source image of ``size`` (h, w), clipped to it."""
    height, width = size
    xyxy = (xyxy - xyxy.new_tensor((*offset, *offset))) / xyxy.new_tensor((*scale, *scale))
    limit = xyxy.new_tensor((width, height, width, height))
    return torch.minimum(xyxy.clamp(min=0), limit)


def ciou(a: Tensor, b: Tensor, eps: float = 1e-7) -> Tensor:
    """Compute the complete IoU (...) of two broadcastable xyxy tensors (..., 4), in -1.5..1.

    IoU - centre distance^2 / enclosing diagonal^2 - alpha * v, with v the squared difference of the aspect
    angles (Zheng et al., arXiv 2005.03572). No gradient flows through ``alpha``, as in the paper.
    """
    ax1, ay1, ax2, ay2 = a.unbind(-1)
    bx1, by1, bx2, by2 = b.unbind(-1)
    aw, ah = ax2 - ax1, ay2 - ay1 + eps
    bw, bh = bx2 - bx1, by2 - by1 + eps
    overlap_w = (torch.minimum(ax2, bx2) - torch.maximum(ax1, bx1)).clamp(min=0)
    overlap_h = (torch.minimum(ay2, by2) - torch.maximum(ay1, by1)).clamp(min=0)
    overlap = overlap_w * overlap_h
    iou = overlap / (aw * ah + bw * bh - overlap + eps)
    hull_w = torch.maximum(ax2, bx2) - torch.minimum(ax1, bx1)
    hull_h = torch.maximum(ay2, by2) - torch.minimum(ay1, by1)
    diagonal2 = hull_w**2 + hull_h**2 + eps
    distance2 = ((bx1 + bx2 - ax1 - ax2) ** 2 + (by1 + by2 - ay1 - ay2) ** 2) / 4
    v = (4 / math.pi**2) * (torch.atan(bw / bh) - torch.atan(aw / ah)) ** 2
    with torch.no_grad():
        alpha = v / (v - iou + (1 + eps))
    return iou - (distance2 / diagonal2 + v * alpha)
