"""Processes that belong to this one."""

import contextlib
import ctypes
import os
import signal
import sys


def end_with_parent(name: str = "SIGKILL") -> None:
    """Have this process sent a signal as soon as the thread that started it ends, on Linux."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, int(signal.Signals[name]))  # PR_SET_PDEATHSIG


def env_rank() -> int:
    """Return the rank that torchrun's or SLURM's variables give this process; 0 without them."""
    text = os.environ.get("RANK") or "0"
    if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        text = os.environ.get("SLURM_PROCID", "0")
    return int(text) if text.isdecimal() else 0
