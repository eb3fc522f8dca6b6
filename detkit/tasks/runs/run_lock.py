"""Locks on files: one process at a time writes into a run directory."""

import errno
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from detkit.distributed.process_group import run_on_main
from detkit.errors import DetkitError
from detkit.ops.files import read_regular

RELEASE = 90  # seconds after which the lock of a dead machine is gone from a network's disk
MAX_LOCK = 2**20  # bytes
LOCK = ".lock"  # of two lines: the host and number of the process, and the job that it belongs to


@contextmanager
def run_lock(run_dir: Path, job: str, patience: float = 0) -> Iterator[None]:
    """Keep others out of a run directory; of several ranks, rank 0 does it for all.

    The operating system forgets a process' lock with the process, however that ends. A disk that knows no locks keeps
    nobody out.

    Args:
        job: a line for ``find_run_of_job``.
        patience: seconds to wait for another process, which may be about to end, or of a machine that is no more.

    Raises:
        DetkitError: another process has it.
    """
    file: IO[bytes] | None = None

    def take() -> None:
        nonlocal file
        end = time.monotonic() + patience
        while True:
            try:
                file = _lock(run_dir, job)
                return
            except DetkitError:
                if time.monotonic() >= end:
                    raise
                time.sleep(1)

    run_on_main(take)
    try:
        yield
    finally:
        if file is not None:
            file.close()


def find_run_of_job(folder: Path, job: str) -> Path | None:
    """Return the run directory under ``folder`` that a process of ``job`` was the last to hold; None if none is."""
    found = []
    for path in folder.glob(f"*/{LOCK}"):
        with suppress(OSError):
            if os.fsdecode(read_regular(path, MAX_LOCK)).splitlines()[1:] == [job]:
                found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def lock_file(path: Path, wait: bool = False) -> IO[bytes] | None:
    """Return a file that is locked until it is closed, or this process ends.

    None: another process has it (with ``wait`` that is waited for), or this disk or system knows no locks.
    """
    file = open(path, "ab")  # noqa: SIM115  (whoever called closes it)
    try:
        if _acquire(file, wait):
            return file
    except BlockingIOError:
        pass
    file.close()
    return None


def _acquire(file: IO[bytes], wait: bool = False) -> bool:
    """Lock a file until it is closed; return False where this disk or system knows no locks.

    Raises:
        BlockingIOError: another process has it; with ``wait`` that is waited for.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)  # loaders would inherit a flock
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EAGAIN):
            raise BlockingIOError(error.errno, error.strerror) from None
        return False
    return True


def _lock(run_dir: Path, job: str) -> IO[bytes] | None:
    """Return a run directory's file, locked if the disk knows locks; closing it lets go. None: it cannot be made.

    Raises:
        DetkitError: another process has it.
    """
    try:
        file = open(run_dir / LOCK, "a+b", buffering=0)  # noqa: SIM115  (it stays open as long as the run lasts)
    except OSError:
        return None
    try:
        _acquire(file)
    except BlockingIOError:
        with file:
            words = f"{run_dir} is in use{_holder(file)}"
        raise DetkitError(f"{words}: wait until that ends, or name another folder") from None
    with suppress(OSError):  # the disk is full
        file.truncate(0)
        file.write(os.fsencode(f"{socket.gethostname()} {os.getpid()}\n{job}\n"))
    return file


def _holder(file: IO[bytes]) -> str:
    """Say whose a lock is, as far as the file tells."""
    with suppress(OSError, ValueError):
        file.seek(0)
        host, number = file.readline().decode().split()
        return f" by process {number} on {host}"
    return " by another process"
