"""The processes that make a loader's batches: how they begin, how long one waits for them, and how they end."""

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
from types import FrameType
from typing import Any, TypeVar

import cv2
from torch.utils.data import DataLoader, get_worker_info

from detkit.errors import DetkitError
from detkit.ops.processes import end_with_parent
from detkit.structures import Batch

TIMEOUT = 600.0  # seconds without a batch after which the processes are given up
SHM_DIR = "/dev/shm"  # where torch keeps what processes hand to one another, on Linux
SHM_HINT = "give it more (docker run --shm-size=2g), or use fewer workers, or workers=0"
PREFETCH = 2  # batches that a process makes ahead, torch's default
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
SIGCHLD = getattr(signal, "SIGCHLD", signal.SIGTERM)  # there is none on Windows, and no handler of torch's

T = TypeVar("T")


class WorkersLost(DetkitError):  # noqa: N818  (what it is)
    """Worker processes have died or deliver nothing: whoever asked for a batch can save what was learnt before."""


class Workers:
    """Iterates over a DataLoader with persistent worker processes.

    One that dies, or is alive and delivers nothing, raises ``WorkersLost`` where a batch is asked for, and nowhere
    else. Without processes this is the loader itself.

    Args:
        loader: the thread that begins the first iteration does all; the processes end with it.
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
        """Whether one of the processes is no more."""
        return any(process.exitcode is not None for process in self.processes)

    def _start(self) -> None:
        """Start the processes.

        Raises:
            DetkitError: the system does not allow so many, or one has died meanwhile.
        """
        others, handler = multiprocessing.active_children(), signal.getsignal(SIGCHLD)
        # At the exit, before multiprocessing asks its children to end, which these do not heed, and waits for them.
        Finalize(None, _kill, [self.processes], exitpriority=100)
        hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # of a half-made iterator of torch's
        try:
            reason = self._fork()
        finally:
            sys.unraisablehook = hook
        _replace_sigchld_handler(handler)
        if reason is None:
            self.processes += self.iterator._workers  # also those that have died already
        else:
            _kill([child for child in multiprocessing.active_children() if child not in others])
            message = f"{self.loader.num_workers} data loading processes cannot be started"
            raise DetkitError(f"{message} ({reason}): use fewer workers, or workers=0")

    def _fork(self) -> str | None:
        """Make torch's iterator; return why there are not so many processes, if there are not.

        The system does not allow them, or one has died already, of which torch's own handler tells here.
        """
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
        """Return what ``receive`` gets from the processes.

        Raises:
            WorkersLost: one has died, or nothing came in time.
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
        # torch's way to end them may wait for a lock that one of the dead has taken along.
        threading.Thread(target=self.iterator._shutdown_workers, daemon=True).start()
        raise WorkersLost(message)

    def _on_timeout(self) -> None:
        """End the processes, and with them whatever the other thread waits for."""
        self.timed_out = True
        for process in self.processes:
            process.kill()

    def _exit_codes(self) -> list[int]:
        """Return the exit codes of the processes that have ended, or are about to."""
        ended = multiprocessing.connection.wait([process.sentinel for process in self.processes], timeout=1)
        for process in self.processes:
            if process.sentinel in ended:
                process.join(10)
        return [process.exitcode for process in self.processes if process.exitcode is not None]

    def _explain(self, error: Exception, codes: list[int]) -> str | None:
        """Say what an error means, and the exit codes of those that have ended; None: a fault in the work itself."""
        count = self.loader.num_workers
        if self.timed_out:
            message = f"no batch has come from the {count} data loading processes for {self.timeout:g} seconds"
            return f"{message} (trainer.loader_timeout): the storage stalls, or they were stopped"
        if not codes:
            if getattr(error, "errno", None) in (errno.EMFILE, errno.ENFILE) or "open files" in str(error):
                return (
                    f"too many open files for {count} data loading processes: raise `ulimit -n`, or use fewer workers"
                )
            return None
        if codes[0] >= 0:
            reason = os.strerror(codes[0]) if codes[0] in RESOURCE_ERRNOS else f"exit status {codes[0]}"
            return f"a data loading process has ended ({reason}): use fewer workers, or workers=0"
        name = signal.Signals(-codes[0]).name
        hint = HINTS.get(name, ": workers=0 shows where")
        return f"a data loading process was killed (signal {-codes[0]}, {name}){hint}"


