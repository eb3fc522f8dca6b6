"""Packages that formats need: they are optional, and imported when a format is used."""

import importlib
from typing import Any

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
        return importlib.import_module(name)
    except ImportError as error:
        install = f"pip install 'detkit[{extra}]'"
        if isinstance(error, ModuleNotFoundError):
            raise DetkitError(f"{name.partition('.')[0]} is not installed: {install}") from None
        raise DetkitError(f"{name} cannot be imported ({error}): {install}") from None
