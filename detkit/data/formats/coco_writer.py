"""Writing COCO json."""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from detkit.data.annotations import Annotations
from detkit.data.formats.writing import WriteResult, file_names, make_parent, place_images
from detkit.registry import WRITERS


@WRITERS.register("coco")
def write_coco(splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write ``images/SPLIT`` and ``annotations/instances_SPLIT.json``, one record per line, with ids and areas."""
    for (split, annotations), names in zip(splits.items(), file_names(splits), strict=True):
        place_images(annotations, names, folder / "images" / split)
        file = make_parent(folder / "annotations" / f"instances_{split}.json")
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
