"""Available memory."""

import os
from pathlib import Path


def free_memory() -> int:
    """Return the available memory in bytes: that of the machine, or of the container if less."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    try:
        limit, current = (Path(f"/sys/fs/cgroup/memory.{name}").read_text().strip() for name in ("max", "current"))
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        used = int(current) - int(stat["inactive_file"])  # page cache that the kernel reclaims on demand
        return free if limit == "max" else max(min(free, int(limit) - used), 0)
    except (OSError, ValueError, KeyError):
        return free


def gib(size: float) -> str:
    """Format a number of bytes in GiB."""
    return f"{size / 2**30:.2f} GiB"
