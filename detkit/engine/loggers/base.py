"""What a logger does."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from detkit.ops.curves import Curves

Value = bool | int | float | str


class Logger(Protocol):
    """Keeps what a run measures, draws and says. A method may raise anything: the training goes on without.

    Steps are batches of the run, the one axis of all that is kept.
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Keep numbers by name, such as ``val/AP``."""

    def image(self, name: str, path: Path, step: int) -> None:
        """Keep a picture that lies at ``path``, a JPEG or PNG."""

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
        """Keep precision and recall of a set's classes."""

    def text(self, name: str, text: str) -> None:
        """Keep a text in Markdown."""

    def hyper_parameters(self, values: Mapping[str, Value]) -> None:
        """Keep what the run was made with, to compare runs by the last of their scalars ``best/...``."""

    def close(self, finished: bool) -> None:
        """Write what waits; ``finished`` is False where the run was cut short."""


def tag(name: str) -> str:
    """Return a class name as every logger takes it in the name of a scalar: letters, digits, ``_``, ``-``, ``.``."""
    return re.sub(r"[^\w.-]+", "_", name)
