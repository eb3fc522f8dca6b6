"""Reading images and letterboxing them for the network's input.

A path may point into a tar file: SHARD.tar/OFFSET+SIZE/NAME, with the offset in bytes from the start of the shard.
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

# Pillow's names of the supported formats, for training and prediction; of animations the first frame is read.
FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "TIFF", "GIF", "AVIF")
IMAGE_SUFFIXES = {
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"),
    *(".png", ".bmp", ".webp", ".tif", ".tiff", ".gif", ".avif"),
}
# Decoded by Pillow: OpenCV reads them only since 4.11, and ignores the orientation of an AVIF.
BY_PILLOW = ("GIF", "AVIF")
# Raised by Pillow's plugins for damaged files.
PILLOW_ERRORS = (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, AttributeError, OverflowError,
                 ZeroDivisionError, EOFError, MemoryError, struct.error, Image.DecompressionBombError)  # fmt: skip
MAX_PIXELS = 178_956_970  # of an image, by default: 537 MB decoded
MAX_BYTES = 2**30  # of an image file
AVIF_PIXELS = 2**28  # libavif's own limit
_MAX_PIXELS_VARIABLE = "DETKIT_MAX_PIXELS"  # an environment variable, inherited by child processes
PAD_VALUE = 114  # the gray padding of YOLO models
# OpenCV's flags for reduced decoding do not set the channel order: IMREAD_COLOR_RGB is added to them.
_REDUCED = {
    1: 0,
    2: cv2.IMREAD_REDUCED_GRAYSCALE_2,
    4: cv2.IMREAD_REDUCED_GRAYSCALE_4,
    8: cv2.IMREAD_REDUCED_GRAYSCALE_8,
}

_CONVERT = "which is not supported: convert it to JPEG or PNG"
_OTHER_FILES = {  # first bytes -> file type
    b"\xff\x0a": f"a JPEG XL image, {_CONVERT}",
    b"\0\0\0\x0cJXL": f"a JPEG XL image, {_CONVERT}",
    b"\0\0\0\x0cjP": f"a JPEG 2000 image, {_CONVERT}",
    b"%PDF": f"a PDF, {_CONVERT}",
    b"<": "HTML or XML",
    b"version https://git-lfs": "a Git LFS pointer: fetch the image with git lfs pull",
}
_IN_TAR = re.compile(r"(.+\.tar)/([0-9]{1,18})\+([0-9]{1,18})/[^/]+", re.DOTALL)


def is_image(name: str) -> bool:
    """Return whether a file name has an image suffix and is not hidden."""
    # Called for every file of a data set: os.path is several times as fast as pathlib.
    suffix, base = os.path.splitext(name)[1], os.path.basename(name)  # noqa: PTH122, PTH119
    return suffix.lower() in IMAGE_SUFFIXES and not base.startswith(".")


def max_pixels() -> int:
    """Return the maximum number of pixels of an image: MAX_PIXELS, or the value set by ``set_max_pixels``."""
    return int(os.environ.get(_MAX_PIXELS_VARIABLE, MAX_PIXELS))


def set_max_pixels(count: int) -> None:
    """Set the maximum number of pixels of an image, for this process and child processes started later."""
    os.environ[_MAX_PIXELS_VARIABLE] = str(count)


def tar_member(path: str | Path) -> tuple[str, int, int] | None:
    """Return the tar file that a path points into, and offset and size of the image in it; None for a plain file."""
    match = _IN_TAR.fullmatch(str(path))
    return (match[1], int(match[2]), int(match[3])) if match else None


def image_file(path: str | Path) -> str:
    """Return the file that contains an image: the path itself, or the tar file that it points into."""
    member = tar_member(path)
    return str(path) if member is None else member[0]


def open_image(path: str | Path) -> BinaryIO:
    """Open an image file, or an image in a tar file, for reading bytes.

    Raises:
        OSError: the file cannot be opened or is not a regular file.
    """
    member = tar_member(path)
    if member is None:
        return open_regular(path)
    shard, offset, size = member
    with open_regular(shard) as file:
        file.seek(offset)
        return io.BytesIO(file.read(min(size, MAX_BYTES)))


def open_header(file: BinaryIO) -> Image.Image:
    """Read an image's format, size and mode from its header, whatever its suffix, without decoding it.

    Raises:
        UnreadableImage: the format is not one of FORMATS, the image is larger than ``max_pixels()``, or it is damaged;
            the message does not name the file.
    """
    try:
        start = file.read(32)
        file.seek(0)
        opener = next((opener for opener, accepts in _openers() if accepts(start) is True), None)
        with warnings.catch_warnings(action="ignore"):
            image = opener and opener(file, "")
    except Image.DecompressionBombError:  # WebP and GIF have Pillow's own limit, which is MAX_PIXELS
        raise UnreadableImage(_too_many_pixels(MAX_PIXELS)) from None
    except PILLOW_ERRORS:
        too_large = _avif_pixels(file) > AVIF_PIXELS
        raise UnreadableImage(_too_many_pixels(AVIF_PIXELS) if too_large else "it is truncated or damaged") from None
    if image is None:
        raise UnreadableImage(_identify_other_format(start))
    _check_header(image)
    return image


def _check_header(image: Image.Image) -> None:
    """Check that an image can be decoded, and make Pillow take the orientation from EXIF only, as OpenCV does.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    width, height = image.size
    if not width * height:
        raise UnreadableImage("it has no pixels")
    if width * height > max_pixels():
        raise UnreadableImage(
            f"it has {width}x{height} pixels, more than the limit max_pixels={max_pixels()}: "
            "shrink it or raise the limit"
        )
    if image.mode in ("F", "I"):
        raise UnreadableImage("it has 32 bits per channel: convert it to 8 or 16")
    for key in ("xmp", "XML:com.adobe.xmp"):
        image.info.pop(key, None)


