"""Find objects in pictures."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

from detkit.engine.checkpoint import build_from_checkpoint, write_atomically
from detkit.engine.precision import pick_device
from detkit.errors import DetkitError
from detkit.models.detector import list_pictures
from detkit.ops.image import read_image
from detkit.report.console import make_console
from detkit.report.drawing import draw_boxes, save_picture
from detkit.structures import Detections
from detkit.tasks.common import checkpoint_name, make_run_dir


def run(cfg: dict[str, Any]) -> list[dict[str, Any]]:
    """Predict ``cfg["source"]``, a picture or a folder; write each with its boxes, and ``predictions.json``.

    Returns:
        what ``predictions.json`` holds: for each picture ``file``, ``height``, ``width`` and ``detections``, each
        with ``box`` (xyxy in pixels), ``score``, ``label`` and ``name``.

    Raises:
        DetkitError: an unreadable checkpoint or picture.
    """
    console = make_console()
    detector = build_from_checkpoint(str(cfg["ckpt"])).to(pick_device(cfg["device"])).fuse()
    files = list_pictures(Path(str(cfg["source"])))
    stems = Counter(file.stem for file in files)
    run_dir = make_run_dir(cfg, "predict", checkpoint_name(cfg["ckpt"]))
    settings = {key: cfg[key] for key in ("score", "iou", "max_det", "image_size")}
    records, unreadable = [], []
    for file in files:
        try:
            image = read_image(file)
        except DetkitError as error:
            unreadable.append(str(error))
            continue
        (found,) = detector.predict(image, **settings)
        name = file.stem if stems[file.stem] == 1 else file.name  # a.jpg beside a.png
        boxes, labels, scores = found.boxes.numpy(), found.labels.tolist(), found.scores.tolist()
        save_picture(draw_boxes(image, boxes, labels, detector.class_names, scores), run_dir / f"{name}.jpg")
        records.append(as_record(file, found))
        console.print(f"{file.name}: {_count(found)}")
    write_atomically(run_dir / "predictions.json", json.dumps(records, indent=1).encode())
    console.print(f"{len(records)} of {len(files)} pictures, and predictions.json: {run_dir}")
    if unreadable:
        more = f" (and {len(unreadable) - 1} more)" if len(unreadable) > 1 else ""
        raise DetkitError(unreadable[0] + more)
    return records


def as_record(file: Path, found: Detections) -> dict[str, Any]:
    """Return one picture's detections as plain data for json."""
    columns = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    detections = [
        {"box": box, "score": score, "label": label, "name": found.class_names[label]} for box, score, label in columns
    ]
    return {"file": str(file), "height": found.size[0], "width": found.size[1], "detections": detections}


def _count(found: Detections) -> str:
    """Return such as ``2 circle, 1 star``."""
    labels = found.labels.tolist()
    return ", ".join(f"{labels.count(k)} {found.class_names[k]}" for k in sorted(set(labels))) or "nothing"
