"""Reading YOLO txt: a data.yaml, and one text file per image.

Each line describes a box, ``class x_centre y_centre width height``. The numbers are in 0..1 of the upright image. A
line with more numbers is a polygon, which is converted to its bounding box, or, with ``kpt_shape`` in the yaml, a box
and its keypoints.
"""

import os
import re
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

from detkit.data.annotations import Annotations
from detkit.data.builder import AnnotationBuilder, check_class_names
from detkit.data.file_utils import Listings, images_in, is_image, list_images, read_lines, with_slashes
from detkit.data.formats.image_names import ImageNames
from detkit.data.formats.label_files import LabelFiles, label_folders
from detkit.data.index import cached
from detkit.data.issues import IssueLog
from detkit.data.splits import ALIASES, REQUIRED_SPLITS, MissingSplit, pick_split
from detkit.errors import DetkitError, shorten
from detkit.ops.files import MAX_TEXT, read_regular, read_yaml
from detkit.registry import DATASETS, SPLIT_NAMES

# Keys of a data.yaml whose values are text.
TEXT_KEYS = ("names", "path", "train", "val", "valid", "validation", "test")
MAX_VALUE = 1e6  # of a normalised coordinate; larger values are invalid


@DATASETS.register("yolo")
def read_yolo(split: str, *, yaml: str | int, log: IssueLog | None = None) -> Annotations:
    """Read a split of a data.yaml: ``train``, ``val`` (or ``valid``), ``test``, or another of its keys.

    A split is a folder, a text file of image paths, or a list of these, relative to ``path``, which is optional and
    relative to the yaml. ``names`` is a list, or a mapping of class ids, which may have gaps. Labels are in the folder
    ``labels`` next to ``images``, or next to their image; an image without labels is background.

    Args:
        split: its name.
        yaml: path of the data.yaml.
        log: receives all problems; if given, the index is not used.

    Raises:
        DetkitError: the yaml, a folder or a list of images is missing or malformed, there is no such split, or no image
            is left.
        MissingSplit: the files of the split do not exist.
    """
    file = Path(str(yaml))
    content = _load(file)
    split = pick_split(split, _split_names(content, file), file)
    class_names, category_ids = _names(content, file)
    keypoints = _keypoints(content, file)
    sources = _sources(content, split, file)
    folders = [source for source in sources if source.is_dir()]
    lists = [source for source in sources if not source.is_dir()]
    roots = (file.parent / with_slashes(str(content.get("path") or ".")), file.parent)
    listed = {source: _read_list(source, roots) for source in lists}
    deep = list(dict.fromkeys(f for folder in folders for f in (folder, *label_folders(folder))))
    listed_folders = {Path(path).parent for paths in listed.values() for path in paths}
    flat = sorted({f for folder in listed_folders for f in (folder, *label_folders(folder))})

    def build(log: IssueLog) -> Annotations:
        paths = [
            path
            for source in sources
            for path in (map(Path, listed[source]) if source in listed else list_images(source))
        ]
        if keypoints:
            log.add("keypoints", file, None, "has 'kpt_shape': the first four numbers of a label are the box")
        builder = AnnotationBuilder(Path(f"{file} ({split})"), log, class_names, category_ids, normalised=True)
        return _read_labels(paths, builder, keypoints)

    return cached("yolo", [file, *lists], deep, flat, log, build, split=split)


@SPLIT_NAMES.register("yolo")
def yolo_splits(*, yaml: str | int) -> list[str]:
    """Return the splits of a data.yaml."""
    file = Path(str(yaml))
    return _split_names(_load(file), file)


def _read_labels(paths: list[Path], builder: AnnotationBuilder, keypoints: int) -> Annotations:
    """Read the label file of every image, and log label files without an image."""
    log, label_of = builder.log, {category: k for k, category in enumerate(builder.category_ids)}
    labels = LabelFiles()
    seen: set[Path] = set()
    for path in paths:
        if path in seen:
            builder.add_image(path, len(builder.paths) + 1)  # reported as repeated; not read again
        else:
            _read_label_file(path, labels, builder, label_of, keypoints)
        seen.add(path)
    for file in labels.without_image():
        log.add("labels_without_image", file, None, "has no image")
    return builder.build(lambda image, line, _: (labels.find(Path(builder.paths[image])), line, ""))


