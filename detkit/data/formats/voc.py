"""Reading Pascal VOC: one xml per image, one list per split (http://host.robots.ox.ac.uk/pascal/VOC)."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.builder import AnnotationBuilder
from detkit.data.file_utils import Listings, list_images, names_in, read_lines, with_slashes
from detkit.data.formats.voc_xml import SIDES, VocObject, parse_xml
from detkit.data.index import cached
from detkit.data.issues import IssueLog
from detkit.data.splits import REQUIRED_SPLITS, pick_split
from detkit.errors import DetkitError, is_name, shorten
from detkit.ops.files import open_regular
from detkit.ops.image import IMAGE_SUFFIXES
from detkit.registry import DATASETS, SPLIT_NAMES

MAX_COORDINATE = 1e9  # in pixels; larger values are invalid
MAX_PARTS = 20  # trailing parts of a listed path that are considered


@DATASETS.register("voc")
def read_voc(
    split: str,
    *,
    root: str | int,
    train_split: str = "train",
    val_split: str = "val",
    images: str | None = None,
    one_based: bool = False,
    log: IssueLog | None = None,
) -> Annotations:
    """Read a split: the images listed in ``ImageSets/Main/{train_split,val_split}.txt``, or in another list there.

    The classes are the sorted names in the xml files of all splits. Objects marked difficult are treated like COCO's
    crowds: excluded from training, ignored in evaluation.

    Args:
        split: its name.
        root: folder of the data set.
        train_split: name of the list of the train split.
        val_split: name of the list of the val split.
        images: folder of the images, relative to ``root``; may have subfolders; by default JPEGImages or images, in
            ``root`` or its parent.
        one_based: coordinates are pixel indices from 1, the last one inclusive, as in the original VOC; by default they
            are pixel edges, as written by most tools.
        log: receives all problems; if given, the index is not used.

    Raises:
        DetkitError: a folder or list is missing, or no class or no image is left.
        MissingSplit: none of the image files exists.
    """
    base = _base(root)
    labels = base / "Annotations"
    lists = _lists(base, str(train_split), str(val_split))
    split = pick_split(split, lists, base)
    folder = _image_folder(base, images)

    def build(log: IssueLog) -> Annotations:
        names = {split: _read_list(lists[split], labels)}
        for other in lists.keys() - {split}:
            with suppress(DetkitError):  # raised when that split is read
                names[other] = _read_list(lists[other], labels)
        return _read_split(names, split, lists[split], labels, folder, bool(one_based), log)

    return cached("voc", list(lists.values()), [labels, folder], [], log, build, split=split, one_based=bool(one_based))


@SPLIT_NAMES.register("voc")
def voc_splits(*, root: str | int, train_split: str = "train", val_split: str = "val", **_: Any) -> list[str]:
    """Return the splits that ``read_voc`` can read with the same keys."""
    return [*_lists(_base(root), str(train_split), str(val_split))]


def _base(root: str | int) -> Path:
    """Return the folder that contains Annotations: ``root`` or its subfolder voc."""
    base = Path(str(root))
    if not base.is_dir():
        raise DetkitError(f"data.root={root} is not a folder")
    if not (base / "Annotations").is_dir() and (base / "voc" / "Annotations").is_dir():
        base = base / "voc"
    if not (base / "Annotations").is_dir():
        raise DetkitError(f"{base} has no folder Annotations: data.root must be the folder of a VOC set")
    return base


def _lists(base: Path, train_split: str, val_split: str) -> dict[str, Path]:
    """Return the list of every split: train, val, and the others in ImageSets/Main.

    trainval and the lists of a single class, for example ``cat_train``, are not splits.
    """
    folder = base / "ImageSets" / "Main"
    lists = {"train": folder / f"{train_split}.txt", "val": folder / f"{val_split}.txt"}
    for name in names_in(folder):
        stem, suffix = os.path.splitext(name)  # noqa: PTH122  (of a name)
        file, known = folder / name, {*lists, "trainval", train_split, val_split}
        if suffix == ".txt" and stem not in known and not name.startswith(".") and not _is_list_of_class(file):
            lists[stem] = file
    return lists


def _is_list_of_class(file: Path) -> bool:
    """Whether the first lines of a list have a second column that marks the images of a class."""
    try:
        with open_regular(file) as stream:
            lines = stream.read(2**12).decode(errors="replace").splitlines()[:10]
    except OSError:
        return False
    columns = [line.split() for line in lines if line.strip()]
    return all(len(column) > 1 and column[-1] in ("1", "-1", "0") for column in columns)


def _read_split(
    names: dict[str, list[str]],
    split: str,
    list_file: Path,
    labels: Path,
    folder: Path,
    one_based: bool,
    log: IssueLog,
) -> Annotations:
    """Read the xml files of a split, and those of the other splits for their classes.

    A split other than train and val without any xml files has no labels, like some test sets.
    """
    builder = AnnotationBuilder(list_file, log)
    image_file = _image_finder(folder)
    classes: dict[str, int] = {}  # numbered in the order of the files
    stems: list[str] = []
    labelled = split in REQUIRED_SPLITS or any(
        os.path.isfile(labels / f"{name}.xml")  # noqa: PTH113  (Path.is_file may raise OSError)
        for name in names[split]
    )
    for name in dict.fromkeys(names[split]):
        file = labels / f"{name}.xml"
        if not labelled:
            path = image_file(name)
            log.add("unlabelled_image", path, None, f"has no label file {file}")
            builder.add_image(path, len(stems) + 1)
            stems.append(name)
            continue
        xml = parse_xml(file, log)
        if xml is None:
            continue
        stated, objects = xml
        image = builder.add_image(image_file(name), len(stems) + 1, stated)
        stems.append(name)
        for obj in objects:
            xyxy = _box(obj, one_based)
            if xyxy is None:
                message = (
                    f"<object> needs a printable name and a <bndbox> of numbers, it has {shorten(obj.fields, 100)}"
                )
                log.add("malformed_box", file, obj.line, message)
                continue
            label = classes.setdefault(obj.fields["name"], len(classes))
            builder.add_box(image, label, xyxy, obj.line, crowd=obj.fields.get("difficult") == "1")
    _log_repeated(names[split], list_file, log)
    others = dict.fromkeys(name for other, entries in names.items() if other != split for name in entries)
    _add_classes([labels / f"{name}.xml" for name in others], one_based, classes)
    if not classes:
        reason = f": {log.summary()}; the first problem: {log.issues[0]}" if log.summary() else ""
        raise DetkitError(
            f"the xml files of the {len(stems)} images listed in {list_file} contain no objects, so there is nothing "
            f"to detect{reason}"
        )
    builder.class_names = tuple(sorted(classes))
    builder.category_ids = tuple(range(1, len(classes) + 1))
    rank = np.array([builder.class_names.index(name) for name in classes])

    def translate(rows: np.ndarray) -> np.ndarray:
        rows["label"] = rank[rows["label"]]
        return rows

    return builder.build(lambda image, line, _: (labels / f"{stems[image]}.xml", line, ""), translate)


def _log_repeated(names: list[str], list_file: Path, log: IssueLog) -> None:
    """Log the images that are listed more than once."""
    if len(names) > len(set(names)):
        for name, count in Counter(names).items():
            if count > 1:
                log.add("repeated_image", list_file, None, f"lists {shorten(name)} more than once")


def _add_classes(files: list[Path], one_based: bool, classes: dict[str, int]) -> None:
    """Add the classes of the valid objects in xml files to ``classes``."""
    silent = IssueLog(limit=0)
    for file in files:
        for obj in (parse_xml(file, silent) or (None, ()))[1]:
            if _box(obj, one_based) is not None:
                classes.setdefault(obj.fields["name"], len(classes))


def _box(obj: VocObject, one_based: bool) -> tuple[float, float, float, float] | None:
    """Return the xyxy box of an object; None if its numbers or its name are invalid."""
    name = obj.fields.get("name")
    try:
        x1, y1, x2, y2 = (float(obj.fields[side]) for side in SIDES)
    except (KeyError, ValueError):
        return None
    if not is_name(name) or not all(abs(v) < MAX_COORDINATE for v in (x1, y1, x2, y2)):  # False for NaN
        return None
    return (x1 - 1, y1 - 1, x2, y2) if one_based else (x1, y1, x2, y2)


def _image_folder(base: Path, images: str | None) -> Path:
    candidates = [base / str(images)] if images else [
        base / "JPEGImages", base / "images", base.parent / "JPEGImages", base.parent / "images"
    ]  # fmt: skip
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise DetkitError(f"there is no folder {candidates[0]}: set data.images=FOLDER to the folder of the images")


def _image_finder(folder: Path) -> Callable[[str], Path]:
    """Return a function that finds an image by its path below ``folder`` without suffix, or by its stem."""
    images = list_images(folder)[::-1]  # reversed: of images with the same stem, the first is found
    by_path = {os.path.splitext(os.path.relpath(path, folder))[0]: path for path in images}  # noqa: PTH122  (bulk)
    by_stem = {path.stem: path for path in images}
    return lambda name: by_path.get(name) or by_stem.get(name.rpartition("/")[2]) or folder / f"{name}.jpg"


def _read_list(file: Path, labels: Path) -> list[str]:
    """Return the image names of a split, as paths of the xml files below ``labels`` without suffix.

    A listed name may have an image suffix and leading folders. A second column, a flag as in the lists of a class or
    the name of the xml file, is ignored.
    """
    names = [with_slashes(line) for line in read_lines(file)]
    columns = [name.rsplit(None, 1) for name in names]
    if all(len(column) == 2 and (column[1] in ("1", "-1", "0") or column[1].endswith(".xml")) for column in columns):
        names = [column[0] for column in columns]
    listings = Listings()
    return [next((c for c in _candidates(name) if listings.has(f"{labels}/{c}.xml")), name) for name in names]


def _candidates(name: str) -> Iterator[str]:
    """Yield possible xml names of a listed name: unchanged, without suffix, with successively fewer leading folders."""
    yield name
    stem, suffix = os.path.splitext(name)  # noqa: PTH122  (bulk: no Path for each image)
    if suffix.lower() in (*IMAGE_SUFFIXES, ".xml"):
        name = stem
    parts = name.split("/")
    yield from ("/".join(parts[k:]) for k in range(max(len(parts) - MAX_PARTS, 0), len(parts)))