def _too_many_pixels(limit: int) -> str:
    """Return the message for an image with more pixels than ``limit``, that of the library that opens it."""
    if max_pixels() <= limit:
        return f"it has more pixels than the limit max_pixels={max_pixels()}: shrink it or raise the limit"
    return f"it has more than {limit} pixels, the limit of its format: shrink it or convert it to JPEG or PNG"


def _avif_pixels(file: BinaryIO) -> int:
    """Return the number of pixels in the header of an AVIF; 0 for other files."""
    file.seek(0)
    sizes = re.findall(rb"ispe....(....)(....)", file.read(2**16), re.DOTALL)
    return max((int.from_bytes(width) * int.from_bytes(height) for width, height in sizes), default=0)


@cache
def _openers() -> list[tuple[Any, Any]]:
    """Return Pillow's readers of FORMATS, each with the function that recognizes its first bytes.

    ``Image.open`` has a limit of its own for large images, which is global to the process.
    """
    Image.init()
    return [Image.OPEN[name] for name in FORMATS if name in Image.OPEN]


def _identify_other_format(start: bytes) -> str:
    """Return a message about a file that is not one of FORMATS, by its first 32 bytes."""
    if not start:
        return "it is empty"
    if start[4:8] == b"ftyp" and start[8:11] in (b"hei", b"hev", b"mif"):
        return f"it is a HEIC image, {_CONVERT}"
    kind = next((kind for magic, kind in _OTHER_FILES.items() if start.startswith(magic)), None)
    return f"it is {kind or 'not an image of a supported format (' + ', '.join(FORMATS) + ')'}"