def _read_label_file(
    path: Path, labels: LabelFiles, builder: AnnotationBuilder, label_of: Mapping[int, int], keypoints: int
) -> None:
    """Append an image and its boxes; skip it if its label file is unreadable, but not if it is missing."""
    file = labels.find(path)
    if file is None:
        label_files = " nor ".join(map(str, labels.candidates(path)))
        builder.log.add("unlabelled_image", path, None, f"has no label file {label_files}")
    try:
        text = "" if file is None else read_regular(file, MAX_TEXT).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        builder.log.add("unreadable_labels", file, None, f"cannot be read: {reason}")
        return
    image = builder.add_image(path, len(builder.paths) + 1)
    for number, line in enumerate(text.splitlines(), 1):
        fields = line.split()
        if not fields:
            continue
        xyxy = _box(fields, keypoints)
        if xyxy is None:
            rest = (
                f", optionally with {keypoints} keypoint values" if keypoints else ", or a polygon of at least 3 points"
            )
            message = f"needs a class and 4 numbers{rest}, it is '{shorten(line, 80)}'"
            builder.log.add("malformed_box", file, number, message)
            continue
        category = int(float(fields[0]))
        if category not in label_of:
            known = f"{min(label_of)} to {max(label_of)}"
            builder.log.add("unknown_class", file, number, f"has class {category}, data.yaml defines {known}")
            continue
        builder.add_box(image, label_of[category], xyxy, number)


def _box(fields: list[str], keypoints: int) -> tuple[float, float, float, float] | None:
    """Return the normalised xyxy box of a line; None if it is invalid.

    Args:
        fields: of the line, separated by whitespace.
        keypoints: number of keypoint values that may follow the box; if 0, a line with more numbers is a polygon.
    """
    try:
        numbers = [float(field) for field in fields]
    except ValueError:
        return None
    if keypoints and len(numbers) == 5 + keypoints:
        numbers = numbers[:5]
    if not (numbers[0].is_integer() and all(abs(v) < MAX_VALUE for v in numbers)):  # False for NaN
        return None
    if len(numbers) == 5:
        x, y, w, h = numbers[1:]
        return x - w / 2, y - h / 2, x + w / 2, y + h / 2
    if not keypoints and len(numbers) >= 7 and len(numbers) % 2:
        xs, ys = numbers[1::2], numbers[2::2]
        return min(xs), min(ys), max(xs), max(ys)
    return None


def _load(file: Path) -> dict[str, Any]:
    """Parse the data.yaml."""
    try:
        content = read_yaml(file, text_keys=TEXT_KEYS)
    except OSError as error:
        raise DetkitError(f"cannot read data.yaml={file}: {error.strerror or error}") from None
    if not isinstance(content, dict):
        raise DetkitError(f"{file} is not a data.yaml: it needs the keys train, val and names")
    return content


def _names(content: Mapping[str, Any], file: Path) -> tuple[tuple[str, ...], tuple[int, ...]]:
    """Return class names and ids in ascending order of the ids."""
    names = content.get("names")
    if isinstance(names, list):
        names = dict(enumerate(names))
    if not isinstance(names, dict) or not names:
        raise DetkitError(f"{file} needs 'names': a list of class names, or a mapping of class ids to names")
    by_id: dict[int, str] = {}
    for key, name in names.items():
        number = _parse_int(key)
        if number is None or number < 0:
            raise DetkitError(f"{file}: the keys of 'names' must be whole numbers, 0 or more, one is {shorten(key)}")
        if not isinstance(name, str) or number in by_id:
            raise DetkitError(f"{file}: 'names' must give every class id one name, {number} has {shorten(name)}")
        by_id[number] = name
    ids = tuple(sorted(by_id))
    result = tuple(by_id[k] for k in ids)
    check_class_names(result, f"{file}: 'names'")
    count = content.get("nc")
    if count is not None and _parse_int(count) is None:
        raise DetkitError(f"{file}: 'nc' must be the number of classes, it is {shorten(count)}")
    if count is not None and _parse_int(count) != len(ids):
        raise DetkitError(f"{file}: 'nc' is {_parse_int(count)}, but 'names' holds {len(ids)}; correct one of them")
    return result, ids


