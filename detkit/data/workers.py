"""The worker processes of a loader: startup, timeouts, crashes and shutdown."""

import errno
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from multiprocessing.queues import Queue
from multiprocessing.util import Finalize
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import cv2
from torch.utils.data import DataLoader, get_worker_info

from detkit.errors import DetkitError
from detkit.ops.processes import end_with_parent
from detkit.structures import Batch

TIMEOUT = 600.0  # seconds without a batch after which the processes are killed
SHM_DIR = "/dev/shm"  # torch's shared memory on Linux
SHM_HINT = "increase its size (docker run --shm-size=2g), or use fewer workers, or workers=0"
PREFETCH = 2  # batches prefetched per process, torch's default
RESOURCE_ERRNOS = (
    errno.EMFILE,
    errno.ENFILE,
    errno.ENOSPC,
    errno.ENOMEM,
)  # exit statuses of a process that cannot hand on

HINTS = {
    "SIGKILL": ", as the out-of-memory killer does: use fewer workers, or workers=0",
    "SIGBUS": f": {SHM_DIR} is full, {SHM_HINT}",
}
SIGCHLD = getattr(signal, "SIGCHLD", signal.SIGTERM)  # Windows has neither SIGCHLD nor torch's handler

T = TypeVar("T")


class WorkersLost(DetkitError):  # noqa: N818  (named after the cause)
    """Worker processes have died or hang; the caller can still save a checkpoint."""


