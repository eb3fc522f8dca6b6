"""Task-aligned assignment of points to ground-truth boxes (TOOD, arXiv 2108.07755), vectorised over the batch."""

from dataclasses import dataclass

import torch
from torch import Tensor

from detkit.ops.boxes import ciou

EPS = 1e-9


@dataclass
class Assignment:
    """Targets of the A points of B images.

    Attributes:
        foreground_ba: (B, A) bool, whether the point is assigned to a box.
        box_index_ba: (B, A) int64, index of the box among the image's M; 0 for background.
        scores_bac: (B, A, C) float32 target score of each class; 0 for background.
    """

    foreground_ba: Tensor
    box_index_ba: Tensor
    scores_bac: Tensor


@torch.no_grad()
def assign_task_aligned(  # noqa: PLR0913  (predictions and ground truth; the options are keyword-only)
    scores_bac: Tensor,
    boxes_ba4: Tensor,
    points_a2: Tensor,
    gt_boxes_bm4: Tensor,
    gt_labels_bm: Tensor,
    gt_valid_bm: Tensor,
    *,
    topk: int = 10,
    alpha: float = 0.5,
    beta: float = 6.0,
) -> Assignment:
    """Assign to each box the ``topk`` points inside it that classify and localize it best.

    The alignment of point a with box m is ``score^alpha * CIoU^beta``; a point selected for several boxes is assigned
    to the one with the highest CIoU. The target score is the alignment, scaled so that the maximum of each box is its
    highest CIoU.

    Args:
        scores_bac: (B, A, C) predicted scores in 0..1.
        boxes_ba4: (B, A, 4) predicted boxes, xyxy in pixels.
        points_a2: (A, 2) point centres in pixels.
        gt_boxes_bm4: (B, M, 4) boxes, xyxy in pixels, padded as in Batch.
        gt_labels_bm: (B, M) class indices.
        gt_valid_bm: (B, M) False where padded.
        topk: number of points per box.
        alpha: exponent of the score.
        beta: exponent of the CIoU.
    """
    num_points = scores_bac.shape[1]
    num_boxes = gt_boxes_bm4.shape[1]
    if num_boxes == 0:
        background = torch.zeros(scores_bac.shape[:2], dtype=torch.bool, device=scores_bac.device)
        return Assignment(background, background.long(), torch.zeros_like(scores_bac))

    points_to_corners = torch.cat(
        (points_a2 - gt_boxes_bm4[:, :, None, :2], gt_boxes_bm4[:, :, None, 2:] - points_a2), -1
    )
    inside_bma = (points_to_corners.amin(-1) > EPS) & gt_valid_bm[..., None]
    label_index = gt_labels_bm[..., None].expand(-1, -1, num_points)
    label_scores_bma = scores_bac.transpose(1, 2).gather(1, label_index)
    overlaps_bma = ciou(gt_boxes_bm4[:, :, None], boxes_ba4[:, None]).clamp_(min=0) * inside_bma
    alignment_bma = label_scores_bma.pow(alpha) * overlaps_bma.pow(beta)

    best = alignment_bma.topk(min(topk, num_points), dim=-1)
    # Scatter a number: with a tensor, deterministic algorithms would synchronize with the GPU.
    positive_bma = torch.zeros_like(inside_bma).scatter_(-1, best.indices, True) & inside_bma

    contested_ba = positive_bma.sum(1) > 1
    closest_bma = torch.zeros_like(inside_bma).scatter_(1, overlaps_bma.argmax(1, keepdim=True), True)
    positive_bma = torch.where(contested_ba[:, None], closest_bma, positive_bma)

    alignment_bma = alignment_bma * positive_bma
    best_alignment = alignment_bma.amax(-1, keepdim=True)
    best_overlap = (overlaps_bma * positive_bma).amax(-1, keepdim=True)
    strength_ba = (alignment_bma * best_overlap / (best_alignment + EPS)).amax(1)
    foreground_ba, box_index_ba = positive_bma.any(1), positive_bma.int().argmax(1)
    labels_ba = gt_labels_bm.gather(1, box_index_ba)
    own_class_bac = labels_ba[..., None] == torch.arange(scores_bac.shape[2], device=labels_ba.device)
    scores = torch.where(own_class_bac, (strength_ba * foreground_ba)[..., None], 0.0)
    return Assignment(foreground_ba, box_index_ba, scores)
