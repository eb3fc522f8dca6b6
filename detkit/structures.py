"""Data structures shared by all packages, with shapes and units.

B: batch size; M: ground-truth boxes per image (padded); A: points of all levels; C: classes; N: boxes in one image.
Boxes are xyxy in pixels of their image unless stated otherwise.
"""

import importlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from detkit.errors import DetkitError, printable, shorten


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


@dataclass(repr=False)
class Detections:
    """Objects detected in one image.

    ``found[0]``, ``found[2:5]``, ``found[mask]`` and ``found[indices]`` are Detections of these objects.

    Attributes:
        boxes: (N, 4) float32, xyxy in pixels of the source image.
        scores: (N,) float32 in 0..1, descending.
        labels: (N,) int64 class indices.
        class_names: name of each class.
        size: (height, width) of the source image.
        path: file of the source image or video; None for an array.
        frame: position in its video or stream, from 0; None for an image.
        tracks: (N,) int64 ids of tracked objects, -1 for those without a track; None without tracking.
    """

    boxes: Tensor
    scores: Tensor
    labels: Tensor
    class_names: tuple[str, ...]
    size: tuple[int, int]
    path: Path | None = None
    frame: int | None = None
    tracks: Tensor | None = None

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        name = "" if self.path is None else f" in {printable(self.path.name)}"
        frame = "" if self.frame is None else f" frame {self.frame}"
        objects = f"{len(self)} object{'' if len(self) == 1 else 's'}"
        return f"{objects}{name}{frame} ({self.size[0]}x{self.size[1]}): {self.counts()}"

    def __getitem__(self, index: Any) -> "Detections":
        """Return the objects of an index, a slice, a boolean mask (N,) or indices (K,)."""
        if isinstance(index, (int, np.integer)):
            if not -len(self) <= index < len(self):
                raise IndexError(f"object {index} of {len(self)}")
            index = [int(index)]
        if not isinstance(index, slice):
            index = torch.as_tensor(index)
            index = index if index.dtype == torch.bool else index.long()
        tracks = None if self.tracks is None else self.tracks[index]
        boxes, scores, labels = self.boxes[index], self.scores[index], self.labels[index]
        return replace(self, boxes=boxes, scores=scores, labels=labels, tracks=tracks)

    @property
    def names(self) -> list[str]:
        """The class name of each object."""
        return [self.class_names[label] for label in self.labels.tolist()]

    def counts(self) -> str:
        """Return the number of objects per class, such as ``2 circle, 1 star``, or ``nothing``."""
        counts = Counter(self.labels.tolist())
        return ", ".join(f"{counts[k]} {shorten(self.class_names[k], 40)}" for k in sorted(counts)) or "nothing"

    def filter(self, score: float = 0.0, classes: Sequence[str | int] | None = None) -> "Detections":
        """Return the objects with at least a score, of some classes, given by name or index; None for all classes.

        Raises:
            DetkitError: there is no such class.
        """
        keep = self.scores >= score
        if classes is not None:
            wanted = [find_label(name, self.class_names, "classes") for name in classes]
            keep &= torch.isin(self.labels, self.labels.new_tensor(wanted))
        return self[keep]

    def to_dict(self) -> dict[str, Any]:
        """Return plain data as in ``predictions.json``.

        Its keys are ``file``, ``height``, ``width``, for a video ``frame``, and ``detections``, a list of ``box``
        (xyxy in pixels), ``score``, ``label``, ``name`` and, with tracking, ``track`` (None without a track).
        """
        columns = zip(self.boxes.tolist(), self.scores.tolist(), self.labels.tolist(), self.names, strict=True)
        found: list[dict[str, Any]] = [
            {"box": box, "score": score, "label": label, "name": name} for box, score, label, name in columns
        ]
        if self.tracks is not None:
            for record, track in zip(found, self.tracks.tolist(), strict=True):
                record["track"] = track if track >= 0 else None
        file = None if self.path is None else str(self.path)
        frame = {} if self.frame is None else {"frame": self.frame}
        return {"file": file, "height": self.size[0], "width": self.size[1], **frame, "detections": found}

    def to_coco(self, image_id: int, category_ids: Sequence[int] | None = None) -> list[dict[str, Any]]:
        """Return COCO results: ``image_id``, ``category_id``, ``bbox`` [x, y, w, h] in pixels, and ``score``.

        Args:
            image_id: of the image in the data set.
            category_ids: of each class; by default from 1 in the order of the classes.
        """
        xywh = torch.cat((self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]), 1).tolist()
        ids = range(1, len(self.class_names) + 1) if category_ids is None else category_ids
        columns = zip(self.labels.tolist(), xywh, self.scores.tolist(), strict=True)
        return [
            {"image_id": image_id, "category_id": int(ids[label]), "bbox": box, "score": score}
            for label, box, score in columns
        ]

    def to_supervision(self) -> Any:
        """Return ``supervision.Detections``, with ``tracker_id`` if tracked and ``data["class_name"]``.

        Raises:
            DetkitError: supervision is not installed.
        """
        supervision = _import("supervision", "to_supervision")
        return supervision.Detections(
            xyxy=self.boxes.numpy(force=True).reshape(-1, 4),
            confidence=self.scores.numpy(force=True),
            class_id=self.labels.numpy(force=True),
            tracker_id=None if self.tracks is None else self.tracks.numpy(force=True),
            data={"class_name": np.array(self.names, dtype=str)},
        )

    def to_pandas(self) -> Any:
        """Return a ``pandas.DataFrame`` of x1, y1, x2, y2 (pixels), score, label, name and, with tracking, track.

        Raises:
            DetkitError: pandas is not installed.
        """
        pandas = _import("pandas", "to_pandas")
        columns: dict[str, Any] = dict(
            zip(("x1", "y1", "x2", "y2"), self.boxes.numpy(force=True).reshape(-1, 4).T, strict=True)
        )
        columns |= {"score": self.scores.numpy(force=True), "label": self.labels.numpy(force=True), "name": self.names}
        return pandas.DataFrame(columns if self.tracks is None else columns | {"track": self.tracks.numpy(force=True)})


def find_label(name: str | int, class_names: Sequence[str], key: str) -> int:
    """Return the index of a class, given its name or index.

    Raises:
        DetkitError: there is no such class; the message begins with ``key``.
    """
    if str(name) in class_names:
        return class_names.index(str(name))
    if isinstance(name, int) and not isinstance(name, bool) and 0 <= name < len(class_names):
        return name
    known = shorten(", ".join(class_names))
    raise DetkitError(f"{key}: the model has no class '{shorten(name)}', its classes are {known}")


def _import(package: str, method: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise DetkitError(f"{method} needs {package}: pip install {package} ({error})") from None


for _output in (DenseOutput, AnchorOutput):  # for torch.export and torch.utils._pytree
    torch.export.register_dataclass(_output, serialized_type_name=f"detkit.{_output.__name__}")
