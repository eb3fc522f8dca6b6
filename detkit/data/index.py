"""The index: a set's annotations as read, validated once, kept for the next start.

One file in the user's cache folder, in the safetensors layout: 8 bytes of length, a json header, flat arrays. It is
mapped into memory, so all worker processes share one copy; it is never unpickled. Its name says what it was built
from: the names, sizes and times of every label file and image.
"""

import hashlib
import json
import math
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from detkit.data.annotations import Annotations, PathTable
from detkit.data.file_utils import names_in, walk
from detkit.data.issues import IssueLog
from detkit.ops.files import cache_dir, open_regular
from detkit.ops.image import max_pixels

VERSION = 3  # of the layout, and of the judgement of images and boxes
ARRAYS = ("image_ids", "sizes", "offsets", "boxes", "labels", "areas", "crowd")
PART = 2**18  # elements that are written at a time
DTYPES = {"I64": np.int64, "I32": np.int32, "F64": np.float64, "BOOL": np.bool_, "U8": np.uint8}


def cached(
    kind: str,
    files: Sequence[Path],
    folders: Sequence[Path],
    flat: Sequence[Path],
    log: IssueLog | None,
    build: Callable[[IssueLog], Annotations],
    **arguments: Any,
) -> Annotations:
    """Return what ``build`` makes of these files and folders, from the index where nothing has changed since.

    Args:
        kind: the format; with the files, folders and ``arguments`` it names the set.
        folders: watched with the folders within; ``flat``: without.
        log: where ``build`` puts problems; given one, the index is not used, as it holds no more than a few.
    """
    if log is not None:
        return build(log)
    name = json.dumps(
        [VERSION, max_pixels(), kind, [str(p.absolute()) for p in (*files, *folders, *flat)], arguments], sort_keys=True
    )
    prefix = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    index = index_folder() / f"{prefix}-{fingerprint(files, folders, flat)}.safetensors"
    annotations = open_index(index)
    if annotations is None:
        annotations = build(IssueLog())
        if annotations.watched and write_index(annotations, index):
            _remove_older(prefix, index)
            annotations = open_index(index) or annotations
    return annotations


def index_folder() -> Path:
    """Return where indexes are kept: XDG_CACHE_HOME or ~/.cache, detkit/index."""
    return cache_dir() / "index"


def fingerprint(files: Sequence[Path], folders: Sequence[Path], flat: Sequence[Path]) -> str:
    """Return a hash of the names, sizes and modification times of files, and of all files in folders."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(_state(str(file)))
    for folder in folders:
        if os.path.isdir(folder):
            for path in walk(folder):
                digest.update(_state(path))
        digest.update(b"end")
    for folder in flat:
        for name in names_in(folder):
            digest.update(_state(os.path.join(folder, name)))
        digest.update(b"end")
    return digest.hexdigest()


def _state(path: str) -> bytes:
    try:
        status = os.stat(path)
        return os.fsencode(path) + b"\0%d %d\0" % (status.st_size, status.st_mtime_ns)
    except OSError:  # missing, or a link to itself
        return os.fsencode(path) + b"\0-\0"


def write_index(annotations: Annotations, file: Path) -> bool:
    """Write the index in one piece: whole or not at all, whoever else writes it; False where the disk refuses."""
    table = annotations.paths if isinstance(annotations.paths, PathTable) else PathTable.of(annotations.paths)
    arrays = {name: getattr(annotations, name) for name in ARRAYS} | {"path_text": table.text, "path_ends": table.ends}
    about = {
        "source": str(annotations.source),
        "class_names": annotations.class_names,
        "category_ids": annotations.category_ids,
        "problems": annotations.issues.as_dict(),
    }
    scratch = None
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        descriptor, scratch = tempfile.mkstemp(prefix=".index-", dir=file.parent)
        with os.fdopen(descriptor, "wb") as stream:
            _write_arrays(stream, arrays, {"detkit_index": json.dumps(about)})
        os.replace(scratch, file)
        return True
    except OSError:  # a full or read-only disk
        if scratch is not None:
            Path(scratch).unlink(missing_ok=True)
        return False


def _write_arrays(stream: BinaryIO, arrays: dict[str, np.ndarray], metadata: dict[str, str]) -> None:
    """Write the safetensors layout part by part: its library's ``save_file`` would hold another copy of everything."""
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name in sorted(arrays, key=lambda name: -arrays[name].itemsize):  # so that all of them are aligned
        array = arrays[name]
        dtype = next(key for key, value in DTYPES.items() if array.dtype == value)
        header[name] = {"dtype": dtype, "shape": array.shape, "data_offsets": (end, end + array.nbytes)}
        end += array.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)
    for name in [*header][1:]:
        array = arrays[name]
        for start in range(0, len(array), PART):
            stream.write(np.ascontiguousarray(array[start : start + PART]))
            _unmap_pages(array)


def _unmap_pages(array: np.ndarray) -> None:
    """Take an array that is mapped from a file out of the process' memory until it is read again."""
    if isinstance(array.base, np.memmap) and hasattr(mmap, "MADV_DONTNEED"):
        array.base._mmap.madvise(mmap.MADV_DONTNEED)


def open_index(file: Path) -> Annotations | None:
    """Map an index into memory; None where it is not there or not whole."""
    try:
        with open_regular(file) as stream:
            size = os.fstat(stream.fileno()).st_size
            length = int.from_bytes(stream.read(8), "little")
            if length > size:
                return None
            header = json.loads(stream.read(length))
        about = json.loads(header.pop("__metadata__")["detkit_index"])
        arrays = {name: _map(file, size, 8 + length, entry) for name, entry in header.items()}
        table = PathTable(arrays.pop("path_text"), arrays.pop("path_ends"))
        annotations = Annotations(
            source=Path(about["source"]),
            paths=table,
            class_names=tuple(about["class_names"]),
            category_ids=tuple(about["category_ids"]),
            issues=IssueLog.from_dict(about["problems"]),
            **{name: arrays[name] for name in ARRAYS},
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    consistent = len(annotations.offsets) == len(table) + 1 and annotations.offsets[-1] == len(annotations.boxes)
    return annotations if consistent else None


def _map(file: Path, size: int, start: int, entry: dict[str, Any]) -> np.ndarray:
    begin, end = entry["data_offsets"]
    dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
    if start + end > size or end - begin != math.prod(shape) * dtype.itemsize:
        raise ValueError(f"{file} is cut off")
    if begin == end:
        return np.zeros(shape, dtype)
    return np.memmap(file, dtype, "r", start + begin, shape).view(np.ndarray)  # its own indexing is slow


def _remove_older(prefix: str, index: Path) -> None:
    """Remove indexes of the same set as it was before; who has them mapped keeps them."""
    for other in index.parent.glob(f"{prefix}-*.safetensors"):
        if other != index:
            other.unlink(missing_ok=True)
