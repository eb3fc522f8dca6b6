"""Data structures shared by all packages, with shapes and units.

B: batch size; M: ground-truth boxes per image (padded); A: points of all levels; C: classes; N: boxes in one image.
Boxes are xyxy in pixels of their image unless stated otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class SampleKey(NamedTuple):
    """Key of one draw of a sample; together with the seed of the run it determines the sample.

    A plain tuple ``(epoch, index)`` is accepted as well.

    Attributes:
        epoch: from 0.
        index: index of the item.
        repeat: how often the item was drawn before in this epoch; every draw is augmented differently.
        mosaic_pool: items from which a mosaic draws its other images; None for the whole set.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # shadows tuple.index, which is not used
    repeat: int = 0
    mosaic_pool: list[int] | None = None


@dataclass
class ImageMeta:
    """Origin of a sample, and the mapping back to the pixels of its file.

    Attributes:
        index: position of the image in its data set.
        path: image file.
        size: (height, width) of the image in the file.
        scale, offset: (x, y) each, with ``x_sample = x_file * scale + offset``; set by letterboxing and tiling.
    """

    index: int
    path: Path
    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass
class Sample:
    """One image and its boxes, as the transforms take and return them.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes: (N, 4) float32, xyxy in pixels of ``image``.
        labels: (N,) int64, contiguous class indices.
        meta: origin of the image.
    """

    image: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    meta: ImageMeta


@dataclass
class Batch:
    """Samples stacked for the network.

    Attributes:
        images: (B, 3, H, W) uint8, RGB, channels-last in memory.
        boxes_bm4: (B, M, 4) float32, xyxy pixels, zero where padded.
        labels_bm: (B, M) int64, zero where padded.
        valid_bm: (B, M) bool, False where padded.
        metas: origin of each image.
        issues: one message per image that was skipped.
        position: position of the batch in its epoch, from 1; 0 if it does not belong to an epoch.
    """

    images: Tensor
    boxes_bm4: Tensor
    labels_bm: Tensor
    valid_bm: Tensor
    metas: list[ImageMeta] = field(default_factory=list)
    issues: list[str] = field(default_factory=list)
    position: int = 0

    @classmethod
    def empty(cls) -> "Batch":
        """Return a batch without images, for a rank that has none left while others do."""
        images, boxes = torch.zeros(0, 3, 0, 0, dtype=torch.uint8), torch.zeros(0, 0, 4)
        return cls(images, boxes, torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on ``device`` (asynchronously from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in pinned memory; called by the data loader."""
        return self._map(Tensor.pin_memory)

    def _map(self, move: Callable[[Tensor], Tensor]) -> "Batch":
        images, boxes, labels, valid = map(move, (self.images, self.boxes_bm4, self.labels_bm, self.valid_bm))
        return Batch(images, boxes, labels, valid, self.metas, self.issues, self.position)


@dataclass
class DenseOutput:
    """Raw predictions at every grid point of every level, before decoding and non-maximum suppression.

    Attributes:
        cls: (B, A, C) class logits.
        reg: (B, A, 4 * reg_max) box logits, side-major: left, top, right, bottom.
        points: (A, 2) point centres (x, y) in units of their stride.
        strides: (A, 1) pixels per unit at each point.
    """

    cls: Tensor
    reg: Tensor
    points: Tensor
    strides: Tensor

    def empty(self) -> Self:
        """Return the output for zero images, still connected to the autograd graph."""
        return replace(self, cls=self.cls[:0], reg=self.reg[:0])


@dataclass
class AnchorOutput(DenseOutput):
    """Raw predictions of an anchor-based head: each point appears once per anchor of its level.

    ``reg`` is (B, A, 4): logits of the box's centre x, y and of its width and height (ops/anchors.py).

    Attributes:
        objectness: (B, A, 1) logits.
        anchors: (A, 2) width and height in pixels.
        levels: (rows, columns, anchors per cell) of each level; A is ordered by level, row, column, anchor.
    """

    objectness: Tensor
    anchors: Tensor
    levels: tuple[tuple[int, int, int], ...]

    def empty(self) -> Self:
        """Return the output for zero images, still connected to the autograd graph."""
        return replace(super().empty(), objectness=self.objectness[:0])


@dataclass
class Detections:
    """Objects detected in one image.

    Attributes:
        boxes: (N, 4) float32, xyxy in pixels of the source image.
        scores: (N,) float32 in 0..1, descending.
        labels: (N,) int64 class indices.
        class_names: name of each class.
        size: (height, width) of the source image.
        path: file of the source image; None for an array.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    size: tuple[int, int]
    path: Path | None = None

    def __len__(self) -> int:
        return len(self.scores)


for _output in (DenseOutput, AnchorOutput):  # for torch.export and torch.utils._pytree
    torch.export.register_dataclass(_output, serialized_type_name=f"detkit.{_output.__name__}")
