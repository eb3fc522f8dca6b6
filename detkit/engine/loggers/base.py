"""Interface of loggers."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

from detkit.ops.curves import Curves

Value = bool | int | float | str


class Logger(Protocol):
    """Records metrics, images and texts of a run. Methods may raise any exception; training continues.

    A step is the number of batches so far, the x-axis of everything recorded.
    """

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Log scalars by name, such as ``val/AP``."""

    def image(self, name: str, path: Path, step: int) -> None:
        """Log the image file ``path``, a JPEG or PNG."""

    def precision_recall(self, curves: Curves, class_names: Sequence[str], step: int) -> None:
        """Log precision-recall curves of the classes."""

    def text(self, name: str, text: str) -> None:
        """Log a Markdown text."""

    def hyper_parameters(self, values: Mapping[str, Value]) -> None:
        """Log the hyperparameters, to compare runs by the last values of their scalars ``best/...``."""

    def close(self, finished: bool) -> None:
        """Write pending data and close; ``finished`` is False if the run was interrupted."""


def tag(name: str) -> str:
    """Return a class name with only characters that every logger allows: letters, digits, ``_``, ``-``, ``.``."""
    return re.sub(r"[^\w.-]+", "_", name)
