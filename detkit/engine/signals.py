"""Ending a training when somebody asks for it: a scheduler, or Ctrl-C."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = ("SIGTERM", "SIGUSR1", "SIGINT")


class StopRequest:
    """Whether a signal has asked for the end.

    Attributes:
        signum: the first signal's number; None: there was none.
    """

    def __init__(self) -> None:
        self.signum: int | None = None

    @contextmanager
    def watch(self) -> Iterator[None]:
        """Note the first of SIGTERM, SIGUSR1 and SIGINT; the same signal again has its usual effect.

        Only the main thread can; in another one nothing is noted.
        """
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {signum: signal.getsignal(signum) for name in SIGNALS if (signum := getattr(signal, name, None))}

        def note(signum: int, frame: FrameType | None) -> None:
            self.signum = self.signum or signum
            signal.signal(signum, before[signum])

        for signum in before:
            signal.signal(signum, note)
        try:
            yield
        finally:
            for signum, handler in before.items():
                signal.signal(signum, handler)

    def obey(self) -> None:
        """End the process, if that was asked for, with the status that schedulers know: 128 and the signal's number."""
        if self.signum is not None:
            raise SystemExit(128 + self.signum)
