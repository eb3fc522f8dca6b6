"""Listing large or self-referential folders, and processing many files in parallel."""

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
CHUNK = 64  # files per task of a process
TIMEOUT = 600.0  # seconds without a result after which processing is aborted


def list_images(folder: Path) -> list[Path]:
    """Return the image files in a folder and its subfolders, sorted; each folder once, even with circular links.

    Raises:
        DetkitError: the folder cannot be listed.
    """
    return sorted(Path(path) for path in walk(folder) if is_image(path))


def images_in(folder: Path) -> list[Path]:
    """Return the image files in a folder without its subfolders, sorted; none if it cannot be listed."""
    return [folder / name for name in names_in(folder) if is_image(name)]


def names_in(folder: str | Path) -> list[str]:
    """Return the names of the entries of a folder, sorted; none if it cannot be listed."""
    try:
        return sorted(os.listdir(folder))  # noqa: PTH208  (names of a million files, without a Path of each)
    except (OSError, ValueError):
        return []


class Listings(dict[str, frozenset[str]]):
    """The names in each folder, listed on first access; empty if a folder cannot be listed."""

    def __missing__(self, folder: str) -> frozenset[str]:
        self[folder] = frozenset(names_in(folder))
        return self[folder]

    def has(self, path: str) -> bool:
        """Whether a path exists."""
        folder, name = os.path.split(path)
        return name in self[folder or "."]


def read_lines(file: Path) -> list[str]:
    """Return the non-empty lines of a text file, stripped.

    Bytes that are not UTF-8 are decoded like file names.

    Raises:
        DetkitError: the file is missing, not a regular file, or not text.
    """
    try:
        data = read_regular(file, MAX_LIST)
    except OSError as error:
        raise DetkitError(f"cannot read the list {file}: {error.strerror or error}") from None
    if b"\0" in data:
        raise DetkitError(f"{file} should list images, one per line, but it is not UTF-8 text")
    return [line.strip() for line in os.fsdecode(data.removeprefix(codecs.BOM_UTF8)).splitlines() if line.strip()]


def with_slashes(name: str) -> str:
    """Return a path with slashes in place of backslashes."""
    return name.replace("\\", "/")


def walk(folder: Path) -> Iterator[str]:
    """Yield the files below a folder; follow links, but enter no folder twice and no hidden one.

    Subfolders that cannot be listed are skipped.

    Raises:
        DetkitError: the folder itself cannot be listed.
    """
    seen: set[tuple[int, int]] = set()
    pending = [str(folder)]
    while pending:
        current = pending.pop()
        try:
            status = os.stat(current)  # noqa: PTH116  (bulk: no Path for each folder)
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
            path = os.path.join(current, name)  # noqa: PTH118  (bulk: no Path for each file)
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
    """Yield ``function(path)`` for every path in order, computed in parallel, with a progress bar on a terminal.

    Args:
        function: called in the worker processes.
        paths: its arguments.
        description: shown next to the progress bar.
        workers: number of processes (at least one).
        initializer: called once in each process.

    Raises:
        DetkitError: a process was killed, or there was no result for TIMEOUT seconds.
    """
    existing = multiprocessing.active_children()
    try:
        with ProcessPoolExecutor(max(workers, 1), initializer=partial(_init_process, initializer)) as pool:
            results = _in_order(pool, function, iter(paths), 4 * max(workers, 1))
            try:
                yield from track(results, description, len(paths), transient=True, disable=not sys.stdout.isatty())
            except BaseException:
                for child in multiprocessing.active_children():  # the pool would wait for their current task
                    if child not in existing:
                        child.kill()
                raise
    except BrokenProcessPool:
        raise DetkitError(f"{description}: a process was killed, possibly for lack of memory; try workers=1") from None
    except TimeoutError:
        reason = "the storage hangs, or the processes were stopped"
        raise DetkitError(f"{description}: no result for {TIMEOUT:g} seconds: {reason}") from None


def _in_order(
    pool: ProcessPoolExecutor, function: Callable[[str], Any], paths: Iterator[str], ahead: int
) -> Iterator[Any]:
    """Yield ``function(path)`` in order, with at most ``ahead`` chunks queued (``pool.map`` would queue all)."""
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
    """Initialize a worker process, which ends with its parent and leaves Ctrl-C to it."""
    end_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if initializer is not None:
        initializer()


def cores() -> int:
    """Return the number of cores available to this process, at most 16."""
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, 16)
