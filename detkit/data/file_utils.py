"""Listing folders that may be large, or link to themselves, and working on many files by several processes."""

import codecs
import multiprocessing
import os
import signal
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

from rich.progress import track

from detkit.errors import DetkitError
from detkit.ops.files import read_regular
from detkit.ops.image import is_image
from detkit.ops.processes import end_with_parent

MAX_LIST = 2**28  # bytes of a list of images
CHUNK = 64  # files that a process is given at a time
TIMEOUT = 600.0  # seconds without the next of them after which the processes are given up


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


class Listings(dict[str, frozenset[str]]):
    """What lies in folders, each listed when it is asked for the first time; nothing in one that cannot be listed."""

    def __missing__(self, folder: str) -> frozenset[str]:
        self[folder] = frozenset(names_in(folder))
        return self[folder]

    def has(self, path: str) -> bool:
        """Whether there is something at a path."""
        folder, name = os.path.split(path)
        return name in self[folder or "."]


def read_lines(file: Path) -> list[str]:
    """Return the lines of a text file that say something, without the space around them.

    A name that is no UTF-8 comes as the file system's functions take it.

    Raises:
        DetkitError: it is missing, no regular file, or no text.
    """
    try:
        data = read_regular(file, MAX_LIST)
    except OSError as error:
        raise DetkitError(f"cannot read the list {file}: {error.strerror or error}") from None
    if b"\0" in data:
        raise DetkitError(f"{file} should list images, a line each, but it is not UTF-8 text")
    return [line.strip() for line in os.fsdecode(data.removeprefix(codecs.BOM_UTF8)).splitlines() if line.strip()]


def with_slashes(name: str) -> str:
    """Return a path as Windows writes it with slashes for its backslashes."""
    return name.replace("\\", "/")


def walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder, following links but never into the same folder twice, nor into hidden ones.

    Raises:
        DetkitError: the folder itself cannot be listed; folders within that cannot are passed over.
    """
    seen: set[tuple[int, int]] = set()
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        try:
            status = os.stat(current)
            with os.scandir(current) as entries:
                found = sorted((entry.name, _is_folder(entry)) for entry in entries)
        except OSError as error:
            if current == str(folder):
                raise DetkitError(f"cannot list the folder {folder}: {error.strerror or error}") from None
            continue
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for name, is_folder in found:
            path = os.path.join(current, name)
            if not is_folder:
                yield path
            elif not name.startswith("."):
                pending.append(path)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself
        return False


def map_files(
    function: Callable[[str], Any],
    paths: Sequence[str],
    description: str,
    workers: int,
    initializer: Callable[[], None] | None = None,
) -> Iterator[Any]:
    """Yield ``function(path)`` for every path, in their order, by ``workers`` processes; a bar shows on a terminal.

    Args:
        words: what is being done, beside the bar.
        initializer: called once in each process.

    Raises:
        DetkitError: one of the processes was killed, or nothing comes from them for TIMEOUT.
    """
    unrelated = multiprocessing.active_children()
    try:
        with ProcessPoolExecutor(max(workers, 1), initializer=partial(_init_process, initializer)) as pool:
            results = _in_order(pool, function, iter(paths), 4 * max(workers, 1))
            try:
                yield from track(results, description, len(paths), transient=True, disable=not sys.stdout.isatty())
            except BaseException:
                for child in multiprocessing.active_children():  # the pool would wait for what they are at
                    if child not in unrelated:
                        child.kill()
                raise
    except BrokenProcessPool:
        raise DetkitError(f"{description}: a process was killed, for want of memory perhaps; try workers=1") from None
    except TimeoutError:
        reason = "the storage stalls, or the processes were stopped"
        raise DetkitError(f"{description}: nothing has come for {TIMEOUT:g} seconds: {reason}") from None


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[str], Any], paths: Iterator[str], ahead: int
) -> Iterator[Any]:
    """Yield ``function(path)`` in order; no more than ``ahead`` chunks wait (``pool.map`` would keep them all)."""
    pending: deque[Future] = deque()
    while chunk := [*islice(paths, CHUNK)]:
        pending.append(pool.submit(_map_chunk, function, chunk))
        if len(pending) == ahead:
            yield from pending.popleft().result(TIMEOUT)
    for future in pending:
        yield from future.result(TIMEOUT)


def _map_chunk(function: Callable[[str], Any], paths: list[str]) -> list[Any]:
    return [function(path) for path in paths]


def _init_process(initializer: Callable[[], None] | None) -> None:
    """Prepare a process, which ends with this one and leaves Ctrl-C to it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initializer is not None:
        initializer()


def cores() -> int:
    """Return the number of cores that this process may use, 16 at most."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
