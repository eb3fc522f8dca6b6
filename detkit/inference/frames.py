"""Frames: what a source yields and the predictor takes."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from detkit.errors import UnreadableImage


@dataclass
class Frame:
    """An image of a source, decoded or still to be read.

    Attributes:
        path: file of the image or video; None for an array.
        image: (H, W, 3) uint8 RGB; None until it is read from ``path``.
        index: position in its video or stream, from 0; None for an image.
        fps: frame rate of the video; None for an image, or if it is unknown.
        name: what messages and records call it: the path, or the URL or number of a camera.
        error: why there is no image: the video cannot be read, or ended early.
    """

    path: Path | None
    image: np.ndarray | None = None
    index: int | None = None
    fps: float | None = None
    name: str = ""
    error: UnreadableImage | None = None
