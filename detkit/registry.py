"""Names for the parts of a detector, so that a config or the command line can ask for them."""

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from detkit.errors import DetkitError, nearest, shorten
from detkit.hints import describe, fits

# What a constructor may raise for arguments that make no sense; others are its own faults.
REFUSALS = (ArithmeticError, AssertionError, LookupError, MemoryError, RuntimeError, TypeError, ValueError)

GROUPS = ("backbone", "neck", "head", "loss", "data")  # kinds whose arguments are keys of the configuration


class Registry:
    """A table of one kind of part: name -> class or function.

    >>> BACKBONES = Registry("backbone")
    >>> @BACKBONES.register("csp_darknet")
    ... class CSPDarknet: ...
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind
        self._parts: dict[str, Callable[..., Any]] = {}

    def register(self, name: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        """Return a decorator that files a class or function under ``name``; a name is taken once."""

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
        """Return the part called ``name``.

        Raises:
            DetkitError: unknown name; the sentence lists the known ones and the nearest.
        """
        if not isinstance(name, str) or name not in self._parts:
            known, word = self.names(), shorten(name, 100)
            raise DetkitError(f"unknown {self.kind} '{word}': known are {', '.join(known)}{nearest(word, known)}")
        return self._parts[name]

    def build(self, spec: Mapping[str, Any], *args: Any, **derived: Any) -> Any:
        """Build the part that ``spec`` describes.

        Args:
            spec: ``{"name": registered name, **keyword arguments}``, usually straight from YAML.
            args: positional arguments that the caller works out (channels of a block).
            derived: keyword arguments that the caller works out; a config may not set them.

        Raises:
            DetkitError: no or unknown name, unknown or missing keyword, a derived value in the config, a value that
                does not fit the part's type hint, or one that a class refuses.
        """
        kwargs = dict(spec)
        name = kwargs.pop("name", None)
        if name is None:
            raise DetkitError(f"{self.kind}.name is not set: known are {', '.join(self.names())}")
        part = self.get(name)
        for key in kwargs:
            if key in derived:
                raise DetkitError(f"{self.kind}.{key} is worked out from the other parts: remove it from the config")
        try:
            inspect.signature(part).bind(*args, **kwargs, **derived)
        except TypeError as error:
            parameters = inspect.signature(part).parameters
            for key in kwargs:
                if key not in parameters:
                    word = shorten(key, 100)
                    raise DetkitError(
                        f"{self.kind} '{name}' takes no argument '{word}'{nearest(word, parameters)}"
                    ) from None
            raise DetkitError(f"{self.kind} '{name}': {error}") from None
        self._check_types(name, part, kwargs)
        try:
            return part(*args, **kwargs, **derived)
        except DetkitError:
            raise
        except REFUSALS as error:
            if not inspect.isclass(part):
                raise  # a function does the work: a fault of its own
            reason = shorten((str(error) or type(error).__name__).splitlines()[0])
            raise DetkitError(f"{self.kind} '{name}' cannot be made with {_listed(kwargs)}: {reason}") from error

    def _check_types(self, name: str, part: Callable[..., Any], kwargs: Mapping[str, Any]) -> None:
        """Check arguments against the part's type hints, as far as it has any."""
        try:
            hints = typing.get_type_hints(part.__init__ if inspect.isclass(part) else part)
        except Exception:  # a plugin's hints may name what is not there at run time
            return
        for key, value in kwargs.items():
            if key in hints and not fits(value, hints[key]):
                place = f"{self.kind}.{key}" if self.kind in GROUPS else f"{self.kind} '{name}': {key}"
                raise DetkitError(f"{place}={shorten(value)} must be {describe(hints[key])}")


def _listed(kwargs: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={shorten(value, 60)}" for key, value in kwargs.items()) or "its defaults"


BLOCKS = Registry("block")
BACKBONES = Registry("backbone")
NECKS = Registry("neck")
HEADS = Registry("head")
LOSSES = Registry("loss")
DATASETS = Registry("data")
SPLIT_NAMES = Registry("data")  # by the same names: which splits a set has (data/splits.py)
WRITERS = Registry("format")
LOGGERS = Registry("logger")
