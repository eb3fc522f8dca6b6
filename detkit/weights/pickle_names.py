"""What a name in a pickle may stand for: plain data, or nothing. No name is ever looked up, imported or called."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

MAX_ARGUMENTS = 1000  # of a call; a path has as many as it has parts, all others fewer than ten


class Global(NamedTuple):
    """The name of a class or function in a pickle. It is never looked up."""

    module: str
    name: str

    def __str__(self) -> str:
        """Return ``module.name`` on one line, cut to what a sentence can hold."""
        return ascii(f"{self.module}.{self.name}"[:100])[1:-1]

    @property
    def is_foreign_class(self) -> bool:
        """Whether it looks like a class (``Conv2d``) of a package outside Python's standard library."""
        package, leaf = self.module.partition(".")[0], self.name.rpartition(".")[2].lstrip("_")
        return leaf[:1].isupper() and package not in _PYTHON


class TensorRef(NamedTuple):
    """A tensor that has not been read: ``size``, ``stride`` and ``offset`` in elements of the storage ``key``."""

    dtype: torch.dtype
    key: str
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]


class StorageRef(NamedTuple):
    """A block of ``count`` elements that the file holds under ``key``."""

    dtype: torch.dtype
    key: str
    count: int  # type: ignore[assignment]  # tuples have a method of this name


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """An object of a class that is only known by name: the attributes and items it was saved with."""

    kind: Global
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


class Refusal(Exception):  # noqa: N818  (never leaves these two modules)
    """What a pickle asks for and will not get, in words that go on from the file's name."""


def named(module: Any, name: Any) -> Global:
    """Return the name.

    Raises:
        Refusal: it belongs to Python's own library, and is not among the few known to be plain data.
    """
    if not isinstance(module, str) or not isinstance(name, str) or len(module) + len(name) > 200:
        raise ValueError("a name is a string, and short")
    found = Global(module, name)
    if found in _KNOWN or module.partition(".")[0] not in _PYTHON:
        return found
    raise Refusal(f"asks for {found}, which is not data: it was refused, and nothing was run")


def stand_in(function: Any, arguments: Any) -> Any:
    """Return the data that calling ``function`` would have made.

    Raises:
        Refusal: for anything but the functions of ``_KNOWN`` and classes outside the standard library.
    """
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("only a named function can be called")
    if len(arguments) > MAX_ARGUMENTS:  # every call copies them, and one long tuple may be those of 100,000 calls
        raise ValueError("too many arguments")
    if function in _KNOWN:
        made = _KNOWN[function](*arguments)
        return Record(function) if made is None else made
    if function.is_foreign_class:
        return Record(function)
    raise Refusal(f"asks to call {function}, which is not data: it was refused, and nothing was run")


def storage_of(pid: Any) -> Any:
    """Return what a persistent id stands for: ("storage", type, key, device, count) is all that torch writes.

    Raises:
        Refusal: anything else.
    """
    if not isinstance(pid, tuple) or not 4 <= len(pid) <= 6:
        raise Refusal("holds a pickle with a persistent id that is no storage's")
    if pid[0] == "module" and len(pid) == 4:  # old checkpoints: a class with its source text
        return pid[1]
    _, kind, key, _, count, *view = pid
    if pid[0] != "storage" or not isinstance(kind, Global) or any(part is not None for part in view):
        raise Refusal("holds a pickle with a persistent id that is no storage's")
    dtype = _STORAGES.get(kind.name) if kind.module in ("torch", "torch.cuda") else None
    if dtype is None or not isinstance(key, str) or not _is_size(count):
        raise Refusal(f"holds a storage of the unknown type {kind}")
    return StorageRef(dtype, key, count)


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


# What the known functions make. None of them copies an argument of any length: it may be referred to a million times.


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    if not isinstance(storage, StorageRef) or not len(size) == len(stride) <= 16:
        raise ValueError("not a tensor")
    if not all(map(_is_size, (offset, *size, *stride))):
        raise ValueError("not a tensor")
    return TensorRef(storage.dtype, storage.key, offset, tuple(size), tuple(stride))


def _tensor_of_type(function: Any, _kind: Any, arguments: Any, *_: Any) -> TensorRef:
    """A tensor with attributes, such as a torch.nn.Buffer, or of a subclass is that tensor."""
    if function != Global("torch._utils", "_rebuild_tensor_v2"):
        raise ValueError("not a tensor")
    return stand_in(function, arguments)


def _first(value: Any = (), *_: Any) -> Any:
    """What wraps a tensor (a parameter) is that tensor; for a torch.Size or a set, the tuple or list in it will do."""
    return value


def _inert(*_: Any) -> None:
    """Known, harmless and not needed: a Record without content."""


def _empty_dict(*_: Any) -> dict[Any, Any]:
    """Mappings are made empty; their items follow."""
    return {}


def as_set(values: list[Any]) -> set[Any]:
    """Return the plain ones of ``values``."""
    return {value for value in values if _is_plain_key(value)}


def _is_plain_key(value: Any) -> bool:
    """Strings and ordinary numbers: a nested tuple or a huge number could take forever to hash."""
    return isinstance(value, (str, bytes, float)) or (isinstance(value, int) and value.bit_length() <= 64)


def plain_items(values: list[Any]) -> dict[Any, Any]:
    """[key, value, key, value, ...] -> dict, without the items whose key is no plain one: nobody asks for these."""
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
    Global("copyreg", "_reconstructor"): lambda kind, *_: stand_in(kind, ()),
    Global("copy_reg", "_reconstructor"): lambda kind, *_: stand_in(kind, ()),
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
