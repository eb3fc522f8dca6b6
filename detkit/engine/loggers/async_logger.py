"""Wrappers that keep a logger's failures, and in the background its delays, away from the training."""

import logging
import time
from collections.abc import Callable
from contextlib import suppress
from queue import Full, Queue
from threading import Thread

from detkit.engine.loggers.base import Logger

logger = logging.getLogger(__name__)

Call = Callable[[Logger], None]
CAPACITY = 10_000  # calls that wait for a slow logger
PATIENCE = {True: 60.0, False: 10.0}  # seconds for the rest at the end of a run, and of one that was cut short


class SafeLogger:
    """Calls a logger at once, which suits TensorBoard: it writes where the loop itself writes. The first
    failure is logged as a warning; what the logger was to keep is lost.

    Args:
        name: of the logger, for messages.
    """

    def __init__(self, name: str, backend: Logger) -> None:
        self.name = name
        self.backend = backend
        self.failed = False

    def call(self, call: Call) -> None:
        """Call the logger; a failed call is no failure of the run."""
        try:
            call(self.backend)
        except Exception as error:  # whatever a full disk, a network or somebody's package comes up with
            self.warn((str(error) or type(error).__name__).splitlines()[0])

    def close(self, finished: bool) -> None:
        """Let the logger end."""
        self.call(lambda logger: logger.close(finished))

    def warn(self, reason: str) -> None:
        """Warn, once, why something is lost."""
        if not self.failed:
            self.failed = True
            logger.warning("%s fails (%s): what it was to keep is lost, the training goes on", self.name, reason)


class AsyncLogger(SafeLogger):
    """Calls a logger in a thread: one that waits for its network keeps neither this rank nor the others waiting."""

    def __init__(self, name: str, backend: Logger) -> None:
        super().__init__(name, backend)
        self.calls: Queue[Call | None] = Queue(CAPACITY)
        self.thread = Thread(target=self._work, name=f"{name} logger", daemon=True)
        self.thread.start()

    def call(self, call: Call) -> None:
        """Leave a call to the thread; one that finds no room is lost."""
        try:
            self.calls.put_nowait(call)
        except Full:
            self.warn("too slow")

    def close(self, finished: bool) -> None:
        """Wait for what is left, not for ever; where the queue is full, first for room."""
        deadline = time.monotonic() + PATIENCE[finished]
        with suppress(Full):
            for last in (lambda logger: logger.close(finished), None):
                self.calls.put(last, timeout=max(deadline - time.monotonic(), 0))
            self.thread.join(max(deadline - time.monotonic(), 0))
        if self.thread.is_alive():
            self.warn("too slow at the end")

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            super().call(call)
