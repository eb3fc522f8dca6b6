"""Prediction: frames in, Detections out, for any runtime."""

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, TypedDict, Unpack

import numpy as np
import torch

from detkit.config.fields import is_number, is_whole
from detkit.errors import DetkitError, UnreadableImage, shorten
from detkit.inference.frames import Frame
from detkit.inference.merge import MERGES, merge_views
from detkit.inference.model import Model
from detkit.inference.prefetch import prefetch
from detkit.inference.views import View, ViewSettings, frame_shape, make_views
from detkit.ops.image import read_image
from detkit.ops.nms import Selection, Thresholds
from detkit.structures import Detections, find_label

LEAST = {"max_det": 1, "image_size": 1, "batch_size": 1, "tiles": 32, "threads": 0}  # of options
CPU_BATCH, GPU_BATCH = 4, 16  # of auto_batch_size
FRAMES_IN_FLIGHT = 2  # batches whose frames are read ahead, or wait for others of their shape


@dataclass
class _Pending:
    """A frame whose views are being predicted."""

    frame: Frame
    views: list[View]
    found: dict[int, Selection] = field(default_factory=dict)


class Predictor:
    """Runs a model on frames: they are read and letterboxed in threads, batched, and their boxes mapped back.

    Args:
        model: PyTorch's or an exported one.
        thresholds: of the detections.
        views: what the network sees of a frame.
        batch_size: views per forward pass.
        merge: how detections of several views become one: nms, nmm or wbf (``inference/merge.py``).
        threads: that read frames ahead; 0 reads each when it is needed.

    Raises:
        DetkitError: the model takes only images of another size.
    """

    def __init__(
        self,
        model: Model,
        thresholds: Thresholds,
        views: ViewSettings,
        *,
        batch_size: int = 1,
        merge: str = "nms",
        threads: int = 0,
    ) -> None:
        if merge not in MERGES:
            raise DetkitError(f"merge={shorten(merge)} must be one of {', '.join(MERGES)}")
        fixed = model.fixed_shape[1:]
        asked = frame_shape((1, 1), views)
        if any(have is not None and have != want for have, want in zip(fixed, asked, strict=True)):
            raise DetkitError(
                f"image_size={views.image_size}: the exported model only takes {fixed[0]}x{fixed[1]} pixels"
            )
        if fixed != (None, None) and (views.rect or views.tta):
            raise DetkitError("rect and tta need inputs of several sizes: export the model with dynamic sides")
        self.model = model
        self.thresholds = thresholds
        self.views = views
        self.batch_size = batch_size
        self.merge = merge
        self.threads = threads

    def run(
        self, frames: Iterable[Frame], on_error: Callable[[Frame, UnreadableImage], None] | None = None
    ) -> Generator[tuple[Frame, Detections], None, None]:
        """Yield each frame, with its ``image``, and its detections, in order.

        Args:
            frames: the source; memory does not grow with its length.
            on_error: called with a frame that cannot be read, which is then left out; None: the error is raised.
        """
        pending: list[_Pending] = []  # in order
        waiting: dict[tuple[int, ...], list[tuple[_Pending, int]]] = {}  # views by shape
        # Frames of many views are large, and fill batches by themselves.
        in_flight = 0 if self.views.tiles is not None or self.views.tta else FRAMES_IN_FLIGHT * self.batch_size
        with closing(prefetch(self._prepare, frames, self.threads, max(in_flight, 1))) as prepared:
            for frame, future in prepared:
                try:
                    views = future.result()
                except UnreadableImage as error:
                    if on_error is None:
                        raise
                    on_error(frame, error)
                    continue
                pending.append(_Pending(frame, views))
                for k, view in enumerate(views):
                    group = waiting.setdefault(view.pixels.shape, [])
                    group.append((pending[-1], k))
                    if len(group) == self.batch_size:
                        self._detect(waiting.pop(view.pixels.shape))
                if len(pending) > in_flight:
                    self._detect_all(waiting)
                yield from self._finished(pending)
        self._detect_all(waiting)
        yield from self._finished(pending)

    def _prepare(self, frame: Frame) -> list[View]:
        if frame.error is not None:
            raise frame.error
        if frame.image is None:
            assert frame.path is not None
            frame.image = read_image(frame.path)
        return make_views(frame.image, self.views)

    def _detect_all(self, waiting: dict[tuple[int, ...], list[tuple[_Pending, int]]]) -> None:
        for group in waiting.values():
            self._detect(group)
        waiting.clear()

    def _detect(self, group: Sequence[tuple[_Pending, int]]) -> None:
        """Run the model on views of one shape and store what it found."""
        pixels = np.stack([pending.views[k].pixels for pending, k in group])
        images = torch.from_numpy(pixels).to(self.model.device).permute(0, 3, 1, 2)  # channels-last
        for (pending, k), found in zip(group, self.model.detect(images, self.thresholds), strict=True):
            boxes, scores, labels = pending.views[k].to_frame(found)
            pending.found[k] = boxes.cpu(), scores.cpu(), labels.cpu()

    def _finished(self, pending: list[_Pending]) -> Iterator[tuple[Frame, Detections]]:
        """Remove the first frames whose views are all predicted, and yield them with their detections."""
        while pending and len(pending[0].found) == len(pending[0].views):
            done = pending.pop(0)
            found = [done.found[k] for k in range(len(done.views))]
            windows = [view.window for view in done.views]
            frame, size = done.frame, done.views[0].size
            merged = merge_views(found, windows, size, self.merge, self.thresholds)
            yield frame, Detections(*merged, self.model.class_names, size, frame.path, frame.index)


