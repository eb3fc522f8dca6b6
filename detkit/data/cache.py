"""Caches of decoded images: per process, shared in RAM, or on disk.

They hold images at training size (uint8, the longer side limited) and have one method, ``fetch(index, load)``, which
returns image ``index`` and calls ``load()`` to decode it if it is not cached.
"""

import hashlib
import mmap
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

from detkit.data.annotations import Annotations
from detkit.errors import DetkitError
from detkit.ops.files import cache_dir
from detkit.ops.image import fit_sizes, image_file
from detkit.ops.memory import free_memory, gib

LOCAL_CACHE_BYTES = 128 * 2**20  # cached per process without data.cache
RECENT_IMAGES = 32  # cached in addition; more than a mosaic window (augment/pipeline.py)
MAX_FRACTION = 0.8  # of the free memory or disk that a cache may take
VERSION = 1  # of the files: resizing and layout

Load = Callable[[], np.ndarray]


class LocalImages:
    """A cache of one process: the first images, up to ``capacity`` bytes, permanently, and the most recent ones.

    LRU eviction would drop most images before they are used again, as every epoch has a different order.

    Attributes:
        holds_all: whether all images of the data set fit.
    """

    def __init__(self, annotations: Annotations, longest: int, capacity: int) -> None:
        self.capacity = capacity
        self.holds_all = bool(_image_bytes(annotations, longest).sum() <= capacity)
        self.permanent: dict[int, np.ndarray] = {}
        self.recent: dict[int, np.ndarray] = {}
        self.bytes = 0  # of the permanent images

    def fetch(self, index: int, load: Load) -> np.ndarray:
        """Return image ``index`` (H, W, 3), read-only."""
        for images in (self.permanent, self.recent):
            if index in images:
                return images[index]
        image = load()
        image.flags.writeable = False
        if self.bytes + image.nbytes <= self.capacity:
            self.permanent[index] = image
            self.bytes += image.nbytes
        else:
            self.recent[index] = image
            if len(self.recent) > RECENT_IMAGES:
                del self.recent[next(iter(self.recent))]  # the oldest
        return image


class SharedImages:
    """All images of a data set in one flat buffer shared by the worker processes, filled on first use.

    The buffer holds one byte per image, 1 once its pixels are written, followed by the pixels of all images.

    Args:
        buffer: writable memory of ``shared_bytes(annotations, longest)`` bytes, initially zero.
        annotations: the data set.
        longest: limit of the longer side in pixels.
    """

    holds_all = True

    def __init__(self, buffer: mmap.mmap, annotations: Annotations, longest: int) -> None:
        self.shapes = _image_shapes(annotations, longest)
        count = len(self.shapes)
        self.offsets = count + np.concatenate(([0], np.cumsum(_image_bytes(annotations, longest))))
        self.bytes = np.frombuffer(buffer, np.uint8)
        self.is_filled = self.bytes[:count]

    def fetch(self, index: int, load: Load) -> np.ndarray:
        """Return image ``index`` (H, W, 3), read-only.

        Raises:
            ValueError: the size of the loaded image does not match the annotations.
        """
        pixels = self.bytes[self.offsets[index] : self.offsets[index + 1]].reshape(*self.shapes[index], 3)
        if not self.is_filled[index]:
            np.copyto(pixels, load())
            self.is_filled[index] = 1  # after the pixels, as another process may read at any time
        pixels.flags.writeable = False
        return pixels


def open_cache(kind: str | None, annotations: Annotations, longest: int) -> LocalImages | SharedImages:
    """Return the cache for ``data.cache``.

    Args:
        kind: None (a small cache per process), ``"ram"`` or ``"disk"``.
        annotations: the data set.
        longest: limit of the longer side in pixels.

    Raises:
        DetkitError: not enough free memory or disk space; states the required and the available size.
    """
    if kind is None:
        return LocalImages(annotations, longest, LOCAL_CACHE_BYTES)
    size = shared_bytes(annotations, longest)
    contents = f"{len(annotations)} images at {longest} pixels"
    buffer = _memory(size, contents) if kind == "ram" else _file(_cache_file(annotations, longest), size, contents)
    return SharedImages(buffer, annotations, longest)


def shared_bytes(annotations: Annotations, longest: int) -> int:
    """Return the size of the buffer of ``SharedImages`` in bytes."""
    return len(annotations) + int(_image_bytes(annotations, longest).sum())


def _image_shapes(annotations: Annotations, longest: int) -> np.ndarray:
    """Return the (N, 2) heights and widths of the cached images."""
    return fit_sizes(annotations.sizes, longest)


def _image_bytes(annotations: Annotations, longest: int) -> np.ndarray:
    """Return the (N,) sizes of the cached images in bytes."""
    return 3 * _image_shapes(annotations, longest).prod(1)


def _memory(size: int, contents: str) -> mmap.mmap:
    """Return zeroed memory that forked processes share."""
    free = free_memory()
    if size > MAX_FRACTION * free:
        raise DetkitError(
            f"data.cache=ram takes {gib(size)} for {contents}, more than {MAX_FRACTION:.0%} of the "
            f"{gib(free)} of free memory: use data.cache=disk or data.cache=null"
        )
    return mmap.mmap(-1, size)


def _file(path: Path, size: int, contents: str) -> mmap.mmap:
    """Map the cache file into memory, creating it if necessary."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            # Caches of previous versions of the data set.
            for stale in path.parent.glob(f"{path.name.partition('-')[0]}-*.u8"):
                stale.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            if size > MAX_FRACTION * free:
                raise DetkitError(
                    f"data.cache=disk takes {gib(size)} for {contents}, more than {MAX_FRACTION:.0%} of the "
                    f"{gib(free)} free at {path.parent}: free some space, set XDG_CACHE_HOME to a folder on another "
                    "disk, or use data.cache=null"
                )
            _reserve(path, size)
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), size)
    except (OSError, ValueError) as error:  # ValueError: the file is too short
        raise DetkitError(f"data.cache=disk cannot use {path} ({error}): remove it, or use data.cache=null") from None


def _reserve(path: Path, size: int) -> None:
    """Create a file of zeros with its disk space allocated: writing to a mapping on a full disk raises SIGBUS."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    scratch = Path(name)
    try:
        os.posix_fallocate(handle, 0, size)
        scratch.replace(path)
    except BaseException:
        scratch.unlink()
        raise
    finally:
        os.close(handle)


def _cache_file(annotations: Annotations, longest: int) -> Path:
    """Return the file in the user's cache folder, named after the data set and everything its pixels depend on."""
    set_digest = hashlib.blake2b(os.fsencode(f"{annotations.source.absolute()} {longest}"), digest_size=8)
    digest = hashlib.blake2b(b"%d " % VERSION + np.ascontiguousarray(annotations.sizes).tobytes(), digest_size=8)
    for path in annotations.paths:
        try:
            status = Path(image_file(path)).stat()
        except OSError as error:
            raise DetkitError(f"cannot read image {path}: {error.strerror or error}") from None
        digest.update(os.fsencode(path) + b"\0%d %d\n" % (status.st_size, status.st_mtime_ns))
    return cache_dir() / "images" / f"{set_digest.hexdigest()}-{digest.hexdigest()}.u8"
