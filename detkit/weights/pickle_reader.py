"""Reading the pickle of a torch checkpoint without unpickling it.

A pickle is a program for a small stack machine. This one steps through it and only ever builds plain data: containers,
numbers, strings, ``TensorRef`` for a tensor and ``Record`` for an object of somebody's class. It imports nothing and
calls nothing that a file names; memory stays within a small multiple of the file.
"""

import pickletools
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, BinaryIO, NamedTuple

import torch

from detkit.errors import DetkitError

MAX_BYTES = 64 << 20  # of one pickle; those of real checkpoints hold 0.1 to 20 MiB
MAX_OPCODES = 1_000_000  # real ones: 30,000 to 300,000


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
    count: int


@dataclass(eq=False, repr=False, slots=True)
class Record:
    """An object of a class that is only known by name: the attributes and items it was saved with."""

    kind: Global
    state: Any = None
    items: dict[Any, Any] = field(default_factory=dict)


class Refusal(Exception):  # noqa: N818  (never leaves this module)
    """What a pickle asks for and will not get, in words that go on from the file's name."""


def read_pickle(stream: BinaryIO, source: str) -> tuple[Any, dict[str, StorageRef]]:
    """Read one pickle of ``stream``, which is left behind its end.

    Returns:
        the object, and every storage it mentions by key.

    Raises:
        DetkitError: a damaged pickle, one that would call something, or one too large; ``source`` names the file.
    """
    machine = _Machine()
    try:
        return machine.run(stream), machine.storages
    except Refusal as refusal:
        raise DetkitError(f"{source} {refusal}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):  # what nonsense opcodes lead to
        raise DetkitError(f"{source} is damaged: its pickle does not make sense") from None


class _Machine:
    """The stack machine: one method an opcode that does more than push its argument."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRef] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Step through the opcodes; return what is on top of the stack at the end."""
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= MAX_OPCODES:
                raise Refusal(f"holds a pickle of more than {MAX_OPCODES:,} instructions: no checkpoint needs so many")
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _PUTS:
                self.memo[argument] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            elif name in _TUPLES:
                self.stack.append(tuple(self.pop(_TUPLES[name])))
            elif name not in ("PROTO", "FRAME", "STOP"):
                step = getattr(self, f"do_{name.lower()}", None)
                if step is None:
                    raise Refusal(f"holds a pickle with the instruction {name}, which no checkpoint needs")
                step(argument)
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        """Take the top ``count`` values, in the order they were pushed."""
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise LookupError("stack underflow")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    # stack and memo

    def do_mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def do_pop(self, _: None) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop(1)

    def do_pop_mark(self, _: None) -> None:
        self.pop_mark()

    def do_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # containers

    def do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def do_list(self, _: None) -> None:
        self.stack.append(self.pop_mark())

    def do_dict(self, _: None) -> None:
        self.stack.append(_plain_items(self.pop_mark()))

    def do_frozenset(self, _: None) -> None:
        self.stack.append(_as_set(self.pop_mark()))

    def do_append(self, _: None) -> None:
        _extend(self.stack[-2], self.pop(1))

    def do_appends(self, _: None) -> None:
        values = self.pop_mark()
        _extend(self.stack[-1], values)

    def do_additems(self, _: None) -> None:
        values = self.pop_mark()
        self.stack[-1].update(_as_set(values))

    def do_setitem(self, _: None) -> None:
        _update(self.stack[-3], self.pop(2))

    def do_setitems(self, _: None) -> None:
        values = self.pop_mark()
        _update(self.stack[-1], values)

    # names, and what would be calls

    def do_global(self, argument: str) -> None:
        self.stack.append(_named(*argument.split(" ", 1)))

    def do_stack_global(self, _: None) -> None:
        self.stack.append(_named(*self.pop(2)))

    def do_reduce(self, _: None) -> None:
        function, arguments = self.pop(2)
        self.stack.append(_stand_in(function, arguments))

    do_newobj = do_reduce

    def do_newobj_ex(self, _: None) -> None:
        function, arguments, _keywords = self.pop(3)
        self.stack.append(_stand_in(function, arguments))

    def do_inst(self, argument: str) -> None:
        self.stack.append(_stand_in(_named(*argument.split(" ", 1)), tuple(self.pop_mark())))

    def do_obj(self, _: None) -> None:
        function, *arguments = self.pop_mark()
        self.stack.append(_stand_in(function, tuple(arguments)))

    def do_build(self, _: None) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, (dict, TensorRef)):  # attributes of a state dict or a parameter: nobody's need
            raise ValueError("state for something that has none")

    def do_binpersid(self, _: None) -> None:
        """Only storages have persistent ids: ("storage", type, key, device, count), old ones with a view's place."""
        (pid,) = self.pop(1)
        if not isinstance(pid, tuple) or not pid:
            raise Refusal("holds a pickle with a persistent id that is no storage's")
        if pid[0] == "module" and len(pid) == 4:  # old checkpoints: a class with its source text
            self.stack.append(pid[1])
            return
        _, kind, key, _, count = pid[:5]
        if pid[0] != "storage" or not isinstance(kind, Global) or any(pid[5:]):
            raise Refusal("holds a pickle with a persistent id that is no storage's")
        dtype = _STORAGES.get(kind.name) if kind.module in ("torch", "torch.cuda") else None
        if dtype is None or not isinstance(key, str) or not _is_size(count):
            raise Refusal(f"holds a storage of the unknown type {kind}")
        storage = StorageRef(dtype, key, count)
        if self.storages.setdefault(key, storage) != storage:
            raise Refusal(f"is damaged: it gives two types or sizes for the storage {key[:40]!a}")
        self.stack.append(storage)


