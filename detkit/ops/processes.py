"""Processes that belong to this one."""

import contextlib
import ctypes
import signal
import sys


def end_with_parent(name: str = "SIGKILL") -> None:
    """Have this process sent a signal as soon as the thread that started it ends, on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, int(signal.Signals[name]))  # PR_SET_PDEATHSIG
