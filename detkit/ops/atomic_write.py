"""Writing files so that a reader, or a crash, never meets half of one."""

import os
from contextlib import suppress
from pathlib import Path


def write_atomically(path: Path, data: bytes | memoryview, keep: int = 1) -> None:
    """Write a file under a temporary name, then rename it: a reader sees the old one or the new one, whole.

    Args:
        keep: how many there are to be: ``path`` itself and those that it was before, see ``rotated_path``.

    Raises:
        OSError: it cannot be written, with ``path`` as its file; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with suppress(OSError):
            temporary.unlink()  # opening a pipe would be waited for, and a link may lead anywhere
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        for age in range(keep - 1, 0, -1):
            with suppress(FileNotFoundError):
                os.replace(rotated_path(path, age - 1), rotated_path(path, age))
        os.replace(temporary, path)
    except OSError as error:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk needs the room
        error.filename, error.filename2 = str(path), None
        raise


def rotated_path(path: Path, age: int) -> Path:
    """Return where ``write_atomically`` keeps what ``path`` was ``age`` writes ago: ``state-1.pt`` for ``state.pt``."""
    return path.with_name(f"{path.stem}-{age}{path.suffix}") if age else path
