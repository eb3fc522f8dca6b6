"""Pascal VOC: an xml file an image, and a list of image names a split (http://host.robots.ox.ac.uk/pascal/VOC)."""

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

MAX_COORDINATE = 1e9  # pixels of a coordinate: beyond, it is nonsense
MAX_PARTS = 20  # of a listed path: more in front are passed over


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
    """Read a split: the names in ``ImageSets/Main/{train_split,val_split}.txt``, or in another list there.

    The classes are the names that the xml files of all splits hold, sorted. Objects marked difficult are ignored as
    COCO ignores crowds: not trained on, neither right nor wrong to find.

    Args:
        images: folder of the images, relative to ``root``, with folders within; by default JPEGImages, else images,
            here or one folder up.
        one_based: coordinates count pixels from 1 and include the last, as in the original VOC; by default they are
            edges, as most tools write them.
        log: where problems go; given one, the files are read anew instead of the index.

    Raises:
        DetkitError: a missing folder or list, no class or no image left.
    """
    base = _base(root)
    labels = base / "Annotations"
    lists = _lists(base, str(train_split), str(val_split))
    split = pick_split(split, lists, base)
    folder = _image_folder(base, images)

    def build(log: IssueLog) -> Annotations:
        names = {split: _read_list(lists[split], labels)}
        for other in lists.keys() - {split}:
            with suppress(DetkitError):  # it is named where that split is read
                names[other] = _read_list(lists[other], labels)
        return _read_split(names, split, lists[split], labels, folder, bool(one_based), log)

    return cached("voc", list(lists.values()), [labels, folder], [], log, build, split=split, one_based=bool(one_based))


@SPLIT_NAMES.register("voc")
def voc_splits(*, root: str | int, train_split: str = "train", val_split: str = "val", **_: Any) -> list[str]:
    """Return the splits that ``read_voc`` finds; it takes the same keys."""
    return [*_lists(_base(root), str(train_split), str(val_split))]


def _base(root: str | int) -> Path:
    """Return the folder that holds Annotations: ``root``, or voc within."""
    base = Path(str(root))
    if not base.is_dir():
        raise DetkitError(f"data.root={root} is not a folder")
    if not (base / "Annotations").is_dir() and (base / "voc" / "Annotations").is_dir():
        base = base / "voc"
    if not (base / "Annotations").is_dir():
        raise DetkitError(f"{base} has no folder Annotations: data.root must be the folder of a VOC set")
    return base


def _lists(base: Path, train_split: str, val_split: str) -> dict[str, Path]:
    """Return the list of every split: train, val, and those of the others in ImageSets/Main that hold images alone.

    trainval, which holds the images of both, is none of its own, nor are the lists of a class, such as ``cat_train``.
    """
    folder = base / "ImageSets" / "Main"
    lists = {"train": folder / f"{train_split}.txt", "val": folder / f"{val_split}.txt"}
    for name in names_in(folder):
        stem, suffix = os.path.splitext(name)
        file, known = folder / name, {*lists, "trainval", train_split, val_split}
        if suffix == ".txt" and stem not in known and not name.startswith(".") and not _is_list_of_class(file):
            lists[stem] = file
    return lists


def _is_list_of_class(file: Path) -> bool:
    """Whether a list says for each image whether it shows a class, going by its first lines."""
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
    """Read the xml files of a split, and those of the others for the names of their classes.

    A split beside train and val of which there is none is without labels, as test sets may be: it has no boxes.
    """
    builder = AnnotationBuilder(list_file, log)
    image_file = _image_finder(folder)
    classes: dict[str, int] = {}  # numbered as they come
    stems: list[str] = []
    labelled = split in REQUIRED_SPLITS or any(os.path.isfile(labels / f"{name}.xml") for name in names[split])
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
    repeated = len(names[split]) - len(set(names[split]))
    for name in [name for name, count in Counter(names[split]).items() if count > 1] if repeated else ():
        log.add("repeated_image", list_file, None, f"names {shorten(name)} more than once")
    silent = IssueLog(limit=0)
    for name in dict.fromkeys(name for other, entries in names.items() if other != split for name in entries):
        for obj in (parse_xml(labels / f"{name}.xml", silent) or (None, ()))[1]:
            if _box(obj, one_based) is not None:
                classes.setdefault(obj.fields["name"], len(classes))
    if not classes:
        reason = f": {log.summary()}; the first is {log.issues[0]}" if log.summary() else ""
        raise DetkitError(
            f"the xml files of the {len(stems)} images that {list_file} names hold no object, so there is nothing to "
            f"detect{reason}"
        )
    builder.class_names = tuple(sorted(classes))
    builder.category_ids = tuple(range(1, len(classes) + 1))
    rank = np.array([builder.class_names.index(name) for name in classes])

    def translate(rows: np.ndarray) -> np.ndarray:
        rows["label"] = rank[rows["label"]]
        return rows

    return builder.build(lambda image, line, _: (labels / f"{stems[image]}.xml", line, ""), translate)


def _box(obj: VocObject, one_based: bool) -> tuple[float, float, float, float] | None:
    """Return the object's xyxy box; None where it has no numbers, or no name that can be shown."""
    name = obj.fields.get("name")
    try:
        x1, y1, x2, y2 = (float(obj.fields[side]) for side in SIDES)
    except (KeyError, ValueError):
        return None
    if not is_name(name) or not all(abs(v) < MAX_COORDINATE for v in (x1, y1, x2, y2)):  # NaN is not, either
        return None
    return (x1 - 1, y1 - 1, x2, y2) if one_based else (x1, y1, x2, y2)


def _image_folder(base: Path, images: str | None) -> Path:
    candidates = [base / str(images)] if images else [
        base / "JPEGImages", base / "images", base.parent / "JPEGImages", base.parent / "images"
    ]  # fmt: skip
    for candidate in candidates:
        if candidate.is_dir():
            return candidate
    raise DetkitError(f"there is no folder {candidates[0]}: say where the images are, data.images=FOLDER")


def _image_finder(folder: Path) -> Callable[[str], Path]:
    """Return the function that finds the image of a name: by its path below ``folder``, else by its last part alone."""
    images = list_images(folder)[::-1]  # the first of those with one name counts
    by_path = {os.path.splitext(os.path.relpath(path, folder))[0]: path for path in images}
    by_stem = {path.stem: path for path in images}
    return lambda name: by_path.get(name) or by_stem.get(os.path.basename(name)) or folder / f"{name}.jpg"


def _read_list(file: Path, labels: Path) -> list[str]:
    """Return the image names of a split, as the xml files below ``labels`` are called.

    A line may have the suffix of the image or folders in front. A second column is passed over: a flag, as in the lists
    of a class, or the name of the xml file.
    """
    names = [with_slashes(line) for line in read_lines(file)]
    columns = [name.rsplit(None, 1) for name in names]
    if all(len(column) == 2 and (column[1] in ("1", "-1", "0") or column[1].endswith(".xml")) for column in columns):
        names = [column[0] for column in columns]
    listings = Listings()
    return [next((c for c in _candidates(name) if listings.has(f"{labels}/{c}.xml")), name) for name in names]


def _candidates(name: str) -> Iterator[str]:
    """Yield what a listed name may be as that of an xml file: itself, without suffix, without folders in front."""
    yield name
    stem, suffix = os.path.splitext(name)
    if suffix.lower() in (*IMAGE_SUFFIXES, ".xml"):
        name = stem
    parts = name.split("/")
    yield from ("/".join(parts[k:]) for k in range(max(len(parts) - MAX_PARTS, 0), len(parts)))
