"""Sources of frames: images, folders, lists and arrays."""

import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from detkit.errors import DetkitError, shorten
from detkit.inference.frames import Frame
from detkit.ops.image import IMAGE_SUFFIXES, is_image

Source = str | Path | np.ndarray | Sequence["Source"]


def expand_source(path: Path) -> list[Path]:
    """Return the images of a folder sorted by name, or the single file.

    Raises:
        DetkitError: the path does not exist or cannot be read, or the folder contains no images.
    """
    try:
        mode = path.stat().st_mode
        listed = path.iterdir() if stat.S_ISDIR(mode) else ()
        files = sorted(file for file in listed if is_image(file.name))
    except FileNotFoundError:
        raise DetkitError(f"source {shorten(str(path))} does not exist") from None
    except (OSError, ValueError) as error:  # no permission, a symlink loop, a NUL character
        reason = getattr(error, "strerror", None) or error
        raise DetkitError(f"cannot read source {shorten(str(path))}: {reason}") from None
    if stat.S_ISREG(mode):
        return [path]
    if not stat.S_ISDIR(mode):
        raise DetkitError(f"source {shorten(str(path))} is neither a regular file nor a folder")
    if not files:
        suffixes = ", ".join(sorted(IMAGE_SUFFIXES))
        raise DetkitError(f"folder {shorten(str(path))} contains no images (looked for {suffixes})")
    return files


def open_source(source: Source) -> Iterator[Frame]:
    """Yield a frame for every image in ``source``; files are not read yet."""
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            raise DetkitError(f"an image array must be (H, W, 3) uint8 RGB, not {source.shape} {source.dtype}")
        yield Frame(None, source)
    elif isinstance(source, (str, Path)):
        for file in expand_source(Path(source)):
            yield Frame(file, name=str(file))
    elif not isinstance(source, Sequence):
        raise DetkitError(
            f"a source must be a file, a folder, an image array or a list of these, not {type(source).__name__}"
        )
    else:
        for item in source:
            yield from open_source(item)
