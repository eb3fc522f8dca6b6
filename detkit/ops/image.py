"""Reading pictures and fitting them into the network's input.

A picture's path may lead into a tar file: SHARD.tar/OFFSET+SIZE/NAME, bytes counted from the start of the shard.
"""

import errno
import io
import os
import re
import struct
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np
from PIL import Image, ImageOps

from detkit.errors import UnreadableImage
from detkit.ops.files import open_regular

# Pillow's names of the formats that are read, by training and prediction alike; of moving pictures the first frame.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "AVIF")
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif"),
}
# These are decoded by Pillow: OpenCV reads them since 4.11, and leaves out the orientation of an AVIF.
BY_PILLOW = ("GIF", "AVIF")
# What Pillow's plugins raise when they parse nonsense.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
                 ZeroDivisionError, EOFError, MemoryError, struct.error, Image.DecompressionBombError)  # fmt: skip
MAX_PIXELS = 178_956_970  # of a picture, where max_pixels says nothing else: 537 MB decoded
MAX_BYTES = 2**30  # of a picture's file
AVIF_PIXELS = 2**28  # libavif's own limit
_MAX_PIXELS_VARIABLE = "DETKIT_MAX_PIXELS"  # in the environment, which processes started later inherit
PAD_VALUE = 114  # the gray that YOLO models see around an image
# OpenCV's flags for a reduced decoding carry no order of colours: IMREAD_COLOR_RGB is added to them.
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

_CONVERT = "which is not read: convert it to JPEG or PNG"
_OTHER_FILES = {  # first bytes, and what a file is that begins with them
    b"\xff\x0a": f"a JPEG XL picture, {_CONVERT}",
    b"\0\0\0\x0cJXL": f"a JPEG XL picture, {_CONVERT}",
    b"\0\0\0\x0cjP": f"a JPEG 2000 picture, {_CONVERT}",
    b"%PDF": f"a PDF, {_CONVERT}",
    b"<": "a web page or xml",
    b"version https://git-lfs": "a pointer of Git LFS: fetch the picture with git lfs pull",
}
_IN_TAR = re.compile(r"(.+\.tar)/([0-9]{1,18})\+([0-9]{1,18})/[^/]+", re.DOTALL)


