"""The terminal."""

from typing import IO

from rich.console import Console


def make_console(stderr: bool = False, quiet: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console that prints text as it is: [brackets] and :colons: in names are no markup, lines do not wrap.

    Args:
        file: prints there, also while stdout is redirected; None: to what is stdout at the time, or stderr.
    """
    return Console(file=file, stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)
