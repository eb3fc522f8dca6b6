"""Non-maximum suppression."""

import torch
from torch import Tensor


def non_max_suppression(
    boxes_ba4: Tensor,
    scores_bac: Tensor,
    *,
    score: float,
    iou: float,
    max_det: int,
    multi_label: bool = True,
    max_candidates: int = 30_000,
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Apply class-aware non-maximum suppression to each image; NaN scores and boxes that are not finite are dropped.

    Args:
        boxes_ba4: (B, A, 4) xyxy.
        scores_bac: (B, A, C) in 0..1.
        score: minimum score (exclusive).
        iou: suppress a box if its IoU with a higher-scoring box of its class exceeds this.
        max_det: maximum number of boxes per image.
        multi_label: keep a box once for each of its classes above ``score``; False: for its best class only.
        max_candidates: maximum number of boxes per image before suppression, by score.

    Returns:
        For each image: boxes (N, 4), scores (N,), labels (N,) int64, by descending score.
    """
    from torchvision.ops import batched_nms  # imported lazily, as it takes a second

    selected = []
    for boxes_a4, scores_ac in zip(boxes_ba4.float(), scores_bac.float(), strict=True):
        finite_a = boxes_a4.isfinite().all(-1)
        if multi_label:
            point, label = torch.nonzero((scores_ac > score) & finite_a[:, None], as_tuple=True)
        else:
            best_a, label_a = scores_ac.max(-1)
            (point,) = torch.nonzero((best_a > score) & finite_a, as_tuple=True)
            label = label_a[point]
        confidence = scores_ac[point, label]
        if len(confidence) > max_candidates:
            confidence, best = confidence.topk(max_candidates)
            point, label = point[best], label[best]
        boxes = boxes_a4[point]
        keep = batched_nms(boxes, confidence, label, iou)[:max_det]
        selected.append((boxes[keep], confidence[keep], label[keep]))
    return selected
