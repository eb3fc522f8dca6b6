"""Pascal VOC: an xml file an image, and a list of image names a split (http://host.robots.ox.ac.uk/pascal/VOC)."""

import math
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from xml.parsers import expat

import numpy as np

from detkit.data.annotations import Annotations
from detkit.data.columns import Columns
from detkit.data.files import list_images, read_lines
from detkit.data.index import cached
from detkit.data.problems import ProblemLog
from detkit.errors import DetkitError
from detkit.registry import DATASETS

LARGEST = 1e9  # pixels of a coordinate: beyond, it is nonsense
SIDES = ("xmin", "ymin", "xmax", "ymax")
MAX_XML = 2**26  # bytes of one label file


@dataclass
class VocObject:
    """One <object>: its fields as text, and the line where it begins."""

    line: int
    fields: dict[str, str] = field(default_factory=dict)


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
        names = {name: _read_list(file) for name, file in lists.items()}
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
    files = {path.stem: path for path in reversed(list_images(folder))}
    classes: dict[str, int] = {}  # numbered as they come
    stems: list[str] = []
    for name in dict.fromkeys(names[wanted]):
        file = labels / f"{name}.xml"
        xml = parse_xml(file, log)
        if xml is None:
            continue
        stated, objects = xml
        image = columns.add_image(files.get(name, folder / f"{name}.jpg"), len(stems) + 1, stated)
        stems.append(name)
        for obj in objects:
            xyxy = _box(obj, one_based)
            if xyxy is None:
                words = f"<object> needs a name and a <bndbox> of numbers, it has {str(obj.fields)[:100]}"
                log.add("malformed_box", file, obj.line, words)
                continue
            label = classes.setdefault(obj.fields["name"], len(classes))
            columns.add_box(image, label, xyxy, obj.line, crowd=obj.fields.get("difficult") == "1")
    again = len(names[wanted]) - len(set(names[wanted]))
    for name in [name for name, count in Counter(names[wanted]).items() if count > 1] if again else ():
        log.add("repeated_image", list_file, None, f"names {name} more than once")
    silent = ProblemLog(limit=0)
    for name in dict.fromkeys(name for split, entries in names.items() if split != wanted for name in entries):
        for obj in (parse_xml(labels / f"{name}.xml", silent) or (None, ()))[1]:
            if _box(obj, one_based) is not None:
                classes.setdefault(obj.fields["name"], len(classes))
    if not classes:
        raise DetkitError(f"{labels} holds no object with a name, so there is nothing to detect")
    columns.class_names = tuple(sorted(classes))
    columns.category_ids = tuple(range(1, len(classes) + 1))
    rank = np.array([columns.class_names.index(name) for name in classes])

    def translate(rows: np.ndarray) -> np.ndarray:
        rows["label"] = rank[rows["label"]]
        return rows

    return columns.finish(lambda image, line, _: (labels / f"{stems[image]}.xml", line, ""), translate)


def parse_xml(file: Path, log: ProblemLog) -> tuple[tuple[int, int], list[VocObject]] | None:
    """Read one label file; entities, with which a small file could grow without end, are refused.

    Returns:
        the stated (height, width), 0 where it states none, and the objects; None where the file is missing or
        malformed, which is logged.
    """
    if not os.path.isfile(file):
        log.add("missing_labels", file, None, "does not exist, though the list of the split names it")
        return None
    reader = _XmlReader()
    try:
        if file.stat().st_size > MAX_XML:
            raise ValueError("too large for a label file")
        reader.parser.Parse(file.read_bytes(), True)
    except expat.ExpatError as error:
        log.add("unreadable_labels", file, error.lineno, f"malformed xml: {expat.ErrorString(error.code)}")
        return None
    except (OSError, ValueError, LookupError) as error:  # LookupError: an encoding nobody knows
        log.add("unreadable_labels", file, None, f"cannot be read ({error})")
        return None
    try:
        stated = int(float(reader.size.get("height", "0"))), int(float(reader.size.get("width", "0")))
    except (ValueError, OverflowError):
        stated = (0, 0)
    return stated if min(stated) >= 0 and max(stated) < 2**31 else (0, 0), reader.objects


class _XmlReader:
    """Gathers <size> and the <object>s of an annotation, whose parts (of a person, say) are passed over."""

    def __init__(self) -> None:
        self.parser = expat.ParserCreate()
        self.parser.StartElementHandler = self.start
        self.parser.EndElementHandler = self.end
        self.parser.CharacterDataHandler = self.characters
        self.parser.EntityDeclHandler = self.refuse
        self.size: dict[str, str] = {}
        self.objects: list[VocObject] = []
        self.path: list[str] = []
        self.text = ""

    def start(self, tag: str, _: dict[str, str]) -> None:
        self.path.append(tag)
        self.text = ""
        if self.path[1:] == ["object"]:
            self.objects.append(VocObject(self.parser.CurrentLineNumber))

    def characters(self, text: str) -> None:
        self.text += text

    def end(self, tag: str) -> None:
        below, value = self.path[1:], self.text.strip()
        if below[:1] == ["size"] and len(below) == 2:
            self.size[tag] = value
        elif below[:1] == ["object"] and (len(below) == 2 or (len(below) == 3 and below[1] == "bndbox")):
            self.objects[-1].fields[tag] = value
        self.path.pop()
        self.text = ""

    @staticmethod
    def refuse(*_: object) -> None:
        raise ValueError("it declares entities")


def _box(obj: VocObject, one_based: bool) -> tuple[float, float, float, float] | None:
    """Return the object's xyxy box; None where it has no name or no numbers."""
    try:
        x1, y1, x2, y2 = (float(obj.fields[side]) for side in SIDES)
    except (KeyError, ValueError):
        return None
    if not obj.fields.get("name") or not all(math.isfinite(v) and abs(v) < LARGEST for v in (x1, y1, x2, y2)):
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


def _read_list(file: Path) -> list[str]:
    """Return the image names of a split; a second column, as in the lists of a class, is passed over."""
    names = read_lines(file)
    columns = [name.rsplit(None, 1) for name in names]
    if all(len(column) == 2 and column[1] in ("1", "-1", "0") for column in columns):
        return [column[0] for column in columns]
    return names
