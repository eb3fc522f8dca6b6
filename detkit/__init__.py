"""detkit: object detectors whose parts can be swapped, trained and compared."""

from detkit.api import create_model, list_models, load
from detkit.engine.transfer import load_weights
from detkit.errors import DetkitError

__version__ = "0.1.0"
__all__ = ["DetkitError", "create_model", "list_models", "load", "load_weights"]
