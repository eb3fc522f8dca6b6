"""The fields of COCO records, as all kinds of tools write them."""

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from detkit.data.builder import check_class_names
from detkit.data.formats.segmentation import XYWH, numbers, segmentation_box
from detkit.errors import DetkitError, shorten

MAX_COORDINATE = 1e9  # pixels of a coordinate: beyond, it is nonsense
MAX_USED = 100_000  # categories that are known to have boxes
INTEGER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
# What the functions below raise where a field makes no sense.
INVALID_FIELD = (LookupError, TypeError, ValueError, OverflowError, AttributeError)


class Ids:
    """Numbers for the ids of a file, which tools write as 1, 1.0, "1" or as words; a word has one below 0."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.names: list[str] = []

    def number(self, value: Any) -> int:
        """Return the number of an id; ValueError for what is none."""
        if not isinstance(value, str):
            return parse_int(value)
        if INTEGER.fullmatch(value):
            return int(value.partition(".")[0])
        if not value:
            raise ValueError(value)
        if value not in self.numbers:
            self.names.append(value)
            self.numbers[value] = -len(self.names)
        return self.numbers[value]

    def original(self, number: int) -> object:
        """Return the id that has a number, for a message."""
        return shorten(self.names[-number - 1]) if -len(self.names) <= number < 0 else number


class Categories(Ids):
    """The ids of categories, of which it remembers those that have boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()

    def use(self, value: Any) -> int:
        """Return the number of a box's category."""
        number = self.number(value)
        if number not in self.used and len(self.used) < MAX_USED:
            self.used.add(number)
        return number

    def sorted_by_id(self, records: list[Any], file: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the categories' ids, ascending, and their names.

        Roboflow puts a root above the classes, which may be called as one of them is: then it is left out.

        Raises:
            DetkitError: they make no sense, or are not told apart.
        """
        names: dict[int, str] = {}
        roots: list[int] = []
        for k, record in enumerate(records):
            try:
                number, name = self.number(record["id"]), class_name(record["name"])
            except INVALID_FIELD:
                needs = {"id": ("a whole 'id'", self.number), "name": ("a 'name'", class_name)}
                raise DetkitError(f"{file}: categories[{k}] {describe_invalid_field(record, needs)}") from None
            if number in names:
                raise DetkitError(f"{file}: 'categories' holds the same id twice; give every class one of its own")
            names[number] = name
            if record.get("supercategory") == "none" and number not in self.used and len(self.used) < MAX_USED:
                roots.append(number)
        counts = Counter(names.values())
        for root in roots:
            if counts[names[root]] > 1:
                counts[names.pop(root)] -= 1
        if not names:
            raise DetkitError(f"{file}: 'categories' is empty, so there is nothing to detect")
        ids = tuple(sorted(names))
        class_names = tuple(names[k] for k in ids)
        check_class_names(class_names, f"{file}: 'categories'")
        return ids, class_names


def class_name(value: Any) -> str:
    """Return the name of a category; TypeError for what is none."""
    if not isinstance(value, (str, int)):
        raise TypeError(value)
    return str(value)


def file_name(record: Mapping[str, Any]) -> str:
    """Return an image's file; LVIS gives but the address, which ends as the file's path does."""
    name = record.get("file_name") or urlsplit(record["coco_url"]).path.lstrip("/")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(name)
    return name


def parse_side(value: Any) -> int:
    """Return a stated height or width in pixels; 0 where it is null or, as VIA has it, -1."""
    if isinstance(value, str) and INTEGER.fullmatch(value):
        value = int(value.partition(".")[0])
    parse_side = max(parse_int(value or 0), 0)
    if parse_side >= 2**31:
        raise ValueError(value)
    return parse_side


def parse_box(record: Mapping[str, Any]) -> XYWH:
    """Return x, y, width and height of an annotation."""
    x, y, w, h = numbers(record["bbox"]) if record.get("bbox") else segmentation_box(record["segmentation"])
    if not (max(abs(x), abs(y), abs(w), abs(h)) < MAX_COORDINATE and not math.isnan(x + y + w + h)):
        raise ValueError(record["bbox"])
    return x, y, w, h


def parse_flag(value: Any) -> bool:
    """Return what an ``iscrowd`` says, in whatever way."""
    if value in (None, 0, 1):
        return bool(value)
    return FLAGS[str(value).strip().lower()]


def describe_invalid_field(record: Any, needs: Mapping[str, tuple[str, Callable[[Any], object]]]) -> str:
    """Say which field of a record makes no sense.

    Args:
        needs: of each field what the record needs, and a function that raises NONSENSE for anything else.
    """
    if isinstance(record, Mapping):
        for key, (names, check) in needs.items():
            try:
                check(record.get(key))
            except INVALID_FIELD:
                found = "there is none" if record.get(key) is None else f"it is {shorten(record[key], 100)}"
                return f"needs {names}, {found}"
    return f"needs fields such as '{next(iter(needs))}', it is {shorten(record, 100)}"


def is_int64(value: Any) -> bool:
    """Whether ``value`` is an integer that fits 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def parse_int(value: Any) -> int:
    """Return a whole number, which may be written as 480.0; ValueError for anything else."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not is_int64(value):
        raise ValueError(value)
    return value
