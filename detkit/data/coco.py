"""COCO json: the format most tools write (https://cocodataset.org/#format-data)."""

import math
from array import array
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.coco_fields import LARGEST, NONSENSE, Categories, Ids, box_of, fault, file_name, flag, side
from detkit.data.columns import Columns
from detkit.data.foreign import other_format_of
from detkit.data.image_names import ImageNames
from detkit.data.index import cached
from detkit.data.json_stream import read_records
from detkit.data.problems import ProblemLog
from detkit.errors import DetkitError, shorten
from detkit.registry import DATASETS

LISTS = ("images", "annotations", "categories")


@DATASETS.register("coco")
def read_coco(
    split: str,
    *,
    root: str | int,
    train_images: str = "images/train",
    train_annotations: str = "annotations/instances_train.json",
    val_images: str = "images/val",
    val_annotations: str = "annotations/instances_val.json",
    log: ProblemLog | None = None,
) -> Annotations:
    """Read the ``"train"`` or ``"val"`` split; the folders and files are relative to ``root``.

    Args:
        log: where problems go; given one, the files are read anew instead of the index.

    Raises:
        DetkitError: ``root`` is no folder, or as ``read_coco_json``.
    """
    if not Path(str(root)).is_dir():
        raise DetkitError(f"data.root={root} is not a folder")
    images, annotations = {"train": (train_images, train_annotations), "val": (val_images, val_annotations)}[split]
    file, image_dir = Path(str(root)) / str(annotations), Path(str(root)) / str(images)
    return cached("coco", [file], [image_dir], [], log, lambda log: read_coco_json(file, image_dir, log))


def read_coco_json(file: Path, image_dir: Path, log: ProblemLog | None = None) -> Annotations:
    """Read one COCO json whose image files lie under ``image_dir``.

    Category ids may have gaps: labels are their ranks. A record without a ``bbox`` has that of its polygons or mask.
    Ids and sizes may be written as text; an id that is no number gets one of its own. Records that make no sense are
    left out and logged; boxes and images are judged as in data/mending.py.

    Raises:
        DetkitError: a missing or malformed file, categories that make no sense, or no image left.
    """
    reader = _Reader(file, image_dir, ProblemLog() if log is None else log)
    categories: list[Any] = []
    take = {"images": reader.image, "annotations": reader.box, "categories": lambda k, line, c: categories.append(c)}
    missing = set(LISTS)
    for key, position, line, record in read_records(file, LISTS):
        if position < 0:
            missing.discard(key)
        else:
            take[key](position, line, record)
    if missing:
        hint = other_format_of(file)
        raise DetkitError(f"{file} is not a COCO detection file: it has no list '{min(missing)}'{hint}")
    annotations = reader.finish(*reader.categories.ranked(categories, file))
    annotations.watched = reader.watched
    return annotations


class _Reader:
    """Gathers the records that make sense; what ids they name is looked up at the end."""

    def __init__(self, file: Path, image_dir: Path, log: ProblemLog) -> None:
        self.file, self.image_dir, self.log = file, image_dir, log
        self.columns = Columns(file, log)
        self.images, self.categories = Ids(), Categories()
        self.names = ImageNames(image_dir)
        self.seen: set[int] = set()
        self.watched = True
        self.positions, self.lines = array("q"), array("q")  # of each box in 'annotations' and in the file

    def image(self, position: int, line: int, record: Any) -> None:
        """Take images[position]."""
        try:
            image_id, given = self.images.number(record["id"]), file_name(record)
            stated = side(record.get("height")), side(record.get("width"))
        except NONSENSE:
            needs = {
                "id": ("a whole 'id'", self.images.number),
                "file_name": ("a 'file_name'", lambda _: file_name(record)),
                "height": ("'height' in whole pixels", side),
                "width": ("'width' in whole pixels", side),
            }
            self.log.add("malformed_image", self.file, line, f"images[{position}] {fault(record, needs)}")
            return
        if image_id in self.seen:
            words = f"images[{position}] has the id {shorten(record['id'])}, given before"
            self.log.add("repeated_image", self.file, line, words)
            return
        name, taken_by = self.names.locate(given)
        if taken_by:
            words = f"images[{position}] is {shorten(given)}, but {name} is the image of {shorten(taken_by)}"
            self.log.add("repeated_image", self.file, line, words)
            return
        self.seen.add(image_id)
        self.columns.add_image(self.image_dir / name, image_id, stated)
        if name.startswith(("/", ".")) or "/." in name:
            self.watched = False  # it may lie outside image_dir, or hidden

    def box(self, position: int, line: int, record: Any) -> None:
        """Take annotations[position]."""
        try:
            image_id, category_id = self.images.number(record["image_id"]), self.categories.use(record["category_id"])
            x, y, w, h = box_of(record)
            area, crowd = record.get("area"), flag(record.get("iscrowd"))
        except NONSENSE:
            needs = {
                "image_id": ("a whole 'image_id'", self.images.number),
                "category_id": ("a whole 'category_id'", self.categories.number),
                "bbox": ("'bbox' as [x, y, width, height] in numbers", lambda bbox: bbox and box_of(record)),
                "segmentation": ("a 'bbox', or a 'segmentation' of polygons or a mask", lambda _: box_of(record)),
                "iscrowd": ("'iscrowd' to be 0 or 1", flag),
            }
            self.log.add("malformed_box", self.file, line, f"annotations[{position}] {fault(record, needs)}")
            return
        area = float(area) if type(area) in (int, float) and abs(area) < LARGEST**2 else math.nan
        corners = (x, y, x + w, y + h)
        self.columns.add_box(image_id, category_id, corners, len(self.lines), area=area, crowd=crowd)
        self.positions.append(position)
        self.lines.append(line)

    def finish(self, category_ids: tuple[int, ...], class_names: tuple[str, ...]) -> Annotations:
        """Return the boxes whose image and class exist."""
        columns = self.columns
        columns.class_names, columns.category_ids = class_names, category_ids
        image, has_image = _look_up(columns.image_of, columns.image_ids)
        label, has_label = _look_up(columns.label, category_ids)
        for kind, key, known, ids, mask in (
            ("labels_without_image", "image_id", self.images, columns.image_of, ~has_image),
            ("unknown_class", "category_id", self.categories, columns.label, has_image & ~has_label),
        ):
            words = f"has {key} {{}}, which the file does not define"
            self.log.extend(
                kind,
                np.flatnonzero(mask),
                lambda k, ids=ids, known=known, words=words: self._place(k, words, known.word(ids[k])),
            )
        columns.choose(image, label, has_image & has_label)
        return columns.finish(lambda _, k: self._place(k, ""))

    def _place(self, k: int, words: str, *values: object) -> tuple[Path, int, str]:
        """Return file, line and words about box ``k`` of those gathered."""
        return self.file, self.lines[k], f"annotations[{self.positions[k]}] {words.format(*values)}"


def _look_up(wanted: array, ids: array | tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """Return the position in ``ids`` of each id wanted, and whether it is there."""
    known, wanted = np.array(ids, np.int64), np.array(wanted, np.int64)
    if not known.size:
        return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
    order = np.argsort(known)
    position = order[np.searchsorted(known, wanted, sorter=order).clip(max=len(known) - 1)]
    return position, known[position] == wanted
