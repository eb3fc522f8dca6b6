"""Looking at image files without decoding them: size, orientation, kind, whether they are whole."""

import contextlib
import os
import stat
import struct
import sys
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image
from rich.progress import track

from detkit.errors import DetkitError
from detkit.ops.image import IMAGE_SUFFIXES, open_picture, tar_member

MAX_PIXELS = 2**28  # of an image: beyond, it is taken for a bomb
PARALLEL_FROM = 2000  # images: below, starting processes costs more than it saves
EXIF_ORIENTATION = 0x0112

# bits of a probe's flags
MISSING, UNREADABLE, TRUNCATED, ROTATED, GRAY, DEEP, CMYK, ALPHA = (1 << k for k in range(8))
ORIENTATION_SHIFT = 8  # above them, the EXIF orientation of an image that is turned
UNUSABLE = MISSING | UNREADABLE | TRUNCATED


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and the folders within, sorted; each folder once, whatever links there are.

    Raises:
        DetkitError: the folder cannot be listed.
    """
    found = [Path(entry.path) for entry in walk(folder) if Path(entry.name).suffix.lower() in IMAGE_SUFFIXES]
    return sorted(found)


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder, without those in the folders within, sorted; none if unlistable."""
    try:
        names = sorted(os.listdir(folder))
    except OSError:
        return []
    return [folder / name for name in names if Path(name).suffix.lower() in IMAGE_SUFFIXES and name[0] != "."]


def walk(folder: Path) -> Iterator[os.DirEntry]:
    """Yield the files below a folder, hidden ones aside, following links but never into the same folder twice.

    Raises:
        DetkitError: the folder itself cannot be listed; folders within that cannot are passed over.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        try:
            status = os.stat(here)
            entries = sorted(os.scandir(here), key=lambda entry: entry.name)
        except OSError as error:
            if here == str(folder):
                raise DetkitError(f"cannot list the folder {folder}: {error.strerror or error}") from None
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in entries:
            if entry.name.startswith("."):
                continue
            try:
                if entry.is_dir():
                    waiting.append(entry.path)
                else:
                    yield entry
            except OSError:  # a link to itself
                yield entry


def probe(path: str | Path) -> tuple[int, int, int, int, int]:
    """Read the head and the tail of an image file, or of one within a tar file (ops/image.py).

    Returns:
        height and width turned upright, height and width as stored (0 where unreadable), flags.
    """
    member = tar_member(path)
    try:
        if not stat.S_ISREG(os.stat(member[0] if member else path).st_mode):  # opening a pipe would wait for ever
            return 0, 0, 0, 0, UNREADABLE
    except (OSError, ValueError):
        return 0, 0, 0, 0, MISSING
    try:
        with warnings.catch_warnings(), open_picture(path) as file:
            warnings.simplefilter("ignore")  # of large images, which are looked at below
            with Image.open(file) as image:
                return _describe(image, path)
    except (OSError, ValueError, SyntaxError, TypeError, KeyError, IndexError, OverflowError, struct.error,
            EOFError, Image.DecompressionBombError, MemoryError, AttributeError, ZeroDivisionError):  # fmt: skip
        return 0, 0, 0, 0, UNREADABLE  # Pillow's plugins raise what their parsing meets


def _describe(image: Image.Image, path: str | Path) -> tuple[int, int, int, int, int]:
    width, height = image.size
    if width * height > MAX_PIXELS or not width * height:
        return 0, 0, 0, 0, UNREADABLE
    mode, flags = image.mode, 0
    if mode in ("1", "L", "LA", "La") or mode.startswith(("I", "F")):
        flags |= GRAY
    if mode.startswith(("I", "F")):
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
        whole = image.format not in ("JPEG", "MPO") or _jpeg_ends(path)
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
    with open_picture(path) as file:
        return (file.read(25) + bytes(25))[24]


def _png_chunks(path: str | Path) -> tuple[Image.Exif, bool]:
    """Return the EXIF data and whether the last chunk is there; Pillow would decode the picture to find out."""
    exif = Image.Exif()
    with open_picture(path) as file:
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


def _jpeg_ends(path: str | Path) -> bool:
    """Whether the end marker is there; cameras pad a file, so that where it is missing the picture is decoded."""
    with open_picture(path) as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - 64, 0))
        if b"\xff\xd9" in file.read():
            return True
    return _decodes(path)


def _decodes(path: str | Path) -> bool:
    try:
        with open_picture(path) as file, Image.open(file) as image:
            image.load()
        return True
    except (OSError, ValueError, SyntaxError, EOFError, MemoryError, struct.error):
        return False


def probe_all(paths: Sequence[str | Path]) -> np.ndarray:
    """Probe many files, by several processes where that pays; a bar shows on a terminal.

    Returns:
        (N, 5) int32: what ``probe`` returns, a row each.
    """
    if len(paths) < PARALLEL_FROM:
        return np.array([probe(path) for path in paths], np.int32).reshape(-1, 5)
    with ProcessPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
        rows = pool.map(probe, paths, chunksize=256)
        table = np.empty((len(paths), 5), np.int32)
        for k, row in enumerate(
            track(rows, "looking at the images", len(paths), transient=True, disable=not sys.stdout.isatty())
        ):
            table[k] = row
    return table
