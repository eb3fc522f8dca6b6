"""Exceptions for user errors, and helpers that format their messages."""

import contextlib
import difflib
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

JOINERS = "\u200c\u200d"
INVISIBLE = ("Cc", "Cf", "Cs", "Zl", "Zp")  # Unicode categories: control, format, surrogates, separators


class DetkitError(ValueError):
    """A user error; the message is one sentence that names the file, key or line and what to do.

    The command line prints the message and exits with status 2; in Python it is a ``ValueError``.
    """


class UnreadableImage(DetkitError):  # noqa: N818  (named for its subject)
    """An image file that cannot be read, or is not the labelled one; callers that load many images may skip it."""


@contextlib.contextmanager
def error_context(place: object, hint: str = "") -> Iterator[None]:
    """Prefix a DetkitError raised in the block with ``place``, such as a file, and append ``hint``; None: unchanged."""
    try:
        yield
    except DetkitError as error:
        if place is None:
            raise
        raise DetkitError(f"{place}: {error}{hint}") from None


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known name closest to ``name``, or an empty string."""
    matches = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def shorten(value: Any, limit: int = 200) -> str:
    """Format a value for a message: strings unquoted, anything else by ``repr``, truncated to ``limit`` characters.

    A container is truncated before it is formatted, so that a list of a million names is cheap to show.
    """
    text = value if isinstance(value, str) else _Repr(limit).repr(value)
    text = printable(text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """Escape control characters, which a terminal would obey, and lone surrogates, which cannot be printed."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode("ascii") for c in text)


def is_name(text: object) -> bool:
    """Return whether ``text`` can be a class name: a string, not blank, without invisible characters.

    The joiners of Persian letters and of emoji are allowed.
    """
    if not isinstance(text, str) or not text.strip():
        return False
    return all(c in JOINERS or unicodedata.category(c) not in INVISIBLE for c in text)


class _Repr(reprlib.Repr):
    """``repr`` truncated to about ``limit`` characters."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 6
        self.maxstring = self.maxother = self.maxlong = limit
        self.maxlist = self.maxdict = self.maxtuple = self.maxset = self.maxfrozenset = max(limit // 4, 1)

    def repr_int(self, x: int, level: int) -> str:
        """Format an integer, in hexadecimal if it is too long for Python's decimal conversion."""
        try:
            return super().repr_int(x, level)
        except ValueError:
            return f"{x:#x}"[: self.maxlong]
