"""Merging the detections of several views of one image."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from detkit.ops.boxes import pairwise_overlap
from detkit.ops.nms import Selection, Thresholds, suppress

MIN_OVER_SMALLER = 0.5  # intersection over the smaller area from which a cut box belongs to another
CUT_MARGIN = 0.01  # of a view's longer side: a box that ends this close to an inner border is cut by it
MAX_CANDIDATES = 5000  # detections of all views that are merged, by score
FUSION_IOU = 0.55  # of weighted boxes fusion, the paper's


@dataclass(frozen=True)
class Candidates:
    """The detections of all views of an image, by descending score.

    Attributes:
        boxes: (N, 4) xyxy in pixels of the image.
        scores: (N,).
        labels: (N,) int64; zeros if suppression ignores the class.
        views: (N,) number of views that cover the centre of the box.
        is_cut: (N,) bool, whether the box ends at a border of its view that is not one of the image.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    views: Tensor
    is_cut: Tensor


Merged = tuple[Tensor, Tensor, Tensor]  # boxes (M, 4), scores (M,), and the candidate whose label each has (M,)


def merge_nms(found: Candidates, iou: float) -> Merged:
    """Non-maximum suppression of the detections of all views."""
    keep = suppress(found.boxes, found.scores, found.labels, iou)
    return found.boxes[keep], found.scores[keep], keep


def merge_nmm(found: Candidates, iou: float) -> Merged:
    """Greedy non-maximum merging, for objects cut by tiles.

    Each box, by descending score, absorbs the remaining ones of its class whose IoU with it exceeds ``iou``. If one of
    the two is cut, they belong together from half of the smaller area, whatever their IoU; a cut box grows to the hull
    of itself and the cut boxes it absorbs.
    """
    free = torch.ones(len(found.scores), dtype=torch.bool)
    kept, merged = [], []
    for k in range(len(found.scores)):
        if not free[k]:
            continue
        box = found.boxes[k : k + 1]
        rest = torch.nonzero(free & (found.labels == found.labels[k]))[:, 0]  # all of them are behind k, or k itself
        boxes, is_cut = found.boxes[rest], found.is_cut[rest]
        part = (is_cut | found.is_cut[k]) & (pairwise_overlap(box, boxes, over="smaller")[0] > MIN_OVER_SMALLER)
        absorbed = part | (pairwise_overlap(box, boxes)[0] > iou)
        free[rest[absorbed]] = False
        free[k] = False
        hull = boxes[absorbed & part & is_cut & (found.scores[rest] > found.scores[k] / 2)]
        if found.is_cut[k] and len(hull):
            box = torch.cat((hull[:, :2].amin(0), hull[:, 2:].amax(0)))[None]
        kept.append(k)
        merged.append(box)
    keep = torch.tensor(kept, dtype=torch.int64)
    return torch.cat((found.boxes[:0], *merged)), found.scores[keep], keep


def merge_wbf(found: Candidates, _iou: float) -> Merged:
    """Weighted boxes fusion (Solovyev et al., arXiv 1910.13302).

    By descending score, each box joins the cluster of its class whose fused box has the largest IoU with it, if that
    exceeds FUSION_IOU, or starts one. A fused box is the mean of its members weighted by their scores; its score is
    their mean, times the share of the views that cover it in which it was found.
    """
    members: list[list[int]] = []
    fused = found.boxes.clone()  # row m: the fused box of cluster m
    labels = torch.empty_like(found.labels)
    for k, box in enumerate(found.boxes):
        count = len(members)
        overlap = pairwise_overlap(box[None], fused[:count])[0]
        iou, best = (
            torch.where(labels[:count] == found.labels[k], overlap, -1.0).max(0) if count else (box.new_zeros(()), 0)
        )
        if iou > FUSION_IOU:
            chosen = members[int(best)]
            chosen.append(k)
            weights = found.scores[chosen]
            fused[int(best)] = (found.boxes[chosen] * weights[:, None]).sum(0) / weights.sum().clamp(min=1e-9)
        else:
            members.append([k])
            fused[count], labels[count] = box, found.labels[k]
    first = torch.tensor([chosen[0] for chosen in members], dtype=torch.int64)
    means = [found.scores[chosen].mean() * min(len(chosen) / float(found.views[chosen[0]]), 1.0) for chosen in members]
    scores = torch.stack(means) if means else found.scores
    order = scores.argsort(descending=True, stable=True)
    return fused[: len(members)][order], scores[order], first[order]


MERGES: dict[str, Callable[[Candidates, float], Merged]] = {"nms": merge_nms, "nmm": merge_nmm, "wbf": merge_wbf}


def merge_views(
    found: Sequence[Selection],
    windows: Sequence[tuple[float, float, float, float]],
    size: tuple[int, int],
    merge: str,
    thresholds: Thresholds,
) -> Selection:
    """Merge the detections of the views of one image, all in pixels of that image.

    Args:
        found: detections of each view.
        windows: xyxy of each view in the image, including its padding.
        size: (height, width) of the image.
        merge: a name of MERGES.
        thresholds: those of the views; ``score`` and ``max_det`` apply to the merged detections, too.
    """
    if len(found) == 1:
        return found[0]
    boxes, scores, labels = (torch.cat([selection[k] for selection in found]).cpu() for k in range(3))
    is_cut = torch.cat(
        [_cut_by(window, size, selection[0].cpu()) for window, selection in zip(windows, found, strict=True)]
    )
    order = scores.argsort(descending=True, stable=True)[:MAX_CANDIDATES]
    boxes, scores, labels, is_cut = boxes[order], scores[order], labels[order], is_cut[order]
    centres, limits = (boxes[:, :2] + boxes[:, 2:]) / 2, boxes.new_tensor(windows)
    inside = (centres[:, None] >= limits[:, :2]) & (centres[:, None] <= limits[:, 2:])
    views = inside.all(-1).sum(1).clamp(min=1)
    groups = torch.zeros_like(labels) if thresholds.class_agnostic else labels
    boxes, scores, kept = MERGES[merge](Candidates(boxes, scores, groups, views, is_cut), thresholds.iou)
    labels = labels[kept]
    lowest = torch.tensor(thresholds.score)
    keep = torch.nonzero(scores > (lowest if lowest.ndim == 0 else lowest[labels]))[: thresholds.max_det, 0]
    return boxes[keep], scores[keep], labels[keep]


def _cut_by(window: tuple[float, float, float, float], size: tuple[int, int], boxes: Tensor) -> Tensor:
    """Return which boxes (N, 4) end at a border of the window that lies inside the image of ``size`` (h, w)."""
    x1, y1, x2, y2 = window
    margin = CUT_MARGIN * max(x2 - x1, y2 - y1)
    at_start = boxes[:, :2] <= boxes.new_tensor((x1, y1)) + margin
    at_end = boxes[:, 2:] >= boxes.new_tensor((x2, y2)) - margin
    inner_start = torch.tensor((x1 > 1, y1 > 1))  # by more than rounding
    inner_end = torch.tensor((x2 < size[1] - 1, y2 < size[0] - 1))
    return ((at_start & inner_start) | (at_end & inner_end)).any(1)