def _named(module: Any, name: Any) -> Global:
    """Return the name, unless it belongs to Python's own library and is not among the few known to be plain data."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name is a string")
    found = Global(module, name)
    if found in _KNOWN or module.partition(".")[0] not in _PYTHON:
        return found
    raise Refusal(f"asks for {found}, which is not data: it was refused, and nothing was run")


def _stand_in(function: Any, arguments: Any) -> Any:
    """Return the data that calling ``function`` would have made.

    Raises:
        Refusal: for anything but the functions of ``_KNOWN`` and classes outside the standard library.
    """
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("only a named function can be called")
    if function in _KNOWN:
        made = _KNOWN[function](*arguments)
        return Record(function) if made is None else made
    if function.is_foreign_class:
        return Record(function)
    raise Refusal(f"asks to call {function}, which is not data: it was refused, and nothing was run")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, StorageRef) or len(size) != len(stride) or not all(map(_is_size, numbers)):
        raise ValueError("not a tensor")
    return TensorRef(storage.dtype, storage.key, offset, tuple(size), tuple(stride))


def _first(value: Any, *_: Any) -> Any:
    """What wraps a tensor (a parameter) or a tuple (torch.Size) is that tensor or tuple."""
    return value


def _inert(*_: Any) -> None:
    """Known, harmless and not needed: a Record without content."""


def _as_dict(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    return _plain_items([value for pair in pairs for value in pair]) if isinstance(pairs, list) else {}


def _as_set(values: Any = ()) -> set[Any]:
    return {value for value in values if _is_plain_key(value)}


def _is_plain_key(value: Any) -> bool:
    """Strings and ordinary numbers: a nested tuple or a huge number could take forever to hash."""
    return isinstance(value, (str, bytes, float)) or (isinstance(value, int) and value.bit_length() <= 64)


def _plain_items(values: list[Any]) -> dict[Any, Any]:
    """[key, value, key, value, ...] -> dict, without the items whose key is no plain one: nobody asks for these."""
    return {
        key: value for key, value in zip(values[::2], values[1::2], strict=True) if key is None or _is_plain_key(key)
    }


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Record):
        raise ValueError("not a list")


def _update(target: Any, values: list[Any]) -> None:
    (target.items if isinstance(target, Record) else target).update(_plain_items(values))


_PYTHON = sys.stdlib_module_names | {"__builtin__"}
_LITERALS = frozenset(
    {"INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT"}
    | {"STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8"}
    | {"BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"}
)
_CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _PUTS:
                self.memo[argument] = self.stack[-1]
            elif name in _GETS:
                self.stack.append(self.memo[argument])
            elif name in _TUPLES:
                self.stack.append(tuple(self.pop(_TUPLES[name])))
            elif name not in ("PROTO", "FRAME", "STOP"):
                step = getattr(self, f"do_{name.lower()}", None)
                if step is None:
                    raise Refusal(f"holds a pickle with the instruction {name}, which no checkpoint needs")
                step(argument)
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        """Take the top ``count`` values, in the order they were pushed."""
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise LookupError("stack underflow")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_mark(self) -> list[Any]:
        """Take everything above the last mark."""
        height = self.marks.pop()
        values = self.stack[height:]
        del self.stack[height:]
        return values

    # stack and memo

    def do_mark(self, _: None) -> None:
        self.marks.append(len(self.stack))

    def do_pop(self, _: None) -> None:
        if self.marks and self.marks[-1] == len(self.stack):
            self.marks.pop()
        else:
            self.pop(1)

    def do_pop_mark(self, _: None) -> None:
        self.pop_mark()

    def do_dup(self, _: None) -> None:
        self.stack.append(self.stack[-1])

    def do_memoize(self, _: None) -> None:
        self.memo[len(self.memo)] = self.stack[-1]

    # containers

    def do_tuple(self, _: None) -> None:
        self.stack.append(tuple(self.pop_mark()))

    def do_list(self, _: None) -> None:
        self.stack.append(self.pop_mark())

    def do_dict(self, _: None) -> None:
        self.stack.append(_plain_items(self.pop_mark()))

    def do_frozenset(self, _: None) -> None:
        self.stack.append(_as_set(self.pop_mark()))

    def do_append(self, _: None) -> None:
        _extend(self.stack[-2], self.pop(1))

    def do_appends(self, _: None) -> None:
        values = self.pop_mark()
        _extend(self.stack[-1], values)

    def do_additems(self, _: None) -> None:
        values = self.pop_mark()
        self.stack[-1].update(_as_set(values))

    def do_setitem(self, _: None) -> None:
        _update(self.stack[-3], self.pop(2))

    def do_setitems(self, _: None) -> None:
        values = self.pop_mark()
        _update(self.stack[-1], values)

    # names, and what would be calls

    def do_global(self, argument: str) -> None:
        self.stack.append(_named(*argument.split(" ", 1)))

    def do_stack_global(self, _: None) -> None:
        self.stack.append(_named(*self.pop(2)))

    def do_reduce(self, _: None) -> None:
        function, arguments = self.pop(2)
        self.stack.append(_stand_in(function, arguments))

    do_newobj = do_reduce

    def do_newobj_ex(self, _: None) -> None:
        function, arguments, _keywords = self.pop(3)
        self.stack.append(_stand_in(function, arguments))

    def do_inst(self, argument: str) -> None:
        self.stack.append(_stand_in(_named(*argument.split(" ", 1)), tuple(self.pop_mark())))

    def do_obj(self, _: None) -> None:
        function, *arguments = self.pop_mark()
        self.stack.append(_stand_in(function, tuple(arguments)))

    def do_build(self, _: None) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, (dict, TensorRef)):  # attributes of a state dict or a parameter: nobody's need
            raise ValueError("state for something that has none")

    def do_binpersid(self, _: None) -> None:
        """Only storages have persistent ids: ("storage", type, key, device, count), old ones with a view's place."""
        (pid,) = self.pop(1)
        if not isinstance(pid, tuple) or not pid:
            raise Refusal("holds a pickle with a persistent id that is no storage's")
        if pid[0] == "module" and len(pid) == 4:  # old checkpoints: a class with its source text
            self.stack.append(pid[1])
            return
        _, kind, key, _, count = pid[:5]
        if pid[0] != "storage" or not isinstance(kind, Global) or any(pid[5:]):
            raise Refusal("holds a pickle with a persistent id that is no storage's")
        dtype = _STORAGES.get(kind.name) if kind.module in ("torch", "torch.cuda") else None
        if dtype is None or not isinstance(key, str) or not _is_size(count):
            raise Refusal(f"holds a storage of the unknown type {kind}")
        storage = StorageRef(dtype, key, count)
        if self.storages.setdefault(key, storage) != storage:
            raise Refusal(f"is damaged: it gives two types or sizes for the storage {key[:40]!a}")
        self.stack.append(storage)


