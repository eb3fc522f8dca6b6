"""The one exception for a user's mistake."""

import contextlib
import difflib
import reprlib
import unicodedata
from collections.abc import Iterable, Iterator
from typing import Any

JOINERS = "\u200c\u200d"
UNSEEN = ("Cc", "Cf", "Cs", "Zl", "Zp")  # categories of Unicode: control, format, lone surrogates, ends of lines


class DetkitError(ValueError):
    """A user's mistake, said in one plain sentence that names the file, key or line and what to do.

    The command line prints the sentence and ends with exit status 2; in Python it is a ``ValueError``.
    """


class UnreadableImage(DetkitError):  # noqa: N818  (what it is, not that it is an error)
    """An image file that cannot be read, or is not the one that was labelled: whoever loads many may leave it out."""


@contextlib.contextmanager
def error_context(place: object, hint: str = "") -> Iterator[None]:
    """Begin the sentence of a mistake in the block with the file it lies in, and end it with a hint; None: do not."""
    try:
        yield
    except DetkitError as error:
        if place is None:
            raise
        raise DetkitError(f"{place}: {error}{hint}") from None


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""


def shorten(value: Any, limit: int = 200) -> str:
    """Return a value as a message shows it: text as it is, all else by ``repr``, cut to ``limit`` characters.

    A container is cut before it is turned into text: what is shown of a list of a million names costs no more.
    """
    text = value if isinstance(value, str) else _Repr(limit).repr(value)
    text = printable(text[: limit + 1])
    return text if len(text) <= limit else f"{text[: limit - 3]}..."


def printable(text: str) -> str:
    """Return ``text`` with control characters and lone surrogates escaped, as a terminal would obey or refuse them."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c == " " else c.encode("unicode_escape").decode("ascii") for c in text)


def is_name(text: object) -> bool:
    """Whether something is text that can name a class: not blank, and without characters that nobody sees.

    The joiners of Persian letters and of emoji are seen by what they do.
    """
    if not isinstance(text, str) or not text.strip():
        return False
    return all(c in JOINERS or unicodedata.category(c) not in UNSEEN for c in text)


class _Repr(reprlib.Repr):
    """``repr`` that stops after ``limit`` characters or so."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 6
        self.maxstring = self.maxother = self.maxlong = limit
        self.maxlist = self.maxdict = self.maxtuple = self.maxset = self.maxfrozenset = max(limit // 4, 1)

    def repr_int(self, x: int, level: int) -> str:
        """Return a number's digits, in hexadecimal those that Python refuses to count in tens."""
        try:
            return super().repr_int(x, level)
        except ValueError:
            return f"{x:#x}"[: self.maxlong]
