"""Common code of the writers; a writer is a function in WRITERS, in a module next to the reader of the format."""

import os
import re
import shutil
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.progress import track

from detkit.data.annotations import Annotations
from detkit.errors import DetkitError
from detkit.ops.image import IMAGE_SUFFIXES, open_image
from detkit.registry import WRITERS

MAX_STEM = 180  # bytes of a file name without its suffix; file systems allow 255


@dataclass
class WriteResult:
    """The ``data`` keys that read the written data set, and warnings about what the format cannot represent."""

    data: dict[str, str]
    warnings: list[str] = field(default_factory=list)


def write_set(format_name: str, splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write splits with their images.

    Images are hard links if the file system supports it, otherwise copies. A writer is
    ``(splits, folder) -> WriteResult``.

    Args:
        format_name: name of a writer in WRITERS.
        splits: name and annotations of each split.
        folder: to write into; created if necessary.

    Raises:
        DetkitError: the format is unknown, the folder is not empty or cannot be written, or the format cannot represent
            the classes or splits.
    """
    writer = WRITERS.get(format_name)
    require_empty_dir(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result = writer(splits, folder.resolve())
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        raise DetkitError(f"cannot write the data set, {reason}; {folder} is incomplete, remove it") from None
    rotated = sum(annotations.issues.counts["exif_rotated"] for annotations in splits.values())
    if rotated:
        explanation = "their boxes refer to the rotated image, which not every tool supports"
        result.warnings.append(f"images rotated by their EXIF orientation: {rotated}; {explanation}")
    return result


def require_empty_dir(folder: Path) -> None:
    """Check that ``folder`` does not exist or is empty.

    Raises:
        DetkitError: it is not empty, or is a file.
    """
    try:
        not_empty = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        raise DetkitError(f"cannot write to {folder}: {error}") from None
    if not_empty:
        raise DetkitError(f"{folder} is not an empty folder: choose another one, or remove it")


def area_warnings(splits: Mapping[str, Annotations]) -> list[str]:
    """Return a warning if areas differ from those of the boxes, like COCO's mask areas, as they are lost."""
    for annotations in splits.values():
        box_areas = np.prod(annotations.boxes[:, 2:] - annotations.boxes[:, :2], axis=1)
        if not np.allclose(box_areas, annotations.areas, rtol=1e-3):
            return ["mask areas are lost: small, medium and large will be determined by the areas of the boxes"]
    return []


def file_names(splits: Mapping[str, Annotations]) -> list[list[str]]:
    """Return a safe file name for each image of each split, if possible its own.

    Stems are unique over all splits, even on a case-insensitive file system.
    """
    taken: set[str] = set()
    repeats: dict[str, int] = defaultdict(lambda: 1)  # number of images with a stem
    names: list[list[str]] = []
    for annotations in splits.values():
        names.append([])
        for path in annotations.paths:
            stem = re.sub(r"[^\w.,()+@=~-]+", "_", path.stem).strip(".")  # no spaces: lists are split at them
            stem = stem.encode()[:MAX_STEM].decode(errors="ignore") or "image"
            unique = stem
            while unique.casefold() in taken:
                repeats[stem] += 1
                unique = f"{stem}-{repeats[stem]}"
            taken.add(unique.casefold())
            suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".jpg"  # readers detect the content
            names[-1].append(unique + suffix)
    return names


def place_images(annotations: Annotations, names: list[str], folder: Path) -> None:
    """Hard-link the image files into ``folder``, or copy them, with a progress bar on a terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    bar = track(names, "images", transient=True, disable=not sys.stdout.isatty())
    for path, name in zip(annotations.paths, bar, strict=True):
        try:
            os.link(os.path.realpath(path), folder / name)
        except OSError:  # another disk, or an image in a tar file
            with open_image(path) as source, (folder / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def make_parent(file: Path) -> Path:
    """Create the folder of ``file`` and return ``file``."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
