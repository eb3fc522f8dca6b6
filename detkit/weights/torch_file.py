"""Files of ``torch.save``, zip and legacy: the pickle as plain data, and tensors read by their position in the file."""

import io
import math
import os
import struct
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.ops.files import open_regular
from detkit.weights.pickle_names import StorageRef, TensorRef
from detkit.weights.pickle_reader import MAX_BYTES, read_pickle

ZIP_MAGIC = b"PK\x03\x04"
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
MAX_INDEX = 8 << 20  # bytes of a zip's index; 4,000 tensors take 0.4 MiB
MAX_TAIL = 1 << 17  # bytes at the end of a zip that are searched for its index
CHUNK = 1 << 20


class Extent(NamedTuple):
    """A range of bytes in a file and its CRC-32; 0 if unknown, as after torch's ``set_crc32_options(False)``."""

    start: int
    length: int
    crc: int = 0


@dataclass(frozen=True)
class TorchFile:
    """A file written by ``torch.save``.

    Attributes:
        path: the file.
        content: the saved object, with ``TensorRef`` for tensors and ``Record`` for objects of other classes.
        extents: position of every storage.
    """

    path: Path
    content: Any
    extents: Mapping[str, Extent]

    def read_tensors(self, refs: Mapping[str, TensorRef]) -> dict[str, Tensor]:
        """Read tensors as contiguous ones, floating-point ones as float32.

        Raises:
            DetkitError: a storage is damaged, a tensor exceeds its storage, or all tensors together exceed the file.
        """
        tensors = {}
        with open_regular(self.path) as file:
            self._check_storages(file, {ref.key for ref in refs.values()})
            left = os.fstat(file.fileno()).st_size
            for name, ref in refs.items():
                span = self._span(name, ref)
                left -= span * ref.dtype.itemsize
                if left < 0:
                    raise DetkitError(f"{self.path} is rejected: its tensors claim more memory than the file contains")
                tensors[name] = self._read(file, name, ref, span)
        return tensors

    def _check_storages(self, file: BinaryIO, keys: set[str]) -> None:
        left = os.fstat(file.fileno()).st_size
        for key in sorted(keys & self.extents.keys()):
            left -= self.extents[key].length
            if left < 0:
                raise DetkitError(f"{self.path} is rejected: its storages overlap")
            _check_crc(self.path, file, f"storage {shorten(key, 40)!r}", self.extents[key])

    def _span(self, name: str, ref: TensorRef) -> int:
        """Return the number of storage elements that a tensor spans.

        Raises:
            DetkitError: they exceed the storage.
        """
        count = math.prod(ref.size)
        span = 1 + sum((n - 1) * step for n, step in zip(ref.size, ref.stride, strict=True)) if count else 0
        length = self.extents[ref.key].length if ref.key in self.extents else 0
        if count > span or (ref.offset + span) * ref.dtype.itemsize > length:
            raise DetkitError(
                f"{self.path} is rejected: its tensor {shorten(name)!r} claims more elements than the file contains"
            )
        return span

    def _read(self, file: BinaryIO, name: str, ref: TensorRef, span: int) -> Tensor:
        if not span:
            return torch.empty(0)
        file.seek(self.extents[ref.key].start + ref.offset * ref.dtype.itemsize)
        data = bytearray(file.read(span * ref.dtype.itemsize))
        if len(data) < span * ref.dtype.itemsize:
            raise DetkitError(f"{self.path} is truncated: its tensor {shorten(name)!r} is incomplete")
        tensor = torch.frombuffer(data, dtype=ref.dtype).as_strided(ref.size, ref.stride)
        return tensor.to(torch.float32 if ref.dtype.is_floating_point else ref.dtype).contiguous()


def open_torch_file(path: Path) -> TorchFile:
    """Read the structure of a file of ``torch.save`` without executing code in it or reading tensors.

    Raises:
        DetkitError: the file is truncated, damaged, not of ``torch.save``, or not plain data.
        OSError: it cannot be opened.
    """
    with open_regular(path) as file:
        start = file.read(len(ZIP_MAGIC))
        file.seek(0)
        if start == ZIP_MAGIC:
            return _open_zip(path, file)
        if start[:1] == b"\x80":
            return _open_legacy(path, file)
    what = "is empty" if not start else "is not a checkpoint"
    raise DetkitError(f"{path} {what}: a file of torch.save or of safetensors was expected")


