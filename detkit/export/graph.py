"""The network that is exported: a detector, decoding and, inside the file, non-maximum suppression."""

import torch
from torch import Tensor, nn

from detkit.models.detector import Detector
from detkit.ops.nms import Thresholds

FLOAT32_MAX = torch.finfo(torch.float32).max


class ExportGraph(nn.Module):
    """Maps images to boxes and scores, and with thresholds to detections.

    Args:
        detector: fused; computed in the dtype of its weights and decoded in float32.
        thresholds: of non-maximum suppression inside the file; None leaves it out.
    """

    def __init__(self, detector: Detector, thresholds: Thresholds | None = None) -> None:
        super().__init__()
        self.detector = detector
        self.thresholds = thresholds
        self.dtype = next(detector.parameters()).dtype

    def forward(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W), float32 RGB in 0..1, to the outputs of the file.

        Returns:
            boxes (B, A, 4) xyxy in input pixels and scores (B, A, C) in 0..1, both float32; with thresholds also
            detections (M, 7), see ``select_detections``.
        """
        boxes, scores = self.detector.decode(self.detector(images.to(self.dtype)))
        if self.thresholds is None:
            return boxes, scores
        return boxes, scores, select_detections(boxes, scores, self.thresholds)


def select_detections(boxes_ba4: Tensor, scores_bac: Tensor, thresholds: Thresholds) -> Tensor:
    """Return what ``ops.nms.non_max_suppression`` selects, as one tensor, in operators that every runtime has.

    A box is reported for its best class only: other classes get the score 0 before suppression, which is by class.

    Args:
        boxes_ba4: (B, A, 4) xyxy.
        scores_bac: (B, A, C) in 0..1.
        thresholds: with one ``score`` for all classes.

    Returns:
        (M, 7) float32: image, x1, y1, x2, y2, score, label; by image, then by descending score.
    """
    assert isinstance(thresholds.score, float)
    classes = torch.arange(scores_bac.shape[-1], device=scores_bac.device)
    finite_ba1 = (boxes_ba4.abs() <= FLOAT32_MAX).all(-1, keepdim=True)  # False for NaN, too
    above_bac = (scores_bac > thresholds.score) & finite_ba1
    best_bac = torch.where(above_bac, scores_bac, 0.0)
    best_bac = torch.where(classes == best_bac.argmax(-1, keepdim=True), best_bac, 0.0)
    boxes_ba4 = torch.where(finite_ba1, boxes_ba4, 0.0)
    picked_k3 = torch.ops.detkit.non_max_suppression(
        boxes_ba4, best_bac.transpose(1, 2), thresholds.max_det, thresholds.iou, thresholds.score
    )
    image, label, point = picked_k3.unbind(1)
    score = best_bac[image, point, label]
    # By descending score, then by image: the second key is unique, so that the sort need not be stable.
    order = torch.sort(score, descending=True).indices
    position = torch.arange(order.shape[0], device=order.device)
    order = order[torch.sort(image[order] * order.shape[0] + position).indices]
    image, label, point, score = (column[order] for column in (image, label, point, score))
    images = torch.arange(boxes_ba4.shape[0], device=image.device)
    first_b = (image[:, None] < images).sum(0)  # row at which each image begins
    keep = torch.nonzero(position - first_b[image] < thresholds.max_det)[:, 0]
    image, label, point, score = (column[keep] for column in (image, label, point, score))
    return torch.cat((image.float()[:, None], boxes_ba4[image, point], score[:, None], label.float()[:, None]), 1)


@torch.library.custom_op("detkit::non_max_suppression", mutates_args=())
def _non_max_suppression(boxes_ba4: Tensor, scores_bca: Tensor, max_det: int, iou: float, score: float) -> Tensor:
    """Do what ONNX's NonMaxSuppression does: return (K, 3) int64 image, class, point, by image, class and score."""
    from torchvision.ops import nms  # imported lazily, as it takes a second

    rows = [torch.zeros(0, 3, dtype=torch.int64, device=boxes_ba4.device)]
    for image, (boxes_a4, scores_ca) in enumerate(zip(boxes_ba4, scores_bca, strict=True)):
        for label, scores_a in enumerate(scores_ca):
            (point,) = torch.nonzero(scores_a > score, as_tuple=True)
            point = point[nms(boxes_a4[point], scores_a[point], iou)[:max_det]]
            rows.append(torch.stack((torch.full_like(point, image), torch.full_like(point, label), point), 1))
    return torch.cat(rows)


@_non_max_suppression.register_fake
def _(boxes_ba4: Tensor, _scores_bca: Tensor, _max_det: int, _iou: float, _score: float) -> Tensor:
    return boxes_ba4.new_empty((torch.library.get_ctx().new_dynamic_size(), 3), dtype=torch.int64)
