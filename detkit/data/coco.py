"""COCO json: the format most tools write (https://cocodataset.org/#format-data)."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.annotations import Annotations, require_files
from detkit.errors import DetkitError
from detkit.registry import DATASETS


@DATASETS.register("coco")
def read_coco(
    split: str,
    *,
    root: str | int,
    train_images: str = "images/train",
    train_annotations: str = "annotations/instances_train.json",
    val_images: str = "images/val",
    val_annotations: str = "annotations/instances_val.json",
) -> Annotations:
    """Read the ``"train"`` or ``"val"`` split; the folders and files are relative to ``root``.

    Raises:
        DetkitError: ``root`` is no folder, or as ``read_coco_json``.
    """
    if not Path(str(root)).is_dir():
        raise DetkitError(f"data.root={root} is not a folder")
    images, annotations = {"train": (train_images, train_annotations), "val": (val_images, val_annotations)}[split]
    return read_coco_json(Path(str(root)) / annotations, Path(str(root)) / images)


def read_coco_json(file: Path, image_dir: Path) -> Annotations:
    """Read one COCO json whose image files lie under ``image_dir``.

    Category ids may have gaps: labels are their ranks. Boxes are clipped to their image; those left without
    area are counted in ``left_out``. Images without boxes stay, as background.

    Raises:
        DetkitError: a missing or malformed file, record or image; names the file and the record.
    """
    content = _load(file)
    category_ids, class_names = _categories(content["categories"], file)
    images = content["images"]
    _check_images(images, file)
    paths = [image_dir / image["file_name"] for image in images]
    require_files(paths, file)

    rows, left_out = _boxes(content["annotations"], images, category_ids, file)
    rows.sort(key=lambda row: row[0])  # stable: an image's boxes keep the order of the file
    table = np.array(rows, np.float64).reshape(-1, 8)
    return Annotations(
        source=file,
        paths=paths,
        image_ids=np.array([image["id"] for image in images], np.int64),
        sizes=np.array([(image["height"], image["width"]) for image in images], np.int32),
        offsets=np.searchsorted(table[:, 0], np.arange(len(images) + 1)),
        boxes=np.ascontiguousarray(table[:, 1:5]),
        labels=table[:, 5].astype(np.int64),
        areas=np.ascontiguousarray(table[:, 6]),
        crowd=table[:, 7].astype(bool),
        class_names=class_names,
        category_ids=category_ids,
        left_out=left_out,
    )


def _categories(records: list[Any], file: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """Return the categories' ids, ascending, and their names."""
    ranked = sorted(records, key=lambda c: _get(c, "id", int, file, "categories"))
    ids = tuple(c["id"] for c in ranked)
    names = tuple(str(_get(c, "name", (str, int), file, "categories")) for c in ranked)
    for what, values in (("id", ids), ("name", names)):
        if len(set(values)) < len(values):
            raise DetkitError(f"{file}: 'categories' holds the same {what} twice; give every class one of its own")
    if not ids:
        raise DetkitError(f"{file}: 'categories' is empty, so there is nothing to detect")
    return ids, names


def _check_images(images: list[Any], file: Path) -> None:
    """Check that every image has an id of its own, a file name and a size."""
    for k, image in enumerate(images):
        for key, kind in (("id", int), ("file_name", str), ("height", int), ("width", int)):
            _get(image, key, kind, file, f"images[{k}]")
        if not (0 < image["height"] < 2**31 and 0 < image["width"] < 2**31 and abs(image["id"]) < 2**63):
            raise DetkitError(f"{file}: images[{k}] needs a height and a width of 1 or more, and an id below 2^63")
    if not images:
        raise DetkitError(f"{file}: 'images' is empty")
    if len({image["id"] for image in images}) < len(images):
        raise DetkitError(f"{file}: 'images' holds the same id twice")


def _boxes(
    records: list[Any], images: list[dict[str, Any]], category_ids: tuple[int, ...], file: Path
) -> tuple[list[tuple[float, ...]], int]:
    """Return a row (image, x1, y1, x2, y2, label, area, crowd) for each box, and how many had no area."""
    position = {image["id"]: k for k, image in enumerate(images)}
    label_of = {category_id: label for label, category_id in enumerate(category_ids)}
    rows: list[tuple[float, ...]] = []
    left_out = 0
    for k, record in enumerate(records):
        where = f"annotations[{k}]"
        image = position.get(_get(record, "image_id", int, file, where))
        label = label_of.get(_get(record, "category_id", int, file, where))
        if image is None or label is None:
            key = "image_id" if image is None else "category_id"
            raise DetkitError(f"{file}: {where} has {key} {record[key]}, which the file does not define")
        x, y, w, h = _box(record, file, where)
        x1, y1 = max(x, 0.0), max(y, 0.0)
        x2, y2 = min(x + w, float(images[image]["width"])), min(y + h, float(images[image]["height"]))
        if x2 <= x1 or y2 <= y1:
            left_out += 1
            continue
        area, crowd = record.get("area"), record.get("iscrowd", 0)
        if area is None:
            area = (x2 - x1) * (y2 - y1)
        if not is_finite(area) or area < 0 or crowd not in (0, 1):
            raise DetkitError(f"{file}: {where} needs an 'area' of 0 or more and an 'iscrowd' of 0 or 1")
        rows.append((image, x1, y1, x2, y2, label, area, crowd))
    return rows, left_out


def _load(file: Path) -> dict[str, list[dict[str, Any]]]:
    """Parse the json and check its outline."""
    try:
        content = json.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DetkitError(f"cannot read annotations {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DetkitError(f"{file} is not a json file: it is not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise DetkitError(f"{file} is malformed json, line {error.lineno} column {error.colno}: {error.msg}") from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, lists without end
        raise DetkitError(f"{file} is malformed json: {error}") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DetkitError(f"{file} is not a COCO detection file: it has no list '{key}'")
    return content


def _get(record: Any, key: str, kind: type | tuple[type, ...], file: Path, where: str) -> Any:
    """Return ``record[key]`` if it is there and of the right type."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        expected = kind.__name__ if isinstance(kind, type) else "text"
        raise DetkitError(f"{file}: {where} needs '{key}' ({expected}), it has {value!r}")
    return value


def _box(record: dict[str, Any], file: Path, where: str) -> list[float]:
    """Return the record's [x, y, width, height] as finite numbers."""
    box = record.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_finite, box)):
        raise DetkitError(f"{file}: {where} needs 'bbox' [x, y, width, height], it has {str(box)[:80]}")
    return [float(v) for v in box]


def is_finite(value: Any) -> bool:
    """Whether ``value`` is a number that a float can hold."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e300
