"""Graceful exit on signals from a scheduler or the keyboard."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
FOREIGN = "SIGUSR2"  # only handled if there is a handler for it: submitit's requeues the job and exits


@contextmanager
def ignore_hangup() -> Iterator[None]:
    """Ignore SIGHUP, sent when the terminal closes, unless a handler is installed for it.

    Has no effect outside the main thread.
    """
    hangup = getattr(signal, "SIGHUP", None)
    main = threading.current_thread() is threading.main_thread()
    if not main or hangup is None or signal.getsignal(hangup) is not signal.SIG_DFL:
        yield
        return
    signal.signal(hangup, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(hangup, signal.SIG_DFL)


class GracefulExit:
    """Records signals that request the end of the run."""

    def __init__(self) -> None:
        self.received: set[int] = set()
        self.previous: dict[int, Any] = {}  # handlers that were installed before

    @property
    def signum(self) -> int | None:
        """The highest number of a received signal, or None."""
        return max(self.received, default=None)

    @contextmanager
    def install(self) -> Iterator[None]:
        """Record SIGTERM, SIGUSR1 and SIGINT, and SIGUSR2 if there is a handler for it.

        The same signal again has its usual effect. Nothing is recorded outside the main thread.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        known = [signum for name in (*SIGNALS, FOREIGN) if (signum := getattr(signal, name, None))]
        handlers = {signum: signal.getsignal(signum) for signum in known}
        self.previous = {k: h for k, h in handlers.items() if signal.Signals(k).name in SIGNALS or callable(h)}
        for signum in self.previous:
            signal.signal(signum, self._record)
        try:
            yield
        finally:
            for signum, handler in self.previous.items():
                signal.signal(signum, handler)

    def exit(self, signum: int) -> None:
        """End the process with status 128 + ``signum``, as schedulers expect.

        If a handler for the signal was installed before, it is called instead; if it returns, the signal is recorded
        again from then on.

        Raises:
            SystemExit: there was no such handler.
        """
        self.received.discard(signum)
        handler = self.previous.get(signum)
        if not callable(handler) or handler is signal.default_int_handler:
            if signum == getattr(signal, "SIGUSR1", None):
                self._ignore_sigterm()
            raise SystemExit(128 + signum)
        signal.signal(signum, handler)
        handler(signum, None)
        signal.signal(signum, self._record)

    def _ignore_sigterm(self) -> None:
        """Ignore SIGTERM, which srun sends to the other ranks when the first one has ended.

        A rank that is still closing its loggers would otherwise end with 143, and the job would not be requeued.
        """
        self.previous[signal.SIGTERM] = signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _record(self, signum: int, _frame: FrameType | None) -> None:
        self.received.add(signum)
        signal.signal(signum, self.previous[signum])
