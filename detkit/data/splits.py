"""The names of a set's splits: train and val, which a training takes, and whatever else the set has, such as test.

Each format says by a function in SPLIT_NAMES which splits a set has: ``(**keys of data) -> list of names``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from detkit.errors import DetkitError, nearest, shorten
from detkit.registry import DATASETS, SPLIT_NAMES

REQUIRED_SPLITS = ("train", "val")  # every set has these
ALIASES = {"valid": "val", "validation": "val"}  # what some tools call it
HELD_OUT_FIRST = {"test": 0, "val": 1, "train": 3}  # others: 2


class MissingSplit(DetkitError):  # noqa: N818  (what it is, not that it is an error)
    """A set names a split whose files are not there, as where the test images of a public set were not downloaded."""


def splits_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the splits of a set, train and val first.

    Args:
        arguments: the set's format as ``name``, and what its reader takes.

    Raises:
        DetkitError: an unknown format, or the set is not there.
    """
    DATASETS.get(arguments["name"])
    if arguments["name"] not in SPLIT_NAMES.names():  # a plugin's
        return [*REQUIRED_SPLITS]
    return SPLIT_NAMES.build(arguments)


def pick_split(split: str, known: Iterable[str], source: object) -> str:
    """Return the name under which a set has ``split``.

    Raises:
        DetkitError: it has none of that name; the sentence lists those it has.
    """
    known = [*known]
    name = split if split in known else ALIASES.get(split, split)
    if name not in known:
        available = ", ".join(map(shorten, known))
        raise DetkitError(f"{source} has no split '{shorten(split)}': it has {available}{nearest(split, known)}")
    return name


def held_out_first(splits: Iterable[str]) -> list[str]:
    """Return splits in the order in which they keep an image that several of them have: test, val, others, train."""
    return sorted(splits, key=lambda split: HELD_OUT_FIRST.get(split, 2))
