"""The data that travels between the layers, with shapes and units.

Legend: B images of a batch, M ground-truth boxes of an image (padded), A points of all levels together,
C classes, N boxes of one image. Boxes are xyxy in pixels of the image they belong to unless said otherwise.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import Tensor


class SampleKey(NamedTuple):
    """Identifies one draw of a sample: with the seed of the run, all that the sample depends on.

    A plain tuple ``(epoch, index)`` will do.

    Attributes:
        epoch: from 0.
        index: of the item.
        repeat: how often the epoch has drawn the item before, so that each time it looks different.
        mosaic_pool: the items that a mosaic takes its others from; None: the whole set.
    """

    epoch: int
    index: int  # type: ignore[assignment]  # hides tuple.index, which nobody asks a key for
    repeat: int = 0
    mosaic_pool: list[int] | None = None


@dataclass
class ImageMeta:
    """Where a sample comes from, and the way back to its pixels.

    Attributes:
        index: position of the image in its data set.
        path: its file.
        size: (height, width) of the image in the file.
        scale, offset: (x, y) each, such that ``x_sample = x_file * scale + offset``; kept by letterboxing and by tiles.
    """

    index: int
    path: Path
    size: tuple[int, int]
    scale: tuple[float, float] = (1.0, 1.0)
    offset: tuple[float, float] = (0.0, 0.0)


@dataclass
class Sample:
    """One image and its boxes on their way through the transforms.

    Attributes:
        image: (H, W, 3) uint8, RGB.
        boxes: (N, 4) float32, xyxy in pixels of ``image``.
        labels: (N,) int64, contiguous class indices.
        origin: where the image comes from.
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
        boxes_bm4: (B, M, 4) float32, xyxy pixels, rows beyond an image's boxes are zero.
        labels_bm: (B, M) int64, zero where padded.
        valid_bm: (B, M) bool, False where padded.
        metas: where each image comes from.
        issues: a sentence for each image that was skipped on the way here.
        position: of the batch in its epoch, from 1; 0: it is of none.
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
        """Return a batch of no images: what a rank gets where the others have some."""
        images, boxes = torch.zeros(0, 3, 0, 0, dtype=torch.uint8), torch.zeros(0, 0, 4)
        return cls(images, boxes, torch.zeros(0, 0, dtype=torch.int64), torch.zeros(0, 0, dtype=torch.bool))

    def to(self, device: torch.device) -> "Batch":
        """Return the batch with its tensors on ``device`` (without waiting, from pinned memory)."""
        return self._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """Return the batch in page-locked memory; the data loader calls this by name."""
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

    def of_no_image(self) -> Self:
        """Return the predictions for the first 0 images of the batch, still a function of the weights."""
        return replace(self, cls=self.cls[:0], reg=self.reg[:0])


@dataclass
class AnchorOutput(DenseOutput):
    """The raw predictions of an anchor-based head: a point appears once for each anchor of its level.

    ``reg`` is (B, A, 4): logits of the box's centre x, y and of its width and height (ops/anchors.py).

    Attributes:
        objectness: (B, A, 1) logits.
        anchors: (A, 2) width and height in pixels.
        levels: rows, columns and anchors a cell of each level; A runs over levels, rows, columns, anchors.
    """

    objectness: Tensor
    anchors: Tensor
    levels: tuple[tuple[int, int, int], ...]

    def of_no_image(self) -> Self:
        """Return the predictions for the first 0 images of the batch, still a function of the weights."""
        return replace(super().of_no_image(), objectness=self.objectness[:0])


@dataclass
class Detections:
    """The objects found in one image.

    Attributes:
        boxes: (N, 4) float32, xyxy in pixels of the source image.
        scores: (N,) float32 in 0..1, descending.
        labels: (N,) int64 class indices.
        class_names: name of each class index.
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


for _output in (DenseOutput, AnchorOutput):  # so that torch.export takes a detector, and pytree functions what it gives
    torch.export.register_dataclass(_output, serialized_type_name=f"detkit.{_output.__name__}")
