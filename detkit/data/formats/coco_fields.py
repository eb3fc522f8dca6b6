"""Parsing the fields of COCO records written by various tools."""

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

MAX_COORDINATE = 1e9  # in pixels; larger values are invalid
MAX_USED = 100_000  # categories with boxes that are tracked
INTEGER = re.compile(r"[+-]?[0-9]{1,18}(\.0*)?")
FLAGS = {"0": False, "1": True, "0.0": False, "1.0": True, "false": False, "true": True}
# Exceptions of the functions below for an invalid field.
INVALID_FIELD = (LookupError, TypeError, ValueError, OverflowError, AttributeError)


class Ids:
    """Maps ids, which may be 1, 1.0, "1" or a name, to integers; those of names are negative."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}
        self.names: list[str] = []

    def number(self, value: Any) -> int:
        """Return the integer of an id.

        Raises:
            ValueError: it is neither an integer nor a name.
        """
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
        """Return the id with an integer, for a message."""
        return shorten(self.names[-number - 1]) if -len(self.names) <= number < 0 else number


class Categories(Ids):
    """The ids of categories; tracks which of them have boxes."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()

    def use(self, value: Any) -> int:
        """Return the integer of the category of a box."""
        number = self.number(value)
        if number not in self.used and len(self.used) < MAX_USED:
            self.used.add(number)
        return number

    def sorted_by_id(self, records: list[Any], file: Path) -> tuple[tuple[int, ...], tuple[str, ...]]:
        """Return the ids of the categories in ascending order, and their names.

        Roboflow adds a root category, which is dropped if it has the same name as a class.

        Raises:
            DetkitError: the categories are invalid or not unique.
        """
        names: dict[int, str] = {}
        roots: list[int] = []
        for k, record in enumerate(records):
            try:
                number, name = self.number(record["id"]), class_name(record["name"])
            except INVALID_FIELD:
                needs = {"id": ("an integer 'id'", self.number), "name": ("a 'name'", class_name)}
                raise DetkitError(f"{file}: categories[{k}] {describe_invalid_field(record, needs)}") from None
            if number in names:
                raise DetkitError(f"{file}: 'categories' holds the same id twice; give every class a unique id")
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
    """Return the name of a category.

    Raises:
        TypeError: it is not a string or an integer.
    """
    if not isinstance(value, (str, int)):
        raise TypeError(value)
    return str(value)


def file_name(record: Mapping[str, Any]) -> str:
    """Return the file name of an image; LVIS has only a URL, whose path ends with the file name.

    Raises:
        KeyError, ValueError: there is no valid name.
    """
    name = record.get("file_name") or urlsplit(record["coco_url"]).path.lstrip("/")
    if not isinstance(name, str) or not name or "\0" in name:
        raise ValueError(name)
    return name


def parse_side(value: Any) -> int:
    """Parse a height or width in pixels; return 0 for null or, in VIA's files, -1.

    Raises:
        ValueError: it is not an integer below 2**31.
    """
    if isinstance(value, str) and INTEGER.fullmatch(value):
        value = int(value.partition(".")[0])
    length = max(parse_int(value or 0), 0)
    if length >= 2**31:
        raise ValueError(value)
    return length


def parse_box(record: Mapping[str, Any]) -> XYWH:
    """Return x, y, width and height of an annotation in pixels.

    Raises:
        LookupError, TypeError, ValueError: there is no valid box or segmentation.
    """
    x, y, w, h = numbers(record["bbox"]) if record.get("bbox") else segmentation_box(record["segmentation"])
    if not (max(abs(x), abs(y), abs(w), abs(h)) < MAX_COORDINATE and not math.isnan(x + y + w + h)):
        raise ValueError(record["bbox"])
    return x, y, w, h


def parse_flag(value: Any) -> bool:
    """Parse an ``iscrowd`` in any notation.

    Raises:
        KeyError: it is neither true nor false.
    """
    if value in (None, 0, 1):
        return bool(value)
    return FLAGS[str(value).strip().lower()]


def describe_invalid_field(record: Any, needs: Mapping[str, tuple[str, Callable[[Any], object]]]) -> str:
    """Return a message about the first invalid field of a record.

    Args:
        record: the record.
        needs: for each field a description, and a function that raises INVALID_FIELD for an invalid value.
    """
    if isinstance(record, Mapping):
        for key, (requirement, check) in needs.items():
            try:
                check(record.get(key))
            except INVALID_FIELD:
                found = "there is none" if record.get(key) is None else f"it is {shorten(record[key], 100)}"
                return f"needs {requirement}, {found}"
    return f"needs fields like '{next(iter(needs))}', it is {shorten(record, 100)}"


def is_int64(value: Any) -> bool:
    """Whether ``value`` is an integer that fits in 64 bits."""
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 2**63


def parse_int(value: Any) -> int:
    """Parse an integer, which may be written as 480.0.

    Raises:
        ValueError: it is not an integer, or does not fit in 64 bits.
    """
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not is_int64(value):
        raise ValueError(value)
    return value
