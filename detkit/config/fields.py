"""Kinds of fields: the allowed values and their description."""

import math
import os
from typing import Annotated, Any

from pydantic import Field, PlainValidator
from pydantic_core import PydanticUndefined

MOST = 1_000_000_000  # for counts without another limit; larger values are typing errors
LONGEST_PATH, LONGEST_NAME = 4096, 255  # bytes of a path and of one of its components on Linux


def is_whole(value: Any, least: int) -> bool:
    """Return whether ``value`` is an integer of at least ``least``."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def is_number(value: Any, low: float, high: float = math.inf) -> bool:
    """Return whether ``value`` is a number from ``low`` to ``high``."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high


def field(meaning: str, must: str = "", *, most: float | None = None, **limits: Any) -> Any:
    """Declare a field.

    Args:
        meaning: description of the field.
        must: description of the allowed values; by default derived from the type.
        most: the upper bound set by the type or ``limits``; messages mention it only if a value exceeds it.
        **limits: constraints of pydantic's ``Field``, and ``default``.
    """
    limits.setdefault("default", PydanticUndefined)
    return Field(description=meaning, json_schema_extra={"must": must, "most": most}, **limits)


def whole(meaning: str, least: int = 0, most: int = MOST, **limits: Any) -> Any:
    """Declare an integer from ``least`` to ``most``."""
    return field(meaning, f"a whole number, {least} or more", most=most, ge=least, le=most, **limits)


def number(meaning: str, low: float = 0, high: float | None = None, **limits: Any) -> Any:
    """Declare a number from ``low`` to ``high``, or to MOST."""
    if high is None:
        return field(meaning, f"a number, {low:g} or more", most=MOST, ge=low, le=MOST, **limits)
    return field(meaning, f"a number from {low:g} to {high:g}", ge=low, le=high, **limits)


def positive(meaning: str, most: float = MOST, **limits: Any) -> Any:
    """Declare a number above 0."""
    return field(meaning, "a number above 0", most=most, gt=0, le=most, **limits)


def fraction(meaning: str, **limits: Any) -> Any:
    """Declare a number above 0, and 1 at most."""
    return field(meaning, "a number above 0, and 1 at most", gt=0, le=1, **limits)


def location(meaning: str, **limits: Any) -> Any:
    """Declare a ``Location``."""
    return field(meaning, "a path", **limits)


def _check_path(value: Any) -> Any:
    """Check that a value can be a path; a folder's name may be a number, such as 2024."""
    if not isinstance(value, (str, int)) or isinstance(value, bool) or value == "":
        raise ValueError("not a path")
    name = os.fsencode(str(value))
    if len(name) > LONGEST_PATH or any(len(part) > LONGEST_NAME for part in name.split(b"/")):
        raise ValueError("too long")
    return value


# Not pydantic's str, which rejects file names that are not UTF-8.
Location = Annotated[str | int, PlainValidator(_check_path)]
