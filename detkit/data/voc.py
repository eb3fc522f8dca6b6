"""Pascal VOC: an xml file an image, and a list of image names a split (http://host.robots.ox.ac.uk/pascal/VOC)."""

import os
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.columns import Columns
from detkit.data.files import Listings, list_images, read_lines, with_slashes
from detkit.data.index import cached
from detkit.data.problems import ProblemLog
from detkit.data.voc_xml import SIDES, VocObject, parse_xml
from detkit.errors import DetkitError, shorten
from detkit.ops.image import IMAGE_SUFFIXES
from detkit.registry import DATASETS

LARGEST = 1e9  # pixels of a coordinate: beyond, it is nonsense
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
    log: ProblemLog | None = None,
) -> Annotations:
    """Read the ``"train"`` or ``"val"`` split: the names in ``ImageSets/Main/{train_split,val_split}.txt``.

    The classes are the names that the xml files of both splits hold, sorted. Objects marked difficult are ignored as
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
    base = Path(str(root))
    if not base.is_dir():
        raise DetkitError(f"data.root={root} is not a folder")
    if not (base / "Annotations").is_dir() and (base / "voc" / "Annotations").is_dir():
        base = base / "voc"
    labels = base / "Annotations"
    if not labels.is_dir():
        raise DetkitError(f"{base} has no folder Annotations: data.root must be the folder of a VOC set")
    lists = {name: base / "ImageSets" / "Main" / f"{name}.txt" for name in (str(train_split), str(val_split))}
    folder = _image_folder(base, images)
    wanted = str({"train": train_split, "val": val_split}[split])

    def build(log: ProblemLog) -> Annotations:
        names = {name: _read_list(file, labels) for name, file in lists.items()}
        return _read_split(names, wanted, lists[wanted], labels, folder, bool(one_based), log)

    return cached(
        "voc", list(lists.values()), [labels, folder], [], log, build, split=wanted, one_based=bool(one_based)
    )


def _read_split(
    names: dict[str, list[str]],
    wanted: str,
    list_file: Path,
    labels: Path,
    folder: Path,
    one_based: bool,
    log: ProblemLog,
) -> Annotations:
    """Read the xml files of the wanted split, and those of the other for the names of its classes."""
    columns = Columns(list_file, log)
    image_file = _image_finder(folder)
    classes: dict[str, int] = {}  # numbered as they come
    stems: list[str] = []
    for name in dict.fromkeys(names[wanted]):
        file = labels / f"{name}.xml"
        xml = parse_xml(file, log)
        if xml is None:
            continue
        stated, objects = xml
        image = columns.add_image(image_file(name), len(stems) + 1, stated)
        stems.append(name)
        for obj in objects:
            xyxy = _box(obj, one_based)
            if xyxy is None:
                words = f"<object> needs a name and a <bndbox> of numbers, it has {shorten(obj.fields, 100)}"
                log.add("malformed_box", file, obj.line, words)
                continue
            label = classes.setdefault(obj.fields["name"], len(classes))
            columns.add_box(image, label, xyxy, obj.line, crowd=obj.fields.get("difficult") == "1")
    again = len(names[wanted]) - len(set(names[wanted]))
    for name in [name for name, count in Counter(names[wanted]).items() if count > 1] if again else ():
        log.add("repeated_image", list_file, None, f"names {shorten(name)} more than once")
    silent = ProblemLog(limit=0)
    for name in dict.fromkeys(name for split, entries in names.items() if split != wanted for name in entries):
        for obj in (parse_xml(labels / f"{name}.xml", silent) or (None, ()))[1]:
            if _box(obj, one_based) is not None:
                classes.setdefault(obj.fields["name"], len(classes))
    if not classes:
        reason = f": {log.summary()}; the first is {log.problems[0]}" if log.summary() else ""
        raise DetkitError(
            f"the xml files of the {len(stems)} images that {list_file} names hold no object, so there is nothing to "
            f"detect{reason}"
        )
    columns.class_names = tuple(sorted(classes))
    columns.category_ids = tuple(range(1, len(classes) + 1))
    rank = np.array([columns.class_names.index(name) for name in classes])
    columns.label = rank[np.asarray(columns.label, np.int64)]
    return columns.finish(lambda image, line: (labels / f"{stems[image]}.xml", line, ""))


def _box(obj: VocObject, one_based: bool) -> tuple[float, float, float, float] | None:
    """Return the object's xyxy box; None where it has no numbers, or no name that can be shown."""
    name = obj.fields.get("name")
    try:
        x1, y1, x2, y2 = (float(obj.fields[side]) for side in SIDES)
    except (KeyError, ValueError):
        return None
    if not name or not name.isprintable() or not all(abs(v) < LARGEST for v in (x1, y1, x2, y2)):  # NaN is not, either
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
