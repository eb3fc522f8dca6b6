"""Writing Pascal VOC xml."""

from collections.abc import Mapping
from pathlib import Path
from xml.sax.saxutils import escape

import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.formats.writing import WriteResult, area_warnings, file_names, make_parent, place_images
from detkit.errors import DetkitError, is_name
from detkit.registry import WRITERS


@WRITERS.register("voc")
def write_voc(splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write ``Annotations``, ``JPEGImages`` and ``ImageSets/Main``; crowds become difficult objects.

    Raises:
        DetkitError: the format cannot represent a class name.
    """
    class_names = next(iter(splits.values())).class_names
    for name in class_names:
        if name != name.strip() or not is_name(name):
            raise DetkitError(
                f"Pascal VOC cannot hold the class name {name!r}: rename the class, or write coco or yolo"
            )
    for (split, annotations), names in zip(splits.items(), file_names(splits), strict=True):
        place_images(annotations, names, folder / "JPEGImages")
        for image, name in enumerate(names):
            file = make_parent(folder / "Annotations" / f"{Path(name).stem}.xml")
            file.write_text(_voc_xml(annotations, image, name), encoding="utf-8")
        file = make_parent(folder / "ImageSets" / "Main" / f"{split}.txt")
        file.write_text("".join(f"{Path(name).stem}\n" for name in names), encoding="utf-8")
    warnings = area_warnings(splits)
    used = sorted({class_names[k] for annotations in splits.values() for k in np.unique(annotations.labels)})
    if tuple(used) != class_names:
        warnings.append(
            f"Pascal VOC has no list of classes: readers sort the names of the classes with boxes, {len(used)} of "
            f"{len(class_names)}"
        )
    return WriteResult({"name": "voc", "root": str(folder)}, warnings)


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
