"""COCO metrics of a detector on a labelled set."""

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from detkit.data.annotations import Annotations
from detkit.models.detector import Detector, to_original
from detkit.ops.nms import select_boxes
from detkit.structures import Batch, Origin

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
STAT_INDEX = (0, 1, 2, 3, 4, 5, 8)  # of those, in COCO's twelve


@dataclass
class Evaluation:
    """What an evaluation found.

    Attributes:
        metrics: METRICS in 0..1 (-1 where the set has no such boxes), and ``per_class``: {name: {AP, AP50, boxes}}.
        predictions: COCO results: image_id, category_id, bbox [x, y, w, h] in pixels of the image, score.
        pictures: the first batch's origins with their boxes (N, 4), scores (N,) and labels (N,), for drawing.
        problems: a sentence for each image that could not be read; its boxes count as missed.
    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    pictures: list[tuple[Origin, Tensor, Tensor, Tensor]]
    problems: list[str]


@torch.inference_mode()
def evaluate(
    detector: Detector,
    batches: Iterable[Batch],
    annotations: Annotations,
    *,
    score: float = 0.001,
    iou: float = 0.7,
    max_det: int = 300,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Predict every batch in float32 and score the predictions with COCO's metrics.

    Args:
        batches: letterboxed images of the set, in any order and batch size.
        score, iou, max_det: of the non-maximum suppression.
        advance: called after every batch, for a progress bar.
    """
    device = next(detector.parameters()).device
    detector.eval()
    predictions: list[dict[str, Any]] = []
    pictures: list[tuple[Origin, Tensor, Tensor, Tensor]] = []
    problems: list[str] = []
    for k, batch in enumerate(batches):
        problems += batch.problems
        batch = batch.to(device)
        boxes, scores = detector.decode(detector(batch.images.float() / 255))
        selected = select_boxes(boxes, scores, score=score, iou=iou, max_det=max_det)
        for origin, (xyxy, confidence, labels) in zip(batch.origins, selected, strict=True):
            xyxy = to_original(xyxy, origin.scale, origin.offset, origin.size).cpu()
            found = (xyxy, confidence.cpu(), labels.cpu())
            predictions.extend(_coco_results(annotations, origin, *found))
            if k == 0:
                pictures.append((origin, *found))
        advance()
    return Evaluation(coco_metrics(annotations, predictions), predictions, pictures, problems)


def coco_metrics(annotations: Annotations, predictions: list[dict[str, Any]]) -> dict[str, Any]:
    """Score COCO results against a labelled set with faster-coco-eval: METRICS and ``per_class``.

    No predictions score 0; a set without boxes scores -1, as COCO defines.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations.ground_truth())
        # A copy: the library adds fields to the records it is given.
        scored = COCOeval_faster(truth, truth.loadRes([dict(p) for p in predictions]), "bbox", print_function=_silent)
        scored.run()
    metrics: dict[str, Any] = {name: float(scored.stats[i]) for name, i in zip(METRICS, STAT_INDEX, strict=True)}
    # precision: (IoU thresholds, recalls, classes, areas, limits); -1 where a class has no boxes
    precision = np.asarray(scored.eval["precision"])[:, :, :, 0, -1]
    counts = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.class_names))
    metrics["per_class"] = {
        name: {"AP": _mean(precision[:, :, c]), "AP50": _mean(precision[0, :, c]), "boxes": int(counts[c])}
        for c, name in enumerate(annotations.class_names)
    }
    return metrics


def _silent(*_: Any) -> None:
    """Print nothing."""


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _coco_results(annotations: Annotations, origin: Origin, xyxy: Tensor, scores: Tensor, labels: Tensor) -> list[dict]:
    image_id = int(annotations.image_ids[origin.index])
    xywh = torch.cat((xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]), 1)
    columns = zip(xywh.tolist(), scores.tolist(), labels.tolist(), strict=True)
    return [
        {"image_id": image_id, "category_id": annotations.category_ids[label], "bbox": box, "score": score}
        for box, score, label in columns
    ]
