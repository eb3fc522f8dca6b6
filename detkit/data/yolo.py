"""YOLO txt: a data.yaml, and beside every image a text file with a line ``class x_centre y_centre width height``.

The numbers are in 0..1 of the upright image. A line of more numbers is a polygon; its box is taken.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from detkit.data.annotations import Annotations
from detkit.data.columns import Columns
from detkit.data.files import images_in, is_image, list_images, names_in, read_lines
from detkit.data.index import cached
from detkit.data.problems import ProblemLog
from detkit.data.splits import ALIASES, TRAINED, MissingSplit, pick_split
from detkit.errors import DetkitError
from detkit.registry import DATASETS, SPLIT_NAMES

MAX_TEXT = 2**26  # bytes of one label file
LARGEST = 1e6  # of a normalised value: beyond, it is nonsense
NO_LABELS = {"classes.txt", "labels.txt", "readme.txt", "notes.txt"}  # tools leave these beside the labels


@DATASETS.register("yolo")
def read_yolo(split: str, *, yaml: str | int, log: ProblemLog | None = None) -> Annotations:
    """Read a split that a data.yaml describes: ``train``, ``val`` (or ``valid``), ``test``, or another of its keys.

    A split is a folder, a text file of image paths, or a list of these, relative to ``path``, which is relative to the
    yaml and may be missing. ``names`` is a list, or a mapping of class ids that may have gaps. Labels
    lie in the folder ``labels`` beside ``images``, or else beside their image; an image without any is background.

    Args:
        log: where problems go; given one, the files are read anew instead of the index.

    Raises:
        DetkitError: a missing or malformed yaml, folder or list of images, no such split, or no image left.
    """
    file = Path(str(yaml))
    content = _load(file)
    split = pick_split(split, _split_names(content, file), file)
    class_names, category_ids = _names(content, file)
    sources = _sources(content, split, file)
    folders = [source for source in sources if source.is_dir()]
    lists = [source for source in sources if not source.is_dir()]
    listed = {os.path.dirname(path) for source in lists for path in _read_list(source)}
    deep = list(dict.fromkeys(f for folder in folders for f in (folder, label_folder(folder))))
    flat = sorted({f for folder in map(Path, listed) for f in (folder, label_folder(folder))})

    def build(log: ProblemLog) -> Annotations:
        paths = [
            path
            for source in sources
            for path in (list_images(source) if source.is_dir() else map(Path, _read_list(source)))
        ]
        source = Path(f"{file} ({split})")
        return _read_labels(paths, Columns(source, log, class_names, category_ids, normalised=True))

    return cached("yolo", [file, *lists], deep, flat, log, build, split=split)


@SPLIT_NAMES.register("yolo")
def yolo_splits(*, yaml: str | int) -> list[str]:
    """Return the splits that a data.yaml describes."""
    file = Path(str(yaml))
    return _split_names(_load(file), file)


def label_folder(folder: Path) -> Path:
    """Return where the labels of the images in a folder are: its last part ``images`` becomes ``labels``."""
    parts = list(folder.parts)
    if "images" not in parts:
        return folder
    parts[len(parts) - 1 - parts[::-1].index("images")] = "labels"
    return Path(*parts)


def label_file(image: Path) -> Path:
    """Return the text file with the labels of an image."""
    return label_folder(image.parent) / f"{image.stem}.txt"


def _read_labels(paths: list[Path], columns: Columns) -> Annotations:
    """Read the text file of every image, and look for text files without one."""
    log, label_of = columns.log, {category: k for k, category in enumerate(columns.category_ids)}
    files = [label_file(path) for path in paths]
    seen: set[Path] = set()
    for path, file in zip(paths, files, strict=True):
        if path in seen:
            columns.add_image(path, len(columns.paths) + 1)  # to be told of, not to be read again
        else:
            _read_label_file(path, file, columns, label_of)
        seen.add(path)
    folders = {file.parent for file in files}
    image_folders = {path.parent for path in paths}
    known = {*files, *(label_file(image) for folder in image_folders for image in images_in(folder))}
    for folder in sorted(folders):
        for name in names_in(folder):
            if name.endswith(".txt") and name[0] != "." and name not in NO_LABELS and folder / name not in known:
                log.add("labels_without_image", folder / name, None, "has no image")
    return columns.finish(lambda image, line, _: (label_file(Path(columns.paths[image])), line, ""))


def _read_label_file(path: Path, file: Path, columns: Columns, label_of: Mapping[int, int]) -> None:
    """Append an image and its boxes; an image whose labels cannot be read is left out, one without any is not."""
    try:
        exists = os.path.isfile(file)
        if exists and os.path.getsize(file) > MAX_TEXT:
            raise OSError
        text = file.read_text(encoding="utf-8-sig") if exists else ""
    except (OSError, UnicodeDecodeError) as error:
        columns.log.add("unreadable_labels", file, None, f"cannot be read as text ({type(error).__name__})")
        return
    if not exists:
        columns.log.add("unlabelled_image", path, None, f"has no label file {file}")
    image = columns.add_image(path, len(columns.paths) + 1)
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        xyxy = _box(fields)
        if xyxy is None:
            words = f"needs a class and 4 numbers, or a polygon of 3 points or more, it is '{line[:80]}'"
            columns.log.add("malformed_box", file, number, words)
            continue
        category = int(float(fields[0]))
        if category not in label_of:
            known = f"{min(label_of)} to {max(label_of)}"
            columns.log.add("unknown_class", file, number, f"has class {category}, data.yaml defines {known}")
            continue
        columns.add_box(image, label_of[category], xyxy, number)


def _box(fields: list[str]) -> tuple[float, float, float, float] | None:
    """Return the normalised xyxy box of a line's fields; None where they make no sense."""
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        return None
    if not (numbers[0].is_integer() and all(abs(v) < LARGEST for v in numbers)):  # NaN is not, either
        return None
    if len(numbers) == 5:
        x, y, w, h = numbers[1:]
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    if len(numbers) >= 7 and len(numbers) % 2:
        xs, ys = numbers[1::2], numbers[2::2]
        return min(xs), min(ys), max(xs), max(ys)
    return None


