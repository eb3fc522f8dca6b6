"""Names for the parts of a detector, so that a config or the command line can ask for them."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from detkit.errors import DetkitError, nearest


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
        if name not in self._parts:
            known = self.names()
            raise DetkitError(f"unknown {self.kind} '{name}': known are {', '.join(known)}{nearest(str(name), known)}")
        return self._parts[name]

    def build(self, spec: Mapping[str, Any], *args: Any, **derived: Any) -> Any:
        """Build the part that ``spec`` describes.

        Args:
            spec: ``{"name": registered name, **keyword arguments}``, usually straight from YAML.
            args: positional arguments that the caller works out (channels of a block).
            derived: keyword arguments that the caller works out; a config may not set them.

        Raises:
            DetkitError: no or unknown name, unknown or missing keyword, or a derived value in the config.
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
                    hint = nearest(key, parameters)
                    raise DetkitError(f"{self.kind} '{name}' takes no argument '{key}'{hint}") from None
            raise DetkitError(f"{self.kind} '{name}': {error}") from None
        return part(*args, **kwargs, **derived)


BLOCKS = Registry("block")
BACKBONES = Registry("backbone")
NECKS = Registry("neck")
HEADS = Registry("head")
LOSSES = Registry("loss")
DATASETS = Registry("data")
SPLIT_NAMES = Registry("data")  # by the same names: which splits a set has (data/splits.py)
WRITERS = Registry("format")
LOGGERS = Registry("logger")