class PredictOptions(TypedDict, total=False):
    """Options of prediction, with their defaults.

    Attributes:
        image_size: side of the letterboxed square in pixels; by default the one used in training.
        multi_label: report a box once for each of its classes above ``score``, instead of for its best class only.
        classes: names or indices of the classes to report; None for all.
        class_agnostic: suppress a box whatever the class of the higher-scoring one.
        batch_size: views per forward pass (1).
        rect: letterbox to the smallest frame that holds an image instead of a square.
        tiles: also predict tiles of this many pixels of images that are larger; None for whole images only.
        overlap: minimum overlap of adjacent tiles as a fraction of their side (0.2).
        tta: test-time augmentation: also predict mirrored and at other scales.
        merge: how detections of tiles or ``tta`` are merged: nms, nmm or wbf; by default nmm for tiles alone, else nms.
        threads: that read images ahead (0: none).
    """

    image_size: int | None
    multi_label: bool
    classes: Sequence[str | int] | None
    class_agnostic: bool
    batch_size: int
    rect: bool
    tiles: int | None
    overlap: float
    tta: bool
    merge: str | None
    threads: int


def make_predictor(
    model: Model,
    score: float | Mapping[str, float] = 0.25,
    iou: float = 0.7,
    max_det: int = 300,
    **options: Unpack[PredictOptions],
) -> Predictor:
    """Return a predictor for values that users give.

    Args:
        model: what to run.
        score: minimum score (exclusive); a mapping sets it by class name, ``default`` for the others.
        iou: suppress a box if its IoU with a higher-scoring box of its class exceeds this.
        max_det: maximum number of objects per image.
        **options: see PredictOptions.

    Raises:
        DetkitError: a value is out of range, or a class is unknown.
    """
    if not is_number(iou, 0, 1):
        raise DetkitError(f"iou={shorten(iou)} must be a number from 0 to 1")
    if not is_number(options.get("overlap", 0), 0, 0.9):
        raise DetkitError(f"overlap={shorten(options['overlap'])} must be a number from 0 to 0.9")
    wholes: dict[str, Any] = {"max_det": max_det, **{key: value for key, value in options.items() if key in LEAST}}
    for key, value in wholes.items():
        if not is_whole(value, LEAST[key]) and not (value is None and key in ("tiles", "image_size")):
            raise DetkitError(f"{key}={shorten(value)} must be a whole number, {LEAST[key]} or more")
    if (options.get("image_size") or model.image_size) % model.max_stride:
        raise DetkitError(f"image_size={options.get('image_size')} must be a multiple of {model.max_stride}")
    names = options.get("classes")
    classes = None if names is None else tuple(find_label(name, model.class_names, "classes") for name in names)
    thresholds = Thresholds(
        _scores(score, model.class_names),
        float(iou),
        max_det,
        options.get("multi_label", False),
        classes,
        options.get("class_agnostic", False),
    )
    views = ViewSettings(
        options.get("image_size") or model.image_size,
        model.max_stride,
        options.get("rect", False),
        options.get("tiles"),
        options.get("overlap", 0.2),
        options.get("tta", False),
    )
    merge = options.get("merge") or ("nmm" if views.tiles is not None and not views.tta else "nms")
    batch_size, threads = options.get("batch_size", 1), options.get("threads", 0)
    return Predictor(model, thresholds, views, batch_size=batch_size, merge=merge, threads=threads)


def auto_batch_size(device: torch.device) -> int:
    """Return the number of images per forward pass where nobody sets it."""
    return CPU_BATCH if device.type == "cpu" else GPU_BATCH


def _scores(score: float | Mapping[str, float], class_names: Sequence[str]) -> float | tuple[float, ...]:
    """Return the minimum score, or one per class if ``score`` is a mapping."""
    by_class: Mapping[Any, Any] = score if isinstance(score, Mapping) else {"default": score}
    for name, value in by_class.items():
        if not is_number(value, 0, 1):
            key = f"score.{shorten(name)}" if isinstance(score, Mapping) else "score"
            raise DetkitError(f"{key}={shorten(value)} must be a number from 0 to 1")
    default = float(by_class.get("default", 0.25))
    if not isinstance(score, Mapping):
        return default
    scores = [default] * len(class_names)
    for name, value in score.items():
        if name != "default":
            scores[find_label(name, class_names, "score")] = float(value)
    return tuple(scores)
