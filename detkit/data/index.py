"""The index: validated annotations of a data set, stored for later runs.

An index is a folder in the user's cache with one ``.npy`` file per array and a json. The arrays are memory-mapped, so
all worker processes share one copy; nothing is unpickled. The folder's name contains a hash of the names, sizes and
modification times of all label files and images.
"""

import hashlib
import json
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from detkit.data.annotations import Annotations, PathTable
from detkit.data.file_utils import names_in, walk
from detkit.data.issues import IssueLog
from detkit.ops.files import cache_dir, open_regular
from detkit.ops.image import max_pixels

VERSION = 4  # of the layout, and of the validation of images and boxes
METADATA_FILE = "index.json"  # everything except the arrays
CHUNK = 2**18  # elements written at a time
ARRAYS = {  # dtype and shape of an element
    "image_ids": (np.int64, ()),
    "sizes": (np.int32, (2,)),
    "offsets": (np.int64, ()),
    "boxes": (np.float64, (4,)),
    "labels": (np.int32, ()),
    "areas": (np.float64, ()),
    "crowd": (np.bool_, ()),
}
PATH_ARRAYS = {"path_text": (np.uint8, ()), "path_ends": (np.int64, ())}


def cached(
    kind: str,
    files: Sequence[Path],
    folders: Sequence[Path],
    flat_folders: Sequence[Path],
    log: IssueLog | None,
    build: Callable[[IssueLog], Annotations],
    **arguments: Any,
) -> Annotations:
    """Return the annotations from the index if nothing has changed, otherwise call ``build`` and write the index.

    Args:
        kind: the format; identifies the data set together with the files, folders and ``arguments``.
        files: label files, whose changes invalidate the index.
        folders: the same for all files below these folders,
        flat_folders: and for all files in these folders without their subfolders.
        log: receives all problems; if given, the index is not used, as it stores only a few.
        build: reads the annotations.
        **arguments: of the reader, serializable as json.
    """
    if log is not None:
        return build(log)
    name = json.dumps(
        [VERSION, max_pixels(), kind, [str(p.absolute()) for p in (*files, *folders, *flat_folders)], arguments],
        sort_keys=True,
    )
    prefix = hashlib.blake2b(name.encode(errors="surrogateescape"), digest_size=8).hexdigest()
    index = index_folder() / f"{prefix}-{fingerprint(files, folders, flat_folders)}"
    annotations = open_index(index)
    if annotations is None:
        annotations = build(IssueLog())
        if annotations.watched and write_index(annotations, index):
            _remove_older(prefix, index)
            annotations = open_index(index) or annotations
    return annotations


def index_folder() -> Path:
    """Return the folder of the indexes: detkit/index in XDG_CACHE_HOME or ~/.cache."""
    return cache_dir() / "index"


