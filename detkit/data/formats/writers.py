"""Writing an image set in any of the formats that are read; a new format is one more function in WRITERS."""

import json
import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np
import yaml
from rich.progress import track

from detkit.data.annotations import Annotations
from detkit.data.formats.tar_shards import write_webdataset
from detkit.errors import DetkitError, is_name
from detkit.ops.image import IMAGE_SUFFIXES, open_image
from detkit.registry import WRITERS

MAX_STEM = 180  # bytes of a file name without its suffix: file systems take 255


@dataclass
class WriteResult:
    """What was written: the keys of ``data`` that read it back, and what the format cannot hold, a sentence each."""

    data: dict[str, str]
    remarks: list[str] = field(default_factory=list)


def write_set(form: str, splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write splits as ``form`` (a name in WRITERS) into ``folder``, which is made, with their images.

    Images are hard links where the disk allows it, else copies. A writer is ``(splits, folder) -> Written``.

    Raises:
        DetkitError: the folder holds something, the disk refuses, or the format cannot hold the classes.
    """
    writer = WRITERS.get(form)
    require_empty_dir(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        written = writer(splits, folder.resolve())
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        raise DetkitError(f"cannot write the set, {reason}; what is in {folder} is not whole, remove it") from None
    turned = sum(annotations.issues.counts["exif_rotated"] for annotations in splits.values())
    if turned:
        words = "their boxes are those of the upright picture, which not every tool shows"
        written.remarks.append(f"images turned by their EXIF orientation: {turned}; {words}")
    return written


def require_empty_dir(folder: Path) -> None:
    """Check that ``folder`` is new or empty: nothing is overwritten.

    Raises:
        DetkitError: it holds something, or is a file.
    """
    try:
        full = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        raise DetkitError(f"cannot write to {folder}: {error}") from None
    if full:
        raise DetkitError(f"{folder} is not an empty folder: name another one, or remove it")


@WRITERS.register("coco")
def write_coco(splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write ``images/SPLIT`` and ``annotations/instances_SPLIT.json``, a record a line; ids and areas are kept."""
    for (split, annotations), names in zip(splits.items(), _file_names(splits), strict=True):
        _place_images(annotations, names, folder / "images" / split)
        file = _parent_made(folder / "annotations" / f"instances_{split}.json")
        with file.open("w", encoding="utf-8") as stream:
            for start, records in (
                ('{"images": [\n', _coco_images(annotations, names)),
                ('\n],\n"annotations": [\n', _coco_boxes(annotations)),
                ('\n],\n"categories": [\n', _coco_categories(annotations)),
            ):
                stream.write(start)
                for k, record in enumerate(records):
                    stream.write((",\n" if k else "") + json.dumps(record))
            stream.write("\n]}\n")
    return WriteResult({"name": "coco", "root": str(folder)})


def _coco_images(annotations: Annotations, names: list[str]) -> Iterator[dict]:
    for name, number, (h, w) in zip(names, annotations.image_ids.tolist(), annotations.sizes.tolist(), strict=True):
        yield {"id": number, "file_name": name, "height": h, "width": w}


def _coco_boxes(annotations: Annotations) -> Iterator[dict]:
    number = 0
    for image, image_id in enumerate(annotations.image_ids.tolist()):
        for k in range(annotations.offsets[image], annotations.offsets[image + 1]):
            x1, y1, x2, y2 = annotations.boxes[k].tolist()
            number += 1
            yield {
                "id": number,
                "image_id": image_id,
                "category_id": annotations.category_ids[annotations.labels[k]],
                "bbox": [x1, y1, x2 - x1, y2 - y1],
                "area": float(annotations.areas[k]),
                "iscrowd": int(annotations.crowd[k]),
            }


def _coco_categories(annotations: Annotations) -> Iterator[dict]:
    for number, name in zip(annotations.category_ids, annotations.class_names, strict=True):
        yield {"id": int(number), "name": name}


@WRITERS.register("yolo")
def write_yolo(splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write ``data.yaml``, ``images/SPLIT`` and ``labels/SPLIT``; crowds are skipped, classes count from 0."""
    for split in {"path", "names", "nc"} & splits.keys():
        raise DetkitError(f"YOLO's data.yaml cannot hold a split named '{split}': rename it, or write coco or voc")
    for (split, annotations), names in zip(splits.items(), _file_names(splits), strict=True):
        _place_images(annotations, names, folder / "images" / split)
        labels = folder / "labels" / split
        labels.mkdir(parents=True)
        for image, name in enumerate(names):
            height, width = annotations.sizes[image].tolist()
            rows = annotations.rows(image)
            x1, y1, x2, y2 = (annotations.boxes[rows] / (width, height, width, height)).T
            columns = annotations.labels[rows], (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, y2 - y1, annotations.crowd[rows]
            lines = [
                f"{label} {x:.12g} {y:.12g} {w:.12g} {h:.12g}\n"
                for label, x, y, w, h, crowd in zip(*columns, strict=True)
                if not crowd
            ]
            (labels / f"{Path(name).stem}.txt").write_text("".join(lines))
    names = dict(enumerate(next(iter(splits.values())).class_names))
    content = {split: f"images/{split}" for split in splits} | {"names": names}  # no path: from the yaml's folder
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    remarks = _area_remark(splits)
    crowds = sum(int(annotations.crowd.sum()) for annotations in splits.values())
    if crowds:
        remarks.append(f"YOLO txt knows no crowds: {crowds} of them (COCO iscrowd, VOC difficult) are skipped")
    return WriteResult({"name": "yolo", "yaml": str(file)}, remarks)


@WRITERS.register("voc")
def write_voc(splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``; crowds become difficult objects."""
    class_names = next(iter(splits.values())).class_names
    for name in class_names:
        if name != name.strip() or not is_name(name):
            raise DetkitError(
                f"Pascal VOC cannot hold the class name {name!r}: rename the class, or write coco or yolo"
            )
    for (split, annotations), names in zip(splits.items(), _file_names(splits), strict=True):
        _place_images(annotations, names, folder / "JPEGImages")
        for image, name in enumerate(names):
            file = _parent_made(folder / "Annotations" / f"{Path(name).stem}.xml")
            file.write_text(_voc_xml(annotations, image, name), encoding="utf-8")
        file = _parent_made(folder / "ImageSets" / "Main" / f"{split}.txt")
        file.write_text("".join(f"{Path(name).stem}\n" for name in names), encoding="utf-8")
    remarks = _area_remark(splits)
    used = sorted({class_names[k] for annotations in splits.values() for k in np.unique(annotations.labels)})
    if tuple(used) != class_names:
        remarks.append(
            f"Pascal VOC has no list of classes: readers sort the names of those with boxes, {len(used)} of "
            f"{len(class_names)} here"
        )
    return WriteResult({"name": "voc", "root": str(folder)}, remarks)


def _voc_xml(annotations: Annotations, image: int, name: str) -> str:
    height, width = annotations.sizes[image].tolist()
    lines = [
        "<annotation>",
        f"  <filename>{escape(name)}</filename>",
        f"  <size><width>{width}</width><height>{height}</height><depth>3</depth></size>",
    ]
    rows = annotations.rows(image)
    for box, label, crowd in zip(
        annotations.boxes[rows], annotations.labels[rows], annotations.crowd[rows], strict=True
    ):
        sides = zip(("xmin", "ymin", "xmax", "ymax"), box.tolist(), strict=True)
        numbers = "".join(
            f"<{side}>{v:.0f}</{side}>" if v.is_integer() else f"<{side}>{v!r}</{side}>" for side, v in sides
        )
        lines += [
            "  <object>",
            f"    <name>{escape(annotations.class_names[label])}</name>",
            f"    <difficult>{int(crowd)}</difficult>",
            f"    <bndbox>{numbers}</bndbox>",
            "  </object>",
        ]
    return "\n".join([*lines, "</annotation>\n"])


@WRITERS.register("webdataset")
def write_shards(splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write tar shards and their lists (webdataset.py); nothing is lost."""
    for split, annotations in splits.items():
        write_webdataset(annotations, folder, split)
    return WriteResult({"name": "webdataset", "root": str(folder)})


def _area_remark(splits: Mapping[str, Annotations]) -> list[str]:
    """Say so where the stated areas are not those of the boxes, as COCO's are of masks."""
    for annotations in splits.values():
        own = np.prod(annotations.boxes[:, 2:] - annotations.boxes[:, :2], axis=1)
        if not np.allclose(own, annotations.areas, rtol=1e-3):
            return ["areas of masks are lost: small, medium and large go by the boxes' areas from here on"]
    return []


def _file_names(splits: Mapping[str, Annotations]) -> list[list[str]]:
    """Return a file name for each image of each split: its own where it is safe and its stem not taken by another.

    Stems are told apart over all splits, also on a file system that takes capital letters for small ones.
    """
    taken: set[str] = set()
    again = defaultdict(lambda: 1)  # how often a stem has come, counted where it did so before
    names: list[list[str]] = []
    for annotations in splits.values():
        names.append([])
        for path in annotations.paths:
            stem = re.sub(r"[^\w.,()+@=~-]+", "_", path.stem).strip(".")  # no spaces either: lists are split at them
            stem = stem.encode()[:MAX_STEM].decode(errors="ignore") or "image"
            unique = stem
            while unique.casefold() in taken:
                again[stem] += 1
                unique = f"{stem}-{again[stem]}"
            taken.add(unique.casefold())
            suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".jpg"  # the content tells what it is
            names[-1].append(unique + suffix)
    return names


def _place_images(annotations: Annotations, names: list[str], folder: Path) -> None:
    """Link the image files into ``folder``, or copy them to another disk; a bar shows on a terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    bar = track(names, "images", transient=True, disable=not sys.stdout.isatty())
    for path, name in zip(annotations.paths, bar, strict=True):
        try:
            os.link(os.path.realpath(path), folder / name)
        except OSError:  # another disk, or an image in a tar file
            with open_image(path) as source, (folder / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def _parent_made(file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
