"""The labels of an image set, whatever format they came from."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from detkit.errors import DetkitError


@dataclass
class Annotations:
    """N images and their T boxes in flat arrays: cheap to share with the loader's worker processes.

    Attributes:
        source: the file or folder they were read from, for messages.
        paths: file of each image.
        image_ids: (N,) int64, the ids of the source.
        sizes: (N, 2) int32 (height, width) as the source states them.
        offsets: (N + 1,) int64, the boxes of image i are rows offsets[i] to offsets[i + 1].
        boxes: (T, 4) float64, xyxy in pixels of the image.
        labels: (T,) int64 in 0 .. C - 1, indices into ``class_names``.
        areas: (T,) float64 pixels, what COCO's small / medium / large go by.
        crowd: (T,) bool, a region of many objects: never trained on, ignored when evaluating.
        class_names: C names; category_ids: the source's id of each.
        left_out: boxes the source has and this lacks because they have no area.
    """

    source: Path
    paths: list[Path]
    image_ids: np.ndarray
    sizes: np.ndarray
    offsets: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    areas: np.ndarray
    crowd: np.ndarray
    class_names: tuple[str, ...]
    category_ids: tuple[int, ...]
    left_out: int = 0

    def __len__(self) -> int:
        return len(self.paths)

    def ground_truth(self) -> dict[str, list[dict[str, Any]]]:
        """Return the set as a COCO dictionary (images, annotations, categories) for the evaluation."""
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


def require_files(paths: Sequence[Path], source: Path) -> None:
    """Check that every image exists, with one listing a folder.

    Raises:
        DetkitError: names the first one missing, how many there are, and ``source``, which lists them.
    """
    listings: dict[Path, set[str]] = {}
    missing = []
    for path in paths:
        if path.parent not in listings:
            folder = path.parent
            listings[folder] = {p.name for p in folder.iterdir()} if folder.is_dir() else set()
        if path.name not in listings[path.parent]:
            missing.append(path)
    if missing:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise DetkitError(f"image {missing[0]} does not exist{more}, though {source} lists it")
