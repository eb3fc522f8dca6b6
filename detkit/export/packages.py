"""Packages that formats need: they are optional, and imported when a format is used."""

import importlib
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from detkit.errors import DetkitError


def need(name: str, extra: str) -> Any:
    """Import and return an optional package.

    Args:
        name: of the module.
        extra: of detkit that installs it.

    Raises:
        DetkitError: it is missing, or cannot be imported.
    """
    try:
        with quiet_root_logger():
            return importlib.import_module(name)
    except ImportError as error:
        install = f"pip install 'detkit[{extra}]'"
        if isinstance(error, ModuleNotFoundError):
            raise DetkitError(f"{name.partition('.')[0]} is not installed: {install}") from None
        raise DetkitError(f"{name} cannot be imported ({error}): {install}") from None


def require_cpu(device: torch.device, runtime: str) -> None:
    """Check that a runtime that computes on the CPU is not asked for another device.

    Raises:
        DetkitError: it is.
    """
    if device.type != "cpu":
        raise DetkitError(f"device={device}: {runtime} runs on the CPU here, use device=cpu")


@contextmanager
def only_errors(*names: str) -> Iterator[None]:
    """Drop what is logged to these loggers below the level of errors."""
    levels = {name: logging.getLogger(name).level for name in names}
    for name in names:
        logging.getLogger(name).setLevel(logging.ERROR)
    try:
        yield
    finally:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)


@contextmanager
def quiet_root_logger() -> Iterator[None]:
    """Drop what is logged to the root logger: its first message would add a handler that prints detkit's, too."""
    silent = logging.NullHandler()
    logging.getLogger().addHandler(silent)
    try:
        yield
    finally:
        logging.getLogger().removeHandler(silent)
