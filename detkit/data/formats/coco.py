"""Reading COCO json (https://cocodataset.org/#format-data)."""

import math
import os
from array import array
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.builder import AnnotationBuilder
from detkit.data.formats.coco_fields import (
    INVALID_FIELD,
    MAX_COORDINATE,
    Categories,
    Ids,
    describe_invalid_field,
    file_name,
    parse_box,
    parse_flag,
    parse_side,
)
from detkit.data.formats.image_names import ImageNames
from detkit.data.formats.json_stream import read_records
from detkit.data.formats.unsupported import other_format_of
from detkit.data.index import cached
from detkit.data.issues import IssueLog
from detkit.data.splits import ALIASES, REQUIRED_SPLITS, pick_split
from detkit.errors import DetkitError, shorten
from detkit.registry import DATASETS, SPLIT_NAMES

ROBOFLOW = "_annotations.coco.json"  # next to the images of a split, in Roboflow's exports
LISTS = ("images", "annotations", "categories")


@DATASETS.register("coco")
def read_coco(  # noqa: PLR0913  (the keys of data)
    split: str,
    *,
    root: str | int,
    train_images: str = "images/train",
    train_annotations: str = "annotations/instances_train.json",
    val_images: str = "images/val",
    val_annotations: str = "annotations/instances_val.json",
    test_images: str | None = "images/test",
    test_annotations: str | None = "annotations/instances_test.json",
    log: IssueLog | None = None,
) -> Annotations:
    """Read a split; folders and files are relative to ``root``.

    Other splits are found by their files ``annotations/instances_NAME.json`` and ``images/NAME``. If a default file
    does not exist, ``NAME/_annotations.coco.json`` with images in the same folder is read instead.

    Args:
        split: its name.
        root: folder of the data set.
        train_images: folder of the train images.
        train_annotations: json of the train split.
        val_images: folder of the val images.
        val_annotations: json of the val split.
        test_images: folder of the test images.
        test_annotations: json of the test split; there is no test split if the default does not exist.
        log: receives all problems; if given, the index is not used.

    Raises:
        DetkitError: ``root`` is not a folder, there is no such split, or as for ``read_coco_json``.
    """
    keys = {"train": (train_annotations, train_images), "val": (val_annotations, val_images)}
    files = _split_files(root, keys | {"test": (test_annotations, test_images)})
    split = pick_split(split, files, root)
    file, image_dir = files[split]
    labelled = split in REQUIRED_SPLITS
    return cached("coco", [file], [image_dir], [], log, lambda log: read_coco_json(file, image_dir, log, labelled))


@SPLIT_NAMES.register("coco")
def coco_splits(*, root: str | int, **keys: str | None) -> list[str]:
    """Return the splits that ``read_coco`` can read with the same keys."""
    named = {
        split: (
            keys.get(f"{split}_annotations", f"annotations/instances_{split}.json"),
            keys.get(f"{split}_images", f"images/{split}"),
        )
        for split in (*REQUIRED_SPLITS, "test")
    }
    return [*_split_files(root, named)]


def _split_files(root: str | int, keys: Mapping[str, tuple[Any, Any]]) -> dict[str, tuple[Path, Path]]:
    """Return the json and the image folder of every split: first those of ``keys``, then any others."""
    base = Path(str(root))
    if not base.is_dir():
        raise DetkitError(f"data.root={root} is not a folder")
    found: dict[str, tuple[Path, Path]] = {}
    for split, (annotations, images) in keys.items():
        if annotations is None or images is None:
            continue
        place = base / str(annotations), base / str(images)
        is_explicit = annotations != f"annotations/instances_{split}.json"
        if not is_explicit and not place[0].exists():
            names = (split, *(alias for alias, name in ALIASES.items() if name == split))
            alternatives = [(base / "annotations" / f"instances_{name}.json", base / "images" / name) for name in names]
            alternatives += [(base / name / ROBOFLOW, base / name) for name in names]
            place = next((other for other in alternatives if other[0].is_file()), place)
        if split in REQUIRED_SPLITS or is_explicit or place[0].exists():
            found[split] = place
    used_files = {os.path.realpath(file) for file, _ in found.values()}
    named = [(file.stem.removeprefix("instances_"), file) for file in base.glob("annotations/instances_*.json")]
    places = {name: (file, base / "images" / name) for name, file in named}
    places |= {file.parent.name: (file, file.parent) for file in base.glob(f"*/{ROBOFLOW}")}
    for name, (file, images) in sorted(places.items()):
        if name and name not in keys and os.path.realpath(file) not in used_files and images.is_dir():
            found[name] = file, images
    return found


def read_coco_json(file: Path, image_dir: Path, log: IssueLog | None = None, labelled: bool = True) -> Annotations:
    """Read one COCO json.

    Category ids may have gaps: labels are their ranks. A record without a ``bbox`` has that of its polygons or mask.
    Ids and sizes may be strings; non-numeric ids are numbered. Invalid records are skipped and logged. For the
    validation of boxes and images, see data/validation.py.

    Args:
        file: the json.
        image_dir: folder of the images; may have subfolders.
        log: receives all problems.
        labelled: whether the lists ``annotations`` and ``categories`` are required.

    Raises:
        DetkitError: the file is missing or malformed, its categories are invalid, or no image is left.
        MissingSplit: none of the image files exists.
    """
    reader = _Reader(file, image_dir, IssueLog() if log is None else log)
    categories: list[Any] = []
    handlers = {
        "images": reader.image,
        "annotations": reader.box,
        "categories": lambda _position, _line, record: categories.append(record),
    }
    missing = set(LISTS)
    for key, position, line, record in read_records(file, LISTS):
        if position < 0:
            missing.discard(key)
        else:
            handlers[key](position, line, record)
    missing -= set() if labelled else {"annotations", "categories"}
    if missing:
        hint = other_format_of(file)
        raise DetkitError(f"{file} is not a COCO detection file: the list '{min(missing)}' is missing{hint}")
    unlabelled = not labelled and not categories and not reader.builder.boxes
    annotations = reader.build(*(((), ()) if unlabelled else reader.categories.sorted_by_id(categories, file)))
    annotations.watched = reader.watched
    return annotations


