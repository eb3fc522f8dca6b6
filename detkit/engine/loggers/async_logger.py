"""Wrappers that isolate training from failures and delays of loggers."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from threading import Thread

from detkit.engine.loggers.base import Logger

logger = logging.getLogger(__name__)

Call = Callable[[Logger], None]
CAPACITY = 10_000  # queued calls
CLOSE_TIMEOUT = {True: 60.0, False: 10.0}  # seconds to process queued calls, by whether the run has finished


class SafeLogger:
    """Calls a logger synchronously, as suits TensorBoard, which only writes to the run directory.

    The first failure is logged as a warning; data of failed calls is lost.

    Args:
        name: of the logger, for messages.
        backend: the logger.
    """

    def __init__(self, name: str, backend: Logger) -> None:
        self.name = name
        self.backend = backend
        self.failed = False

    def call(self, call: Call) -> None:
        """Call the logger; if that fails, only warn."""
        try:
            call(self.backend)
        except Exception as error:  # of any kind: full disk, network, plugin
            self.warn((str(error) or type(error).__name__).splitlines()[0])

    def close(self, finished: bool) -> None:
        """Close the logger; ``finished`` is False if the run was interrupted."""
        self.call(lambda logger: logger.close(finished))

    def warn(self, reason: str) -> None:
        """Warn that data is lost, once per logger."""
        if not self.failed:
            self.failed = True
            logger.warning("%s failed (%s): some of its data is lost, training continues", self.name, reason)


class AsyncLogger(SafeLogger):
    """Calls a logger in a background thread, so that network delays do not block the ranks."""

    def __init__(self, name: str, backend: Logger) -> None:
        super().__init__(name, backend)
        self.calls: Queue[Call | None] = Queue(CAPACITY)
        self.thread = Thread(target=self._work, name=f"{name} logger", daemon=True)
        self.thread.start()

    def call(self, call: Call) -> None:
        """Queue a call; it is lost if the queue is full."""
        try:
            self.calls.put_nowait(call)
        except Full:
            self.warn("too slow")

    def close(self, finished: bool) -> None:
        """Process the queued calls and close the logger, for at most CLOSE_TIMEOUT."""
        deadline = time.monotonic() + CLOSE_TIMEOUT[finished]
        with suppress(Full):
            for last in (lambda logger: logger.close(finished), None):
                self.calls.put(last, timeout=max(deadline - time.monotonic(), 0))
            self.thread.join(max(deadline - time.monotonic(), 0))
        if self.thread.is_alive():
            self.warn("too slow at the end")

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            super().call(call)
