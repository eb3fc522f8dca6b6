"""Sources of frames: images, folders, patterns, lists, text files of paths, arrays, videos, streams and cameras."""

import glob
import os
import stat
import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from detkit.errors import DetkitError, shorten
from detkit.inference.frames import Frame
from detkit.inference.video import check_url, count_frames, is_url, is_video, read_stream, read_video
from detkit.ops.files import MAX_TEXT, read_regular
from detkit.ops.image import IMAGE_SUFFIXES, is_image

Source = str | int | Path | np.ndarray | Image.Image | Sequence["Source"]
Item = Path | str | int | np.ndarray | Image.Image  # an image or video file, a URL, a camera, an image in memory

LONGEST_LINE = 4096  # bytes of a path


def open_source(source: Source, recursive: bool = False) -> Iterator[Frame]:
    """Return the frames of a source, see ``list_source``; files are not read yet.

    A file that is missing or damaged in a list, folder or text is a frame that cannot be read, after which the others
    follow.

    Raises:
        DetkitError: the source is invalid.
    """
    return read_items(list_source(source, recursive))


def list_source(source: Source, recursive: bool = False) -> list[Item]:
    """Return the files, streams and arrays of a source.

    Args:
        source: one of
            - an image or video file, by its suffix, or a folder of these, sorted by name;
            - a glob pattern such as ``images/*_left.jpg``, where ``**`` stands for any folders;
            - a .txt file of one path per line, relative to the file's folder; ``#`` begins a comment;
            - ``-``: standard input, one path per line, read to its end first;
            - the number of a camera, or the URL of a stream (RTSP, HTTP and others);
            - an (H, W, 3) uint8 RGB array, or a PIL image of any mode;
            - a list of these.
        recursive: also use subfolders of a folder.

    Raises:
        DetkitError: it does not exist, cannot be read, is empty, or is of another type.
    """
    if isinstance(source, str) and source == "-":
        return _from_lines(sys.stdin.buffer.read(MAX_TEXT), Path(), "standard input", recursive)
    if isinstance(source, (str, Path)) and str(source).lower().endswith(".txt") and Path(source).is_file():
        try:
            return _from_lines(read_regular(source), Path(source).parent, str(source), recursive)
        except OSError as error:
            raise DetkitError(f"cannot read source {shorten(str(source))}: {error.strerror}") from None
    if isinstance(source, (str, int, Path, np.ndarray, Image.Image)):
        return _list_one(source, recursive)
    if not isinstance(source, Sequence):
        raise DetkitError(
            f"a source must be a file, a folder, an image or a list of these, not {type(source).__name__}"
        )
    if not len(source):
        raise DetkitError("the source is an empty list")
    return [item for entry in source for item in _list_entry(entry, recursive)]


def read_items(items: Iterable[Item]) -> Iterator[Frame]:
    """Yield the frames of the items of ``list_source``."""
    for item in items:
        if isinstance(item, Image.Image):
            yield Frame(None, np.array(ImageOps.exif_transpose(item).convert("RGB")))
        elif isinstance(item, np.ndarray):
            yield Frame(None, item)
        elif isinstance(item, (str, int)):
            yield from read_stream(item)
        elif is_video(item.name):
            yield from read_video(item)
        else:
            yield Frame(item, name=str(item))


def is_live(items: Iterable[Item]) -> bool:
    """Return whether there is a stream or camera among the items."""
    return any(isinstance(item, (str, int)) for item in items)


def count_items(items: Sequence[Item]) -> int | None:
    """Return the number of frames in the items, as far as videos state it; None if one is a stream."""
    if is_live(items):
        return None
    return sum(count_frames(item) if isinstance(item, Path) and is_video(item.name) else 1 for item in items)


def expand_path(path: Path, recursive: bool = False) -> list[Path]:
    """Return the images and videos of a folder sorted by name, or the single file.

    Raises:
        DetkitError: the path does not exist or cannot be read, or the folder contains no images.
    """
    try:
        mode = path.stat().st_mode
        files = sorted(_files_in(path, recursive)) if stat.S_ISDIR(mode) else []
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
        hint = "" if recursive else "; recursive=true also looks into its subfolders"
        raise DetkitError(f"folder {shorten(str(path))} contains no images or videos (looked for {suffixes}){hint}")
    return files


def _files_in(folder: Path, recursive: bool) -> Iterator[Path]:
    """Yield the images and videos in a folder, hidden ones left out; symbolic links to folders are not followed."""
    if not recursive:
        yield from (file for file in folder.iterdir() if is_image(file.name) or is_video(file.name))
        return
    for root, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        yield from (Path(root, name) for name in names if is_image(name) or is_video(name))


def _list_one(source: str | int | Path | np.ndarray | Image.Image, recursive: bool) -> list[Item]:
    """Return the items of a source that is neither a list nor a text."""
    if isinstance(source, np.ndarray):
        if source.ndim != 3 or source.shape[2] != 3 or source.dtype != np.uint8 or not source.size:
            raise DetkitError(f"an image array must be (H, W, 3) uint8 RGB, not {source.shape} {source.dtype}")
        return [source]
    if isinstance(source, Image.Image):
        return [source]
    if isinstance(source, str) and is_url(source):
        return [check_url(source)]
    path = Path(str(source))
    if _is_camera(source) and not path.exists():
        return [int(source)]  # type: ignore[arg-type]  # digits
    if glob.has_magic(str(path)) and not os.path.lexists(path):
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207  (absolute, too)
        files = [file for file in files if not file.is_dir()]
        if not files:
            raise DetkitError(f"source {shorten(str(path))} matches no files")
        return list(files)
    return list(expand_path(path, recursive))


def _list_entry(entry: Source, recursive: bool) -> Sequence[Item]:
    """Return the items of an entry of a list; a file that does not exist is reported when it is read."""
    if not isinstance(entry, (str, Path)):
        return list_source(entry, recursive)
    if isinstance(entry, str) and (is_url(entry) or _is_camera(entry) or glob.has_magic(entry)):
        return _list_one(entry, recursive)
    path = Path(entry)
    return expand_path(path, recursive) if path.is_dir() else [path]


def _from_lines(content: bytes, folder: Path, name: str, recursive: bool) -> list[Item]:
    """Return the items of a text of paths."""
    items: list[Item] = []
    for number, line in enumerate(content.splitlines(), 1):
        text = os.fsdecode(line).strip()
        if not text or text.startswith("#"):
            continue
        if "\0" in text or len(line) > LONGEST_LINE:
            raise DetkitError(f"source {shorten(name)} is not a text of paths: see line {number}")
        items += _list_one(text, recursive) if is_url(text) else _list_entry(folder / text, recursive)
    if not items:
        raise DetkitError(f"source {shorten(name)} contains no paths")
    return items


def _is_camera(source: object) -> bool:
    """Return whether a source is the number of a camera."""
    return (
        isinstance(source, (int, str))
        and not isinstance(source, bool)
        and str(source).isdecimal()
        and len(str(source)) < 4
    )
