"""Progress bars in a terminal, and lines of progress elsewhere."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from detkit.distributed.process_group import is_main_process
from detkit.viz.console import make_console

logger = logging.getLogger(__name__)

LINE_EVERY = 30.0  # seconds between lines of progress where no bar is shown


def has_bar() -> bool:
    """Whether to show a progress bar: on rank 0 in a terminal."""
    console = make_console()
    return (
        is_main_process() and console.is_interactive and console.file.isatty()
    )  # FORCE_COLOR does not make it a terminal


@contextmanager
def show_progress(label: str, total: int | None, done: int = 0, unit: str = "") -> Iterator["Bar"]:
    """Show a progress bar in a terminal that starts at ``done``; yield its handle.

    Args:
        label: text before the bar.
        total: number of steps; None if unknown.
        done: number of steps already done.
        unit: what is counted, such as ``images``: their number per second and the time left are shown as well, and
            where there is no terminal, they are logged every LINE_EVERY seconds. Without, nothing is shown there.
    """
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[info]}"))
    with Progress(*columns, console=make_console(), transient=True, disable=not has_bar()) as progress:
        yield Bar(progress, label, total, done, unit)


class Bar:
    """Handle of one bar of a Progress; the arguments are those of ``show_progress``."""

    def __init__(self, progress: Progress, label: str, total: int | None, done: int, unit: str = "") -> None:
        self.progress = progress
        self.label, self.total, self.done, self.unit = label, total, done, unit
        self.count = 0  # since the start
        self.start = self.last_update = time.perf_counter()
        self.task = progress.add_task(label, total=total, completed=done, info="")

    def is_due(self) -> bool:
        """Whether the bar is shown and its text is older than a second."""
        return not self.progress.disable and time.perf_counter() - self.last_update > 1

    def advance(self, info: str | None = None) -> None:
        """Advance by one, and show ``info`` next to the bar."""
        self.count += 1
        if self.unit and self.is_due():
            info = f"{self.rate()}{self._left()}"
        elif self.unit and self.progress.disable and time.perf_counter() - self.last_update > LINE_EVERY:
            self.last_update = time.perf_counter()
            logger.info("%s: %d %s, %s", self.label, self.count, self.unit, f"{self.rate()}{self._left()}")
        fields: dict[str, Any] = {} if info is None else {"info": info}
        if info is not None:
            self.last_update = time.perf_counter()
        self.progress.update(self.task, advance=1, **fields)

    def rate(self) -> str:
        """Return the number of steps per second, such as ``31.4 images/s``."""
        return f"{self._per_second():.1f} {self.unit}/s"

    def _left(self) -> str:
        """Return the time left, such as ``, 1:20 left``; an empty string if it is unknown."""
        if self.total is None or not self.count:
            return ""
        return f", {clock(max(self.total - self.done - self.count, 0) / self._per_second())} left"

    def _per_second(self) -> float:
        return self.count / max(time.perf_counter() - self.start, 1e-9)


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
