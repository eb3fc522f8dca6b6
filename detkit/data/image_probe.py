"""Probing image files without decoding them: size, orientation, mode, truncation."""

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

PARALLEL_FROM = 2000  # images; for fewer, starting processes costs more than it saves
EXIF_ORIENTATION = 0x0112

# bits of a probe's flags
MISSING, UNREADABLE, TRUNCATED, ROTATED, GRAY, DEEP, CMYK, ALPHA = (1 << k for k in range(8))
ORIENTATION_SHIFT = 8  # the EXIF orientation of a rotated image is stored above the flags
UNUSABLE = MISSING | UNREADABLE | TRUNCATED


def probe(path: str | Path) -> tuple[int, int, int, int, int]:
    """Read the start and end of an image file, or of an image in a tar file (ops/image.py).

    Returns:
        height and width after applying the EXIF orientation, height and width as stored (0 if unreadable), flags.
    """
    try:
        Path(image_file(path)).stat()
    except (OSError, ValueError):
        return 0, 0, 0, 0, MISSING
    try:
        with warnings.catch_warnings(action="ignore"), open_image(path) as file:  # malformed EXIF is ignored
            return _inspect(open_header(file), path)
    except PILLOW_ERRORS:  # UnreadableImage is one of them
        return 0, 0, 0, 0, UNREADABLE


def why_unreadable(path: str | Path) -> str:
    """Return the reason why ``probe`` finds a file unreadable."""
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
    flags = _mode_flags(image, path)
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
            if image.format == "TIFF":  # Pillow has swapped its size already
                stored = (width, height)
            else:
                height, width = width, height
    if not whole:
        flags |= TRUNCATED
    return height, width, *stored, flags


def _mode_flags(image: Image.Image, path: str | Path) -> int:
    """Return the flags GRAY, DEEP, CMYK and ALPHA."""
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
        flags |= DEEP  # 16-bit colour, which Pillow reads as 8-bit
    return flags


def _png_bits(path: str | Path) -> int:
    with open_image(path) as file:
        return (file.read(25) + bytes(25))[24]


def _png_chunks(path: str | Path) -> tuple[Image.Exif, bool]:
    """Return the EXIF data and whether the last chunk exists; Pillow would decode the image to find out."""
    exif = Image.Exif()
    with open_image(path) as file:
        file.seek(8)
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if kind == b"IEND":
                return exif, True
            if kind == b"eXIf":
                content, length = file.read(length), 0
                with contextlib.suppress(SyntaxError, ValueError, struct.error):  # malformed: ignored by readers
                    exif.load(content)
            file.seek(length + 4, os.SEEK_CUR)
    return exif, False


def _has_jpeg_end(path: str | Path) -> bool:
    """Whether a JPEG has its end marker, or decodes without it: cameras may append more than 64 bytes of padding."""
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
    """Probe many files, in parallel if there are at least PARALLEL_FROM.

    Returns:
        (N, 5) int32, one row of ``probe`` per file.
    """
    if len(paths) < PARALLEL_FROM:
        return np.array([probe(path) for path in paths], np.int32).reshape(-1, 5)
    table = np.empty((len(paths), 5), np.int32)
    for k, row in enumerate(map_files(probe, paths, "probing images", cores())):
        table[k] = row
    return table
