"""Ending a training when somebody asks for it: a scheduler, or Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")
FOREIGN = "SIGUSR2"  # noted only where somebody's handler waits for it: submitit's requeues the job and exits


@contextmanager
def ignore_hangup() -> Iterator[None]:
    """Ignore SIGHUP, which says that the terminal is gone, unless somebody's handler waits for it.

    Only the main thread can; in another one nothing happens.
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
    """Whether signals have asked for the end."""

    def __init__(self) -> None:
        self.asked: set[int] = set()
        self.before: dict[int, Any] = {}  # handlers that were there

    @property
    def signum(self) -> int | None:
        """The largest number of a signal that has asked; None: none has."""
        return max(self.asked, default=None)

    @contextmanager
    def install(self) -> Iterator[None]:
        """Note SIGTERM, SIGUSR1 and SIGINT, and SIGUSR2 where there is a handler for it; the same signal again has its
        usual effect.

        Only the main thread can; in another one nothing is noted.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        known = [signum for name in (*SIGNALS, FOREIGN) if (signum := getattr(signal, name, None))]
        handlers = {signum: signal.getsignal(signum) for signum in known}
        self.before = {k: h for k, h in handlers.items() if signal.Signals(k).name in SIGNALS or callable(h)}
        for signum in self.before:
            signal.signal(signum, self._note)
        try:
            yield
        finally:
            for signum, handler in self.before.items():
                signal.signal(signum, handler)

    def exit(self, signum: int) -> None:
        """End the process with the status that schedulers know: 128 and the signal's number.

        Where somebody had installed a handler for the signal before, it is handed over to that instead; should the
        handler return, so does this, and the signal may come again.
        """
        self.asked.discard(signum)
        handler = self.before.get(signum)
        if not callable(handler) or handler is signal.default_int_handler:
            if signum == getattr(signal, "SIGUSR1", None):
                self._ignore_sigterm()
            raise SystemExit(128 + signum)
        signal.signal(signum, handler)
        handler(signum, None)
        signal.signal(signum, self._note)

    def _ignore_sigterm(self) -> None:
        """Let the process end with its own status: when the first rank has, srun sends the others SIGTERM.

        One that still closes its loggers would end with 143 then, and a job that is to be queued again would not be.
        """
        self.before[signal.SIGTERM] = signal.SIG_IGN
        signal.signal(signal.SIGTERM, signal.SIG_IGN)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        self.asked.add(signum)
        signal.signal(signum, self.before[signum])
