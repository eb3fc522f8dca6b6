"""COCO metrics of a detector on a labelled data set."""

import contextlib
import io
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from faster_coco_eval import COCO, COCOeval_faster
from torch import Tensor

from detkit.data.annotations import Annotations
from detkit.distributed.collectives import world_size
from detkit.distributed.process_group import gather_messages, gather_objects, is_main_process, rank, run_on_main
from detkit.inference.frames import Frame
from detkit.inference.model import Model
from detkit.inference.predictor import Predictor
from detkit.ops.boxes import unletterbox
from detkit.ops.curves import Curves
from detkit.ops.nms import Thresholds
from detkit.structures import Batch, ImageMeta

METRICS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR100")
STAT_INDEX = (0, 1, 2, 3, 4, 5, 8)  # of METRICS in the twelve COCO statistics
EVALUATION = Thresholds(score=0.001, iou=0.7, max_det=300, multi_label=True)
DRAWN = 16  # images of Evaluation.first_batch
ROW = ("index", "x1", "y1", "x2", "y2", "score", "label")  # columns of a prediction; index: of the image in the set


@dataclass
class Evaluation:
    """Results of an evaluation. With several ranks, only rank 0 has all predictions and issues; the others have none.

    Attributes:
        metrics: METRICS in 0..1 (-1 if the set has no such boxes), and ``per_class``: {name: {AP, AP50, boxes}}.
        predictions: COCO results: image_id, category_id, bbox [x, y, w, h] in pixels of the image, score.
        first_batch: metadata, boxes (N, 4) xyxy, scores (N,) and labels (N,) of each image, for drawing.
        issues: one message per image that could not be read; its boxes count as missed.
        curves: precision and recall; None except on rank 0.
    """

    metrics: dict[str, Any]
    predictions: list[dict[str, Any]]
    first_batch: list[tuple[ImageMeta, Tensor, Tensor, Tensor]]
    issues: list[str]
    curves: Curves | None = None


@torch.inference_mode()
def evaluate(
    model: Model,
    batches: Iterable[Batch],
    annotations: Annotations,
    thresholds: Thresholds = EVALUATION,
    advance: Callable[[], None] = lambda: None,
) -> Evaluation:
    """Run a model on every batch and compute COCO metrics of the predictions.

    Each rank predicts its part of the batches; rank 0 computes the metrics and broadcasts them.

    Args:
        model: a detector in any runtime, such as ``detector.as_model()``.
        batches: letterboxed images of the set, in any order and batch size.
        annotations: ground truth of the set.
        thresholds: of the predictions.
        advance: called after every batch, for a progress bar.
    """
    rows: list[Tensor] = [torch.zeros(0, len(ROW), dtype=torch.float64)]
    first_batch: list[tuple[ImageMeta, Tensor, Tensor, Tensor]] = []
    issues: list[str] = []
    for k, batch in enumerate(batches):
        issues += batch.issues
        # If there are no images, other ranks have some of this batch.
        images = batch.images.to(model.device, non_blocking=True)
        selected = model.detect(images, thresholds) if len(images) else []
        for meta, (xyxy, confidence, labels) in zip(batch.metas, selected, strict=True):
            xyxy = unletterbox(xyxy, meta.scale, meta.offset, meta.size).cpu()
            found = (xyxy, confidence.cpu(), labels.cpu())
            rows.append(_rows(meta.index, *found))
            if k == 0:
                first_batch.append((meta, *found))
        advance()
    return _score(annotations, torch.cat(rows), first_batch, issues)


def evaluate_views(
    predictor: Predictor, annotations: Annotations, advance: Callable[[], None] = lambda: None
) -> Evaluation:
    """Predict the images of a set as ``predict`` does, with tiles or test-time augmentation, and compute COCO metrics.

    Args:
        predictor: with its thresholds and views.
        annotations: ground truth of the set; each rank predicts its part of the images.
        advance: called after every image, for a progress bar.
    """
    rows: list[Tensor] = [torch.zeros(0, len(ROW), dtype=torch.float64)]
    first_batch: list[tuple[ImageMeta, Tensor, Tensor, Tensor]] = []
    issues: list[str] = []
    own = range(rank(), len(annotations), world_size())
    frames = (Frame(annotations.paths[index], index=index) for index in own)
    for frame, found in predictor.run(frames, lambda _, error: issues.append(str(error))):
        index = cast("int", frame.index)
        size = cast("tuple[int, int]", tuple(annotations.sizes[index].tolist()))
        advance()
        if found.size != size:
            issues.append(f"image {frame.path} has changed since its labels were read, so its boxes would be misplaced")
            continue
        rows.append(_rows(index, found.boxes, found.scores, found.labels))
        if len(first_batch) < DRAWN:
            meta = ImageMeta(index, annotations.paths[index], size)
            first_batch.append((meta, found.boxes, found.scores, found.labels))
    return _score(annotations, torch.cat(rows), first_batch, issues)


