"""Detect objects in images, videos and streams: ``detkit predict ckpt=FILE source=FILE_OR_FOLDER``."""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from detkit.config.common import Amp, ImageSize, ViewsConfig, image_size_field
from detkit.config.fields import Location, field, location, number, whole
from detkit.config.schema import MAX_BATCH
from detkit.data.loader import reader_threads
from detkit.errors import DetkitError, printable
from detkit.export.runtime import load_model
from detkit.inference.frames import Frame
from detkit.inference.model import Model
from detkit.inference.predictor import Predictor, auto_batch_size, make_predictor
from detkit.inference.sources import Item, count_items, is_live, list_source, read_items
from detkit.inference.tracking import Tracker
from detkit.inference.video import is_video
from detkit.ops.device import pick_device
from detkit.structures import Detections
from detkit.tasks.predictions.names import OutputNames
from detkit.tasks.predictions.outputs import Outputs
from detkit.tasks.predictions.records import Records
from detkit.tasks.runs.run_dir import checkpoint_name, make_run_dir
from detkit.viz.progress import show_progress

logger = logging.getLogger(__name__)


def _as_list(value: Any) -> Any:
    """Return the outputs that a value of ``save`` names: one, several, or none."""
    if value is None or value == "none":
        return []
    return [value] if isinstance(value, str) else value


Score = Annotated[float, Field(ge=0, le=1)]
Save = Annotated[list[Literal["images", "video", "txt", "coco", "crops"]], BeforeValidator(_as_list)]


class PredictConfig(ViewsConfig):
    """Keys of ``configs/predict.yaml``."""

    ckpt: Location = location("checkpoint to load")
    source: Location | list[Location] = field(
        "image, video, folder, glob pattern, text file of paths, camera, stream, a list of these, or - for stdin",
        "a path, a URL, the number of a camera, or a list of these",
    )
    recursive: bool = field("also use the subfolders of a folder")
    image_size: ImageSize | None = image_size_field()
    batch_size: Literal["auto"] | Annotated[int, Field(ge=1, le=MAX_BATCH)] = field(
        "images per forward pass; auto: 4 on a CPU, 16 on a GPU, 1 for streams",
        "a whole number, 1 or more, or auto",
        most=MAX_BATCH,
    )
    amp: Amp = field("precision of the network; auto uses bf16 where the device supports it")
    rect: bool = field("letterbox each image to the smallest frame that holds it instead of a square")
    score: Score | dict[str | int, Score] = field(
        "minimum score of a detection, or one per class, with default for the others",
        "a number from 0 to 1, or a mapping of class names to such numbers",
    )
    iou: float = number("IoU threshold of non-maximum suppression", 0, 1)
    max_det: int = whole("maximum number of detections per image", 1, 100_000)
    multi_label: bool = field(
        "report a box once for each of its classes above the score, instead of for its best class only"
    )
    classes: list[str | int] | None = field("classes to report", "a list of class names or indices")
    class_agnostic: bool = field("suppress a box whatever the class of the higher-scoring one")
    save: Save = field(
        "what to write beside predictions.json and predictions.csv", "a list of images, video, txt, coco and crops"
    )
    track: Literal["bytetrack", "sort", "ocsort"] | None = field("tracker of the objects in videos and streams")