class Workers:
    """Iterates over a DataLoader with persistent worker processes.

    A process that dies or hangs raises ``WorkersLost``, and only while a batch is requested. Without worker processes,
    this just iterates over the loader.

    Args:
        loader: all iterations must be in the same thread; the processes end with it.
        timeout: seconds to wait for a batch.
    """

    def __init__(self, loader: DataLoader, timeout: float = TIMEOUT) -> None:
        self.loader = loader
        self.timeout = timeout
        self.processes: list[BaseProcess] = []
        self.iterator: Any = None  # torch's
        self.timed_out = False

    def __iter__(self) -> Iterator[Any]:
        if not self.loader.num_workers:
            yield from self.loader
            return
        if self.processes:
            self._wait_for(lambda: iter(self.loader))
        else:
            self._start()
        while (result := self._wait_for(lambda: next(self.iterator, None))) is not None:
            yield result

    def any_exited(self) -> bool:
        """Whether one of the processes has exited."""
        return any(process.exitcode is not None for process in self.processes)

    def _start(self) -> None:
        """Start the processes.

        Raises:
            DetkitError: the system does not allow so many processes, or one has already died.
        """
        others, handler = multiprocessing.active_children(), signal.getsignal(SIGCHLD)
        # At exit, before multiprocessing waits for its children, which ignore SIGTERM.
        Finalize(None, _kill, [self.processes], exitpriority=100)
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # for torch's incomplete iterator
        try:
            reason = self._fork()
        finally:
            sys.unraisablehook = hook
        _replace_sigchld_handler(handler)
        if reason is None:
            self.processes += self.iterator._workers  # including those that have already died
        else:
            _kill([child for child in multiprocessing.active_children() if child not in others])
            message = f"{self.loader.num_workers} data loading processes cannot be started"
            raise DetkitError(f"{message} ({reason}): use fewer workers, or workers=0")

    def _fork(self) -> str | None:
        """Create torch's iterator; return the reason if the processes cannot be started, otherwise None."""
        try:
            self.iterator = iter(self.loader)
        except OSError as error:
            return error.strerror
        except RuntimeError as error:
            if "start new thread" not in str(error) and "DataLoader worker" not in str(error):
                raise
            return str(error).strip().rstrip(".")
        return None

    def _wait_for(self, receive: Callable[[], T]) -> T:
        """Return the result of ``receive``, which waits for the processes.

        Raises:
            WorkersLost: a process has died, or there was no result within the timeout.
        """
        try:
            if self.any_exited():
                raise ChildProcessError
            with _interrupt_on_exit(self), _call_after(self.timeout, self._on_timeout):
                return receive()
        except Exception as error:
            message = self._explain(error, self._exit_codes())
            if message is None:
                raise
        _kill(self.processes)
        # In a thread, as torch's shutdown may wait for a lock that a dead process holds.
        threading.Thread(target=self.iterator._shutdown_workers, daemon=True).start()
        raise WorkersLost(message)

    def _on_timeout(self) -> None:
        """Kill the processes, which unblocks the waiting thread."""
        self.timed_out = True
        for process in self.processes:
            process.kill()

    def _exit_codes(self) -> list[int]:
        """Return the exit codes of the processes that have exited or are about to."""
        ended = multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout=1)
        for process in self.processes:
            if process.sentinel in ended:
                process.join(10)
        return [process.exitcode for process in self.processes if process.exitcode is not None]

    def _explain(self, error: Exception, codes: list[int]) -> str | None:
        """Explain an error by the exit codes of the processes; return None if it has another cause."""
        count = self.loader.num_workers
        if self.timed_out:
            message = f"no batch from the {count} data loading processes for {self.timeout:g} seconds"
            return f"{message} (trainer.loader_timeout): the storage hangs, or they were stopped"
        if not codes:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "open files" in str(error):
                return (
                    f"too many open files for {count} data loading processes: raise `ulimit -n`, or use fewer workers"
                )
            return None
        if codes[0] >= 0:
            reason = os.strerror(codes[0]) if codes[0] in RESOURCE_ERRNOS else f"exit status {codes[0]}"
            return f"a data loading process exited ({reason}): use fewer workers, or workers=0"
        name = signal.Signals(-codes[0]).name
        hint = HINTS.get(name, ": workers=0 shows the cause")
        return f"a data loading process was killed (signal {-codes[0]}, {name}){hint}"


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Check that the shared memory is large enough for the batches of the worker processes (Linux).

    Args:
        batch_bytes: size of a batch.
        workers: number of all ranks on this node.

    Raises:
        DetkitError: it is not; states the required and the available size.
    """
    if not workers or not Path(SHM_DIR).is_dir():
        return
    status = os.statvfs(SHM_DIR)
    free, needed = status.f_bavail * status.f_frsize, (PREFETCH * workers + 1) * batch_bytes
    if needed > free:
        message = f"{workers} data loading processes take {_mib(needed)} of {SHM_DIR} (a batch {_mib(batch_bytes)})"
        raise DetkitError(f"{message}, which has {_mib(free)} free: {SHM_HINT}")


def to_shared_memory(batch: Batch) -> Batch:
    """Move a batch to shared memory in a worker process; do nothing in the main process.

    torch would do so later, but in a thread where errors get lost.

    Raises:
        WorkersLost: the shared memory is full, or too many files are open.
    """
    if get_worker_info() is None:
        return batch
    tensors = (batch.images, batch.boxes_bm4, batch.labels_bm, batch.valid_bm)
    try:
        for tensor in tensors:
            tensor.share_memory_()
    except RuntimeError as error:
        size, reason = _mib(sum(tensor.nbytes for tensor in tensors)), str(error).rpartition(": ")[2].partition(" (")[0]
        hint = "raise the limit (ulimit -n)" if "open files" in reason else SHM_HINT
        raise WorkersLost(f"a batch of {size} cannot be transferred through {SHM_DIR} ({reason}): {hint}") from None
    return batch


def worker_context(workers: int) -> str | None:
    """Return the start method of worker processes: fork on Linux, so that they share the index and image cache."""
    return "fork" if workers and sys.platform == "linux" else None


def init_worker(_: int) -> None:
    """Initialize a worker process."""
    cv2.setNumThreads(0)  # one process per core is enough
    # Signals to all processes of a job are left to the main process; the workers end with it.
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent()
    Queue._on_queue_feeder_error = staticmethod(_exit_on_queue_error)  # type: ignore[attr-defined]  # private


def _exit_on_queue_error(error: Exception, _: object) -> None:
    """Exit a worker process whose result cannot be sent, as the main process would wait for it."""
    number = getattr(error, "errno", None)
    os._exit(number if number in RESOURCE_ERRNOS else 1)


def _kill(processes: list[BaseProcess]) -> None:
    """Kill processes, including stopped ones."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(1)
        # At exit, multiprocessing would wait for a process that is blocked by a dead disk.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]  # private


_receiving: Workers | None = None  # that the main thread waits for


def _replace_sigchld_handler(before: Any) -> None:
    """Replace torch's SIGCHLD handler by one that raises only while the main thread waits for a worker.

    torch's handler raises wherever the main thread is when a worker dies, even in an optimizer step or a file write.

    Args:
        before: the handler before torch's.
    """
    if signal.getsignal(SIGCHLD) is before:  # torch's was set earlier, or this is not the main thread
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        global _receiving
        if callable(before):
            before(signum, frame)
        if _receiving is not None and _receiving.any_exited():
            _receiving = None  # raise only once
            raise ChildProcessError

    signal.signal(SIGCHLD, handler)


@contextmanager
def _interrupt_on_exit(workers: Workers) -> Iterator[None]:
    """Interrupt the block in the main thread if a worker process dies."""
    global _receiving
    _receiving = workers
    try:
        yield
    finally:
        _receiving = None


@contextmanager
def _call_after(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call a function in another thread if the block takes longer than ``seconds``."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
