"""The boxes of a set on their way from its label files to the index: many of them wait on disk, not in memory.

A label file may hold ten million boxes, in any order. They are gathered as rows of 80 bytes, in blocks; where there is
more than one block, these lie in a temporary file and are sorted by image there (an external sort), so that what is
done to the boxes of an image is done to a block at a time.
"""

import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from detkit.errors import DetkitError

BLOCK = 2**17  # rows that are in memory at once, more only where a single image has more
GROUPS = 4096  # of neighbouring images; a block of sorted rows begins and ends with a group

ROW = np.dtype(
    [
        ("image", np.int64),  # position of the image, or its id as long as positions are unknown
        ("label", np.int64),  # position of the class, or its id
        ("line", np.int64),  # of the label file
        ("position", np.int64),  # in the label file's list
        ("xyxy", np.float64, 4),
        ("area", np.float64),
        ("crowd", np.bool_),
    ],
    align=True,
)
_pack = struct.Struct("=qqqq5d?7x").pack  # one ROW


class BoxTable:
    """Rows of boxes (ROW), appended one by one and given back by image."""

    def __init__(self) -> None:
        self._pending = bytearray()  # rows of the block that is being filled
        self._file: BinaryIO | None = None  # the blocks before it
        self._blocks = 0

    def __len__(self) -> int:
        return self._blocks * BLOCK + len(self._pending) // ROW.itemsize

    @property
    def on_disk(self) -> bool:
        """Whether there is more than one block."""
        return self._file is not None

    def append(
        self, image: int, label: int, line: int, position: int, xyxy: Sequence[float], area: float, crowd: bool
    ) -> None:
        """Append a row.

        Raises:
            struct.error: a whole number beyond 64 bits.
            DetkitError: the temporary folder is full.
        """
        if len(self._pending) == BLOCK * ROW.itemsize:
            self._spill()
        self._pending += _pack(image, label, line, position, *xyxy, area, crowd)

    def by_image(self, images: int, translate: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        """Yield all rows in arrays of about a block, each with the rows of images after those of the array before.

        All rows of an image are in one array, in the order they came. The table is empty afterwards.

        Args:
            images: number of images.
            translate: puts positions of images in place of ids, and leaves out rows, in arrays in the order they came.

        Raises:
            DetkitError: the temporary folder is full.
        """
        if self._file is None:
            yield translate(np.frombuffer(self._pending, ROW))
            return
        self._spill()
        groups = min(images, GROUPS)
        counts = np.zeros((self._blocks, groups), np.int64)
        for block in range(self._blocks):
            rows = translate(self._read(block * BLOCK, BLOCK))
            counts[block] = np.bincount(rows["image"] * groups // images, minlength=groups)
            self._write(block * BLOCK, rows[np.argsort(rows["image"], kind="stable")])
        bounds = np.concatenate((np.zeros((self._blocks, 1), np.int64), counts.cumsum(1)), 1)
        for first, last in _group_ranges(counts.sum(0)):
            spans = enumerate(bounds[:, [first, last]].tolist())
            yield np.concatenate([self._read(block * BLOCK + begin, end - begin) for block, (begin, end) in spans])
        self._file.close()

    def _spill(self) -> None:
        """Write the block that is being filled to the temporary file."""
        if self._file is None:
            self._file = open_temporary()
        self._write(self._blocks * BLOCK, np.frombuffer(self._pending, ROW))
        self._pending = bytearray()
        self._blocks += 1

    def _read(self, start: int, count: int) -> np.ndarray:
        """Return the rows from ``start`` on, ``count`` at most."""
        rows = np.empty(count, ROW)
        assert self._file is not None, "blocks are written before they are read"
        self._file.seek(start * ROW.itemsize)
        size = self._file.readinto(rows.view(np.uint8))  # type: ignore[attr-defined]  # not in BinaryIO's stub
        return rows[: size // ROW.itemsize]

    def _write(self, start: int, rows: np.ndarray) -> None:
        assert self._file is not None, "the file is opened before the first block"
        write_temporary(self._file, rows, start * ROW.itemsize)


class GrowingArray:
    """An array that is appended to in parts, in memory or in a temporary file.

    Args:
        dtype, shape: of an element, such as ``(4,)`` of a box.
        on_disk: keep it in a file.
    """

    def __init__(self, dtype: Any, shape: tuple[int, ...] = (), on_disk: bool = False) -> None:
        self._parts = [np.zeros((0, *shape), dtype)]
        self._file = open_temporary() if on_disk else None
        self._length = 0

    def append(self, part: np.ndarray) -> None:
        """Append (K, ...) elements; raises DetkitError where the temporary folder is full."""
        part = np.ascontiguousarray(part, self._parts[0].dtype)
        self._length += len(part)
        if self._file is None:
            self._parts.append(part)
        else:
            write_temporary(self._file, part)

    def to_array(self) -> np.ndarray:
        """Return the array; one on disk is mapped into memory, to be read only, and its file goes with it."""
        if self._file is None or not self._length:
            return np.concatenate(self._parts)
        shape = (self._length, *self._parts[0].shape[1:])
        return np.memmap(self._file, self._parts[0].dtype, "r", shape=shape).view(np.ndarray)  # as in index.py


def _group_ranges(totals: np.ndarray) -> Iterator[tuple[int, int]]:
    """Cut groups of ``totals`` rows each into ranges (first, last) of at most BLOCK rows, or of one group."""
    ends, first = np.cumsum(totals), 0
    while first < len(totals):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + BLOCK, side="right")), first + 1)
        yield first, last
        first = last


def open_temporary() -> BinaryIO:
    """Return a new file without a name in the temporary folder; raises DetkitError where there is none."""
    try:
        return tempfile.TemporaryFile(prefix="detkit-")
    except OSError as error:
        raise _disk_full_error(error) from None


def write_temporary(file: BinaryIO, rows: np.ndarray, place: int | None = None) -> None:
    """Write an array at byte ``place`` of a temporary file, or at its end; raises DetkitError where that is full."""
    try:
        if place is not None:
            file.seek(place)
        file.write(rows.reshape(-1).view(np.uint8).data)
        file.flush()
    except OSError as error:
        raise _disk_full_error(error) from None


def _disk_full_error(error: OSError) -> DetkitError:
    words = f"{error.strerror or error}: make room there, or set TMPDIR to a folder on another disk"
    return DetkitError(f"the boxes cannot be sorted in the temporary folder, {words}")
