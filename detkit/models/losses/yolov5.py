"""YOLOv5's loss: boxes are matched to anchors of similar size in the box's cell and the two nearest cells."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.distributed.collectives import all_reduce_sum
from detkit.errors import DetkitError
from detkit.ops.anchors import anchor_boxes
from detkit.ops.boxes import ciou
from detkit.registry import LOSSES
from detkit.structures import AnchorOutput, Batch

BALANCE = {3: (4.0, 1.0, 0.4)}  # weight of each level's objectness, finest first
BALANCE_OTHERWISE = (4.0, 1.0, 0.25, 0.06, 0.02)
NEIGHBOURS = ((0, 0), (-1, 0), (0, -1), (1, 0), (0, 1))  # the box's own cell and those around it, (x, y)


@dataclass
class Matches:
    """K candidate pairs of boxes and anchors of one level.

    Attributes:
        index_bk: (B, K) int64, index of the anchor in its level; 0 if invalid.
        box_k: (K,) int64, index of the box among the M of an image.
        valid_bk: (B, K) bool, whether the pair is a match.
    """

    index_bk: Tensor
    box_k: Tensor
    valid_bk: Tensor


@LOSSES.register("yolov5")
class YOLOv5Loss(nn.Module):
    """Weighted terms ``box``, ``obj`` and ``cls``, means over the matches of all ranks.

    ::

        box = mean (1 - CIoU),  cls = mean BCE(logit, one-hot class),  obj = mean BCE(logit, CIoU of the matched box)

    The means are taken per level, that of ``obj`` over all anchors. With a single class ``cls`` is computed as well,
    unlike in the published recipe.

    Args:
        box, cls, obj: gains; ``cls`` for 80 classes, ``obj`` for images of 640 x 640 pixels.
        anchor_ratio: a box matches an anchor if neither side differs by more than this factor.

    Raises:
        DetkitError: a value is out of range.
    """

    output = AnchorOutput

    def __init__(self, box: float = 0.05, cls: float = 0.5, obj: float = 1.0, anchor_ratio: float = 4.0) -> None:
        super().__init__()
        for key, value in {"box": box, "cls": cls, "obj": obj}.items():
            if value < 0:
                raise DetkitError(f"loss.{key}={value} must be a number, 0 or more")
        if anchor_ratio <= 1:
            raise DetkitError(f"loss.anchor_ratio={anchor_ratio} must be a number above 1")
        self.gains = {"box": box, "obj": obj, "cls": cls}
        self.anchor_ratio = anchor_ratio

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, out: AnchorOutput, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms; summed over terms and ranks they are the mean loss of the global batch."""
        boxes_ba4 = anchor_boxes(out.reg.float(), out.points, out.strides, out.anchors)
        sizes = [h * w * anchors for h, w, anchors in out.levels]
        predictions = [x.split(sizes, 1) for x in (boxes_ba4, out.cls.float(), out.objectness.float())]
        priors = [x.split(sizes) for x in (out.anchors, out.strides)]
        levels = len(sizes)
        balance = BALANCE.get(levels, BALANCE_OTHERWISE)
        terms = dict.fromkeys(self.gains, torch.zeros((), device=boxes_ba4.device))
        for k, (boxes, cls, objectness, anchors, strides) in enumerate(zip(*predictions, *priors, strict=True)):
            matches = match_anchors(batch, anchors, strides, out.levels[k], self.anchor_ratio)
            box, obj, classes = _level_terms(matches, batch, boxes, cls, objectness[..., 0])
            terms = {
                "box": terms["box"] + box,
                "obj": terms["obj"] + obj * balance[k],
                "cls": terms["cls"] + classes,
            }
        pixels = out.levels[0][0] * out.levels[0][1] * out.strides[0, 0] ** 2
        scale: dict[str, Tensor | float] = {"box": 1.0, "obj": pixels / 640**2, "cls": out.cls.shape[-1] / 80}
        return {name: terms[name] * gain * scale[name] * 3 / levels for name, gain in self.gains.items()}


