"""Non-maximum suppression."""

from dataclasses import dataclass

import torch
from torch import Tensor

Selection = tuple[Tensor, Tensor, Tensor]  # boxes (N, 4) xyxy, scores (N,), labels (N,) int64, by descending score


@dataclass(frozen=True)
class Thresholds:
    """Which predictions are reported as detections.

    Attributes:
        score: minimum score (exclusive), one for all classes or one per class.
        iou: suppress a box if its IoU with a higher-scoring box of its class exceeds this.
        max_det: maximum number of boxes per image.
        multi_label: report a box once for each of its classes above ``score``; False: for its best class only.
        classes: labels to report; None for all.
        class_agnostic: suppress a box whatever the class of the higher-scoring one.
    """

    score: float | tuple[float, ...] = 0.25
    iou: float = 0.7
    max_det: int = 300
    multi_label: bool = False
    classes: tuple[int, ...] | None = None
    class_agnostic: bool = False


def non_max_suppression(
    boxes_ba4: Tensor,
    scores_bac: Tensor,
    thresholds: Thresholds,
    max_candidates: int = 30_000,
) -> list[Selection]:
    """Apply non-maximum suppression to each image; NaN scores and boxes that are not finite are dropped.

    Args:
        boxes_ba4: (B, A, 4) xyxy.
        scores_bac: (B, A, C) in 0..1.
        thresholds: which are kept.
        max_candidates: maximum number of boxes per image before suppression, by score.

    Returns:
        For each image: boxes (N, 4), scores (N,), labels (N,) int64, by descending score.
    """
    from torchvision.ops import batched_nms  # imported lazily, as it takes a second

    lowest_c = torch.tensor(thresholds.score, dtype=torch.float32).expand(scores_bac.shape[-1]).to(scores_bac.device)
    if thresholds.classes is not None:
        reported_c = torch.zeros_like(lowest_c, dtype=torch.bool)
        reported_c[list(thresholds.classes)] = True
        lowest_c = torch.where(reported_c, lowest_c, torch.inf)
    selected = []
    for boxes_a4, scores_ac in zip(boxes_ba4.float(), scores_bac.float(), strict=True):
        finite_a = boxes_a4.isfinite().all(-1)
        above_ac = (scores_ac > lowest_c) & finite_a[:, None]
        if thresholds.multi_label:
            point, label = torch.nonzero(above_ac, as_tuple=True)
        else:
            best_a, label_a = torch.where(above_ac, scores_ac, -1.0).max(-1)
            (point,) = torch.nonzero(best_a >= 0, as_tuple=True)
            label = label_a[point]
        confidence = scores_ac[point, label]
        if len(confidence) > max_candidates:
            confidence, best = confidence.topk(max_candidates)
            point, label = point[best], label[best]
        boxes = boxes_a4[point]
        group = torch.zeros_like(label) if thresholds.class_agnostic else label
        keep = batched_nms(boxes, confidence, group, thresholds.iou)[: thresholds.max_det]
        selected.append((boxes[keep], confidence[keep], label[keep]))
    return selected
