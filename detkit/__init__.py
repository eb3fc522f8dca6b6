"""detkit: object detectors whose parts can be swapped, trained and compared."""

from importlib import import_module
from typing import TYPE_CHECKING

from detkit.errors import DetkitError

if TYPE_CHECKING:
    from detkit.api import create_model, list_models, load
    from detkit.engine.transfer import load_weights

__version__ = "0.2.0"
__all__ = ["DetkitError", "create_model", "list_models", "load", "load_weights"]

_LAZY = {
    "create_model": "detkit.api",
    "list_models": "detkit.api",
    "load": "detkit.api",
    "load_weights": "detkit.engine.transfer",
}


def __getattr__(name: str) -> object:
    """Import a function when it is first asked for: ``import detkit`` and ``detkit help`` do not wait for torch."""
    if name not in _LAZY:
        raise AttributeError(f"module 'detkit' has no attribute '{name}'")
    function = globals()[name] = getattr(import_module(_LAZY[name]), name)
    return function


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})
