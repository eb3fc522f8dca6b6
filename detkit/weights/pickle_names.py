"""Replacing globals in a pickle by plain data. No name is ever looked up, imported or called."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

MAX_ARGUMENTS = 1000  # of a call; a path has one per component, all others fewer than ten


class Global(NamedTuple):
    """The name of a class or function in a pickle, which is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        """Return ``module.name`` escaped and truncated for a message."""
        return ascii(f"{self.module}.{self.name}"[:100])[1:-1]

    @property
    def is_foreign_class(self) -> bool:
        """Whether the name looks like a class (``Conv2d``) of a package outside Python's standard library."""
        package, leaf = self.module.partition(".")[0], self.name.rpartition(".")[2].lstrip("_")
        return leaf[:1].isupper() and package not in _PYTHON


class TensorRef(NamedTuple):
    """Reference to a tensor in the file: ``offset``, ``size`` and ``stride`` in elements of the storage ``key``."""

    dtype: torch.dtype
    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class StorageRef(NamedTuple):
    """Reference to a storage of ``count`` elements, which the file contains under ``key``."""

    dtype: torch.dtype
    key: str
    count: int  # type: ignore[assignment]  # tuples have a method of this name


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """An object of a class known by name only, with its saved attributes and items."""

    kind: Global
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


class RejectedPickle(Exception):  # noqa: N818  (internal to the two modules)
    """A pickle is damaged or not plain data; the message continues a sentence that begins with the file's name."""


def check_global(module: Any, name: Any) -> Global:
    """Return a global's name without looking it up.

    Raises:
        RejectedPickle: it belongs to Python's standard library and is not known to be plain data.
        ValueError: it is not a short string.
    """
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > 200:
        raise ValueError("a global must be a short string")
    found = Global(module, name)
    if found in _KNOWN or module.partition(".")[0] not in _PYTHON:
        return found
    raise RejectedPickle(f"refers to {found}, which is not data: it was rejected, and nothing was executed")


def emulate_call(function: Any, arguments: Any) -> Any:
    """Return plain data in place of the result of calling ``function``.

    Raises:
        RejectedPickle: the function is not in ``_KNOWN`` and not a class outside the standard library.
        ValueError: the call is malformed.
    """
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("only a named function can be called")
    if len(arguments) > MAX_ARGUMENTS:  # every call copies them, and 100,000 calls may share one long tuple
        raise ValueError("too many arguments")
    if function in _KNOWN:
        result = _KNOWN[function](*arguments)
        return Record(function) if result is None else result
    if function.is_foreign_class:
        return Record(function)
    raise RejectedPickle(f"calls {function}, which is not data: it was rejected, and nothing was executed")


def parse_persistent_id(pid: Any) -> Any:
    """Parse a persistent id, which torch writes as ("storage", type, key, device, count).

    Raises:
        RejectedPickle: the id has another form.
    """
    if not isinstance(pid, tuple) or not 4 <= len(pid) <= 6:
        raise RejectedPickle("contains a pickle with a persistent id other than a storage")
    if pid[0] == "module" and len(pid) == 4:  # old checkpoints: a class with its source code
        return pid[1]
    _, kind, key, _, count, *view = pid
    if pid[0] != "storage" or not isinstance(kind, Global) or any(item is not None for item in view):
        raise RejectedPickle("contains a pickle with a persistent id other than a storage")
    dtype = _STORAGES.get(kind.name) if kind.module in ("torch", "torch.cuda") else None
    if dtype is None or not isinstance(key, str) or not _is_size(count):
        raise RejectedPickle(f"contains a storage of the unknown type {kind}")
    return StorageRef(dtype, key, count)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


# Results of the known functions. None copies an argument of unbounded size, which may be referenced a million times.


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef) or not len(size) == len(stride) <= 16:
        raise ValueError("not a tensor")
    if not all(map(_is_size, (offset, *size, *stride))):
        raise ValueError("not a tensor")
    return TensorRef(storage.dtype, storage.key, offset, tuple(size), tuple(stride))


def _tensor_of_type(function: Any, _kind: Any, arguments: Any, *_: Any) -> TensorRef:
    """Return the plain tensor for one with attributes, such as a torch.nn.Buffer, or of a subclass."""
    if function != Global("torch._utils", "_rebuild_tensor_v2"):
        raise ValueError("not a tensor")
    return emulate_call(function, arguments)


def _first(value: Any = (), *_: Any) -> Any:
    """Return the tensor in a parameter, or the tuple or list in a torch.Size or a set."""
    return value


def _inert(*_: Any) -> None:
    """Return None, for a Record without content: the function is harmless and not needed."""


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """Return an empty dict, as mappings are created before their items."""
    return {}


def as_set(values: list[Any]) -> set[Any]:
    """Return a set of the plain keys among ``values``."""
    return {value for value in values if _is_plain_key(value)}


def _is_plain_key(value: Any) -> bool:
    """Return whether ``value`` is a string or ordinary number: nested tuples or huge integers may be slow to hash."""
    return isinstance(value, (str, bytes, float)) or (isinstance(value, int) and value.bit_length() <= 64)


def plain_items(values: list[Any]) -> dict[Any, Any]:
    """Convert [key, value, key, value, ...] to a dict, omitting items whose key is not plain."""
    return {
        key: value for key, value in zip(values[::2], values[1::2], strict=True) if key is None or _is_plain_key(key)
    }


_PYTHON = sys.stdlib_module_names | {"__builtin__"}

_STORAGES = {
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "LongStorage": torch.int64,
    "IntStorage": torch.int32,
    "ShortStorage": torch.int16,
    "CharStorage": torch.int8,
    "ByteStorage": torch.uint8,
    "BoolStorage": torch.bool,
}

_KNOWN: dict[Global, Callable[..., Any]] = {
    Global("torch._utils", "_rebuild_tensor"): _tensor,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._tensor", "_rebuild_from_type_v2"): _tensor_of_type,
    Global("torch._utils", "_rebuild_parameter"): _first,
    Global("torch._utils", "_rebuild_parameter_with_state"): _first,
    Global("torch", "Size"): _first,
    Global("torch", "device"): _inert,
    Global("torch.serialization", "_get_layout"): _inert,
    Global("collections", "OrderedDict"): _empty_dict,
    Global("collections", "defaultdict"): _empty_dict,
    Global("collections", "Counter"): _empty_dict,
    Global("argparse", "Namespace"): _inert,
    Global("types", "SimpleNamespace"): _inert,
    Global("copyreg", "_reconstructor"): lambda kind, *_: emulate_call(kind, ()),
    Global("copy_reg", "_reconstructor"): lambda kind, *_: emulate_call(kind, ()),
    Global("_codecs", "encode"): _inert,
    **{Global("datetime", name): _inert for name in ("datetime", "date", "time", "timedelta", "timezone")},
    **{
        Global(module, name): _inert
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
    **{
        Global(f"{package}.{module}", name): _inert
        for package in ("numpy.core", "numpy._core")
        for module, name in (("multiarray", "_reconstruct"), ("multiarray", "scalar"), ("numeric", "_frombuffer"))
    },
    **{Global("numpy", name): _inert for name in ("dtype", "ndarray")},
    **{
        Global(module, name): build
        for module in ("builtins", "__builtin__")
        for name, build in {
            "set": _first,
            "frozenset": _first,
            "object": _inert,
            "complex": _inert,
            "slice": _inert,
            "bytearray": _inert,
            **dict.fromkeys(
                ("dict", "list", "tuple", "int", "long", "float", "str", "unicode", "bool", "bytes"), _inert
            ),
        }.items()
    },
}
