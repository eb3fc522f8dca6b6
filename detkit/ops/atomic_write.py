"""Atomic writing of files: neither a reader nor a crash ever sees a partial file."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes | memoryview, keep: int = 1) -> None:
    """Write a file under a temporary name, then rename it: readers see the complete old or new file.

    Args:
        path: file to write.
        data: its content.
        keep: number of versions to keep, ``path`` included, see ``rotated_path``.

    Raises:
        OSError: the file cannot be written; ``filename`` is ``path``, and the old file is unchanged.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with suppress(OSError):
            temporary.unlink()  # it might be a pipe, which blocks on opening, or a symlink
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                rotated_path(path, age - 1).replace(rotated_path(path, age))
        temporary.replace(path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # frees space on a full disk
        error.filename, error.filename2 = str(path), None
        raise


def rotated_path(path: Path, age: int) -> Path:
    """Return the path of the version of ``path`` from ``age`` writes ago: ``state-1.pt`` for ``state.pt``."""
    return path.with_name(f"{path.stem}-{age}{path.suffix}") if age else path