def _score(
    annotations: Annotations,
    rows: Tensor,
    first_batch: list[tuple[ImageMeta, Tensor, Tensor, Tensor]],
    issues: list[str],
) -> Evaluation:
    """Compute the metrics of all ranks' predictions (N, len(ROW)) on rank 0, and broadcast them."""
    predictions = _coco_results(annotations, gather_rows(rows))
    issues = gather_messages(issues)
    scored, curves = coco_metrics(annotations, predictions) if is_main_process() else (None, None)
    metrics = run_on_main(lambda: scored)
    return Evaluation(metrics, predictions, first_batch, issues, curves)


def coco_metrics(annotations: Annotations, predictions: list[dict[str, Any]]) -> tuple[dict[str, Any], Curves]:
    """Evaluate COCO results with faster-coco-eval; return METRICS with ``per_class``, and the curves at IoU 0.5.

    Without predictions, metrics are 0; without labelled boxes, they are -1, as COCO defines.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(annotations.ground_truth())
        # A copy, since the library adds fields to the records.
        scored = COCOeval_faster(truth, truth.loadRes([dict(p) for p in predictions]), "bbox", print_function=_silent)
        scored.run()
    metrics: dict[str, Any] = {name: float(scored.stats[i]) for name, i in zip(METRICS, STAT_INDEX, strict=True)}
    # precision: (IoU thresholds, recalls, classes, areas, max_dets); -1 for a class without boxes
    precision = np.asarray(scored.eval["precision"])[:, :, :, 0, -1]
    counts = np.bincount(annotations.labels[~annotations.crowd], minlength=len(annotations.class_names))
    metrics["per_class"] = {
        name: {"AP": _mean(precision[:, :, c]), "AP50": _mean(precision[0, :, c]), "boxes": int(counts[c])}
        for c, name in enumerate(annotations.class_names)
    }
    return metrics, Curves(precision[0], np.asarray(scored.eval["scores"])[0, :, :, 0, -1], counts)


def _silent(*_: Any) -> None:
    """Print nothing."""


def _mean(values: np.ndarray) -> float:
    valid = values[values > -1]
    return float(valid.mean()) if valid.size else -1.0


def _rows(index: int, xyxy: Tensor, scores: Tensor, labels: Tensor) -> Tensor:
    """Return an image's N predictions as (N, len(ROW)) float64, which represents all of them exactly."""
    columns = (torch.full((len(xyxy), 1), index), xyxy, scores[:, None], labels[:, None])
    return torch.cat([column.double() for column in columns], 1)


def gather_rows(rows: Tensor) -> Tensor:
    """Gather (N, len(ROW)) predictions on rank 0, in the order of the set's images; other ranks get no rows."""
    if world_size() == 1:
        return rows
    gathered = gather_objects(rows)
    rows = torch.cat(gathered) if gathered else rows[:0]
    return rows[rows[:, 0].argsort(stable=True)]


def _coco_results(annotations: Annotations, rows: Tensor) -> list[dict[str, Any]]:
    xyxy = rows[:, 1:5].float()
    xywh = torch.cat((xyxy[:, :2], xyxy[:, 2:] - xyxy[:, :2]), 1)
    indices, labels = rows[:, [0, 6]].long().T.tolist()
    columns = zip(indices, labels, xywh.tolist(), rows[:, 5].tolist(), strict=True)
    return [
        {
            "image_id": int(annotations.image_ids[index]),
            "category_id": annotations.category_ids[label],
            "bbox": box,
            "score": score,
        }
        for index, label, box, score in columns
    ]
