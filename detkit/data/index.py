"""The index: a set's annotations as read, validated once, kept for the next start.

A folder in the user's cache: a ``.npy`` file for each array, and a json. The arrays are mapped into memory, so all
worker processes share one copy; nothing is ever unpickled. The folder's name says what it was built from: the names,
sizes and times of every label file and image.
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

VERSION = 4  # of the layout, and of the judgement of images and boxes
METADATA_FILE = "index.json"  # everything but the arrays
CHUNK = 2**18  # elements that are written at a time
ARRAYS = {  # of N images and T boxes: type and shape of an element
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
    """Return what ``build`` makes of these files and folders, from the index where nothing has changed since.

    Args:
        kind: the format; with the files, folders and ``arguments`` it names the set.
        folders: watched with the folders within; ``flat``: without.
        log: where ``build`` puts problems; given one, the index is not used, as it holds no more than a few.
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
    """Return where indexes are kept: XDG_CACHE_HOME or ~/.cache, detkit/index."""
    return cache_dir() / "index"


def fingerprint(files: Sequence[Path], folders: Sequence[Path], flat_folders: Sequence[Path]) -> str:
    """Return a hash of the names, sizes and modification times of files, and of all files in folders."""
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(_file_state(str(file)))
    for folder in folders:
        if os.path.isdir(folder):
            for path in walk(folder):
                digest.update(_file_state(path))
        digest.update(b"end")
    for folder in flat_folders:
        for name in names_in(folder):
            digest.update(_file_state(os.path.join(folder, name)))
        digest.update(b"end")
    return digest.hexdigest()


def _file_state(path: str) -> bytes:
    try:
        status = os.stat(path)
        return os.fsencode(path) + b"\0%d %d\0" % (status.st_size, status.st_mtime_ns)
    except OSError:  # missing, or a link to itself
        return os.fsencode(path) + b"\0-\0"


def write_index(annotations: Annotations, folder: Path) -> bool:
    """Write the index in one piece: whole or not at all, whoever else writes it; False where the disk refuses."""
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
    """Write a ``.npy`` file in parts: ``np.save`` would have all of an array in memory that is mapped from a file."""
    with file.open("wb") as stream:
        header = {"descr": npy.dtype_to_descr(array.dtype), "fortran_order": False, "shape": array.shape}
        npy.write_array_header_1_0(stream, header)
        for start in range(0, len(array), CHUNK):
            array[start : start + CHUNK].tofile(stream)
            _unmap_pages(array)


def _publish(new_index: Path, folder: Path) -> None:
    """Move an index to its place, unless another process has put one there meanwhile."""
    try:
        new_index.rename(folder)
    except OSError:
        if open_index(folder) is None:  # what is there is damaged
            _remove(folder)
            new_index.rename(folder)


def _unmap_pages(array: np.ndarray) -> None:
    """Take an array that is mapped from a file out of the process' memory until it is read again."""
    mapped = getattr(array.base, "_mmap", None)
    if mapped is not None and hasattr(mmap, "MADV_DONTNEED"):
        mapped.madvise(mmap.MADV_DONTNEED)


def open_index(folder: Path) -> Annotations | None:
    """Map an index into memory; None where it is not there or not whole."""
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
    except Exception:  # on damaged files, the parsers of numpy and json raise errors of all kinds
        return None


def _map(file: Path, dtype: type, shape: tuple[int, ...]) -> Any:
    """Map an array (K, *shape) that is to be read only; raises an error of any kind where the file is damaged."""
    if not file.is_file():  # a pipe would be waited for
        raise FileNotFoundError(file)
    array = npy.open_memmap(file, mode="r")
    if array.dtype != dtype or array.shape[1:] != shape or array.ndim != 1 + len(shape):
        raise ValueError(f"{file} is of another kind")
    return array.view(np.ndarray)  # a memmap's own indexing is slow


def _is_consistent(annotations: Annotations, table: PathTable) -> bool:
    """Whether the arrays are as long as one another says: N images, T boxes."""
    a = annotations
    of_images = {len(a.image_ids), len(a.sizes), len(a.offsets) - 1, len(table)}
    of_boxes = {len(a.boxes), len(a.labels), len(a.areas), len(a.crowd), int(a.offsets[-1])}
    return len(of_images) == len(of_boxes) == 1 and int(table.ends[-1]) == len(table.text)


def _remove_older(prefix: str, index: Path) -> None:
    """Remove indexes of the same set as it was before; who has them mapped keeps them."""
    for other in index.parent.glob(f"{prefix}-*"):
        if other != index:
            _remove(other)


def _remove(path: Path) -> None:
    """Remove a folder or file, or what can be of it."""
    shutil.rmtree(path, ignore_errors=True)
    if not path.is_dir():
        path.unlink(missing_ok=True)
