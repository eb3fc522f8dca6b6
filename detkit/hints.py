"""Checking values from a configuration against type hints, and describing the hints in messages."""

import math
import types
import typing
from collections.abc import Mapping, Sequence
from typing import Any

LARGEST = 2**31 - 1  # integer accepted; torch multiplies sizes in 64 bits
DESCRIPTIONS = {
    int: ("a whole number", "whole numbers"),
    float: ("a number", "numbers"),
    bool: ("true or false", "true and false"),
    str: ("text", "text"),
    types.NoneType: ("null", "null"),
    Sequence: ("a list", "lists"),
    Mapping: ("a mapping", "mappings"),
}


def fits(value: Any, hint: Any) -> bool:
    """Return whether ``value`` matches ``hint``: numbers, text, lists, mappings and unions of these.

    An int is also a float, a bool is neither, and numbers must be finite. Any value matches other hints, such as
    classes: the callee has to check it.
    """
    members = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return any(fits(value, member) for member in members)
    if typing.get_origin(hint) is typing.Literal:
        return value in members
    kind = _kind(hint)
    if kind is int:
        return isinstance(value, int) and not isinstance(value, bool) and abs(value) <= LARGEST
    if kind is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and _is_finite(value)
    if kind is Sequence:
        if not isinstance(value, (list, tuple)) or not members:
            return isinstance(value, (list, tuple))
        if typing.get_origin(hint) is tuple and members[-1] is not Ellipsis:
            return len(value) == len(members) and all(map(fits, value, members))
        return all(fits(v, members[0]) for v in value)
    if kind is Mapping:
        return isinstance(value, Mapping) and all(fits(v, members[1]) for v in value.values() if members)
    return isinstance(value, kind) if kind else True


def describe(hint: Any, several: bool = False) -> str:
    """Describe a hint, for example ``a list of whole numbers or null``; in the plural if ``several``."""
    members = typing.get_args(hint)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        names = list(dict.fromkeys(describe(member, several) for member in members))
        return f"{', '.join(names[:-1])} or {names[-1]}" if len(names) > 1 else names[0]
    if typing.get_origin(hint) is typing.Literal:
        return " or ".join(map(str, members))
    kind = _kind(hint)
    if kind is Sequence and members:
        return f"{DESCRIPTIONS[kind][several]} of {describe(members[0], several=True)}"
    return DESCRIPTIONS[kind][several] if kind else getattr(hint, "__name__", str(hint))


def _kind(hint: Any) -> Any:
    """Return the key of DESCRIPTIONS for a hint, or None."""
    origin = typing.get_origin(hint) or hint
    if origin in DESCRIPTIONS:
        return origin
    if not isinstance(origin, type) or origin is object:
        return None
    if issubclass(origin, (list, tuple)):
        return Sequence
    return Mapping if issubclass(origin, dict) else None


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer too large for a float
        return False
