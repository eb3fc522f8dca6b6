"""Views of a frame, each letterboxed for the network: the whole image, its tiles, their scaled and mirrored copies."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from detkit.errors import DetkitError
from detkit.ops.boxes import unletterbox
from detkit.ops.geometry import image_windows, rect_frames
from detkit.ops.image import Letterbox
from detkit.ops.nms import Selection

MAX_VIEW_PIXELS = 2**29  # of the tiles of one image, which takes 1.6 GB
TTA_SCALES = (1.0, 0.83, 1.25)  # of the input's side; the second one is mirrored


@dataclass(frozen=True)
class ViewSettings:
    """Which views of a frame the network sees.

    Attributes:
        image_size: side of the letterboxed square in pixels.
        max_stride: sides are multiples of it.
        rect: letterbox to the smallest frame that holds the image instead of the square.
        tiles: side of the tiles in pixels of the image; None for the whole image only.
        overlap: minimum overlap of adjacent tiles, as a fraction of ``tiles``.
        tta: test-time augmentation: also mirrored and at other scales.
    """

    image_size: int
    max_stride: int = 32
    rect: bool = False
    tiles: int | None = None
    overlap: float = 0.2
    tta: bool = False


@dataclass(frozen=True)
class View:
    """An input of the network, and the mapping of its boxes to the frame.

    ``x_view = x_frame * scale + offset`` per axis, then mirrored in ``width`` if ``flipped``.

    Attributes:
        pixels: (H, W, 3) uint8 RGB.
        scale, offset: (x, y) each.
        size: (height, width) of the frame.
        flipped: whether it is mirrored horizontally.
    """

    pixels: np.ndarray
    scale: tuple[float, float]
    offset: tuple[float, float]
    size: tuple[int, int]
    flipped: bool = False

    @property
    def window(self) -> tuple[float, float, float, float]:
        """The part of the frame that it shows, xyxy in pixels."""
        (sx, sy), (ox, oy) = self.scale, self.offset
        height, width = self.pixels.shape[:2]
        return -ox / sx, -oy / sy, (width - ox) / sx, (height - oy) / sy

    def to_frame(self, found: Selection) -> Selection:
        """Map detections to pixels of the frame, clipped to it."""
        xyxy, scores, labels = found
        if self.flipped:
            width = self.pixels.shape[1]
            xyxy = torch.stack((width - xyxy[:, 2], xyxy[:, 1], width - xyxy[:, 0], xyxy[:, 3]), 1)
        return unletterbox(xyxy, self.scale, self.offset, self.size), scores, labels


def make_views(image: np.ndarray, settings: ViewSettings) -> list[View]:
    """Return the views of an (H, W, 3) uint8 RGB image: the whole image first, then its tiles.

    An image that is not larger than a tile has none.

    Raises:
        DetkitError: the tiles would take too much memory.
    """
    height, width = image.shape[:2]
    windows: Sequence[Sequence[int]] = ((0, 0, width, height),)
    if settings.tiles is not None and max(height, width) > settings.tiles:
        tiles = image_windows((height, width), settings.tiles, settings.overlap).tolist()
        if len(tiles) * settings.image_size**2 > MAX_VIEW_PIXELS:
            raise DetkitError(
                f"tiles={settings.tiles}: an image of {width}x{height} pixels has {len(tiles)} tiles, more than fit "
                "into memory; use larger tiles or a smaller image_size"
            )
        windows = (*windows, *tiles)
    views = []
    for x1, y1, x2, y2 in windows:
        for k, scale in enumerate(TTA_SCALES if settings.tta else (1.0,)):
            view = _letterbox(image[y1:y2, x1:x2], settings, scale)
            (sx, sy), (left, top) = view.scale, view.offset
            view = replace(view, offset=(left - x1 * sx, top - y1 * sy), size=(height, width))
            views.append(_flip(view) if k == 1 else view)
    return views


def frame_shape(size: tuple[int, int], settings: ViewSettings, scale: float = 1.0) -> tuple[int, int]:
    """Return height and width of the letterboxed input of an image of ``size`` (height, width)."""
    stride = settings.max_stride
    side = max(round(settings.image_size * scale / stride), 1) * stride
    if not settings.rect:
        return side, side
    height, width = rect_frames(np.array((size,)), side, stride)[0].tolist()
    return height, width


def _letterbox(image: np.ndarray, settings: ViewSettings, scale: float) -> View:
    size = image.shape[0], image.shape[1]
    box = Letterbox.fit(size, frame_shape(size, settings, scale))
    return View(box.apply(image), box.scale, box.offset, size)


def _flip(view: View) -> View:
    return replace(view, pixels=np.ascontiguousarray(view.pixels[:, ::-1]), flipped=True)
