"""Comparing an exported file with PyTorch on real images."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detkit.export.metadata import Metadata
from detkit.export.model import ExportedModel
from detkit.inference.model import TorchModel
from detkit.inference.views import ViewSettings, make_views
from detkit.ops.nms import Selection, Thresholds, non_max_suppression

BOX_TOLERANCE, SCORE_TOLERANCE = 0.5, 1e-3  # pixels, and of a score, in float32
IOU_TOLERANCE = 1e-3  # of NMS: which of two boxes at the threshold is kept depends on rounding
ROW_TOLERANCE = 1e-2  # pixels: NMS copies boxes
CONFIDENT = 0.25  # half and int8 are compared where a score of PyTorch exceeds this

Letterboxed = tuple[np.ndarray, np.ndarray | None]  # (S, S, 3) uint8, and (H, W, 3) where that is another size


@dataclass(frozen=True)
class Deviation:
    """Largest differences of a file from PyTorch.

    Attributes:
        boxes: in pixels of the input.
        scores: of any class.
        compared: number of predictions.
        detections: detections of NMS inside the file that PyTorch's NMS, given the file's boxes and scores, lacks, or
            the reverse.
    """

    boxes: float = 0.0
    scores: float = 0.0
    compared: int = 0
    detections: int = 0

    def is_equal(self) -> bool:
        """Whether the differences are within the tolerances of float32; NaN is not."""
        return self.boxes <= BOX_TOLERANCE and self.scores <= SCORE_TOLERANCE and self.detections == 0

    def is_finite(self) -> bool:
        """Whether the outputs are finite and of the right shape, and NMS inside selects from them as PyTorch does."""
        return math.isfinite(self.boxes) and math.isfinite(self.scores) and self.detections == 0

    def merged(self, other: "Deviation") -> "Deviation":
        """Return the larger differences of the two, and the sum of the counts."""
        return Deviation(
            _largest(self.boxes, other.boxes),
            _largest(self.scores, other.scores),
            self.compared + other.compared,
            self.detections + other.detections,
        )

    def __str__(self) -> str:
        text = f"boxes differ by {self.boxes:.3g} px at most, scores by {self.scores:.2g}"
        return f"{text}, and {self.detections} detections" if self.detections else text


def verify(model: ExportedModel, raw: ExportedModel, reference: TorchModel, images: Sequence[Letterboxed]) -> Deviation:
    """Run a file and PyTorch on the same inputs and compare all boxes and scores, and NMS inside the file.

    Args:
        model: the file.
        raw: the same file with its boxes and scores as outputs.
        reference: in float32.
        images: letterboxed by ``letterbox_both``.
    """
    worst = Deviation()
    for inputs in inputs_of(images, model.metadata):
        boxes, scores = raw.network(inputs)
        expected_boxes, expected_scores = reference.network(inputs)
        if model.metadata.precision == "float32":
            confident = torch.ones(expected_scores.shape[:2], dtype=torch.bool)
        else:
            confident = expected_scores.amax(-1) > CONFIDENT
        found = Deviation(
            _difference(boxes[confident], expected_boxes[confident]),
            _difference(scores[confident], expected_scores[confident]),
            int(confident.sum()),
        )
        if model.has_nms:
            thresholds = model.metadata.thresholds
            rows = model.detect(inputs, thresholds)
            found = replace(found, detections=count_unequal(rows, boxes, scores, thresholds))
        worst = worst.merged(found)
    return worst


def letterbox_both(image: np.ndarray, metadata: Metadata) -> Letterboxed:
    """Letterbox an (H, W, 3) uint8 RGB image to the square, and where sides may vary to the smallest frame."""
    size = metadata.fixed_shape[1] or metadata.image_size
    square = ViewSettings(size, metadata.max_stride)
    (whole,) = make_views(image, square)
    if metadata.fixed_shape[1:] != (None, None):
        return whole.pixels, None
    (frame,) = make_views(image, replace(square, rect=True))
    return whole.pixels, None if frame.pixels.shape == whole.pixels.shape else frame.pixels


def inputs_of(images: Sequence[Letterboxed], metadata: Metadata) -> Iterator[Tensor]:
    """Yield inputs (B, 3, H, W) uint8 as prediction makes them: squares, two at a time if possible, and frames."""
    step = 2 if metadata.fixed_shape[0] is None else 1
    for start in range(0, len(images), step):
        yield _as_input([square for square, _ in images[start : start + step]])
    for _, frame in images:
        if frame is not None:
            yield _as_input([frame])


def count_unequal(rows: Sequence[Selection], boxes: Tensor, scores: Tensor, thresholds: Thresholds) -> int:
    """Count detections that are only among ``rows`` or only among what PyTorch's NMS selects.

    Those that appear or vanish with a threshold of the IoU that is IOU_TOLERANCE lower or higher do not count.
    """
    variants = [
        non_max_suppression(boxes, scores, replace(thresholds, iou=min(max(thresholds.iou + delta, 0.0), 1.0)))
        for delta in (-IOU_TOLERANCE, 0.0, IOU_TOLERANCE)
    ]
    count = 0
    for row, *expected in zip(rows, *variants, strict=True):
        allowed = torch.stack([_present(row, variant) for variant in expected]).any(0)
        required = torch.stack([_present(expected[1], variant) for variant in expected]).all(0)
        count += int((~allowed).sum()) + int((required & ~_present(expected[1], row)).sum())
        count += int((row[1][1:] > row[1][:-1]).sum())  # not by descending score
    return count


def _present(these: Selection, among: Selection) -> Tensor:
    """Return for each of N detections whether it is among others, (N,) bool."""
    if not len(among[0]):
        return torch.zeros(len(these[0]), dtype=torch.bool)
    close = (these[0][:, None] - among[0]).abs().amax(-1) < ROW_TOLERANCE
    close &= (these[1][:, None] - among[1]).abs() < SCORE_TOLERANCE
    return (close & (these[2][:, None] == among[2])).any(1)


def _as_input(pixels: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest absolute difference; NaN if one is not a number, infinity if the shapes differ."""
    if found.shape != expected.shape:
        return math.inf
    return float((found - expected).abs().max()) if expected.numel() else 0.0


def _largest(a: float, b: float) -> float:
    return math.nan if math.isnan(a) or math.isnan(b) else max(a, b)
