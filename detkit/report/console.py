"""The terminal."""

from rich.console import Console


def make_console(stderr: bool = False, quiet: bool = False) -> Console:
    """Return a console that prints text as it is: [brackets] and :colons: in names are no markup, lines do not wrap."""
    return Console(stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)
