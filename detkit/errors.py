"""The one exception for a user's mistake."""

import difflib
from collections.abc import Iterable


class DetkitError(ValueError):
    """A user's mistake, said in one plain sentence that names the file, key or line and what to do.

    The command line prints the sentence and ends with exit status 2; in Python it is a ``ValueError``.
    """


class UnreadableImage(DetkitError):  # noqa: N818  (what it is, not that it is an error)
    """An image file that cannot be read, or is not the one that was labelled: whoever loads many may leave it out."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the known word closest to ``word``, or an empty string."""
    matches = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean '{matches[0]}'?" if matches else ""
