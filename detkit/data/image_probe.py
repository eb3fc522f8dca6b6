"""Looking at image files without decoding them: size, orientation, kind, whether they are whole."""

import contextlib
import os
import struct
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from detkit.data.file_utils import cores, map_files
from detkit.errors import UnreadableImage
from detkit.ops.image import PILLOW_ERRORS, image_file, open_header, open_image

PARALLEL_FROM = 2000  # images: below, starting processes costs more than it saves
EXIF_ORIENTATION = 0x0112

# bits of a probe's flags
MISSING, UNREADABLE, TRUNCATED, ROTATED, GRAY, DEEP, CMYK, ALPHA = (1 << k for k in range(8))
ORIENTATION_SHIFT = 8  # above them, the EXIF orientation of an image that is turned
UNUSABLE = MISSING | UNREADABLE | TRUNCATED


def probe(path: str | Path) -> tuple[int, int, int, int, int]:
    """Read the head and the tail of an image file, or of one within a tar file (ops/image.py).

    Returns:
        height and width turned upright, height and width as stored (0 where unreadable), flags.
    """
    try:
        os.stat(image_file(path))
    except (OSError, ValueError):
        return 0, 0, 0, 0, MISSING
    try:
        with warnings.catch_warnings(action="ignore"), open_image(path) as file:  # malformed EXIF is passed over
            return _inspect(open_header(file), path)
    except PILLOW_ERRORS:  # UnreadableImage is one of them
        return 0, 0, 0, 0, UNREADABLE


def why_unreadable(path: str | Path) -> str:
    """Say why ``probe`` finds a file unreadable."""
    try:
        with open_image(path) as file:
            open_header(file)
    except UnreadableImage as error:
        return str(error)
    except (OSError, ValueError) as error:
        return str(getattr(error, "strerror", None) or error)
    return "it is damaged"


def _inspect(image: Image.Image, path: str | Path) -> tuple[int, int, int, int, int]:
    width, height = image.size
    mode, flags = image.mode, 0
    if mode in ("1", "L", "LA", "La") or mode.startswith("I"):
        flags |= GRAY
    if mode.startswith("I"):
        flags |= DEEP
    if mode == "CMYK":
        flags |= CMYK
    if mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info:
        flags |= ALPHA
    if image.format == "PNG" and _png_bits(path) == 16:
        flags |= DEEP  # colour of 16 bits, which Pillow reads as 8
    stored = (height, width)
    if image.format == "PNG":
        exif, whole = _png_chunks(path)
    else:
        exif = image.getexif()
        whole = image.format not in ("JPEG", "MPO") or _has_jpeg_end(path)
    orientation = exif.get(EXIF_ORIENTATION, 1)
    if orientation in range(2, 9):
        flags |= ROTATED | orientation << ORIENTATION_SHIFT
        if orientation >= 5:
            if image.format == "TIFF":  # Pillow has turned its size already
                stored = (width, height)
            else:
                height, width = width, height
    if not whole:
        flags |= TRUNCATED
    return height, width, *stored, flags


def _png_bits(path: str | Path) -> int:
    with open_image(path) as file:
        return (file.read(25) + bytes(25))[24]


def _png_chunks(path: str | Path) -> tuple[Image.Exif, bool]:
    """Return the EXIF data and whether the last chunk is there; Pillow would decode the picture to find out."""
    exif = Image.Exif()
    with open_image(path) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IEND":
                return exif, True
            if kind == b"eXIf":
                content, length = file.read(length), 0
                with contextlib.suppress(SyntaxError, ValueError, struct.error):  # malformed: readers pass over it
                    exif.load(content)
            file.seek(length + 4, os.SEEK_CUR)
    return exif, False


def _has_jpeg_end(path: str | Path) -> bool:
    """Whether the end marker is there; cameras pad a file, so that where it is missing the picture is decoded."""
    with open_image(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 64, 0))
        if b"\xff\xd9" in file.read():
            return True
    return _is_decodable(path)


def _is_decodable(path: str | Path) -> bool:
    try:
        with open_image(path) as file:
            open_header(file).load()
        return True
    except PILLOW_ERRORS:
        return False


def probe_all(paths: Sequence[str]) -> np.ndarray:
    """Probe many files, by several processes where that pays.

    Returns:
        (N, 5) int32: what ``probe`` returns, a row each.
    """
    if len(paths) < PARALLEL_FROM:
        return np.array([probe(path) for path in paths], np.int32).reshape(-1, 5)
    table = np.empty((len(paths), 5), np.int32)
    for k, row in enumerate(map_files(probe, paths, "looking at the images", cores())):
        table[k] = row
    return table
