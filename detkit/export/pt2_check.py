"""Checking a .pt2 archive before PyTorch loads it: loading unpickles objects and evaluates expressions in it.

Whatever is not part of a file that ``detkit export`` writes is refused: entries, operators, types and expressions are
compared with what is allowed, not searched for what is known to be dangerous.
"""

import ast
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from detkit.errors import DetkitError, shorten
from detkit.export.metadata import KEY, MAX_TEXT

EXTRA_FILE = f"{KEY}.json"
MAX_JSON = 2**28  # bytes of the graph, and of a list of tensors
ENTRY = re.compile(
    r"archive_format|archive_version|version|byteorder|\.data/\w+|\.format_version|models/model\.json|extra/detkit\.json"
    r"|data/weights/(weight_\d+|model_weights_config\.json)|data/constants/(tensor_\d+|model_constants_config\.json)"
    r"|data/sample_inputs/model\.pt"
)
OPERATOR = re.compile(
    r"torch\.ops\.aten\.(?!from_file\b)\w+\.\w+|torch\.ops\.higher_order\.wrap_with_autocast|torch\.sym_\w+"
    r"|_operator\.(add|sub|mul|floordiv|truediv|mod|neg|pos|and_|or_|not_|lt|le|eq|ne|ge|gt|getitem)"
)
TENSOR_FILE = re.compile(r"(weight|tensor)_\d+")
SYMBOL = re.compile(r"[suf]\d{1,9}")  # a size
CALLS = {  # of sympy, but for the last two
    *(
        "Add",
        "Mul",
        "Max",
        "Min",
        "Mod",
        "PythonMod",
        "FloorDiv",
        "CleanDiv",
        "CeilDiv",
        "Integer",
        "Rational",
    ),  # sympy
    *("GreaterThan", "LessThan", "StrictGreaterThan", "StrictLessThan", "Equality", "Unequality", "And", "Or", "Not"),
    *("torch.sym_max", "torch.sym_min"),
}
ASSUMPTIONS = {"positive", "nonnegative", "integer"}  # about a symbol
SYNTAX = (
    *(ast.Expression, ast.Compare, ast.BoolOp, ast.BinOp, ast.UnaryOp, ast.boolop, ast.cmpop, ast.unaryop, ast.Load),
    *(ast.Add, ast.Sub, ast.Mult, ast.Div, ast.FloorDiv, ast.Mod),  # no powers, which can be huge
)
TYPES = {"builtins.tuple", "builtins.list", "builtins.dict", None}  # of inputs and outputs


def check_archive(path: Path) -> str | None:
    """Check that loading an archive unpickles nothing and evaluates only sizes; return its metadata as text.

    Raises:
        DetkitError: the archive is damaged, or not safe.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = _entries(archive)
            texts = {name: _read(archive, entry) for name, entry in entries.items() if name.endswith(".json")}
        contents = {name: json.loads(text) for name, text in texts.items() if not name.startswith("extra/")}
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError, RecursionError) as error:
        raise DetkitError(f"{path} is damaged, or not a .pt2 file ({shorten(str(error))})") from None
    reasons = [f"it holds {name}" for name in entries if not ENTRY.fullmatch(name)]
    reasons += [f"{name} is pickled" for name, entry in entries.items() if name.endswith(".pt") and entry.file_size]
    reasons += [f"{name} holds {reason}" for name, content in contents.items() for reason in _dangers(content)]
    if reasons:
        raise DetkitError(
            f"{path} is refused, since loading it might run code: {shorten(reasons[0])}; export the checkpoint again "
            "with detkit export"
        )
    extra = texts.get(f"extra/{EXTRA_FILE}")
    return None if extra is None else extra.decode("utf-8", "replace")


def _entries(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """Return the entries by their name below the one root folder.

    Raises:
        ValueError: there are several roots, or several entries of one name.
    """
    names = [entry.filename.partition("/") for entry in archive.infolist()]
    if len({root for root, _, _ in names}) != 1 or len({name.lower() for _, _, name in names}) != len(names):
        raise ValueError("its entries are not in one folder, or not distinct")
    return {name: entry for (_, _, name), entry in zip(names, archive.infolist(), strict=True)}


def _read(archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> bytes:
    limit = MAX_TEXT if entry.filename.endswith(EXTRA_FILE) else MAX_JSON
    if entry.file_size > limit:
        raise ValueError(f"{entry.filename} has more than {limit} bytes")
    return archive.read(entry)


def _dangers(content: Any) -> Iterator[str]:
    """Yield what PyTorch would unpickle, look up or evaluate and is not part of an exported detector."""
    todo = [content]
    while todo:
        value = todo.pop()
        if isinstance(value, list):
            todo += value
        if not isinstance(value, dict):
            continue
        todo += value.values()
        if value.get("use_pickle"):
            yield "a pickled tensor"
        if "path_name" in value and not TENSOR_FILE.fullmatch(str(value["path_name"])):
            yield f"the object {value['path_name']}"
        if {"as_custom_obj", "as_operator"} & value.keys() or value.get("custom_obj_values"):
            yield "an object"
        if "target" in value and isinstance(value.get("inputs"), list) and not OPERATOR.fullmatch(str(value["target"])):
            yield f"the operator {value['target']}"
        expressions = [value.get("expr_str", ""), *_as_list(value.get("guards_code"))]
        expressions += value["range_constraints"] if isinstance(value.get("range_constraints"), dict) else ()
        yield from (f"the expression {text}" for text in expressions if not is_arithmetic_on_sizes(text))
        for key in ("in_spec", "out_spec"):
            if not _is_plain_tree(value.get(key, "null")):
                yield f"the type {value[key]}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def is_arithmetic_on_sizes(text: Any) -> bool:
    """Whether a text is only arithmetic on sizes of the input, as sympy or a guard writes it."""
    try:
        return isinstance(text, str) and _is_arithmetic(ast.parse(text or "0", mode="eval"))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False


def _is_arithmetic(node: ast.AST) -> bool:
    match node:
        case ast.Call(ast.Name("Symbol"), [ast.Constant(str(name))], assumptions):
            known = all(a.arg in ASSUMPTIONS and isinstance(a.value, ast.Constant) for a in assumptions)
            return known and SYMBOL.fullmatch(name) is not None
        case ast.Call(function, arguments, []):
            return ast.unparse(function) in CALLS and all(map(_is_arithmetic, arguments))
        case ast.Subscript(value, ast.Constant(int())):
            return ast.unparse(value) == "L['images'].size()"
        case ast.Name(name):
            return SYMBOL.fullmatch(name) is not None or name in ("int_oo", "oo")
        case ast.Constant(value):
            return isinstance(value, (int, float))
    return isinstance(node, SYNTAX) and all(map(_is_arithmetic, ast.iter_child_nodes(node)))


def _is_plain_tree(text: Any) -> bool:
    """Whether a description of inputs or outputs has only tuples, lists and dictionaries."""
    try:
        todo = [json.loads(text)]
    except (TypeError, ValueError, RecursionError):
        return False
    while todo:
        value = todo.pop()
        if isinstance(value, dict) and value.get("type") not in TYPES:
            return False
        todo += value if isinstance(value, list) else value.values() if isinstance(value, dict) else ()
    return True
