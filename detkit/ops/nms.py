"""From dense boxes and scores to the few that stand."""

import torch
from torch import Tensor


def select_boxes(
    boxes_ba4: Tensor, scores_bac: Tensor, *, score: float, iou: float, max_det: int, max_candidates: int = 30_000
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Class-aware non-maximum suppression, several labels a box allowed, image by image.

    Args:
        boxes_ba4: (B, A, 4) xyxy.
        scores_bac: (B, A, C) in 0..1. What is not finite, score or box, is passed over.
        score: keep scores strictly above this.
        iou: drop a box that overlaps a better one of its class by more than this.
        max_det: at most this many boxes an image, best first.
        max_candidates: at most this many enter the suppression, best first.

    Returns:
        For each image: boxes (N, 4), scores (N,), labels (N,) int64, by descending score.
    """
    from torchvision.ops import batched_nms  # here: it takes a second to import, which not every command needs

    selected = []
    for boxes_a4, scores_ac in zip(boxes_ba4.float(), scores_bac.float(), strict=True):
        sound = boxes_a4.isfinite().all(-1, keepdim=True)  # one that is not would spoil the suppression of all
        point, label = torch.nonzero((scores_ac > score) & sound, as_tuple=True)
        confidence = scores_ac[point, label]
        if len(confidence) > max_candidates:
            confidence, best = confidence.topk(max_candidates)
            point, label = point[best], label[best]
        boxes = boxes_a4[point]
        keep = batched_nms(boxes, confidence, label, iou)[:max_det]
        selected.append((boxes[keep], confidence[keep], label[keep]))
    return selected