def _load(file: Path) -> dict[str, Any]:
    """Parse the data.yaml."""
    if not os.path.isfile(file):
        raise DetkitError(f"data.yaml={file} is not a file")
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise DetkitError(f"cannot read {file}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DetkitError(f"{file} is not a yaml file: it is not UTF-8 text") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise DetkitError(f"{file} is malformed yaml{line}: {str(error).splitlines()[0]}") from None
    if not isinstance(content, dict):
        raise DetkitError(f"{file} is no data.yaml: it needs the keys train, val and names")
    return content


def _names(content: Mapping[str, Any], file: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return class names and the id of each, ascending."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DetkitError(f"{file} needs 'names': a list of class names, or a mapping of class ids to names")
    try:
        by_id = {int(key): str(name) for key, name in names.items() if isinstance(name, (str, int, float))}
    except (TypeError, ValueError, OverflowError):
        raise DetkitError(f"{file}: the keys of 'names' must be whole numbers") from None
    if len(by_id) < len(names) or min(by_id) < 0:
        raise DetkitError(f"{file}: 'names' must give every class id, 0 or more, one name")
    ids = tuple(sorted(by_id))
    result = tuple(by_id[k] for k in ids)
    for name in result:
        if not name.isprintable():
            raise DetkitError(f"{file}: 'names' holds the name {name!r}, which cannot be printed; rename the class")
    if len(set(result)) < len(result):
        raise DetkitError(f"{file}: 'names' holds the same name twice; give every class one of its own")
    count = content.get("nc", len(ids))
    if count != len(ids):
        raise DetkitError(f"{file}: 'nc' is {count}, but 'names' holds {len(ids)}; correct the one or the other")
    return result, ids


def _split_names(content: Mapping[str, Any], file: Path) -> list[str]:
    """Return train, val, test where it is there, and the other keys whose values are folders or lists of images."""
    names = [*TRAINED, *(["test"] if content.get("test") else [])]
    return names + [key for key in content if _is_other_split(key, content, file)]


def _is_other_split(key: Any, content: Mapping[str, Any], file: Path) -> bool:
    if key in (*TRAINED, *ALIASES, "test", "trainval", "path", "names") or not isinstance(key, str):
        return False
    try:
        sources = _sources(content, key, file)
        return all(images_in(s) if s.is_dir() else is_image((_read_list(s) or [""])[0]) for s in sources)
    except (DetkitError, OSError, ValueError):
        return False


def _sources(content: Mapping[str, Any], split: str, file: Path) -> list[Path]:
    """Return the folders and lists of images of a split."""
    keys = [split, *(alias for alias, name in ALIASES.items() if name == split)]
    entries = next((content[key] for key in keys if content.get(key) is not None), None)
    entries = [entries] if isinstance(entries, str) else entries
    if not isinstance(entries, list) or not entries or not all(isinstance(e, str) and e for e in entries):
        raise DetkitError(f"{file} needs '{split}': a folder of images, a text file of image paths, or a list of these")
    base = content.get("path") or "."
    if not isinstance(base, str):
        raise DetkitError(f"{file}: 'path' must be a folder, it is {base}")
    return [_resolve(file.parent / base, entry, file) for entry in entries]


def _resolve(base: Path, entry: str, file: Path) -> Path:
    """Return where an entry is; some tools write ``../train/images`` for what lies beside the yaml."""
    for candidate in (base / entry, file.parent / entry, file.parent / entry.removeprefix("../")):
        if os.path.isdir(candidate) or os.path.isfile(candidate):
            return candidate
    raise MissingSplit(
        f"{file}: there is no {base / entry}; correct 'path' (relative to the yaml) or the entry '{entry}'"
    )


def _read_list(file: Path) -> list[str]:
    """Return the image paths in a text file, a line each, relative to the file's folder."""
    return [os.path.normpath(file.parent / line) for line in read_lines(file)]