def run(cfg: PredictConfig) -> Path:
    """Detect objects in ``cfg.source`` and write what ``cfg.save`` names, ``predictions.json`` and ``predictions.csv``.

    Files that cannot be read or written are skipped and reported at the end. If the task ends early,
    ``predictions.json`` holds the results up to then.

    Returns:
        the run directory; ``predictions.json`` in it is a list with, for each image or frame, ``file``, ``height``,
        ``width``, for videos ``frame``, and ``detections``, each with ``box`` (xyxy in pixels), ``score``, ``label``,
        ``name`` and, with ``cfg.track``, ``track``.

    Raises:
        DetkitError: the checkpoint or an image cannot be read, or an image cannot be written.
        OSError: ``predictions.json`` cannot be written.
    """
    model = load_model(str(cfg.ckpt), pick_device(cfg.device), cfg.amp)
    items: list[Item] = [*dict.fromkeys(list_source(cfg.source, cfg.recursive))]  # a file named twice has one result
    _check_tracking(cfg, items)
    threads = reader_threads(cfg.workers)
    predictor = _make_predictor(cfg, model, is_live(items), threads)
    run_dir = make_run_dir(cfg, "predict", checkpoint_name(cfg.ckpt))
    failures = Failures()
    names = OutputNames(items)
    with (
        Records(run_dir, model.class_names, "coco" in cfg.save, lambda: _delete_image(run_dir)) as records,
        Outputs(run_dir, names, cfg.save, model.class_names, threads, failures.add) as outputs,
        show_progress("prediction", count_items(items), unit="images") as bar,
    ):
        try:
            with closing(predictor.run(read_items(items), lambda _, error: failures.add(str(error)))) as frames:
                for frame, found in _track(frames, cfg.track):
                    records.write(frame, found)
                    outputs.write(frame, found)
                    if frame.index is None:
                        logger.info("%s: %s", printable(Path(frame.name).name), found.counts())
                    bar.advance()
        finally:
            logger.info("%d images and frames: %s", records.count, bar.rate())
    logger.info("predictions.json and the other results are in %s", run_dir)
    failures.raise_first()
    return run_dir


class Failures:
    """Messages about files that could not be read or written: each is logged, the first one is kept."""

    def __init__(self) -> None:
        self.first = ""
        self.count = 0

    def add(self, message: str) -> None:
        """Log a message."""
        logger.warning(message)
        self.first = self.first or message
        self.count += 1

    def raise_first(self) -> None:
        """Raise a DetkitError with the first message, if there was any."""
        if self.count:
            raise DetkitError(self.first + (f" (and {self.count - 1} more)" if self.count > 1 else ""))


def _make_predictor(cfg: PredictConfig, model: Model, live: bool, threads: int) -> Predictor:
    auto = 1 if live else auto_batch_size(model.device)
    score: Any = cfg.score
    return make_predictor(
        model,
        score,
        cfg.iou,
        cfg.max_det,
        image_size=cfg.image_size,
        multi_label=cfg.multi_label,
        classes=cfg.classes,
        class_agnostic=cfg.class_agnostic,
        batch_size=auto if cfg.batch_size == "auto" else cfg.batch_size,
        rect=cfg.rect,
        tiles=cfg.tiles,
        overlap=cfg.overlap,
        tta=cfg.tta,
        merge=cfg.merge,
        threads=0 if live else threads,  # what is read ahead of a live stream would be stale
    )


def _check_tracking(cfg: PredictConfig, items: Sequence[Item]) -> None:
    """Check, before anything is predicted, that there is something to track and a tracker."""
    if cfg.track is not None:
        Tracker(cfg.track)
        if not any(is_video(item.name) if isinstance(item, Path) else True for item in items):
            raise DetkitError(f"track={cfg.track} needs a video or stream as source: images are not tracked")


def _track(frames: Iterable[tuple[Frame, Detections]], name: str | None) -> Iterator[tuple[Frame, Detections]]:
    """Yield frames with their detections, tracked within each video if ``name`` is that of a tracker."""
    video, tracker = None, None
    for frame, found in frames:
        if name is not None and frame.index is not None:
            if frame.name != video or frame.index == 0:
                video, tracker = frame.name, Tracker(name, frame.fps)
            assert tracker is not None
            found = tracker.update(found)
        yield frame, found


def _delete_image(run_dir: Path) -> bool:
    """Delete a drawn image to make room on a full disk; return whether there was one."""
    image = next(run_dir.rglob("*.jpg"), None)
    if image is not None:
        image.unlink(missing_ok=True)
    return image is not None
