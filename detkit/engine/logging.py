"""Where a run's numbers and pictures go: the terminal, history.csv and TensorBoard."""

import csv
import io
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from torch.utils.tensorboard import SummaryWriter

from detkit.engine.checkpoint import write_atomically
from detkit.engine.distributed import is_main
from detkit.report.drawing import save_picture

TRAINING = (
    "lr",
    "images_per_s",
    "seconds",
    "skipped_steps",
    "overflow_steps",
)  # columns of the history that tell how it trained


class RunLog:
    """Writes into a run directory and to the terminal; only rank 0 may give it anything to write.

    Args:
        epochs: of the run that are in ``run_dir``; what TensorBoard has of later ones does not count any more.
    """

    def __init__(self, run_dir: Path, console: Console, epochs: int = 0) -> None:
        self.run_dir = run_dir
        self.console = console
        self.tensorboard = SummaryWriter(run_dir, purge_step=epochs + 1) if is_main() else None
        self.told: set[str] = set()  # sentences of ``problems``

    def epoch(self, history: Sequence[Mapping[str, float]], losses: Collection[str], line: str) -> None:
        """Record the last epoch of a history: ``history.csv``, TensorBoard scalars, one line on the terminal.

        Args:
            history: rows of ``epoch`` and what was measured; ``losses`` are those of the keys that are loss terms.
        """
        row = history[-1]
        text = io.StringIO()
        writer = csv.DictWriter(text, history[0].keys())
        writer.writeheader()
        writer.writerows(history)
        write_atomically(self.run_dir / "history.csv", text.getvalue().encode())
        for name, value in row.items():
            if name != "epoch":
                group = "loss" if name in losses else "train" if name in TRAINING else "val"
                self.tensorboard.add_scalar(f"{group}/{name}", value, int(row["epoch"]))
        self.tensorboard.flush()  # before the state is saved that counts this epoch as done
        self.console.print(line)

    def problems(self, sentences: Collection[str]) -> None:
        """Say, once for each image, that it was skipped."""
        for sentence in sentences:
            if sentence not in self.told:
                self.told.add(sentence)
                self.console.print(f"skipped: {sentence}")

    def picture(self, name: str, image: np.ndarray, epoch: int) -> None:
        """Keep an (H, W, 3) uint8 RGB picture as ``plots/NAME.jpg`` and in TensorBoard."""
        save_picture(image, self.run_dir / "plots" / f"{name}.jpg")
        self.tensorboard.add_image(name, image, epoch, dataformats="HWC")

    def close(self) -> None:
        """Flush TensorBoard's events."""
        if self.tensorboard is not None:
            self.tensorboard.close()


@contextmanager
def show_progress(label: str, total: int, console: Console, done: int = 0) -> Iterator["Bar"]:
    """Show a bar on a terminal, nothing elsewhere, of which ``done`` is done; yields what advances it."""
    columns = (TextColumn("{task.description}"), BarColumn(24), MofNCompleteColumn(), TextColumn("{task.fields[info]}"))
    hidden = console.quiet or not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=hidden) as progress:
        yield Bar(progress, label, total, done)


class Bar:
    """One bar of a Progress."""

    def __init__(self, progress: Progress, label: str, total: int, done: int) -> None:
        self.progress = progress
        self.task = progress.add_task(label, total=total, completed=done, info="")

    def advance(self, info: str | None = None) -> None:
        """Move by one, and say ``info`` beside the bar."""
        fields = {} if info is None else {"info": info}
        self.progress.update(self.task, advance=1, **fields)


def clock(seconds: float) -> str:
    """Return a duration as h:mm:ss or m:ss."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