def fingerprint(files: Sequence[Path], folders: Sequence[Path], flat_folders: Sequence[Path]) -> str:
    """Return a hash of the names, sizes and modification times of files, and of all files in folders."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(_file_state(str(file)))
    for folder in folders:
        if os.path.isdir(folder):  # noqa: PTH112  (Path.is_dir may raise OSError)
            for path in walk(folder):
                digest.update(_file_state(path))
        digest.update(b"end")
    for folder in flat_folders:
        for name in names_in(folder):
            digest.update(_file_state(f"{folder}/{name}"))
        digest.update(b"end")
    return digest.hexdigest()


def _file_state(path: str) -> bytes:
    try:
        status = os.stat(path)  # noqa: PTH116  (bulk: no Path for each file)
        return os.fsencode(path) + b"\0%d %d\0" % (status.st_size, status.st_mtime_ns)
    except OSError:  # missing, or a link to itself
        return os.fsencode(path) + b"\0-\0"


def write_index(annotations: Annotations, folder: Path) -> bool:
    """Write the index atomically, even with concurrent writers; return False if it cannot be written."""
    table = annotations.paths if isinstance(annotations.paths, PathTable) else PathTable.from_paths(annotations.paths)
    arrays = {name: getattr(annotations, name) for name in ARRAYS} | {"path_text": table.text, "path_ends": table.ends}
    metadata = {
        "source": str(annotations.source),
        "class_names": annotations.class_names,
        "category_ids": annotations.category_ids,
        "problems": annotations.issues.as_dict(),
    }
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".index-", dir=folder.parent) as scratch:
            new_index = Path(scratch, "index")
            new_index.mkdir()
            for name, array in arrays.items():
                _save(new_index / f"{name}.npy", array)
            (new_index / METADATA_FILE).write_text(json.dumps(metadata))
            _publish(new_index, folder)
        return True
    except OSError:  # a full or read-only disk
        return False


def _save(file: Path, array: np.ndarray) -> None:
    """Write a ``.npy`` file in chunks: ``np.save`` would load all of a memory-mapped array."""
    with file.open("wb") as stream:
        header = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        npy.write_array_header_1_0(stream, header)
        for start in range(0, len(array), CHUNK):
            array[start : start + CHUNK].tofile(stream)
            _unmap_pages(array)


def _publish(new_index: Path, folder: Path) -> None:
    """Move an index to its final path, unless another process has created one in the meantime."""
    try:
        new_index.rename(folder)
    except OSError:
        if open_index(folder) is None:  # the existing one is damaged
            _remove(folder)
            new_index.rename(folder)


def _unmap_pages(array: np.ndarray) -> None:
    """Release the memory of a memory-mapped array until it is read again."""
    mapped = getattr(array.base, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def open_index(folder: Path) -> Annotations | None:
    """Map an index into memory; return None if it is missing or damaged."""
    try:
        with open_regular(folder / METADATA_FILE) as file:
            metadata = json.load(file)
        arrays = {name: _map(folder / f"{name}.npy", *element) for name, element in ARRAYS.items()}
        table = PathTable(*(_map(folder / f"{name}.npy", *element) for name, element in PATH_ARRAYS.items()))
        annotations = Annotations(
            source=Path(metadata["source"]),
            paths=table,
            class_names=tuple(metadata["class_names"]),
            category_ids=tuple(metadata["category_ids"]),
            issues=IssueLog.from_dict(metadata["problems"]),
            **arrays,
        )
        return annotations if _is_consistent(annotations, table) else None
    except Exception:  # numpy and json raise all kinds of errors on damaged files
        return None


def _map(file: Path, dtype: type, shape: tuple[int, ...]) -> Any:
    """Map an array (K, *shape) read-only; a damaged file may raise any exception."""
    if not file.is_file():  # opening a pipe would block
        raise FileNotFoundError(file)
    array = npy.open_memmap(file, mode="r")
    if array.dtype != dtype or array.shape[1:] != shape or array.ndim != 1 + len(shape):
        raise ValueError(f"{file} has an unexpected dtype or shape")
    return array.view(np.ndarray)  # indexing a memmap is slow


def _is_consistent(annotations: Annotations, table: PathTable) -> bool:
    """Whether the lengths of the arrays match."""
    a = annotations
    of_images = {len(a.image_ids), len(a.sizes), len(a.offsets) - 1, len(table)}
    of_boxes = {len(a.boxes), len(a.labels), len(a.areas), len(a.crowd), int(a.offsets[-1])}
    return len(of_images) == len(of_boxes) == 1 and int(table.ends[-1]) == len(table.text)


def _remove_older(prefix: str, index: Path) -> None:
    """Remove outdated indexes of the same data set; processes that have mapped them can still read them."""
    for other in index.parent.glob(f"{prefix}-*"):
        if other != index:
            _remove(other)


def _remove(path: Path) -> None:
    """Remove a folder or file, as far as possible."""
    shutil.rmtree(path, ignore_errors=True)
    if not path.is_dir():
        path.unlink(missing_ok=True)
