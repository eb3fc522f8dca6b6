"""Writing YOLO txt files and their data.yaml."""

from collections.abc import Mapping
from pathlib import Path

import yaml

from detkit.data.annotations import Annotations
from detkit.data.formats.writing import WriteResult, area_warnings, file_names, place_images
from detkit.errors import DetkitError
from detkit.registry import WRITERS


@WRITERS.register("yolo")
def write_yolo(splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write ``data.yaml``, ``images/SPLIT`` and ``labels/SPLIT``; crowds are skipped, class ids start at 0.

    Raises:
        DetkitError: the format cannot represent the name of a split.
    """
    for split in {"path", "names", "nc"} & splits.keys():
        raise DetkitError(f"YOLO's data.yaml cannot hold a split named '{split}': rename it, or write coco or voc")
    for (split, annotations), names in zip(splits.items(), file_names(splits), strict=True):
        place_images(annotations, names, folder / "images" / split)
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
    class_names = dict(enumerate(next(iter(splits.values())).class_names))
    content = {split: f"images/{split}" for split in splits} | {"names": class_names}  # relative to the yaml
    file = folder / "data.yaml"
    file.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    warnings = area_warnings(splits)
    crowds = sum(int(annotations.crowd.sum()) for annotations in splits.values())
    if crowds:
        warnings.append(f"YOLO txt cannot represent crowds: {crowds} of them (COCO iscrowd, VOC difficult) are skipped")
    return WriteResult({"name": "yolo", "yaml": str(file)}, warnings)