def match_anchors(batch: Batch, anchors: Tensor, strides: Tensor, level: tuple[int, int, int], ratio: float) -> Matches:
    """Match boxes to the anchors of one level.

    An anchor matches a box if its sides are within a factor ``ratio`` of the box's, and its cell contains the box's
    centre or is the nearer horizontal or vertical neighbour (less than one cell from the centre along that axis).

    Args:
        batch: ground truth.
        anchors: (h * w * anchors, 2) width, height in pixels, of this level.
        strides: (h * w * anchors, 1) in pixels, of this level.
        level: rows, columns, anchors per cell.
        ratio: maximum factor between the sides of box and anchor.
    """
    rows, columns, per_cell = level
    stride = strides[0, 0]
    mins_bm2, maxs_bm2 = batch.boxes_bm4.split(2, -1)
    x_bm, y_bm = ((mins_bm2 + maxs_bm2) / 2 / stride).unbind(-1)
    factors = (maxs_bm2 - mins_bm2)[:, :, None] / anchors[:per_cell]
    similar_bma = torch.maximum(factors, 1 / factors).amax(-1) < ratio

    own_x_bm, own_y_bm = x_bm.floor().clamp(0, columns - 1), y_bm.floor().clamp(0, rows - 1)
    cells, in_reach = [], []
    for right, down in NEIGHBOURS:  # Python numbers: creating a tensor would synchronize with the GPU
        column, row = own_x_bm + right, own_y_bm + down
        near = ((column + 0.5 - x_bm).abs() * abs(right) < 1) & ((row + 0.5 - y_bm).abs() * abs(down) < 1)
        cells.append(row * columns + column)
        in_reach.append(near & (column >= 0) & (column < columns) & (row >= 0) & (row < rows))
    cell_bmn = torch.stack(cells, -1).long()
    valid_bmna = (similar_bma & batch.valid_bm[..., None])[:, :, None] & torch.stack(in_reach, -1)[..., None]
    index_bmna = cell_bmn[..., None] * per_cell + torch.arange(per_cell, device=cell_bmn.device)
    boxes = torch.arange(index_bmna.shape[1], device=cell_bmn.device)
    box_k = boxes.repeat_interleave(len(NEIGHBOURS) * per_cell)
    return Matches((index_bmna * valid_bmna).flatten(1), box_k, valid_bmna.flatten(1))


def _level_terms(
    matches: Matches, batch: Batch, boxes: Tensor, cls: Tensor, objectness: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the unweighted terms box, obj and cls of one level from predictions (B, n, ...) of its n anchors."""
    weight_bk = matches.valid_bk.float()
    counts = torch.stack((weight_bk.sum(), weight_bk.new_full((), objectness.numel())))
    count, anchors = all_reduce_sum(counts).clamp(min=1).unbind()
    image_b1 = torch.arange(len(boxes), device=boxes.device)[:, None]
    # Advanced indexing, not gather, since gather's backward synchronizes with the GPU under deterministic algorithms.
    pred_bk4 = boxes[image_b1, matches.index_bk]
    # Invalid pairs get their own box as target: a finite term of weight 0.
    target_bk4 = torch.where(matches.valid_bk[..., None], batch.boxes_bm4[:, matches.box_k], pred_bk4.detach())
    overlap_bk = ciou(pred_bk4, target_bk4)
    box = ((1 - overlap_bk) * weight_bk).sum() / count

    labels = F.one_hot(batch.labels_bm[:, matches.box_k], cls.shape[-1]).float()
    logits = cls[image_b1, matches.index_bk]
    classes = F.binary_cross_entropy_with_logits(logits, labels, reduction="none").mean(-1)

    # The objectness target of an anchor matched to several boxes is its highest CIoU.
    target = torch.zeros_like(objectness)
    target = target.scatter_reduce(1, matches.index_bk, overlap_bk.detach().clamp(min=0) * weight_bk, "amax")
    obj = F.binary_cross_entropy_with_logits(objectness, target, reduction="sum") / anchors
    return box, obj, (classes * weight_bk).sum() / count