def _open_zip(path: Path, file: BinaryIO) -> TorchFile:
    """Open an uncompressed zip: ROOT/data.pkl, and one storage per ROOT/data/KEY."""
    try:
        with _IndexReader(open_regular(path).detach()) as index:
            entries = {entry.filename: entry for entry in zipfile.ZipFile(index).infolist()}
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError, LookupError, OverflowError, struct.error):
        raise DetkitError(f"{path} is truncated or damaged: it begins as a zip but has no index at its end") from None
    pickles = [name for name in entries if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(pickles) != 1:
        raise DetkitError(f"{path} is a zip, but not of torch.save: it contains no data.pkl")
    root = pickles[0].removesuffix("data.pkl")
    if f"{root}constants.pkl" in entries:
        raise DetkitError(f"{path} is a TorchScript program, not a checkpoint: import the .pt it was exported from")
    size = os.fstat(file.fileno()).st_size
    extents = {name: _entry_extent(path, file, entry, size) for name, entry in entries.items()}
    order = extents.get(f"{root}byteorder", Extent(0, 0))
    if _read_extent(file, order._replace(length=min(order.length, 16))) not in (b"", b"little"):
        raise DetkitError(f"{path} was written by a big-endian machine: load and save it again with torch on that one")
    extent = extents[pickles[0]]
    if extent.length > MAX_BYTES:
        raise DetkitError(
            f"{path} is rejected: its pickle has more than {MAX_BYTES >> 20} MiB, no checkpoint needs so much"
        )
    _check_crc(path, file, "pickle", extent)
    content, _ = read_pickle(io.BytesIO(_read_extent(file, extent)), str(path))
    prefix = f"{root}data/"
    storages = {name.removeprefix(prefix): e for name, e in extents.items() if name.startswith(prefix)}
    return TorchFile(path, content, storages)


class _IndexReader(io.BufferedReader):
    """Bounds the size of a zip's index, which zipfile reads at once, taking ten times as much memory."""

    def read(self, size: int | None = -1, /) -> bytes:
        """Read at most ``size`` bytes.

        Raises:
            zipfile.BadZipFile: ``size`` exceeds MAX_INDEX.
        """
        if size is not None and size > MAX_INDEX:
            raise zipfile.BadZipFile
        return super().read(MAX_TAIL if size is None or size < 0 else size)


def _entry_extent(path: Path, file: BinaryIO, entry: zipfile.ZipInfo, size: int) -> Extent:
    """Return the position of a zip entry's bytes.

    Raises:
        DetkitError: it is compressed (and might decompress to any size), or extends beyond the file.
    """
    if entry.compress_type != zipfile.ZIP_STORED or entry.flag_bits & 1:
        raise DetkitError(f"{path} is rejected: an entry of it is compressed, which torch.save never does")
    file.seek(entry.header_offset)
    header = file.read(30)
    if len(header) < 30 or header[:4] != ZIP_MAGIC:
        raise DetkitError(f"{path} is damaged: the index of the zip does not match its entries")
    start = entry.header_offset + 30 + sum(struct.unpack_from("<HH", header, 26))  # after name and padding
    if start + entry.file_size > size:
        raise DetkitError(f"{path} is truncated or damaged: an entry of it extends beyond the end of the file")
    return Extent(start, entry.file_size, entry.CRC)


def _read_extent(file: BinaryIO, extent: Extent) -> bytes:
    file.seek(extent.start)
    return file.read(extent.length)


def _check_crc(path: Path, file: BinaryIO, what: str, extent: Extent) -> None:
    """Verify the checksum of a zip entry.

    Raises:
        DetkitError: it is wrong.
    """
    if not extent.crc:
        return
    file.seek(extent.start)
    left, crc = extent.length, 0
    while left > 0 and (chunk := file.read(min(CHUNK, left))):
        left -= len(chunk)
        crc = zlib.crc32(chunk, crc)
    if crc != extent.crc:
        raise DetkitError(f"{path} is damaged: the checksum of its {what} is wrong; copy or download it again")


def _open_legacy(path: Path, file: BinaryIO) -> TorchFile:
    """Open a file of torch before 1.6: five pickles (magic number, version, system, object, keys), then storages."""
    head = io.BytesIO(file.read(MAX_BYTES))
    magic, _ = read_pickle(head, str(path))
    if magic != LEGACY_MAGIC:
        raise DetkitError(f"{path} is a pickle, but not of torch.save: save its state dict with torch.save")
    _version, _ = read_pickle(head, str(path))
    system, _ = read_pickle(head, str(path))
    if isinstance(system, dict) and system.get("little_endian") is False:
        raise DetkitError(f"{path} was written by a big-endian machine: load and save it again with torch on that one")
    content, storages = read_pickle(head, str(path))
    keys, _ = read_pickle(head, str(path))
    return TorchFile(path, content, _legacy_extents(path, file, head.tell(), keys, storages))


def _legacy_extents(
    path: Path, file: BinaryIO, position: int, keys: Any, storages: Mapping[str, StorageRef]
) -> dict[str, Extent]:
    """Return the extents of storages in the order of ``keys``: element count (8 bytes), then the elements.

    Raises:
        DetkitError: the keys or counts are wrong, or the file is truncated.
    """
    if not isinstance(keys, list) or not all(isinstance(key, str) and key in storages for key in keys):
        raise DetkitError(f"{path} is damaged: its list of storages does not match its tensors")
    size = os.fstat(file.fileno()).st_size
    extents = {}
    for key in keys:
        file.seek(position)
        count, length = file.read(8), storages[key].count * storages[key].dtype.itemsize
        if len(count) < 8 or int.from_bytes(count, "little") != storages[key].count or position + 8 + length > size:
            raise DetkitError(f"{path} is truncated or damaged: storage {shorten(key, 40)!r} is incomplete")
        extents[key] = Extent(position + 8, length)
        position += 8 + length
    return extents
