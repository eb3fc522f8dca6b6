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

from detkit.errors import UnreadableImage

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}
FILL = 114  # the gray that YOLO models see around an image
# OpenCV's flags for a reduced decoding carry no order of colours: IMREAD_COLOR_RGB is added to them.
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

_IN_TAR = re.compile(r"(.+\.tar)/([0-9]{1,18})\+([0-9]{1,18})/[^/]+", re.DOTALL)


def tar_member(path: str | Path) -> tuple[str, int, int] | None:
    """Return the tar file that a path leads into, and the first byte and size of the picture there; None for a file."""
    match = _IN_TAR.fullmatch(str(path))
    return (match[1], int(match[2]), int(match[3])) if match else None


def picture_file(path: str | Path) -> str:
    """Return the file that holds a picture: itself, or the tar file that its path leads into."""
    member = tar_member(path)
    return str(path) if member is None else member[0]


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
        UnreadableImage: the file is missing.
    """
    member = tar_member(path)
    try:
        if member is None:
            return np.fromfile(path, np.uint8)
        shard, offset, size = member
        return np.fromfile(shard, np.uint8, size, offset=offset)
    except OSError as error:
        raise UnreadableImage(f"cannot read image {path}: {error.strerror or error}") from None


def read_image(path: Path) -> np.ndarray:
    """Decode a file to (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    Raises:
        UnreadableImage: the file is missing or is no image that OpenCV can read.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: np.ndarray, path: Path, reduce: int = 1) -> np.ndarray:
    """Decode the bytes (K,) uint8 of the picture at ``path``, as ``read_image`` does.

    Args:
        reduce: 1, 2, 4 or 8: a JPEG is decoded at this fraction of its size, rounded up, which takes less time; files
            of other kinds come as they are.

    Raises:
        UnreadableImage: they are no image that OpenCV can read.
    """
    try:
        is_jpeg = data[:2].tobytes() == b"\xff\xd8"
        flags = cv2.IMREAD_COLOR_RGB | (_REDUCED[reduce] if is_jpeg else 0)
        image = cv2.imdecode(data, flags) if data.size else None
    except cv2.error:  # a declared size beyond OpenCV's limit
        image = None
    if image is None:
        raise UnreadableImage(
            f"cannot read image {path}: it is empty, truncated, too large or not an image; replace or remove it"
        )
    return image


def shrunk_sizes(sizes: np.ndarray, longest: int) -> np.ndarray:
    """Return (N, 2) heights and widths with the longer side brought down to ``longest``; smaller ones stay."""
    ratio = np.minimum(longest / sizes.max(1, keepdims=True), 1.0)
    return np.maximum(np.rint(sizes * ratio), 1).astype(np.int64)


def decode_shrunk(
    data: np.ndarray, path: Path, size: tuple[int, int], longest: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a picture's bytes as ``read_image`` does and shrink it to ``shrunk_sizes``.

    A JPEG much larger than that is decoded at a half, a quarter or an eighth of its size.

    Args:
        size: (height, width) that the file is said to have, upright.
        longest: longer side of the result at most, pixels.

    Returns:
        the picture, and the file's (height, width): ``size`` where that is right.
    """
    reduce = next(r for r in (8, 4, 2, 1) if max(size) >= r * longest or r == 1)
    image = decode_image(data, path, reduce)
    found = image.shape[:2]
    if found in (size, tuple(-(-n // reduce) for n in size)):
        if reduce > 1 and found != size:  # the last row and column may stand for less than half a pixel
            image = image[: max(round(size[0] / reduce), 1), : max(round(size[1] / reduce), 1)]
        found = size
    elif reduce > 1:  # the label lies: what size has the file?
        image = decode_image(data, path)
        found = image.shape[:2]
    height, width = shrunk_sizes(np.array((found,)), longest)[0].tolist()
    return (image if image.shape[:2] == (height, width) else resize(image, width, height)), found


def resize(image: np.ndarray, width: int, height: int, output: np.ndarray | None = None) -> np.ndarray:
    """Resize (H, W, 3) uint8 bilinearly; by area where it shrinks to less than half, as bilinear would skip pixels.

    The result is drawn into ``output`` (height, width, 3) where that is given; it may be a part of a larger picture.
    """
    shrinks = width < 0.5 * image.shape[1] or height < 0.5 * image.shape[0]
    return cv2.resize(image, (width, height), output, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


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
