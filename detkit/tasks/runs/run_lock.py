"""Locks on files: one process at a time writes into a run directory."""

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from detkit.distributed.process_group import run_on_main
from detkit.errors import DetkitError
from detkit.ops.files import read_regular

RELEASE = 90  # seconds after which a network file system has dropped the locks of a crashed machine
MAX_LOCK = 2**20  # bytes
LOCK = ".lock"  # who holds the run directory, in two lines: host and PID of the process, and its job
NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # of a file system without locks
LOCKED = ".filelock"  # the file that is locked; on Windows no other process could read it


@contextmanager
def run_lock(run_dir: Path, job: str, patience: float = 0) -> Iterator[None]:
    """Keep other processes out of a run directory; rank 0 does it for all ranks.

    The operating system drops the lock when the process ends, however it ends, even if its loader processes live on.
    A file system without locks, or a directory that is not writable, keeps nobody out.

    Args:
        run_dir: the run directory.
        job: one line, by which ``find_run_of_job`` finds the directory again.
        patience: seconds to wait for another process to end, or for the lock of a crashed machine to expire.

    Raises:
        DetkitError: another process holds the directory.
    """
    lock: FileLock | None = None

    def acquire() -> None:
        nonlocal lock
        try:
            lock = _acquire(run_dir / LOCKED, patience)
        except Timeout:
            message = f"{run_dir} is in use by {_holder(run_dir)}: wait until that ends, or name another folder"
            raise DetkitError(message) from None
        except OSError:
            pass  # the directory is not writable
        with suppress(OSError):  # the disk is full, or read-only
            (run_dir / LOCK).unlink(missing_ok=True)  # opening a pipe would block
            (run_dir / LOCK).write_bytes(os.fsencode(f"{socket.gethostname()} {os.getpid()}\n{job}\n"))

    run_on_main(acquire)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def find_run_of_job(folder: Path, job: str) -> Path | None:
    """Return the run directory under ``folder`` that a process of ``job`` held last; None if there is none."""
    found = []
    for path in folder.glob(f"*/{LOCK}"):
        with suppress(OSError):
            if os.fsdecode(read_regular(path, MAX_LOCK)).splitlines()[1:] == [job]:
                found.append((path.stat().st_mtime, path.parent))
    return max(found)[1] if found else None


def lock_file(path: Path, wait: bool = False) -> FileLock | None:
    """Lock a file until the lock is released or garbage-collected, or this process ends.

    Args:
        path: created if missing.
        wait: wait until no other process holds the lock.

    Returns:
        The lock; None if another process holds it, or the file system knows no locks.

    Raises:
        OSError: the file cannot be created.
    """
    try:
        return _acquire(path, -1 if wait else 0)
    except Timeout:
        return None


def _acquire(path: Path, timeout: float) -> FileLock | None:
    """Return a lock on ``path``; None if its file system knows no locks.

    Args:
        path: created if missing.
        timeout: seconds to wait; -1: forever.

    Raises:
        Timeout: another process holds the lock.
        OSError: the file cannot be created.
    """
    lock = FileLock(path, timeout, thread_local=False, fallback_to_soft=False)  # a soft lock would survive a SIGKILL
    try:
        lock.acquire()
    except OSError as error:
        if error.errno not in NO_LOCKS:  # Timeout, which has none, too
            raise
        return None
    return lock


def _holder(run_dir: Path) -> str:
    """Name the process that holds a run directory, as far as its record tells."""
    try:
        host, pid = read_regular(run_dir / LOCK, MAX_LOCK).decode().partition("\n")[0].split()
    except (OSError, ValueError):
        return "another process"
    return f"process {pid} on {host}"
