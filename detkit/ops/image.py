"""Reading pictures and fitting them into the network's input.

A picture's path may lead into a tar file: SHARD.tar/OFFSET+SIZE/NAME, bytes counted from the start of the shard.
"""

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import cv2
import numpy as np

from detkit.errors import DetkitError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
FILL = 114  # the gray that YOLO models see around an image
_IN_TAR = re.compile(r"(.+\.tar)/(\d+)\+(\d+)/[^/]+", re.DOTALL)


def tar_member(path: str | Path) -> tuple[str, int, int] | None:
    """Return the tar file that a path leads into, and the first byte and size of the picture there; None for a file."""
    match = _IN_TAR.fullmatch(str(path))
    return (match[1], int(match[2]), int(match[3])) if match else None


def open_picture(path: str | Path) -> BinaryIO:
    """Open a picture's bytes for reading, wherever they are.

    Raises:
        OSError: the file cannot be opened.
    """
    member = tar_member(path)
    if member is None:
        return open(path, "rb")
    shard, offset, size = member
    with open(shard, "rb") as file:
        file.seek(offset)
        return io.BytesIO(file.read(size))


def read_bytes(path: Path) -> np.ndarray:
    """Return a picture's bytes as they are stored, (K,) uint8.

    Raises:
        DetkitError: the file is missing.
    """
    member = tar_member(path)
    try:
        if member is None:
            return np.fromfile(path, np.uint8)
        shard, offset, size = member
        return np.fromfile(shard, np.uint8, size, offset=offset)
    except OSError as error:
        raise DetkitError(f"cannot read image {path}: {error.strerror or error}") from None


def read_image(path: Path) -> np.ndarray:
    """Decode a file to (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    Raises:
        DetkitError: the file is missing or is no image that OpenCV can read.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: np.ndarray, path: Path) -> np.ndarray:
    """Decode the bytes (K,) uint8 of the picture at ``path``, as ``read_image`` does.

    Raises:
        DetkitError: they are no image that OpenCV can read.
    """
    try:
        image = cv2.imdecode(data, cv2.IMREAD_COLOR_RGB) if data.size else None
    except cv2.error:  # a declared size beyond OpenCV's limit
        image = None
    if image is None:
        raise DetkitError(
            f"cannot read image {path}: it is empty, truncated, too large or not an image; replace or remove it"
        )
    return image


def resize(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 bilinearly; by area where it shrinks to less than half, as bilinear would skip pixels."""
    shrinks = width < 0.5 * image.shape[1] or height < 0.5 * image.shape[0]
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


@dataclass(frozen=True)
class Letterbox:
    """Where an image lands in a fixed frame: ``x_frame = x_image * scale + offset``, per axis in pixels.

    Attributes:
        height, width: size of the resized image.
        left, top: padding before it; right, bottom: after it.
        scale: (x, y); offset: (x, y).
    """

    height: int
    width: int
    left: int
    top: int
    right: int
    bottom: int
    scale: tuple[float, float]
    offset: tuple[float, float]

    @classmethod
    def fit(cls, size: tuple[int, int], frame: tuple[int, int]) -> "Letterbox":
        """Fit an image of ``size`` (height, width) into ``frame`` (height, width), centred, its aspect kept."""
        (h, w), (frame_h, frame_w) = size, frame
        ratio = min(frame_h / h, frame_w / w)
        new_h, new_w = max(round(h * ratio), 1), max(round(w * ratio), 1)
        pad_h, pad_w = (frame_h - new_h) / 2, (frame_w - new_w) / 2
        top, left = round(pad_h - 0.1), round(pad_w - 0.1)
        bottom, right = round(pad_h + 0.1), round(pad_w + 0.1)
        return cls(new_h, new_w, left, top, right, bottom, (new_w / w, new_h / h), (left, top))

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return (frame height, frame width, 3) uint8: the image resized, FILL around it."""
        if image.shape[:2] != (self.height, self.width):
            image = resize(image, self.width, self.height)
        sides = (self.top, self.bottom, self.left, self.right)
        return cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=(FILL, FILL, FILL)) if any(sides) else image
