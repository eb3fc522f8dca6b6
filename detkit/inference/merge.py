"""Merging the detections of several views of one image."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from detkit.ops.boxes import pairwise_overlap
from detkit.ops.nms import Selection, Thresholds

MIN_OVER_SMALLER = 0.5  # intersection over the smaller area from which two boxes are parts of one object
FUSION_IOU = 0.55  # of weighted boxes fusion, the paper's


def merge_nms(found: Selection, _views_n: Tensor, thresholds: Thresholds) -> Selection:
    """Non-maximum suppression of the detections of all views."""
    from torchvision.ops import batched_nms  # imported lazily, as it takes a second

    boxes, scores, labels = found
    groups = torch.zeros_like(labels) if thresholds.class_agnostic else labels
    keep = batched_nms(boxes, scores, groups, thresholds.iou)
    return boxes[keep], scores[keep], labels[keep]


def merge_nmm(found: Selection, _views_n: Tensor, thresholds: Thresholds) -> Selection:
    """Greedy non-maximum merging, for objects cut by tiles.

    Each box, by descending score, absorbs the boxes of its class of which it covers half, or which cover half of it
    (intersection over the smaller area), and becomes their hull.
    """
    boxes, scores, labels = found
    free = torch.ones(len(scores), dtype=torch.bool)
    kept, hulls = [], []
    for k in range(len(scores)):
        if not free[k]:
            continue
        over_smaller = pairwise_overlap(boxes[k : k + 1], boxes, over="smaller")[0]
        absorbed = free & (over_smaller > MIN_OVER_SMALLER)
        if not thresholds.class_agnostic:
            absorbed &= labels == labels[k]
        absorbed[k] = True
        free &= ~absorbed
        members = boxes[absorbed]
        kept.append(k)
        hulls.append(torch.cat((members[:, :2].min(0).values, members[:, 2:].max(0).values)))
    return (torch.stack(hulls), scores[kept], labels[kept]) if kept else found


def merge_wbf(found: Selection, views_n: Tensor, thresholds: Thresholds) -> Selection:
    """Weighted boxes fusion (Solovyev et al., arXiv 1910.13302).

    By descending score, each box joins the cluster of its class whose fused box has the largest IoU with it, if that
    exceeds FUSION_IOU, or starts one. A fused box is the mean of its members weighted by their scores; its score is
    their mean, times the share of the views that cover it in which it was found.
    """
    boxes, scores, labels = found
    members: list[list[int]] = []
    fused = boxes.clone()  # row m: the fused box of cluster m
    group = torch.zeros_like(labels)
    for k in range(len(scores)):
        count = len(members)
        iou = pairwise_overlap(boxes[k : k + 1], fused[:count])[0]
        if not thresholds.class_agnostic:
            iou = torch.where(group[:count] == labels[k], iou, -1.0)
        best = int(iou.argmax()) if count else 0
        if count and iou[best] > FUSION_IOU:
            members[best].append(k)
            weight = scores[members[best]]
            fused[best] = (boxes[members[best]] * weight[:, None]).sum(0) / weight.sum().clamp(min=1e-9)
        else:
            members.append([k])
            fused[count], group[count] = boxes[k], labels[k]
    share = torch.tensor([min(len(m) / float(views_n[m[0]]), 1.0) for m in members])
    score = torch.stack([scores[m].mean() for m in members]) * share if members else scores
    order = score.argsort(descending=True, stable=True)
    return fused[: len(members)][order], score[order], group[: len(members)][order]


MERGES: dict[str, Callable[[Selection, Tensor, Thresholds], Selection]] = {
    "nms": merge_nms,
    "nmm": merge_nmm,
    "wbf": merge_wbf,
}


def merge_views(
    found: Sequence[Selection], windows: Sequence[tuple[float, ...]], merge: str, thresholds: Thresholds
) -> Selection:
    """Merge the detections of the views of one image, all in pixels of that image.

    Args:
        found: detections of each view.
        windows: xyxy of each view in the image.
        merge: a name of MERGES.
        thresholds: those of the views; ``score`` and ``max_det`` apply to the merged detections, too.
    """
    if len(found) == 1:
        return found[0]
    boxes, scores, labels = (torch.cat([selection[k] for selection in found]).cpu() for k in range(3))
    order = scores.argsort(descending=True, stable=True)
    boxes, scores, labels = boxes[order], scores[order], labels[order]
    centres, limits = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes.new_tensor(windows)
    inside = (centres[:, None] >= limits[:, :2]) & (centres[:, None] <= limits[:, 2:])
    views_n = inside.all(-1).sum(1).clamp(min=1)  # how many views cover each box
    boxes, scores, labels = MERGES[merge]((boxes, scores, labels), views_n, thresholds)
    lowest = torch.tensor(thresholds.score)
    keep = torch.nonzero(scores > (lowest if lowest.ndim == 0 else lowest[labels]))[: thresholds.max_det, 0]
    return boxes[keep], scores[keep], labels[keep]
