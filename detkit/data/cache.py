"""Caches of decoded images: per process, shared in RAM, or on disk.

They keep images of a training's size (uint8, the longer side that many pixels at most) and have one method,
``fetch(index, load)``: return image ``index``, made by ``load()`` where it is not there yet.
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

LOCAL_CACHE_BYTES = 128 * 2**20  # what a process keeps where there is no cache,
RECENT_IMAGES = 32  # and how many it remembers beside them: more than a window of the order (augment/pipeline.py) has
MAX_FRACTION = 0.8  # share of the free memory or disk that a cache may take
VERSION = 1  # of the files: how their pixels are made and laid out

Load = Callable[[], np.ndarray]


class LocalImages:
    """The images one process keeps: the first ones, up to ``keep`` bytes, for good, and beside them the last few.

    Every epoch has another order, in which the image used longest ago is no likelier to come late than any other: to
    drop it, as is usual, would drop most before they are used again.

    Attributes:
        holds_all: whether every image of the set can be kept.
    """

    def __init__(self, annotations: Annotations, longest: int, capacity: int) -> None:
        self.capacity = capacity
        self.holds_all = bool(_image_bytes(annotations, longest).sum() <= capacity)
        self.permanent: dict[int, np.ndarray] = {}
        self.recent: dict[int, np.ndarray] = {}
        self.bytes = 0  # of those kept

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
                del self.recent[next(iter(self.recent))]  # the first that came
        return image


class SharedImages:
    """Every image of a set in one flat buffer that the loader's worker processes share, filled by whoever comes first.

    The buffer holds a byte for each image, 1 once its pixels are there, and then the pixels of all.

    Args:
        buffer: writable memory of ``shared_bytes(annotations, longest)`` bytes, zero where nothing was written yet.
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
            ValueError: ``load`` made an image of another size than the annotations' sizes lead to.
        """
        pixels = self.bytes[self.offsets[index] : self.offsets[index + 1]].reshape(*self.shapes[index], 3)
        if not self.is_filled[index]:
            np.copyto(pixels, load())
            self.is_filled[index] = 1  # after the pixels: another process may look at any moment
        pixels.flags.writeable = False
        return pixels


def open_cache(kind: str | None, annotations: Annotations, longest: int) -> LocalImages | SharedImages:
    """Return the cache that ``data.cache`` asks for: ``null`` (each process its own few), ``ram`` or ``disk``.

    Args:
        longest: longer side of the images kept at most, pixels.

    Raises:
        DetkitError: there is too little free memory or disk; says what it takes and what there is.
    """
    if kind is None:
        return LocalImages(annotations, longest, LOCAL_CACHE_BYTES)
    size = shared_bytes(annotations, longest)
    contents = f"{len(annotations)} images at {longest} pixels"
    buffer = _memory(size, contents) if kind == "ram" else _file(_cache_file(annotations, longest), size, contents)
    return SharedImages(buffer, annotations, longest)


def shared_bytes(annotations: Annotations, longest: int) -> int:
    """Return the bytes that ``SharedImages`` takes."""
    return len(annotations) + int(_image_bytes(annotations, longest).sum())


def _image_shapes(annotations: Annotations, longest: int) -> np.ndarray:
    """Return the (N, 2) heights and widths that the images have in a cache."""
    return fit_sizes(annotations.sizes, longest)


def _image_bytes(annotations: Annotations, longest: int) -> np.ndarray:
    """Return the (N,) bytes of the images in a cache."""
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
    """Map the cache file, made first where there is none."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            for stale in path.parent.glob(f"{path.name.partition('-')[0]}-*.u8"):  # of the set as it was before
                stale.unlink(missing_ok=True)
            free = shutil.disk_usage(path.parent).free
            if size > MAX_FRACTION * free:
                raise DetkitError(
                    f"data.cache=disk takes {gib(size)} for {contents}, more than {MAX_FRACTION:.0%} of the "
                    f"{gib(free)} free at {path.parent}: make room, point XDG_CACHE_HOME at another disk, or use data.cache=null"
                )
            _reserve(path, size)
        with path.open("r+b") as file:
            return mmap.mmap(file.fileno(), size)
    except (OSError, ValueError) as error:  # ValueError: the file is shorter than that
        raise DetkitError(f"data.cache=disk cannot use {path} ({error}): remove it, or use data.cache=null") from None


def _reserve(path: Path, size: int) -> None:
    """Create a file of zeros whose disk space is taken at once: a full disk would kill whoever writes to a mapping."""
    handle, scratch = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-")
    try:
        os.posix_fallocate(handle, 0, size)
        os.replace(scratch, path)
    except BaseException:
        os.unlink(scratch)
        raise
    finally:
        os.close(handle)


def _cache_file(annotations: Annotations, longest: int) -> Path:
    """Return the file in the user's cache folder, named by the set and by all that its pixels depend on."""
    set_digest = hashlib.blake2b(os.fsencode(f"{annotations.source.absolute()} {longest}"), digest_size=8)
    digest = hashlib.blake2b(b"%d " % VERSION + np.ascontiguousarray(annotations.sizes).tobytes(), digest_size=8)
    for path in annotations.paths:
        try:
            status = os.stat(image_file(path))
        except OSError as error:
            raise DetkitError(f"cannot read image {path}: {error.strerror or error}") from None
        digest.update(os.fsencode(path) + b"\0%d %d\n" % (status.st_size, status.st_mtime_ns))
    return cache_dir() / "images" / f"{set_digest.hexdigest()}-{digest.hexdigest()}.u8"