class _Reader:
    """Collects the valid records; ids are resolved at the end."""

    def __init__(self, file: Path, image_dir: Path, log: IssueLog) -> None:
        self.file, self.image_dir, self.log = file, image_dir, log
        self.builder = AnnotationBuilder(file, log)
        self.images, self.categories = Ids(), Categories()
        self.names = ImageNames(image_dir)
        self.seen: set[int] = set()
        self.watched = True

    def image(self, position: int, line: int, record: Any) -> None:
        """Parse images[position]."""
        try:
            image_id, given = self.images.number(record["id"]), file_name(record)
            stated = parse_side(record.get("height")), parse_side(record.get("width"))
        except INVALID_FIELD:
            needs = {
                "id": ("an integer 'id'", self.images.number),
                "file_name": ("a 'file_name'", lambda _: file_name(record)),
                "height": ("'height' in pixels", parse_side),
                "width": ("'width' in pixels", parse_side),
            }
            self.log.add(
                "malformed_image", self.file, line, f"images[{position}] {describe_invalid_field(record, needs)}"
            )
            return
        if image_id in self.seen:
            message = f"images[{position}] has the id {shorten(record['id'])} of an earlier image"
            self.log.add("repeated_image", self.file, line, message)
            return
        name, taken_by = self.names.locate(given)
        if taken_by:
            message = f"images[{position}] is {shorten(given)}, but {name} is the image of {shorten(taken_by)}"
            self.log.add("repeated_image", self.file, line, message)
            return
        self.seen.add(image_id)
        self.builder.add_image(self.image_dir / name, image_id, stated)
        if name.startswith(("/", ".")) or "/." in name:
            self.watched = False  # possibly outside image_dir, or hidden

    def box(self, position: int, line: int, record: Any) -> None:
        """Parse annotations[position]."""
        try:
            image_id, category_id = self.images.number(record["image_id"]), self.categories.use(record["category_id"])
            x, y, w, h = parse_box(record)
            area, crowd = record.get("area"), parse_flag(record.get("iscrowd"))
        except INVALID_FIELD:
            needs = {
                "image_id": ("an integer 'image_id'", self.images.number),
                "category_id": ("an integer 'category_id'", self.categories.number),
                "bbox": ("'bbox' as [x, y, width, height] in numbers", lambda bbox: bbox and parse_box(record)),
                "segmentation": ("a 'bbox', or a 'segmentation' of polygons or a mask", lambda _: parse_box(record)),
                "iscrowd": ("'iscrowd' to be 0 or 1", parse_flag),
            }
            self.log.add(
                "malformed_box", self.file, line, f"annotations[{position}] {describe_invalid_field(record, needs)}"
            )
            return
        area = float(area) if type(area) in (int, float) and abs(area) < MAX_COORDINATE**2 else math.nan
        corners = (x, y, x + w, y + h)
        self.builder.add_box(image_id, category_id, corners, line, position, area=area, crowd=crowd)

    def build(self, category_ids: tuple[int, ...], class_names: tuple[str, ...]) -> Annotations:
        """Return the annotations, without boxes of undefined images and classes."""
        builder = self.builder
        builder.class_names, builder.category_ids = class_names, category_ids
        self.seen.clear()
        image_of, label_of = _Positions(builder.image_ids), _Positions(category_ids)

        def translate(rows: np.ndarray) -> np.ndarray:
            image, has_image = image_of(rows["image"])
            label, has_label = label_of(rows["label"])
            self._log_unknown("labels_without_image", "image_id", self.images, rows, rows["image"], ~has_image)
            self._log_unknown(
                "unknown_class", "category_id", self.categories, rows, rows["label"], has_image & ~has_label
            )
            rows["image"], rows["label"] = image, label
            return rows[has_image & has_label]

        return builder.build(lambda _, line, position: self._locate(line, position), translate)

    def _log_unknown(
        self, kind: str, key: str, ids_seen: Ids, rows: np.ndarray, ids: np.ndarray, mask: np.ndarray
    ) -> None:
        def describe(k: int) -> tuple[Path, int, str]:
            message = f"has {key} {ids_seen.original(int(ids[k]))}, which the file does not define"
            return self._locate(int(rows["line"][k]), int(rows["position"][k]), message)

        self.log.extend(kind, np.flatnonzero(mask), describe)

    def _locate(self, line: int, position: int, message: str = "") -> tuple[Path, int, str]:
        """Return the file, the line and a message about ``annotations[position]``."""
        return self.file, line, f"annotations[{position}] {message}"


class _Positions:
    """Looks up ids in a list."""

    def __init__(self, ids: array | tuple[int, ...]) -> None:
        self.ids = np.array(ids, np.int64)
        self.order = np.argsort(self.ids)

    def __call__(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return the position of each of (T,) ids in the list (T,), and whether it exists (T,) bool."""
        if not self.ids.size:
            return np.zeros(len(wanted), np.int64), np.zeros(len(wanted), bool)
        nearest = np.searchsorted(self.ids, wanted, sorter=self.order).clip(max=len(self.ids) - 1)
        position = self.order[nearest]
        return position, self.ids[position] == wanted
