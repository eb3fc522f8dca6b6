"""The annotations of a data set, independent of the file format."""

import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.issues import IssueLog


class PathTable(Sequence[Path]):
    """N file names in two flat arrays, as a list of a million Path objects would be copied into every worker.

    Args:
        text: (L,) uint8, the concatenated names in the file system encoding.
        ends: (N,) int64, the end of each name in ``text``.
    """

    def __init__(self, text: np.ndarray, ends: np.ndarray) -> None:
        self.text = text
        self.ends = ends

    @classmethod
    def from_paths(cls, paths: Iterable[str | Path]) -> "PathTable":
        """Build a table from an iterable of paths."""
        builder = PathBuilder()
        for path in paths:
            builder.append(os.fspath(path))
        return cls(np.frombuffer(builder.text, np.uint8), np.asarray(builder.ends, np.int64))

    def __len__(self) -> int:
        return len(self.ends)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, PathTable):
            return NotImplemented
        return np.array_equal(self.ends, other.ends) and np.array_equal(self.text, other.text)

    __hash__ = None  # type: ignore[assignment]  # too large to hash

    def __getitem__(self, index: int) -> Path:  # type: ignore[override]  # no slices
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self.ends[index - 1] if index else 0
        return Path(os.fsdecode(self.text[start : self.ends[index]].tobytes()))


class PathBuilder(Sequence[str]):
    """A growing list of file names, stored like a ``PathTable``."""

    def __init__(self) -> None:
        self.text = bytearray()
        self.ends = array("q")

    def append(self, path: str) -> None:
        """Append a file name; characters that no file name can contain are escaped."""
        try:
            self.text += os.fsencode(path)
        except UnicodeEncodeError:
            self.text += path.encode(errors="backslashreplace")
        self.ends.append(len(self.text))

    def __len__(self) -> int:
        return len(self.ends)

    def __getitem__(self, index: int) -> str:  # type: ignore[override]  # no slices
        start = self.ends[index - 1] if index else 0
        return os.fsdecode(bytes(self.text[start : self.ends[index]]))

    def table(self, keep: np.ndarray) -> PathTable:
        """Return the names selected by the mask ``keep``, (N,) bool."""
        if keep.all():
            return PathTable(np.frombuffer(self.text, np.uint8), np.asarray(self.ends, np.int64))
        return PathTable.from_paths(self[k] for k in np.flatnonzero(keep).tolist())


@dataclass
class Annotations:
    """N images and their T boxes in flat arrays, memory-mapped from the index so that forked workers share one copy.

    The start and end of every image file were checked when the index was built. Every box lies within its image and has
    a positive area.

    Attributes:
        source: the file or folder they were read from, for messages.
        paths: (N,) image files.
        image_ids: (N,) int64, the ids in the source, or numbers from 1.
        sizes: (N, 2) int32 (height, width) of the image in its file, after applying the EXIF orientation.
        offsets: (N + 1,) int64, the boxes of image i are rows offsets[i] to offsets[i + 1].
        boxes: (T, 4) float64, xyxy in pixels of the image.
        labels: (T,) int32 in 0 .. C - 1, indices into ``class_names``.
        areas: (T,) float64 in pixels, which determine COCO's small / medium / large.
        crowd: (T,) bool, regions of many objects: excluded from training, ignored in evaluation.
        class_names: C names.
        category_ids: C ids in the source.
        issues: problems that were found, and fixed or skipped.
        watched: whether the index detects a change of any image; False if one lies outside the data set's folders.
    """

    source: Path
    paths: Sequence[Path]
    image_ids: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    issues: IssueLog = field(default_factory=IssueLog)
    watched: bool = True

    def __len__(self) -> int:
        return len(self.paths)

    def rows(self, index: int) -> slice:
        """Return the rows of the boxes of an image."""
        return slice(int(self.offsets[index]), int(self.offsets[index + 1]))

    def subset(self, keep: np.ndarray) -> "Annotations":
        """Return the images selected by the mask ``keep``, (N,) bool, and their boxes."""
        counts = np.diff(self.offsets)
        boxes = np.repeat(keep, counts)
        return replace(
            self,
            paths=PathTable.from_paths(self.paths[k] for k in np.flatnonzero(keep).tolist()),
            image_ids=self.image_ids[keep],
            sizes=self.sizes[keep],
            offsets=np.concatenate(([0], counts[keep].cumsum())),
            boxes=self.boxes[boxes],
            labels=self.labels[boxes],
            areas=self.areas[boxes],
            crowd=self.crowd[boxes],
        )

    def ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """Return a COCO dictionary (images, annotations, categories) for the evaluation."""
        image_of_box = np.repeat(self.image_ids, np.diff(self.offsets)).tolist()
        xywh = np.concatenate((self.boxes[:, :2], self.boxes[:, 2:] - self.boxes[:, :2]), 1).tolist()
        categories = np.asarray(self.category_ids, np.int64)[self.labels].tolist()
        columns = zip(image_of_box, categories, xywh, self.areas.tolist(), self.crowd.tolist(), strict=True)
        return {
            "images": [
                {"id": int(i), "file_name": path.name, "height": int(h), "width": int(w)}
                for i, path, (h, w) in zip(self.image_ids, self.paths, self.sizes, strict=True)
            ],
            "annotations": [
                {"id": k, "image_id": i, "category_id": c, "bbox": box, "area": area, "iscrowd": int(crowd)}
                for k, (i, c, box, area, crowd) in enumerate(columns, 1)
            ],
            "categories": [
                {"id": i, "name": name} for i, name in zip(self.category_ids, self.class_names, strict=True)
            ],
        }
