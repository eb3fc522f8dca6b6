"""Listing folders that may be large, or link to themselves, and working on many files by several processes."""

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from pathlib import Path
from typing import Any

from rich.progress import track

from detkit.errors import DetkitError
from detkit.ops.image import IMAGE_SUFFIXES
from detkit.ops.processes import end_with_parent


def is_image(name: str) -> bool:
    """Whether a file name is that of an image, and not hidden."""
    return os.path.splitext(name)[1].lower() in IMAGE_SUFFIXES and not os.path.basename(name).startswith(".")


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and the folders within, sorted; each folder once, whatever links there are.

    Raises:
        DetkitError: the folder cannot be listed.
    """
    return sorted(Path(path) for path in walk(folder) if is_image(path))


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder, without those in the folders within, sorted; none if unlistable."""
    return [folder / name for name in names_in(folder) if is_image(name)]


def names_in(folder: str | Path) -> list[str]:
    """Return what lies in a folder, sorted; nothing if it cannot be listed."""
    try:
        return sorted(os.listdir(folder))
    except (OSError, ValueError):
        return []


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that say something, without the space around them.

    Raises:
        DetkitError: it is missing, no file (a pipe would be waited for), or not UTF-8 text.
    """
    try:
        if os.path.exists(file) and not os.path.isfile(file):
            raise DetkitError(f"cannot read the list {file}: it is not a file")
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except OSError as error:
        raise DetkitError(f"cannot read the list {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DetkitError(f"{file} should list images, a line each, but it is not UTF-8 text") from None
    return [line.strip() for line in lines if line.strip()]


def walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, following links but never into the same folder twice, nor into hidden ones.

    Raises:
        DetkitError: the folder itself cannot be listed; folders within that cannot are passed over.
    """
    seen: set[tuple[int, int]] = set()
    waiting = [str(folder)]
    while waiting:
        here = waiting.pop()
        try:
            status = os.stat(here)
            with os.scandir(here) as entries:
                found = sorted((entry.name, _is_folder(entry)) for entry in entries)
        except OSError as error:
            if here == str(folder):
                raise DetkitError(f"cannot list the folder {folder}: {error.strerror or error}") from None
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for name, is_folder in found:
            path = os.path.join(here, name)
            if not is_folder:
                yield path
            elif not name.startswith("."):
                waiting.append(path)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def map_files(
    function: Callable[[str], Any],
    paths: Sequence[str],
    words: str,
    workers: int,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """Yield ``function(path)`` for every path, in their order, by ``workers`` processes; a bar shows on a terminal.

    Args:
        words: what is being done, beside the bar.
        initializer: called once in each process.

    Raises:
        DetkitError: one of the processes was killed.
    """
    others = multiprocessing.active_children()
    try:
        with ProcessPoolExecutor(max(workers, 1), initializer=partial(_begin, initializer)) as pool:
            results = pool.map(function, paths, chunksize=64)
            try:
                yield from track(results, words, len(paths), transient=True, disable=not sys.stdout.isatty())
            except BaseException:
                for child in multiprocessing.active_children():  # the pool would wait for what they are at
                    if child not in others:
                        child.kill()
                raise
    except BrokenProcessPool:
        raise DetkitError(f"{words}: a process was killed, for want of memory perhaps; try workers=1") from None


def _begin(initializer: Callable[[], None] | None) -> None:
    """Prepare a process, which ends with this one and leaves Ctrl-C to it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initializer is not None:
        initializer()


def cores() -> int:
    """Return the number of cores that this process may use, 16 at most."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
