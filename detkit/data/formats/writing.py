"""What the writers of all formats share; a writer is a function in WRITERS, in a module beside the format's reader."""

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

MAX_STEM = 180  # bytes of a file name without its suffix: file systems take 255


@dataclass
class WriteResult:
    """What was written: the keys of ``data`` that read it back, and what the format cannot hold, a sentence each."""

    data: dict[str, str]
    warnings: list[str] = field(default_factory=list)


def write_set(format_name: str, splits: Mapping[str, Annotations], folder: Path) -> WriteResult:
    """Write splits as ``form`` (a name in WRITERS) into ``folder``, which is made, with their images.

    Images are hard links where the disk allows it, else copies. A writer is ``(splits, folder) -> WriteResult``.

    Raises:
        DetkitError: the folder holds something, the disk refuses, or the format cannot hold the classes.
    """
    writer = WRITERS.get(format_name)
    require_empty_dir(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        result = writer(splits, folder.resolve())
    except OSError as error:
        reason = f"{error.filename or folder}: {error.strerror or error}"
        raise DetkitError(f"cannot write the set, {reason}; what is in {folder} is not whole, remove it") from None
    turned = sum(annotations.issues.counts["exif_rotated"] for annotations in splits.values())
    if turned:
        explanation = "their boxes are those of the upright picture, which not every tool shows"
        result.warnings.append(f"images turned by their EXIF orientation: {turned}; {explanation}")
    return result


def require_empty_dir(folder: Path) -> None:
    """Check that ``folder`` is new or empty: nothing is overwritten.

    Raises:
        DetkitError: it holds something, or is a file.
    """
    try:
        not_empty = os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir()))
    except (OSError, ValueError) as error:
        raise DetkitError(f"cannot write to {folder}: {error}") from None
    if not_empty:
        raise DetkitError(f"{folder} is not an empty folder: name another one, or remove it")


def area_warnings(splits: Mapping[str, Annotations]) -> list[str]:
    """Return a warning where the stated areas, which are lost, are not those of the boxes, as COCO's are of masks."""
    for annotations in splits.values():
        box_areas = np.prod(annotations.boxes[:, 2:] - annotations.boxes[:, :2], axis=1)
        if not np.allclose(box_areas, annotations.areas, rtol=1e-3):
            return ["areas of masks are lost: small, medium and large go by the boxes' areas from here on"]
    return []


def file_names(splits: Mapping[str, Annotations]) -> list[list[str]]:
    """Return a file name for each image of each split: its own where it is safe and its stem not taken by another.

    Stems are told apart over all splits, also on a file system that takes capital letters for small ones.
    """
    taken: set[str] = set()
    repeats: dict[str, int] = defaultdict(lambda: 1)  # how often a stem has come, counted where it did so before
    names: list[list[str]] = []
    for annotations in splits.values():
        names.append([])
        for path in annotations.paths:
            stem = re.sub(r"[^\w.,()+@=~-]+", "_", path.stem).strip(".")  # no spaces either: lists are split at them
            stem = stem.encode()[:MAX_STEM].decode(errors="ignore") or "image"
            unique = stem
            while unique.casefold() in taken:
                repeats[stem] += 1
                unique = f"{stem}-{repeats[stem]}"
            taken.add(unique.casefold())
            suffix = path.suffix if path.suffix.lower() in IMAGE_SUFFIXES else ".jpg"  # the content tells what it is
            names[-1].append(unique + suffix)
    return names


def place_images(annotations: Annotations, names: list[str], folder: Path) -> None:
    """Link the image files into ``folder``, or copy them to another disk; a bar shows on a terminal."""
    folder.mkdir(parents=True, exist_ok=True)
    bar = track(names, "images", transient=True, disable=not sys.stdout.isatty())
    for path, name in zip(annotations.paths, bar, strict=True):
        try:
            os.link(os.path.realpath(path), folder / name)
        except OSError:  # another disk, or an image in a tar file
            with open_image(path) as source, (folder / name).open("wb") as copy:
                shutil.copyfileobj(source, copy)


def make_parent(file: Path) -> Path:
    """Return ``file`` after making its folder."""
    file.parent.mkdir(parents=True, exist_ok=True)
    return file
