"""An exported file as a Model that prediction and evaluation run."""

from typing import Protocol

import torch
from torch import Tensor

from detkit.errors import DetkitError
from detkit.export.metadata import Metadata
from detkit.ops.nms import Selection, Thresholds, non_max_suppression


class Runner(Protocol):
    """Runs a file in its runtime.

    Attributes:
        metadata: of the file.
    """

    metadata: Metadata

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W) float32 RGB in 0..1 to (boxes, scores), or with NMS inside to (detections,)."""


class ExportedModel:
    """A file in its runtime, with the preprocessing and postprocessing of a PyTorch detector.

    Args:
        run: the file.
        name: what messages call it.
        raw: whether ``run`` returns boxes and scores though the file has NMS inside.
    """

    device = torch.device("cpu")  # runtimes copy from the CPU's memory

    def __init__(self, run: Runner, name: str, raw: bool = False) -> None:
        self.run = run
        self.name = name
        self.metadata = run.metadata
        self.cfg = run.metadata.cfg
        self.class_names = run.metadata.class_names
        self.image_size = run.metadata.image_size
        self.max_stride = run.metadata.max_stride
        self.fixed_shape = run.metadata.fixed_shape
        self.has_nms = run.metadata.nms and not raw

    def network(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, W) uint8 to boxes (B, A, 4) xyxy in input pixels and scores (B, A, C) in 0..1."""
        found = [self.run(part) for part in self._parts(images)]
        boxes, scores = (torch.cat(outputs) if len(outputs) > 1 else outputs[0] for outputs in zip(*found, strict=True))
        if boxes.shape != (*scores.shape[:2], 4) or scores.shape[2:] != (len(self.class_names),):
            raise DetkitError(f"{self.name} is damaged: its outputs are {list(boxes.shape)} and {list(scores.shape)}")
        return boxes, scores

    def detect(self, images: Tensor, thresholds: Thresholds) -> list[Selection]:
        """Return the detections in each of the letterboxed images (B, 3, H, W) uint8 RGB, in pixels of the input.

        Raises:
            DetkitError: the file has other thresholds inside.
        """
        if not self.has_nms:
            return non_max_suppression(*self.network(images), thresholds)
        check_thresholds(self.metadata, thresholds, self.name)
        found: list[Selection] = []
        for part in self._parts(images):
            (rows,) = self.run(part)
            labels = rows[:, 6] if rows.ndim == 2 and rows.shape[1] == 7 else torch.tensor([-1.0])
            if not ((labels >= 0) & (labels < len(self.class_names))).all():
                raise DetkitError(f"{self.name} is damaged: its detections are not (M, 7), or of other classes")
            found += [_select(rows[rows[:, 0] == k], thresholds) for k in range(len(part))]
        return found

    def _parts(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the images as float32, in batches that the file takes."""
        images = images.float() / 255
        return images.split(self.fixed_shape[0] or max(len(images), 1))


def _select(rows: Tensor, thresholds: Thresholds) -> Selection:
    """Return the rows (N, 7) of one image above the score of their class."""
    labels = rows[:, 6].long()
    lowest = torch.tensor(thresholds.score, dtype=torch.float32)
    keep = rows[:, 5] > (lowest if lowest.ndim == 0 else lowest[labels])
    if thresholds.classes is not None:
        keep &= torch.isin(labels, torch.tensor(thresholds.classes, dtype=torch.int64))
    return rows[keep, 1:5], rows[keep, 5], labels[keep]


def check_thresholds(metadata: Metadata, thresholds: Thresholds, name: str) -> None:
    """Check that a file with NMS inside gives what the thresholds ask for; a higher score is possible.

    Raises:
        DetkitError: it does not.
    """
    lowest = min(thresholds.score) if isinstance(thresholds.score, tuple) else thresholds.score
    for key, asked, inside in (
        ("score", min(lowest, metadata.score), metadata.score),
        ("iou", thresholds.iou, metadata.iou),
        ("max_det", thresholds.max_det, metadata.max_det),
        ("multi_label", thresholds.multi_label, False),
        ("class_agnostic", thresholds.class_agnostic, False),
    ):
        if asked != inside:
            raise DetkitError(
                f"{key}={str(asked).lower()}: {name} was exported with {key}={str(inside).lower()} and non-maximum "
                "suppression inside; use that, or export it with nms=false"
            )
