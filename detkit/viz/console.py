"""The terminal: log messages, and output that never ends the program nor gives orders to a terminal."""

import io
import logging
import os
import sys
from contextlib import suppress
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from detkit.errors import DetkitError, printable
from detkit.ops.processes import env_rank

LEVELS = ("debug", "info", "warning", "error")


class Terminal(Console):
    """A console that shows control characters in text, such as that of a file name, escaped."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string: rich does so with all that is printed, in tables too."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def make_console(stderr: bool = False, quiet: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console that prints text as it is: [brackets] and :colons: in names are no markup, lines do not wrap.

    Args:
        file: prints there, also while stdout is redirected; None: to what is stdout at the time, or stderr.
    """
    return Terminal(file=file, stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Prints log records to what is stdout at the time, warnings in yellow; below errors only those of rank 0."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if env_rank() == 0 or record.levelno >= logging.ERROR:
            make_console().print(self.format(record), style="yellow" if record.levelno >= logging.WARNING else None)


def setup_logging() -> None:
    """Print detkit's log messages, from the level that the environment variable ``DETKIT_LOG`` names; ``info`` without.

    Raises:
        DetkitError: it names no level.
    """
    level = os.environ.get("DETKIT_LOG", "info").lower()
    if level not in LEVELS:
        raise DetkitError(f"DETKIT_LOG={level} must be one of {', '.join(LEVELS)}")
    logger = logging.getLogger("detkit")
    logger.setLevel(level.upper())
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())


class Output:
    """A text stream that never fails: what cannot be encoded is escaped, and what cannot be written is lost.

    So a program goes on when a reader has gone (``| head``), a terminal is closed or a disk is full.

    Args:
        stream: the file beneath.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):  # a StringIO encodes nothing
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write ``text``, or lose it."""
        try:
            self.stream.write(text)
        except (OSError, ValueError):  # ValueError: it is closed
            self._lose()
        return len(text)

    def flush(self) -> None:
        """Write what waits, or lose it."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._lose()

    def _lose(self) -> None:
        """Send the rest into nothing, also what other code writes there, and what waits for the end of the program."""
        with suppress(OSError, ValueError):
            nothing = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nothing, self.stream.fileno())
            os.close(nothing)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_output() -> None:
    """Let nothing that is printed end this program; where stdout or stderr was closed before it began, it has none."""
    for number in range(3):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free; a file of ours might, otherwise
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = open(os.devnull, "w")  # noqa: SIM115  (for as long as the program lasts)
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream))
