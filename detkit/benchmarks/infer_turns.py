"""detkit's side of ``task=infer``: a variant of a model, and its turns, in a process of its own."""

import itertools
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detkit.benchmarks.common import BenchmarkConfig, time_once
from detkit.config import import_plugins
from detkit.data.loader import reader_threads
from detkit.engine.checkpoint import build_from_checkpoint
from detkit.engine.evaluator import EVALUATION
from detkit.errors import DetkitError
from detkit.export.runtime import load_model
from detkit.inference.frames import Frame
from detkit.inference.model import Model
from detkit.inference.predictor import auto_batch_size, make_predictor
from detkit.inference.views import View, make_views
from detkit.models.detector import Detector, build_detector
from detkit.ops.background import Background
from detkit.ops.device import pick_device
from detkit.ops.image import read_image
from detkit.ops.nms import Selection, non_max_suppression
from detkit.ops.precision import seed_everything
from detkit.viz.drawing import save_drawn


@dataclass(frozen=True)
class Variant:
    """A form of the model.

    Attributes:
        fused: deployed (``Detector.fuse``).
        channels_last: in memory.
        amp: precision, as of the key ``amp``.
        compiled: by torch.compile.
        file: an exported file that is run instead of the detector.
    """

    name: str
    fused: bool = True
    channels_last: bool = True
    amp: str = "off"
    compiled: bool = False
    file: Path | None = None


def make_detector(cfg: BenchmarkConfig) -> Detector:
    """Return the detector of ``cfg.ckpt``, or a new one, with the same weights in every process."""
    import_plugins(cfg.plugins)
    seed_everything(cfg.seed)
    if cfg.ckpt is not None:
        return build_from_checkpoint(str(cfg.ckpt)).eval()
    return build_detector(cfg.as_dict(), [str(k) for k in range(cfg.num_classes)]).eval()


def make_model(cfg: BenchmarkConfig, variant: Variant) -> Model:
    """Return what prediction runs."""
    device = pick_device(cfg.device)
    if variant.file is not None:
        return load_model(variant.file, device, variant.amp)
    detector = make_detector(cfg).to(device)
    if variant.fused:
        detector = detector.fuse()
    if not variant.channels_last:
        detector = detector.to(memory_format=torch.contiguous_format)
        detector.register_forward_pre_hook(lambda _, args: (args[0].contiguous(),))
    model = detector.as_model(variant.amp)
    if variant.compiled:
        model.detector = torch.compile(model.detector)
    return model


def make_candidates(batch: tuple[int, ...], side: int) -> tuple[Tensor, Tensor]:
    """Return random boxes (B, A, 4) xyxy in a square and scores (B, A, C).

    Args:
        batch: B, A, C, and the number of scores above 0.001 per image.
        side: of the square in pixels.
    """
    images, points, classes, candidates = batch
    centre = torch.rand(images, points, 2) * side * 0.9
    extent = 8 + torch.rand(images, points, 2) * side / 3
    scores = torch.rand(images, points * classes) * 0.0009
    for row in scores:
        row[torch.randperm(len(row))[:candidates]] = 0.002 + torch.rand(candidates) ** 3 * 0.9
    return torch.cat((centre - extent / 2, centre + extent / 2), -1), scores.view(images, points, classes)


class Turns:
    """Measures a model; each turn returns seconds.

    Args:
        model: to run.
        cfg: has the image size.
        folder: images to predict, in turn.
        batch: images, points, classes and candidates per image of the batch for postprocessing.
    """

    def __init__(self, model: Model, cfg: BenchmarkConfig, folder: Path, batch: tuple[int, ...]) -> None:
        self.model: Any = model
        self.device = model.device
        self.size = cfg.image_size
        self.files = sorted(folder.iterdir())
        self.paths = itertools.cycle(self.files)
        self.threads = reader_threads("auto")
        self.batch = batch
        self.candidates: tuple[Tensor, Tensor] | None = None  # of a batch, made when it is asked for

    def measure(self, turn: str) -> dict[str, float]:
        """Return the seconds of a turn: "folder" and "nms", otherwise a batch size, whose images are all timed."""
        if turn == "folder":
            return {"folder": time_once(self._folder, self.device) / len(self.files)}
        if turn == "nms":
            if self.candidates is None:
                torch.manual_seed(0)
                boxes, scores = make_candidates(self.batch, self.size)
                self.candidates = boxes.to(self.device), scores.to(self.device)
            return {"nms": time_once(self._suppress, self.device)}
        return self._predict(int(turn))

    def _predict(self, batch: int) -> dict[str, float]:
        """Time each stage of a batch by itself, and the same images from files to detections."""
        chosen = list(itertools.islice(self.paths, batch))
        predictor = make_predictor(
            self.model, image_size=self.size, batch_size=batch, threads=self.threads if batch > 1 else 0
        )
        seconds = {"predict": time_once(lambda: list(predictor.run(_frames(chosen))), self.device)}
        views: list[View] = []
        inputs: list[Tensor] = []

        def preprocess() -> None:
            views.extend(make_views(read_image(path), predictor.views)[0] for path in chosen)
            pixels = torch.from_numpy(np.stack([view.pixels for view in views]))
            inputs.append(pixels.to(self.device).permute(0, 3, 1, 2))

        seconds["preprocess"] = time_once(preprocess, self.device)
        if getattr(self.model, "has_nms", False):
            detect = self.model.detect
            return seconds | {"network": time_once(lambda: detect(inputs[0], predictor.thresholds), self.device)}
        outputs: list[tuple[Tensor, Tensor]] = []
        seconds["network"] = time_once(lambda: outputs.append(self.model.network(inputs[0])), self.device)

        def postprocess() -> list[Selection]:
            selected = non_max_suppression(*outputs[0], predictor.thresholds)
            return [view.to_frame(found) for view, found in zip(views, selected, strict=True)]

        return seconds | {"postprocess": time_once(postprocess, self.device)}

    def _folder(self) -> None:
        """Predict all images and write them with boxes as ``predict`` does, beside the network."""
        predictor = make_predictor(
            self.model, image_size=self.size, batch_size=auto_batch_size(self.device), threads=self.threads
        )
        errors: list[str] = []
        with tempfile.TemporaryDirectory() as written, Background(self.threads, errors.append) as background:
            for frame, found in predictor.run(_frames(self.files)):
                path = Path(written) / f"{Path(frame.name).name}.jpg"
                background.submit(path, save_drawn, path, frame.image, found)
        if errors:
            raise DetkitError(errors[0])

    def _suppress(self) -> list[Selection]:
        assert self.candidates is not None
        return non_max_suppression(*self.candidates, EVALUATION)


def _frames(paths: list[Path]) -> Iterator[Frame]:
    return (Frame(path, name=str(path)) for path in paths)


def serve_turns(pipe: Connection, cfg: BenchmarkConfig, variant: Variant, folder: Path, batch: tuple[int, ...]) -> None:
    """Load a variant, send a first message, and measure a turn for every line received."""
    turns = Turns(make_model(cfg, variant), cfg, folder, batch)
    if variant.compiled:
        turns.measure("1")
    pipe.send({})
    while line := pipe.recv():
        pipe.send(turns.measure(line))