def _named(module: Any, name: Any) -> Global:
    """Return the name, unless it belongs to Python's own library and is not among the few known to be plain data."""
    if not isinstance(module, str) or not isinstance(name, str):
        raise ValueError("a name is a string")
    found = Global(module, name)
    if found in _KNOWN or module.partition(".")[0] not in _PYTHON:
        return found
    raise Refusal(f"asks for {found}, which is not data: it was refused, and nothing was run")


def _stand_in(function: Any, arguments: Any) -> Any:
    """Return the data that calling ``function`` would have made.

    Raises:
        Refusal: for anything but the functions of ``_KNOWN`` and classes outside the standard library.
    """
    if not isinstance(function, Global) or not isinstance(arguments, tuple):
        raise ValueError("only a named function can be called")
    if function in _KNOWN:
        made = _KNOWN[function](*arguments)
        return Record(function) if made is None else made
    if function.is_foreign_class:
        return Record(function)
    raise Refusal(f"asks to call {function}, which is not data: it was refused, and nothing was run")


def _is_size(value: Any) -> bool:
    return type(value) is int and 0 <= value < 1 << 62


def _tensor(storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> TensorRef:
    numbers = (offset, *size, *stride)
    if not isinstance(storage, StorageRef) or len(size) != len(stride) or not all(map(_is_size, numbers)):
        raise ValueError("not a tensor")
    return TensorRef(storage.dtype, storage.key, offset, tuple(size), tuple(stride))


def _first(value: Any, *_: Any) -> Any:
    """What wraps a tensor (a parameter) or a tuple (torch.Size) is that tensor or tuple."""
    return value


def _inert(*_: Any) -> None:
    """Known, harmless and not needed: a Record without content."""


def _as_dict(pairs: Any = (), *_: Any) -> dict[Any, Any]:
    return _plain_items([value for pair in pairs for value in pair]) if isinstance(pairs, list) else {}


def _as_set(values: Any = ()) -> set[Any]:
    return {value for value in values if _is_plain_key(value)}


def _is_plain_key(value: Any) -> bool:
    """Strings and ordinary numbers: a nested tuple or a huge number could take forever to hash."""
    return isinstance(value, (str, bytes, float)) or (isinstance(value, int) and value.bit_length() <= 64)


def _plain_items(values: list[Any]) -> dict[Any, Any]:
    """[key, value, key, value, ...] -> dict, without the items whose key is no plain one: nobody asks for these."""
    return {
        key: value for key, value in zip(values[::2], values[1::2], strict=True) if key is None or _is_plain_key(key)
    }


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Record):
        raise ValueError("not a list")


