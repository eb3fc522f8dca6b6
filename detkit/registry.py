"""Registries that map names in a config or on the command line to the parts of a detector."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from detkit.errors import DetkitError, nearest, shorten
from detkit.hints import describe, fits

# Raised by constructors for invalid arguments; any other exception is a bug.
CONSTRUCTOR_ERRORS = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

GROUPS = ("backbone", "neck", "head", "loss", "data")  # kinds whose arguments are keys of the configuration


class Registry:
    """Map from names to the classes or functions of one kind of part.

    >>> BACKBONES = Registry("backbone")
    >>> @BACKBONES.register("csp_darknet")
    ... class CSPDarknet: ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that registers a class or function under ``name``.

        Raises:
            KeyError: by the decorator; the name is already registered.
        """

        def decorate(part: Callable[..., Any]) -> Callable[..., Any]:
            if name in self._parts:
                raise KeyError(f"{self.kind} '{name}' is registered twice")
            self._parts[name] = part
            return part

        return decorate

    def names(self) -> list[str]:
        """Return the registered names, sorted."""
        return sorted(self._parts)

    def get(self, name: str) -> Callable[..., Any]:
        """Return the part registered under ``name``.

        Raises:
            DetkitError: the name is unknown; the message lists the known ones and suggests the nearest.
        """
        if not isinstance(name, str) or name not in self._parts:
            known, shown = self.names(), shorten(name, 100)
            raise DetkitError(f"unknown {self.kind} '{shown}': known are {', '.join(known)}{nearest(shown, known)}")
        return self._parts[name]

    def build(self, spec: Mapping[str, Any], *args: Any, **derived: Any) -> Any:
        """Build the part that ``spec`` describes.

        Args:
            spec: ``{"name": registered name, **keyword arguments}``, usually straight from YAML.
            args: positional arguments derived by the caller, such as the channels of a block.
            derived: keyword arguments derived by the caller; a config may not set them.

        Raises:
            DetkitError: the name is missing or unknown, a keyword is unknown or missing, a derived value is in the
                config, or a value does not match the part's type hint or is rejected by its constructor.
        """
        kwargs = dict(spec)
        name = kwargs.pop("name", None)
        if name is None:
            raise DetkitError(f"{self.kind}.name is not set: known are {', '.join(self.names())}")
        part = self.get(name)
        for key in kwargs:
            if key in derived:
                raise DetkitError(f"{self.kind}.{key} is derived from the other parts: remove it from the config")
        try:
            inspect.signature(part).bind(*args, **kwargs, **derived)
        except TypeError as error:
            parameters = inspect.signature(part).parameters
            for key in kwargs:
                if key not in parameters:
                    shown = shorten(key, 100)
                    raise DetkitError(
                        f"{self.kind} '{name}' takes no argument '{shown}'{nearest(shown, parameters)}"
                    ) from None
            raise DetkitError(f"{self.kind} '{name}': {error}") from None
        self._check_types(name, part, kwargs)
        try:
            return part(*args, **kwargs, **derived)
        except DetkitError:
            raise
        except CONSTRUCTOR_ERRORS as error:
            if not inspect.isclass(part):
                raise  # a function does the work itself: this is a bug in it
            reason = shorten((str(error) or type(error).__name__).splitlines()[0])
            raise DetkitError(f"{self.kind} '{name}' cannot be built with {_format(kwargs)}: {reason}") from error

    def _check_types(self, name: str, part: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        """Check arguments against the part's type hints, if it has any."""
        try:
            hints = typing.get_type_hints(part.__init__ if inspect.isclass(part) else part)
        except Exception:  # a plugin's hints may not resolve at run time
            return
        for key, value in kwargs.items():
            if key in hints and not fits(value, hints[key]):
                place = f"{self.kind}.{key}" if self.kind in GROUPS else f"{self.kind} '{name}': {key}"
                raise DetkitError(f"{place}={shorten(value)} must be {describe(hints[key])}")


def _format(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shorten(value, 60)}" for key, value in kwargs.items()) or "its defaults"


BLOCKS = Registry("block")
BACKBONES = Registry("backbone")
NECKS = Registry("neck")
HEADS = Registry("head")
LOSSES = Registry("loss")
DATASETS = Registry("data")
SPLIT_NAMES = Registry("data")  # by the same names: functions that list a data set's splits (data/splits.py)
WRITERS = Registry("format")
LOGGERS = Registry("logger")
