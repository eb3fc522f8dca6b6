"""Images, label files, crops and videos of predictions, written in threads beside the network."""

import math
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detkit.inference.frames import Frame
from detkit.ops.background import Background
from detkit.structures import Detections
from detkit.tasks.predictions.names import OutputNames, class_folders
from detkit.tasks.predictions.videos import AnnotatedVideos
from detkit.viz.drawing import save_drawn, save_image


class Outputs:
    """Writes what ``predict save=...`` names; used as a context, at whose end everything is written.

    Args:
        run_dir: an existing folder.
        names: of the files.
        save: of images, video, txt and crops.
        class_names: of the model.
        threads: that draw and write.
        on_error: called with a message about a file that could not be written.
    """

    def __init__(
        self,
        run_dir: Path,
        names: OutputNames,
        save: Collection[str],
        class_names: Sequence[str],
        threads: int,
        on_error: Callable[[str], None],
    ) -> None:
        self.run_dir, self.names, self.save = run_dir, names, save
        self.folders = class_folders(class_names)
        self.images = Background(threads, on_error)
        self.videos = Background(min(threads, 1), on_error)  # one thread, as frames are written in order
        self.annotated = AnnotatedVideos()

    def write(self, frame: Frame, found: Detections) -> None:
        """Write all of a frame, soon."""
        name = self.names.frame(frame)
        if frame.index is None and "images" in self.save:
            path = self.run_dir / f"{name}.jpg"
            self.images.submit(path, save_drawn, path, frame.image, found)
        if frame.index is not None and "video" in self.save:
            path = self.run_dir / f"{self.names.source(frame)}.mp4"
            self.videos.submit(path, self.annotated.write, path, frame, found)
        if "txt" in self.save:
            path = self.run_dir / "labels" / f"{name}.txt"
            self.images.submit(path, write_txt, path, found)
        if "crops" in self.save and len(found):
            folder = self.run_dir / "crops"
            self.images.submit(folder, write_crops, folder, name, self.folders, frame, found)

    def __enter__(self) -> "Outputs":
        return self

    def __exit__(self, *error: Any) -> None:
        try:
            self.images.__exit__(*error)
        finally:
            self.videos.__exit__(*error)
            self.videos.guard(self.annotated.path or self.run_dir, self.annotated.close)


def write_txt(path: Path, found: Detections) -> None:
    """Write a YOLO label file: class index, centre x, y, width and height relative to the image, and score."""
    height, width = found.size
    lines = []
    columns = zip(found.labels.tolist(), found.boxes.double().tolist(), found.scores.tolist(), strict=True)
    for label, (x1, y1, x2, y2), score in columns:
        box = ((x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height)
        lines.append(" ".join((str(label), *(f"{value:.6f}" for value in box), f"{score:.6f}")) + "\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(lines), encoding="utf-8")


def write_crops(folder: Path, name: str, class_folders: Sequence[str], frame: Frame, found: Detections) -> None:
    """Write each object as ``CLASS/NAME_K.jpg``, K being its position among those of the image."""
    assert frame.image is not None
    height, width = found.size
    for k, (label, (x1, y1, x2, y2)) in enumerate(zip(found.labels.tolist(), found.boxes.tolist(), strict=True)):
        left, top = max(math.floor(x1), 0), max(math.floor(y1), 0)
        crop = frame.image[top : min(math.ceil(y2), height), left : min(math.ceil(x2), width)]
        if crop.size:
            path = folder / class_folders[label] / f"{name}_{k}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            save_image(np.ascontiguousarray(crop), path)
