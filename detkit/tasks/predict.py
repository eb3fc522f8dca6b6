"""Detect objects in images: ``detkit predict ckpt=FILE source=FILE_OR_FOLDER``."""

import errno
import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from detkit.config.common import CommonConfig, ImageSize, image_size_field
from detkit.config.fields import Location, field, location, number, whole
from detkit.engine.checkpoint import build_from_checkpoint
from detkit.errors import DetkitError, printable, shorten
from detkit.inference.sources import expand_source
from detkit.ops.atomic_write import write_atomically
from detkit.ops.device import pick_device
from detkit.ops.image import read_image
from detkit.structures import Detections
from detkit.tasks.runs.run_dir import checkpoint_name, make_run_dir
from detkit.viz.drawing import draw_boxes, save_image

logger = logging.getLogger(__name__)


class PredictConfig(CommonConfig):
    """Keys of ``configs/predict.yaml``."""

    ckpt: Location = location("checkpoint to load")
    source: Location = location("image file, or a folder of images")
    image_size: ImageSize | None = image_size_field()
    score: float = number("minimum score of a detection", 0, 1)
    iou: float = number("IoU threshold of non-maximum suppression", 0, 1)
    max_det: int = whole("maximum number of detections per image", 1, 100_000)
    multi_label: bool = field(
        "report a box once for each of its classes above the score, instead of for its best class only"
    )


def run(cfg: PredictConfig) -> list[dict[str, Any]]:
    """Detect objects in ``cfg.source``, an image or a folder; draw their boxes and write ``predictions.json``.

    Images that cannot be read or written are skipped and reported at the end. If the task ends early,
    ``predictions.json`` holds the results up to then.

    Returns:
        the content of ``predictions.json``: for each image ``file``, ``height``, ``width`` and ``detections``, each
        with ``box`` (xyxy in pixels), ``score``, ``label`` and ``name``.

    Raises:
        DetkitError: the checkpoint or an image cannot be read, or an image cannot be written.
        OSError: ``predictions.json`` cannot be written.
    """
    detector = build_from_checkpoint(str(cfg.ckpt)).to(pick_device(cfg.device)).fuse()
    files = expand_source(Path(str(cfg.source)))
    run_dir = make_run_dir(cfg, "predict", checkpoint_name(cfg.ckpt))
    settings = {key: getattr(cfg, key) for key in ("score", "iou", "max_det", "image_size", "multi_label")}
    records: list[dict[str, Any]] = []
    failures: list[str] = []
    try:
        for file, name in zip(files, output_names(files), strict=True):
            try:
                image = read_image(file)
                (found,) = detector.predict(image, **settings)
                records.append(as_record(file, found))
                logger.info("%s: %s", printable(file.name), _count(found))
                boxes, labels, scores = found.boxes.numpy(), found.labels.tolist(), found.scores.tolist()
                save_image(draw_boxes(image, boxes, labels, detector.class_names, scores), run_dir / name)
                continue
            except DetkitError as error:
                failures.append(str(error))
            except OSError as error:
                failures.append(f"cannot write {run_dir / name}: {error.strerror or error}")
            logger.warning(failures[-1])
    finally:
        _write_records(records, run_dir)
        logger.info("%d of %d images and predictions.json are in %s", len(records), len(files), run_dir)
    if failures:
        more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
        raise DetkitError(failures[0] + more)
    return records


def _write_records(records: Sequence[dict[str, Any]], run_dir: Path) -> None:
    """Write ``predictions.json``; on a full disk, delete drawn images to make room."""
    path, images = run_dir / "predictions.json", run_dir.glob("*.jpg")
    content = json.dumps(records, indent=1).encode()
    while True:
        try:
            return write_atomically(path, content)
        except OSError as error:
            image = next(images, None)
            if error.errno not in (errno.ENOSPC, errno.EDQUOT) or image is None:
                raise
            image.unlink()


def output_names(files: Sequence[Path]) -> list[str]:
    """Return the names of the drawn images: ``a.jpg``, or ``a.png.jpg`` if several files are named ``a``."""
    stems, names = Counter(file.stem for file in files), {file.name for file in files}
    return [
        f"{file.name if stems[file.stem] > 1 or file.stem in names else file.stem}.jpg"  # unique
        for file in files
    ]


def as_record(file: Path, found: Detections) -> dict[str, Any]:
    """Return the detections in an image as plain data for JSON."""
    columns = zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)
    detections = [
        {"box": box, "score": score, "label": label, "name": found.class_names[label]} for box, score, label in columns
    ]
    return {"file": str(file), "height": found.size[0], "width": found.size[1], "detections": detections}


def _count(found: Detections) -> str:
    """Return the number of objects per class, such as ``2 circle, 1 star``."""
    counts = Counter(found.labels.tolist())
    return ", ".join(f"{counts[k]} {shorten(found.class_names[k], 40)}" for k in sorted(counts)) or "nothing"
