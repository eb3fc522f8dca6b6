"""An external sort of boxes by image, between the label files and the index.

A label file may hold ten million boxes in any order. They are collected in blocks of 80-byte rows. If there is more
than one block, the blocks are written to a temporary file and sorted there, so that only about one block is processed
in memory at a time.
"""

import struct
import tempfile
from collections.abc import Callable, Iterator, Sequence
from typing import Any, BinaryIO

import numpy as np

from detkit.errors import DetkitError

BLOCK = 2**17  # rows in memory at once; more only if a single image has more
GROUPS = 4096  # of consecutive images; sorted rows are read in whole groups

ROW = np.dtype(
    [
        ("image", np.int64),  # index of the image, or its id until indices are known
        ("label", np.int64),  # index of the class, or its id
        ("line", np.int64),  # of the label file
        ("position", np.int64),  # in a list of the label file
        ("xyxy", np.float64, 4),
        ("area", np.float64),
        ("crowd", np.bool_),
    ],
    align=True,
)
_pack = struct.Struct("=qqqq5d?7x").pack  # one ROW


class BoxTable:
    """Rows of boxes (ROW), appended one by one and returned grouped by image."""

    def __init__(self) -> None:
        self._pending = bytearray()  # rows of the current block
        self._file: BinaryIO | None = None  # the previous blocks
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
        """Append a row; its fields are those of ROW, ``xyxy`` four numbers.

        Raises:
            struct.error: an integer does not fit in 64 bits.
            DetkitError: the temporary folder is full.
        """
        if len(self._pending) == BLOCK * ROW.itemsize:
            self._spill()
        self._pending += _pack(image, label, line, position, *xyxy, area, crowd)

    def by_image(self, images: int, translate: Callable[[np.ndarray], np.ndarray]) -> Iterator[np.ndarray]:
        """Yield all rows as (K,) ROW arrays of about one block, in ascending order of images.

        All rows of an image are in one array, in insertion order. The table is empty afterwards.

        Args:
            images: number of images.
            translate: called with (K,) ROW arrays in insertion order; replaces image ids by indices and drops rows.

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
        """Write the current block to the temporary file."""
        if self._file is None:
            self._file = open_temporary()
        self._write(self._blocks * BLOCK, np.frombuffer(self._pending, ROW))
        self._pending = bytearray()
        self._blocks += 1

    def _read(self, start: int, count: int) -> np.ndarray:
        """Return at most ``count`` rows from ``start`` on."""
        rows = np.empty(count, ROW)
        assert self._file is not None, "blocks are written before they are read"
        self._file.seek(start * ROW.itemsize)
        size = self._file.readinto(rows.view(np.uint8))  # type: ignore[attr-defined]  # not in BinaryIO's stub
        return rows[: size // ROW.itemsize]

    def _write(self, start: int, rows: np.ndarray) -> None:
        assert self._file is not None, "the file is opened before the first block"
        write_temporary(self._file, rows, start * ROW.itemsize)


class GrowingArray:
    """An array built by appending chunks, in memory or in a temporary file.

    Args:
        dtype: of the array.
        shape: of an element, ``(4,)`` for a box.
        on_disk: store the array in a file.
    """

    def __init__(self, dtype: Any, shape: tuple[int, ...] = (), on_disk: bool = False) -> None:
        self._parts = [np.zeros((0, *shape), dtype)]
        self._file = open_temporary() if on_disk else None
        self._length = 0

    def append(self, part: np.ndarray) -> None:
        """Append (K, *shape) elements.

        Raises:
            DetkitError: the temporary folder is full.
        """
        part = np.ascontiguousarray(part, self._parts[0].dtype)
        self._length += len(part)
        if self._file is None:
            self._parts.append(part)
        else:
            write_temporary(self._file, part)

    def to_array(self) -> np.ndarray:
        """Return the array (N, *shape); one on disk is memory-mapped read-only, and its file is deleted with it."""
        if self._file is None or not self._length:
            return np.concatenate(self._parts)
        shape = (self._length, *self._parts[0].shape[1:])
        return np.memmap(self._file, self._parts[0].dtype, "r", shape=shape).view(np.ndarray)  # as in index.py


def _group_ranges(totals: np.ndarray) -> Iterator[tuple[int, int]]:
    """Split groups of ``totals`` rows each into ranges [first, last) of at most BLOCK rows, or of one group."""
    ends, first = np.cumsum(totals), 0
    while first < len(totals):
        before = ends[first - 1] if first else 0
        last = max(int(np.searchsorted(ends, before + BLOCK, side="right")), first + 1)
        yield first, last
        first = last


def open_temporary() -> BinaryIO:
    """Open an anonymous file in the temporary folder.

    Raises:
        DetkitError: there is no temporary folder, or it is full.
    """
    try:
        return tempfile.TemporaryFile(prefix="detkit-")
    except OSError as error:
        raise _disk_full_error(error) from None


def write_temporary(file: BinaryIO, rows: np.ndarray, offset: int | None = None) -> None:
    """Write an array at byte ``offset`` of a temporary file, by default at the current position.

    Raises:
        DetkitError: the temporary folder is full.
    """
    try:
        if offset is not None:
            file.seek(offset)
        file.write(rows.reshape(-1).view(np.uint8).data)
        file.flush()
    except OSError as error:
        raise _disk_full_error(error) from None


def _disk_full_error(error: OSError) -> DetkitError:
    reason = f"{error.strerror or error}: free some space, or set TMPDIR to a folder on another disk"
    return DetkitError(f"the boxes cannot be sorted in the temporary folder, {reason}")
