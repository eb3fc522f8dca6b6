"""Parent processes and ranks."""

import contextlib
import ctypes
import os
import signal
import sys


def end_with_parent(name: str = "SIGKILL") -> None:
    """Send this process a signal when the thread that started it ends (Linux only)."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(1, int(signal.Signals[name]))  # PR_SET_PDEATHSIG


def env_rank() -> int:
    """Return the rank in the environment variables of torchrun or SLURM; 0 without them."""
    text = os.environ.get("RANK") or "0"
    if "RANK" not in os.environ and os.environ.get("SLURM_STEP_NUM_TASKS", "1") != "1":
        text = os.environ.get("SLURM_PROCID", "0")
    return int(text) if text.isdecimal() else 0