def is_image(name: str) -> bool:
    """Whether a file name is that of an image, and not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")


def max_pixels() -> int:
    """Return how many pixels a picture may have at most: MAX_PIXELS, or what ``set_max_pixels`` set."""
    return int(os.environ.get(_MAX_PIXELS_VARIABLE, MAX_PIXELS))


def set_max_pixels(count: int) -> None:
    """Set how many pixels a picture may have at most, for this process and those that it starts from now on."""
    os.environ[_MAX_PIXELS_VARIABLE] = str(count)


def tar_member(path: str | Path) -> tuple[str, int, int] | None:
    """Return the tar file that a path leads into, and the first byte and size of the picture there; None for a file."""
    match = _IN_TAR.fullmatch(str(path))
    return (match[1], int(match[2]), int(match[3])) if match else None


def image_file(path: str | Path) -> str:
    """Return the file that holds a picture: itself, or the tar file that its path leads into."""
    member = tar_member(path)
    return str(path) if member is None else member[0]


def open_image(path: str | Path) -> BinaryIO:
    """Open a picture's bytes for reading, wherever they are.

    Raises:
        OSError: the file cannot be opened, or is no regular file.
    """
    member = tar_member(path)
    if member is None:
        return open_regular(path)
    shard, offset, size = member
    with open_regular(shard) as file:
        file.seek(offset)
        return io.BytesIO(file.read(min(size, MAX_BYTES)))


def open_header(file: BinaryIO) -> Image.Image:
    """Read a picture's format, size and mode from its first bytes, whatever it is called; nothing is decoded.

    Raises:
        UnreadableImage: it is not of FORMATS, larger than ``max_pixels()``, or broken; says which, without a name.
    """
    try:
        start = file.read(32)
        file.seek(0)
        opener = next((opener for opener, accepts in _openers() if accepts(start) is True), None)
        with warnings.catch_warnings(action="ignore"):
            image = opener and opener(file, "")
    except Image.DecompressionBombError:  # of a WebP or GIF: Pillow's own limit, which is MAX_PIXELS
        raise UnreadableImage(_beyond(MAX_PIXELS)) from None
    except PILLOW_ERRORS:
        words = _beyond(AVIF_PIXELS) if _avif_pixels(file) > AVIF_PIXELS else "it is truncated or damaged"
        raise UnreadableImage(words) from None
    if image is None:
        raise UnreadableImage(_what_else(start))
    _check_header(image)
    return image


def _check_header(image: Image.Image) -> None:
    """Check that the picture can be decoded, and make Pillow find the orientation where OpenCV does: in EXIF alone.

    Raises:
        UnreadableImage: it cannot.
    """
    width, height = image.size
    if not width * height:
        raise UnreadableImage("it has no pixels")
    if width * height > max_pixels():
        raise UnreadableImage(
            f"it has {width}x{height} pixels, more than the limit max_pixels={max_pixels()}: shrink it, or raise that"
        )
    if image.mode in ("F", "I"):
        raise UnreadableImage("it has 32 bits a channel: convert it to 8 or 16")
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)


def _beyond(limit: int) -> str:
    """Say that a picture has more pixels than ``limit``, which is that of the library that opens it."""
    if max_pixels() <= limit:
        return f"it has more pixels than the limit max_pixels={max_pixels()}: shrink it, or raise that"
    return f"it has more than {limit} pixels, the limit of its format: shrink it, or convert it to JPEG or PNG"


def _avif_pixels(file: BinaryIO) -> int:
    """Return how many pixels an AVIF says it has; 0 for anything else."""
    file.seek(0)
    sizes = re.findall(rb"ispe....(....)(....)", file.read(2**16), re.DOTALL)
    return max((int.from_bytes(width) * int.from_bytes(height) for width, height in sizes), default=0)


@cache
def _openers() -> list[tuple[Any, Any]]:
    """Return Pillow's readers of FORMATS, each with the function that knows its first bytes.

    ``Image.open`` would refuse large pictures by a limit of its own, which belongs to all of the process.
    """
    Image.init()
    return [Image.OPEN[name] for name in FORMATS if name in Image.OPEN]


def _what_else(start: bytes) -> str:
    """Say what the first 32 bytes of a file are that are none of FORMATS."""
    if not start:
        return "it is empty"
    if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif"):
        return f"it is a HEIC picture, {_CONVERT}"
    kind = next((kind for magic, kind in _OTHER_FILES.items() if start.startswith(magic)), None)
    return f"it is {kind or 'no image of the formats that are read (' + ', '.join(FORMATS) + ')'}"


def read_bytes(path: Path) -> np.ndarray:
    """Return a picture's bytes as they are stored, (K,) uint8, read-only.

    Raises:
        UnreadableImage: the file is missing, no regular file, or larger than MAX_BYTES.
    """
    try:
        with open_image(path) as file:
            data = file.read(MAX_BYTES + 1)
        if len(data) > MAX_BYTES:
            raise OSError(errno.EFBIG, f"it is larger than {MAX_BYTES // 2**20} MiB")
    except OSError as error:
        raise UnreadableImage(f"cannot read image {path}: {error.strerror or error}") from None
    return np.frombuffer(data, np.uint8)


def read_image(path: Path) -> np.ndarray:
    """Decode a file to (H, W, 3) uint8 RGB, turned upright by its EXIF orientation.

    Raises:
        UnreadableImage: the file is missing or no image, or larger than ``max_pixels()``.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: np.ndarray, path: Path, reduce: int = 1) -> np.ndarray:
    """Decode the bytes (K,) uint8 of the picture at ``path``, as ``read_image`` does.

    Args:
        reduce: 1, 2, 4 or 8: a JPEG is decoded at this fraction of its size, rounded up, which takes less time; files
            of other kinds come as they are.

    Raises:
        UnreadableImage: they are no image of FORMATS, or one larger than ``max_pixels()``.
    """
    try:
        header = open_header(io.BytesIO(data.data))
        if header.format in BY_PILLOW or header.mode == "LAB":  # whose colours OpenCV shifts
            return np.array(ImageOps.exif_transpose(header).convert("RGB"))
        flags = cv2.IMREAD_COLOR_RGB | (_REDUCED[reduce] if header.format in ("JPEG", "MPO") else 0)
        image = cv2.imdecode(data, flags)
    except UnreadableImage as error:
        raise UnreadableImage(f"cannot read image {path}: {error}") from None
    except (cv2.error, *PILLOW_ERRORS):
        image = None
    if image is None:
        raise UnreadableImage(f"cannot read image {path}: it is truncated or damaged; replace or remove it")
    return image


def fit_sizes(sizes: np.ndarray, longest: int) -> np.ndarray:
    """Return (N, 2) heights and widths with the longer side brought down to ``longest``; smaller ones stay."""
    ratio = np.minimum(longest / sizes.max(1, keepdims=True), 1.0)
    return np.maximum(np.rint(sizes * ratio), 1).astype(np.int64)


def decode_resized(
    data: np.ndarray, path: Path, size: tuple[int, int], longest: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode a picture's bytes as ``read_image`` does and shrink it to ``fit_sizes``.

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
    height, width = fit_sizes(np.array((found,)), longest)[0].tolist()
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
        return (
            cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=(PAD_VALUE, PAD_VALUE, PAD_VALUE))
            if any(sides)
            else image
        )