def read_bytes(path: Path) -> np.ndarray:
    """Return the encoded bytes of an image, (K,) uint8, read-only.

    Raises:
        UnreadableImage: the file is missing, not a regular file, or larger than MAX_BYTES.
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
    """Read an image file as (H, W, 3) uint8 RGB, with its EXIF orientation applied.

    Raises:
        UnreadableImage: the file is missing, not an image, or larger than ``max_pixels()``.
    """
    return decode_image(read_bytes(path), path)


def decode_image(data: np.ndarray, path: Path, reduce: int = 1) -> np.ndarray:
    """Decode an image to (H, W, 3) uint8 RGB, with its EXIF orientation applied.

    Args:
        data: (K,) uint8, the encoded bytes.
        path: file of the image, for messages.
        reduce: 1, 2, 4 or 8: decode a JPEG at 1 / ``reduce`` of its size, rounded up, which is faster; other formats
            are decoded at full size.

    Raises:
        UnreadableImage: the format is not one of FORMATS, or the image is damaged or larger than ``max_pixels()``.
    """
    try:
        header = open_header(io.BytesIO(data.data))
        if header.format in BY_PILLOW or header.mode == "LAB":  # OpenCV distorts colours of LAB
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
    """Scale sizes (N, 2) of (height, width) down so that the longer side is at most ``longest``."""
    ratio = np.minimum(longest / sizes.max(1, keepdims=True), 1.0)
    return np.maximum(np.rint(sizes * ratio), 1).astype(np.int64)


def decode_resized(
    data: np.ndarray, path: Path, size: tuple[int, int], longest: int
) -> tuple[np.ndarray, tuple[int, int]]:
    """Decode an image as ``decode_image`` does and shrink it to ``fit_sizes``.

    A much larger JPEG is decoded at a half, a quarter or an eighth of its size.

    Args:
        data: (K,) uint8, the encoded bytes.
        path: file of the image, for messages.
        size: expected (height, width) of the image, upright.
        longest: maximum of the result's longer side in pixels.

    Returns:
        The image (h, w, 3) uint8 RGB, and the actual (height, width) of the file: ``size`` if that is correct.

    Raises:
        UnreadableImage: as ``decode_image``.
    """
    reduce = next(r for r in (8, 4, 2, 1) if max(size) >= r * longest or r == 1)
    image = decode_image(data, path, reduce)
    found = image.shape[:2]
    if found in (size, tuple(-(-n // reduce) for n in size)):
        if reduce > 1 and found != size:  # the last row and column may cover less than half a pixel
            image = image[: max(round(size[0] / reduce), 1), : max(round(size[1] / reduce), 1)]
        found = size
    elif reduce > 1:  # the expected size is wrong: decode at full size to find the actual one
        image = decode_image(data, path)
        found = image.shape[:2]
    height, width = fit_sizes(np.array((found,)), longest)[0].tolist()
    return (image if image.shape[:2] == (height, width) else resize(image, width, height)), found


def resize(image: np.ndarray, width: int, height: int, output: np.ndarray | None = None) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3), bilinearly, or by area when shrinking a side to less than half.

    Bilinear interpolation would skip pixels there. The result is written to ``output`` (height, width, 3) if given,
    which may be a view of a larger image.
    """
    shrinks = width < 0.5 * image.shape[1] or height < 0.5 * image.shape[0]
    return cv2.resize(image, (width, height), output, interpolation=cv2.INTER_AREA if shrinks else cv2.INTER_LINEAR)


@dataclass(frozen=True)
class Letterbox:
    """Placement of an image in a fixed frame: ``x_frame = x_image * scale + offset``, per axis in pixels.

    Attributes:
        height, width: size of the resized image.
        left, top, right, bottom: padding in pixels.
        scale, offset: (x, y) each.
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
        """Fit an image of ``size`` (height, width) into ``frame`` (height, width), centred, preserving its aspect."""
        (h, w), (frame_h, frame_w) = size, frame
        ratio = min(frame_h / h, frame_w / w)
        new_h, new_w = max(round(h * ratio), 1), max(round(w * ratio), 1)
        pad_h, pad_w = (frame_h - new_h) / 2, (frame_w - new_w) / 2
        top, left = round(pad_h - 0.1), round(pad_w - 0.1)
        bottom, right = round(pad_h + 0.1), round(pad_w + 0.1)
        return cls(new_h, new_w, left, top, right, bottom, (new_w / w, new_h / h), (left, top))

    def apply(self, image: np.ndarray) -> np.ndarray:
        """Return the image resized and padded with PAD_VALUE, (frame height, frame width, 3) uint8."""
        if image.shape[:2] != (self.height, self.width):
            image = resize(image, self.width, self.height)
        sides = (self.top, self.bottom, self.left, self.right)
        if not any(sides):
            return image
        return cv2.copyMakeBorder(image, *sides, cv2.BORDER_CONSTANT, value=(PAD_VALUE,) * 3)
