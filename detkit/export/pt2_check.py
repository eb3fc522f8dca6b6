"""Checking a .pt2 archive before PyTorch loads it: loading unpickles objects and evaluates expressions in it."""

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
OPERATOR = re.compile(r"torch\.ops\.aten\.\w+\.\w+|_operator\.\w+|math\.\w+|torch\.sym_\w+")
TENSOR_FILE = re.compile(r"(weight|tensor)_\d+")
CHARACTERS = re.compile(r"[\w\s()\[\],'=!<>+*/%&|~.-]*")  # of an expression over sizes
ATTRIBUTES = {"size", "sym_max", "sym_min"}
SIZE_NAMES = {"L", "images", "torch", "not", "and", "or", "positive", "nonnegative", "integer", *ATTRIBUTES}
SYMBOL = re.compile(r"[suf]\d+|[A-Z]\w*|int_oo|oo")  # sizes, classes of sympy such as Mul, and infinity
TYPES = {"builtins.tuple", "builtins.list", "builtins.dict", None}  # of inputs and outputs


def check_archive(path: Path) -> str | None:
    """Check that loading an archive unpickles nothing and evaluates only sizes; return its metadata as text.

    Raises:
        DetkitError: the archive is damaged, or not safe.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            entries = {entry.filename.partition("/")[2]: entry for entry in archive.infolist()}
            texts = {name: _read(archive, entry) for name, entry in entries.items() if name.endswith(".json")}
        contents = {name: json.loads(text) for name, text in texts.items() if not name.startswith("extra/")}
    except (OSError, zipfile.BadZipFile, RuntimeError, NotImplementedError, ValueError, RecursionError) as error:
        raise DetkitError(f"{path} is damaged, or not a .pt2 file ({shorten(str(error))})") from None
    reasons = [f"{name} is pickled" for name, entry in entries.items() if name.endswith(".pt") and entry.file_size]
    reasons += [f"{name} holds {reason}" for name, content in contents.items() for reason in _dangers(content)]
    if reasons:
        raise DetkitError(
            f"{path} is refused, since loading it might run code: {shorten(reasons[0])}; export the checkpoint again "
            "with detkit export"
        )
    extra = texts.get(f"extra/{EXTRA_FILE}")
    return None if extra is None else extra.decode("utf-8", "replace")


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
        yield from (f"the expression {text}" for text in expressions if not _is_size(text))
        for key in ("in_spec", "out_spec"):
            if not _is_plain_tree(value.get(key, "null")):
                yield f"the type {value[key]}"


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [] if value is None else [value]


def _is_size(text: Any) -> bool:
    """Whether a text is only arithmetic on sizes of the input."""
    if not isinstance(text, str) or not CHARACTERS.fullmatch(text) or "__" in text:
        return False
    names = re.findall(r"[A-Za-z_]\w*", text)
    attributes = re.findall(r"\.\s*([A-Za-z_]\w*)", text)
    return all(n in SIZE_NAMES or SYMBOL.fullmatch(n) for n in names) and ATTRIBUTES.issuperset(attributes)


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
