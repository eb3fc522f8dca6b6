"""Reading the pickle of a torch checkpoint without unpickling it.

A pickle is a program for a stack machine. This interpreter only builds plain data: containers, numbers, strings,
``TensorRef`` for tensors and ``Record`` for objects of other classes. It imports and calls nothing that a file names;
time and memory are bounded by a small multiple of the file's size.

``torch.load(weights_only=True)`` with inert classes in place of foreign ones executes nothing either, but a file of one
megabyte can make it hash a tuple of tuples forever, or copy a list into thousands of sets. Preventing that requires
checking the stack before each step. It also reads protocol 2 only.
"""

import pickletools
from collections.abc import Callable
from typing import Any, BinaryIO

from detkit.errors import DetkitError
from detkit.weights.pickle_names import (
    Record,
    RejectedPickle,
    StorageRef,
    TensorRef,
    as_set,
    check_global,
    emulate_call,
    parse_persistent_id,
    plain_items,
)

MAX_BYTES = 64 << 20  # of one pickle; those of real checkpoints have 0.1 to 20 MiB
MAX_OPCODES = 1_000_000  # real ones: 30,000 to 300,000


def read_pickle(stream: BinaryIO, source: str) -> tuple[Any, dict[str, StorageRef]]:
    """Read one pickle from ``stream`` and leave the position after it.

    Returns:
        The object, and the storages that it references by key.

    Raises:
        DetkitError: the pickle is damaged, is not plain data, or is too large; ``source`` names the file.
    """
    machine = _Machine()
    try:
        return machine.run(stream), machine.storages
    except RejectedPickle as rejected:
        raise DetkitError(f"{source} {rejected}") from None
    except (ValueError, LookupError, TypeError, AttributeError, OverflowError):  # from invalid opcodes
        raise DetkitError(f"{source} is damaged: its pickle is invalid") from None


class _Machine:
    """The stack machine: one method per opcode that does more than push its argument."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.marks: list[int] = []  # heights of the stack
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRef] = {}

    def run(self, stream: BinaryIO) -> Any:
        """Execute the opcodes; return the top of the stack at the end.

        Raises:
            RejectedPickle: the pickle has too many or unsupported opcodes, or is not plain data.
        """
        for count, (opcode, argument, _) in enumerate(pickletools.genops(stream)):
            if count >= MAX_OPCODES:
                raise RejectedPickle(f"has a pickle of more than {MAX_OPCODES:,} opcodes: no checkpoint needs so many")
            name = opcode.name
            if name in _LITERALS:
                self.stack.append(argument)
            elif name in _CONSTANTS:
                self.stack.append(_CONSTANTS[name]())
            elif name in _PUTS:
                self.memo[argument] = self.stack[-1]  # type: ignore[index]  # an int for these opcodes
            elif name in _GETS:
                self.stack.append(self.memo[argument])  # type: ignore[index]
            elif name in _TUPLES:
                self.stack.append(tuple(self.pop(_TUPLES[name])))
            elif name not in ("PROTO", "FRAME", "STOP"):
                step = getattr(self, f"do_{name.lower()}", None)
                if step is None:
                    raise RejectedPickle(f"contains a pickle with the opcode {name}, which no checkpoint needs")
                step(argument)
        return self.stack[-1]

    def pop(self, count: int) -> list[Any]:
        """Pop the top ``count`` values, in the order they were pushed.

        Raises:
            LookupError: there are fewer above the last mark.
        """
        if count > len(self.stack) - (self.marks[-1] if self.marks else 0):
            raise LookupError("stack underflow")
        values = self.stack[len(self.stack) - count :]
        del self.stack[len(self.stack) - count :]
        return values

    def pop_mark(self) -> list[Any]:
        """Pop the last mark and everything above it."""
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
        self.stack.append(plain_items(self.pop_mark()))

    def do_frozenset(self, _: None) -> None:
        self.stack.append(as_set(self.pop_mark()))

    def do_append(self, _: None) -> None:
        _extend(self.stack[-2], self.pop(1))

    def do_appends(self, _: None) -> None:
        values = self.pop_mark()
        _extend(self.stack[-1], values)

    def do_additems(self, _: None) -> None:
        values = self.pop_mark()
        self.stack[-1].update(as_set(values))

    def do_setitem(self, _: None) -> None:
        _update(self.stack[-3], self.pop(2))

    def do_setitems(self, _: None) -> None:
        values = self.pop_mark()
        _update(self.stack[-1], values)

    # globals and calls

    def do_global(self, argument: str) -> None:
        self.stack.append(check_global(*argument.split(" ", 1)))

    def do_stack_global(self, _: None) -> None:
        self.stack.append(check_global(*self.pop(2)))

    def do_reduce(self, _: None) -> None:
        function, arguments = self.pop(2)
        self.stack.append(emulate_call(function, arguments))

    do_newobj = do_reduce

    def do_newobj_ex(self, _: None) -> None:
        function, arguments, _keywords = self.pop(3)
        self.stack.append(emulate_call(function, arguments))

    def do_obj(self, _: None) -> None:
        function, *arguments = self.pop_mark()
        self.stack.append(emulate_call(function, tuple(arguments)))

    def do_build(self, _: None) -> None:
        (state,) = self.pop(1)
        target = self.stack[-1]
        if isinstance(target, Record):
            target.state = state
        elif not isinstance(target, (dict, TensorRef)):  # attributes of a state dict or a parameter are not needed
            raise ValueError("state for an object that has none")

    def do_binpersid(self, _: None) -> None:
        (pid,) = self.pop(1)
        storage = parse_persistent_id(pid)
        if isinstance(storage, StorageRef) and self.storages.setdefault(storage.key, storage) != storage:
            raise RejectedPickle(f"is damaged: it has two types or sizes for the storage {storage.key[:40]!a}")
        self.stack.append(storage)


def _extend(target: Any, values: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(values)
    elif not isinstance(target, Record):
        raise ValueError("not a list")


def _update(target: Any, values: list[Any]) -> None:
    (target.items if isinstance(target, Record) else target).update(plain_items(values))


# Opcodes of protocol 2 and above, the only ones torch writes.
_LITERALS = frozenset(
    {"LONG1", "LONG4", "BININT", "BININT1", "BININT2", "BINFLOAT", "BINBYTES", "SHORT_BINBYTES", "BINBYTES8"}
    | {"BINSTRING", "SHORT_BINSTRING", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BYTEARRAY8"}
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
_PUTS, _GETS = frozenset({"BINPUT", "LONG_BINPUT"}), frozenset({"BINGET", "LONG_BINGET"})
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
