"""Processes that belong to this one."""

import contextlib
import ctypes
import signal


def end_with_parent(signum: int = signal.SIGKILL) -> None:
    """Have this process sent a signal as soon as the thread that started it ends, on Linux."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, int(signum))  # PR_SET_PDEATHSIG
