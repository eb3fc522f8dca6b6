"""YOLOv8's loss: task-aligned assignment, BCE on classes, CIoU and distribution focal loss on boxes."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from detkit.distributed.collectives import all_reduce_sum
from detkit.errors import DetkitError
from detkit.models.losses.assigner import assign_task_aligned
from detkit.ops.boxes import ciou, dfl_expectation, ltrb_to_xyxy, xyxy_to_ltrb
from detkit.registry import LOSSES
from detkit.structures import Batch, DenseOutput


@LOSSES.register("task_aligned")
class TaskAlignedLoss(nn.Module):
    """Weighted terms ``box``, ``cls`` and ``dfl``, normalized by the sum T of target scores of all ranks (at least 1).

    ::

        cls = sum BCE(logit, target score) / T
        box = sum (1 - CIoU) w / T,   dfl = sum (mean over sides of the focal term) w / T,   w = summed target score

    Args:
        box, cls, dfl: gains of the terms.
        topk, alpha, beta: options of the assigner.

    Raises:
        DetkitError: a value is out of range.
    """

    output = DenseOutput

    def __init__(
        self,
        box: float = 7.5,
        cls: float = 0.5,
        dfl: float = 1.5,
        topk: int = 10,
        alpha: float = 0.5,
        beta: float = 6.0,
    ) -> None:
        super().__init__()
        for key, value in {"box": box, "cls": cls, "dfl": dfl, "alpha": alpha, "beta": beta}.items():
            if value < 0:
                raise DetkitError(f"loss.{key}={value} must be a number, 0 or more")
        if topk < 1:
            raise DetkitError(f"loss.topk={topk} must be a whole number, 1 or more")
        self.gains = {"box": box, "cls": cls, "dfl": dfl}
        self.assigner: dict[str, Any] = {"topk": topk, "alpha": alpha, "beta": beta}

    @torch.autocast("cpu", enabled=False)
    @torch.autocast("cuda", enabled=False)
    def forward(self, out: DenseOutput, batch: Batch) -> dict[str, Tensor]:
        """Return the weighted terms; summed over terms and ranks they are the mean loss of the global batch."""
        cls, reg = out.cls.float(), out.reg.float()
        bins = torch.arange(reg.shape[-1] // 4, device=reg.device, dtype=torch.float32)
        boxes_ba4 = ltrb_to_xyxy(dfl_expectation(reg, bins), out.points)  # in strides
        targets = assign_task_aligned(
            cls.detach().sigmoid(),
            boxes_ba4.detach() * out.strides,
            out.points * out.strides,
            batch.boxes_bm4,
            batch.labels_bm,
            batch.valid_bm,
            **self.assigner,
        )
        total = all_reduce_sum(targets.scores_bac.sum()).clamp(min=1)
        terms = {"cls": F.binary_cross_entropy_with_logits(cls, targets.scores_bac, reduction="sum") / total}
        if batch.boxes_bm4.shape[1]:
            index = targets.box_index_ba[..., None].expand(-1, -1, 4)
            target_boxes_ba4 = batch.boxes_bm4.gather(1, index) / out.strides
            # Background points get their own box as target: finite terms of weight 0, without synchronization.
            foreground = targets.foreground_ba[..., None]
            target_boxes_ba4 = torch.where(foreground, target_boxes_ba4, boxes_ba4.detach())
            weight_ba = targets.scores_bac.sum(-1) / total
            terms["box"] = ((1 - ciou(boxes_ba4, target_boxes_ba4)) * weight_ba).sum()
            distances_ba4 = xyxy_to_ltrb(target_boxes_ba4, out.points)
            terms["dfl"] = (distribution_focal_loss(reg, distances_ba4).mean(-1) * weight_ba).sum()
        else:
            terms["box"] = terms["dfl"] = reg.sum() * 0  # keeps every parameter in the graph
        return {name: terms[name] * gain for name, gain in self.gains.items()}


def distribution_focal_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Compute the cross entropy with the two bins around each target, linearly weighted (arXiv 2006.04388, eq. 6).

    Args:
        logits: (..., 4 * K), side-major.
        target: (..., 4) distances in strides; clamped to [0, K - 1.01].

    Returns:
        (..., 4), one term per side.
    """
    log_p = logits.unflatten(-1, (4, -1)).log_softmax(-1)
    target = target.clamp(0, log_p.shape[-1] - 1 - 0.01)
    # Weights of all bins, 0 except for two: selecting these by index would sort gradients and synchronize with the GPU
    # under deterministic algorithms, and a NaN target has no index.
    bins = torch.arange(log_p.shape[-1], device=log_p.device, dtype=log_p.dtype)
    weights = (1 - (bins - target[..., None]).abs()).clamp(min=0)
    return -(log_p * weights).sum(-1)
