"""Non-maximum suppression."""

from dataclasses import dataclass

import torch
from torch import Tensor

Selection = tuple[Tensor, Tensor, Tensor]  # boxes (N, 4) xyxy, scores (N,), labels (N,) int64, by descending score
FARTHEST = 1e9  # pixels from the origin that boxes are clamped to before they are compared
FIRST = 2  # times max_det: the candidates suppressed at first


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
    lowest_c = torch.tensor(thresholds.score, dtype=torch.float32).expand(scores_bac.shape[-1]).to(scores_bac.device)
    if thresholds.classes is not None:
        reported_c = torch.zeros_like(lowest_c, dtype=torch.bool)
        reported_c[list(thresholds.classes)] = True
        lowest_c = torch.where(reported_c, lowest_c, torch.inf)
    images, points, classes = scores_bac.shape
    best_n = scores_bac.amax(-1).flatten().float()  # NaN if any is, but the other classes of the point count
    (chosen_k,) = torch.nonzero(~(best_n <= lowest_c.min()), as_tuple=True)
    boxes_k4 = boxes_ba4.flatten(0, 1)[chosen_k].float()
    finite_k = boxes_k4.isfinite().all(-1)
    chosen_k, boxes_k4 = chosen_k[finite_k], boxes_k4[finite_k]
    scores_kc = scores_bac.flatten(0, 1)[chosen_k].float()
    if thresholds.multi_label:
        (place,) = torch.nonzero((scores_kc > lowest_c).flatten(), as_tuple=True)
        row, label = place // classes, place % classes
    else:
        best_k, label_k = torch.where(scores_kc.isnan(), -1.0, scores_kc).max(-1)
        (row,) = torch.nonzero(best_k > lowest_c[label_k], as_tuple=True)
        label = label_k[row]
    counts = torch.bincount(chosen_k[row] // points, minlength=images).tolist()
    candidates = (boxes_k4[row], scores_kc[row, label], label)
    by_image = zip(*(values.split(counts) for values in candidates), strict=True)
    selected = []
    for boxes, scores, labels in by_image:
        scores, order = scores.sort(descending=True, stable=True)
        scores, order = scores[:max_candidates], order[:max_candidates]
        boxes, labels = boxes[order], labels[order]
        groups = torch.zeros_like(labels) if thresholds.class_agnostic else labels
        keep = suppress(boxes, scores, groups, thresholds.iou, thresholds.max_det)
        selected.append((boxes[keep], scores[keep], labels[keep]))
    return selected


def suppress(boxes: Tensor, scores: Tensor, groups: Tensor, iou: float, most: int | None = None) -> Tensor:
    """Apply non-maximum suppression within groups, such as classes.

    Args:
        boxes: (N, 4) xyxy, by descending score.
        scores: (N,).
        groups: (N,) int64; boxes of different groups do not suppress each other.
        iou: see Thresholds.
        most: number of boxes to keep; None for all.

    Returns:
        the positions of the boxes that are kept, (M,), by descending score.
    """
    from torchvision.ops import nms  # imported lazily, as it takes a second

    apart = boxes.double().clamp(-FARTHEST, FARTHEST)
    if len(groups):  # side by side, in float64 without a loss of precision
        apart += (groups * (apart.max() - apart.min() + 1))[:, None]
    count = len(scores) if most is None else FIRST * most
    while True:  # what is kept of the best ones does not depend on the others
        keep = nms(apart[:count], scores[:count].double(), iou)[:most]
        if len(keep) == most or count >= len(scores):
            return keep
        count *= 4