def _update(target: Any, values: list[Any]) -> None:
    (target.items if isinstance(target, Record) else target).update(_plain_items(values))


_PYTHON = sys.stdlib_module_names | {"__builtin__"}
_LITERALS = frozenset(
    ["INT", "LONG", "LONG1", "LONG4", "BININT", "BININT1", "BININT2", "FLOAT", "BINFLOAT", "STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"]
)
_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "EMPTY_DICT": dict,
    "EMPTY_SET": set,
}
_PUTS, _GETS = frozenset({"PUT", "BINPUT", "LONG_BINPUT"}), frozenset({"GET", "BINGET", "LONG_BINGET"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}

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
    Global("torch._utils", "_rebuild_parameter"): _first,
    Global("torch._utils", "_rebuild_parameter_with_state"): _first,
    Global("torch", "Size"): _first,
    Global("torch", "device"): _inert,
    Global("torch.serialization", "_get_layout"): _inert,
    Global("collections", "OrderedDict"): _as_dict,
    Global("collections", "defaultdict"): lambda *_: {},
    Global("collections", "Counter"): lambda *_: {},
    Global("argparse", "Namespace"): _inert,
    Global("types", "SimpleNamespace"): _inert,
    Global("copyreg", "_reconstructor"): lambda kind, *_: _stand_in(kind, ()),
    Global("copy_reg", "_reconstructor"): lambda kind, *_: _stand_in(kind, ()),
    Global("_codecs", "encode"): _inert,
    **{Global("datetime", name): _inert for name in ("datetime", "date", "time", "timedelta", "timezone")},
    **{
        Global(module, name): _inert
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath", "PurePath", "PurePosixPath", "PureWindowsPath")
    },
    **{
        Global(f"{package}.multiarray", name): _inert
        for package in ("numpy.core", "numpy._core")
        for name in ("_reconstruct", "scalar")
    },
    **{Global("numpy", name): _inert for name in ("dtype", "ndarray")},
    **{
        Global(module, name): build
        for module in ("builtins", "__builtin__")
        for name, build in {
            "set": _as_set,
            "frozenset": _as_set,
            "object": _inert,
            "complex": _inert,
            "slice": _inert,
            "bytearray": _inert,
            **dict.fromkeys(("dict", "list", "int", "float", "str", "bool", "bytes", "tuple"), _inert),
        }.items()
    },
}
