"""Console output: log messages, escaped control characters, and streams that never raise."""

import io
import logging
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rich.console import Console
from rich.text import Text

from detkit.errors import DetkitError, printable
from detkit.ops.processes import env_rank

LEVELS = ("debug", "info", "warning", "error")


class Terminal(Console):
    """Console that escapes control characters in text, for instance in file names."""

    def render_str(self, text: str, **options: Any) -> Text:
        """Render a string; rich calls this for everything that is printed, including tables."""
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


def make_console(stderr: bool = False, quiet: bool = False, file: IO[str] | None = None) -> Console:
    """Return a console that prints text literally, without markup, emoji codes or line wrapping.

    Args:
        stderr: print to stderr instead of stdout.
        quiet: print nothing.
        file: print to this stream; None: to the current stdout or stderr.
    """
    return Terminal(file=file, stderr=stderr, quiet=quiet, markup=False, emoji=False, highlight=False, soft_wrap=True)


class ConsoleHandler(logging.Handler):
    """Prints log records to the current stdout, warnings in yellow; ranks other than 0 only print errors."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print one record."""
        if env_rank() == 0 or record.levelno >= logging.ERROR:
            make_console().print(self.format(record), style="yellow" if record.levelno >= logging.WARNING else None)


def setup_logging() -> None:
    """Print detkit's log messages from the level in the environment variable ``DETKIT_LOG`` (default: ``info``).

    Raises:
        DetkitError: ``DETKIT_LOG`` is not a level.
    """
    level = os.environ.get("DETKIT_LOG", "info").lower()
    if level not in LEVELS:
        raise DetkitError(f"DETKIT_LOG={level} must be one of {', '.join(LEVELS)}")
    logger = logging.getLogger("detkit")
    logger.setLevel(level.upper())
    if not any(isinstance(handler, ConsoleHandler) for handler in logger.handlers):
        logger.addHandler(ConsoleHandler())


class Output:
    """Text stream that never raises: characters that cannot be encoded are escaped, failed output is dropped.

    A program thus continues after its reader has ended (``| head``), its terminal is closed or the disk is full.

    Args:
        stream: the underlying stream.
    """

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        if isinstance(stream, io.TextIOWrapper):  # not a StringIO, which does not encode
            with suppress(OSError):
                stream.reconfigure(errors="backslashreplace")

    def write(self, text: str) -> int:
        """Write ``text``, or drop it."""
        try:
            self.stream.write(text)
        except (OSError, ValueError):  # ValueError: closed
            self._redirect_to_devnull()
        return len(text)

    def flush(self) -> None:
        """Flush, or drop the buffered text."""
        try:
            self.stream.flush()
        except (OSError, ValueError):
            self._redirect_to_devnull()

    def _redirect_to_devnull(self) -> None:
        """Discard all further output, including that of other code and what is flushed at exit."""
        with suppress(OSError, ValueError):
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, self.stream.fileno())
            os.close(devnull)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)


def guard_output() -> None:
    """Replace stdout and stderr by streams that never raise; open /dev/null if they were closed at startup."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free descriptor, which another file would get otherwise
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            stream = Path(os.devnull).open("w")  # noqa: SIM115  (kept open until exit)
        if not isinstance(stream, Output):
            setattr(sys, name, Output(stream))
