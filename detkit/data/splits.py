"""The names of the splits of a data set: train and val, which training uses, and any others, for example test.

Each format registers a function in SPLIT_NAMES that returns them: ``(**keys of data) -> list of names``.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from detkit.errors import DetkitError, nearest, shorten
from detkit.registry import DATASETS, SPLIT_NAMES

REQUIRED_SPLITS = ("train", "val")  # of every data set
ALIASES = {"valid": "val", "validation": "val"}  # names used by some tools
HELD_OUT_FIRST = {"test": 0, "val": 1, "train": 3}  # others: 2


class MissingSplit(DetkitError):  # noqa: N818  (named after the cause)
    """The files of a split do not exist, for example because the test images of a public set were not downloaded."""


def splits_of(arguments: Mapping[str, Any]) -> list[str]:
    """Return the names of the splits of a data set, train and val first.

    Args:
        arguments: the format as ``name``, and the arguments of its reader.

    Raises:
        DetkitError: the format is unknown, or the data set does not exist.
    """
    DATASETS.get(arguments["name"])
    if arguments["name"] not in SPLIT_NAMES.names():  # a plugin's
        return [*REQUIRED_SPLITS]
    return SPLIT_NAMES.build(arguments)


def pick_split(split: str, known: Iterable[str], source: object) -> str:
    """Resolve the name or alias of a split.

    Args:
        split: the requested name.
        known: the names of the data set.
        source: file or folder, for the message.

    Raises:
        DetkitError: there is no such split; lists the existing ones.
    """
    known = [*known]
    name = split if split in known else ALIASES.get(split, split)
    if name not in known:
        available = ", ".join(map(shorten, known))
        raise DetkitError(f"{source} has no split '{shorten(split)}': it has {available}{nearest(split, known)}")
    return name


def held_out_first(splits: Iterable[str]) -> list[str]:
    """Sort splits by their priority for an image in several of them: test, val, others, train."""
    return sorted(splits, key=lambda split: HELD_OUT_FIRST.get(split, 2))