def check_shared_memory(batch_bytes: int, workers: int) -> None:
    """Check that there is room for the batches that worker processes hand over, where that is bounded (Linux).

    Args:
        workers: of all ranks on this node.

    Raises:
        DetkitError: there is not; says what it takes and what there is.
    """
    if not workers or not os.path.isdir(SHM_DIR):
        return
    status = os.statvfs(SHM_DIR)
    free, needed = status.f_bavail * status.f_frsize, (PREFETCH * workers + 1) * batch_bytes
    if needed > free:
        message = f"{workers} data loading processes take {_mib(needed)} of {SHM_DIR} (a batch {_mib(batch_bytes)})"
        raise DetkitError(f"{message}, which has {_mib(free)} free: {SHM_HINT}")


def to_shared_memory(batch: Batch) -> Batch:
    """Move a batch of a worker process to shared memory; elsewhere it stays.

    torch would do so as well, but in a thread where what fails is lost and waited for.

    Raises:
        WorkersLost: there is no room.
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
        raise WorkersLost(f"a batch of {size} cannot be handed over through {SHM_DIR} ({reason}): {hint}") from None
    return batch


def worker_context(workers: int) -> str | None:
    """Return how worker processes are started: forked on Linux, so that they share the index and the image cache."""
    return "fork" if workers and sys.platform == "linux" else None


def init_worker(_: int) -> None:
    """Prepare a worker process."""
    cv2.setNumThreads(0)  # one process a core is enough
    # Sent to all processes of a job: the main one decides when to end, and these end with it.
    for name in ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    end_with_parent()
    Queue._on_queue_feeder_error = staticmethod(_exit_on_queue_error)  # type: ignore[attr-defined]  # private


def _exit_on_queue_error(error: Exception, _: object) -> None:
    """End a worker process whose result is lost on its way, as it would be waited for."""
    number = getattr(error, "errno", None)
    os._exit(number if number in RESOURCE_ERRNOS else 1)


def _kill(processes: list[BaseProcess]) -> None:
    """End processes, also those that are stopped."""
    for process in processes:
        process.kill()
    for process in processes:
        process.join(1)
        # One that waits for a dead disk would be waited for.
        multiprocessing.process._children.discard(process)  # type: ignore[attr-defined]  # private


_receiving: Workers | None = None  # what the main thread waits for


def _replace_sigchld_handler(before: Any) -> None:
    """Put a handler of SIGCHLD in the place of torch's, which raises wherever the main thread is when a worker dies: in
    the middle of an optimizer step or of a file, too. This one raises where the thread waits for that worker.

    Args:
        before: the handler that was there before torch's.
    """
    if signal.getsignal(SIGCHLD) is before:  # torch's came earlier, or this is not the main thread
        return

    def handler(signum: int, frame: FrameType | None) -> None:
        global _receiving
        if callable(before):
            before(signum, frame)
        if _receiving is not None and _receiving.any_exited():
            _receiving = None  # once is enough
            raise ChildProcessError

    signal.signal(SIGCHLD, handler)


@contextmanager
def _interrupt_on_exit(workers: Workers) -> Iterator[None]:
    """Let the death of a process end what the main thread waits for."""
    global _receiving
    _receiving = workers
    try:
        yield
    finally:
        _receiving = None


@contextmanager
def _call_after(seconds: float, call: Callable[[], None]) -> Iterator[None]:
    """Call something from another thread, if the block takes longer."""
    timer = threading.Timer(seconds, call)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