def _parse_int(value: Any) -> int | None:
    """Parse an integer, which may be written as ``2.0``, ``"2"`` or ``0x2``; return None for anything else."""
    text = str(value) if isinstance(value, (int, float, str)) and not isinstance(value, bool) else ""
    match = re.fullmatch(r"([0-9]{1,9})(\.0*)?|(0[xX][0-9a-fA-F]{1,7})", text.strip())
    return match and int(match[1] or match[3], 10 if match[1] else 16)


def _keypoints(content: Mapping[str, Any], file: Path) -> int:
    """Return the number of keypoint values in a label according to ``kpt_shape``; 0 without it."""
    shape = content.get("kpt_shape")
    if shape is None:
        return 0
    values = re.findall(r"[^\s,()\[\]]+", shape) if isinstance(shape, str) else shape  # "(17, 3)" as well
    numbers = [_parse_int(value) for value in values] if isinstance(values, list) else []
    if len(numbers) != 2 or not numbers[0] or numbers[1] not in (2, 3):
        raise DetkitError(f"{file}: 'kpt_shape' must be [keypoints, 2 or 3 numbers of each], it is {shorten(shape)}")
    return numbers[0] * numbers[1]


def _split_names(content: Mapping[str, Any], file: Path) -> list[str]:
    """Return train, val, test if it exists, and the other keys whose values are folders or lists of images."""
    names = [*REQUIRED_SPLITS, *(["test"] if content.get("test") else [])]
    return names + [key for key in content if _is_other_split(key, content, file)]


def _is_other_split(key: Any, content: Mapping[str, Any], file: Path) -> bool:
    if key in (*REQUIRED_SPLITS, *ALIASES, "test", "trainval", "path", "names") or not isinstance(key, str):
        return False
    try:
        sources = _sources(content, key, file)
        return all(images_in(s) if s.is_dir() else is_image((read_lines(s) or [""])[0]) for s in sources)
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
        raise DetkitError(f"{file}: 'path' must be a folder, it is {shorten(base)}")
    return [_resolve(file.parent, base, entry, file) for entry in dict.fromkeys(entries)]


def _resolve(folder: Path, base: str, entry: str, file: Path) -> Path:
    """Return the path of an entry; some tools write ``../train/images`` for a folder next to the yaml."""
    for base_name, name in ((base, entry), (with_slashes(base), with_slashes(entry))):
        for candidate in (folder / base_name / name, folder / name, folder / name.removeprefix("../")):
            # Path's methods may raise OSError, for example for long names.
            if os.path.isdir(candidate) or os.path.isfile(candidate):  # noqa: PTH112, PTH113
                return candidate
    if os.path.exists(folder / base / entry):  # noqa: PTH110  (as above)
        raise DetkitError(f"{file}: {shorten(str(folder / base / entry))} is neither a folder nor a regular file")
    raise MissingSplit(
        f"{file}: there is no {shorten(str(folder / base / entry))}; correct 'path' (relative to the yaml) or the "
        f"entry '{shorten(entry)}'"
    )


def _read_list(file: Path, roots: Iterable[Path]) -> list[str]:
    """Return the image paths in a text file, one per line, relative to its folder or to one of ``roots``.

    If there is no such image, it is searched by the end of its path.
    """
    listings = Listings()
    folders = [file.parent, *roots]
    finders = [ImageNames(folder) for folder in folders]
    paths = []
    for line in read_lines(file):
        candidates = (os.path.normpath(folder / line) for folder in folders)
        by_end = (
            os.path.join(finder.folder, name)  # noqa: PTH118  (bulk: no Path for each image)
            for finder in finders
            for name, other in [finder.locate(line)]
            if not other
        )
        first = next(candidates)
        paths.append(first if listings.has(first) else next(filter(listings.has, chain(candidates, by_end)), first))
    return paths
