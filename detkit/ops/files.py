"""Safe reading of untrusted files: regular files only, of bounded size, without blocking."""

import errno
import hashlib
import os
import stat
import tempfile
from collections.abc import Collection, Iterator
from io import BufferedReader
from pathlib import Path
from typing import Any

import yaml

from detkit.errors import DetkitError, shorten

MAX_TEXT = 2**26  # bytes of a text file
MAX_YAML_NODES = 1_000_000  # values of a YAML file with aliases expanded
MAX_YAML_DEPTH = 100  # levels of nested mappings and lists
MAX_DIGITS = 300  # characters of a number: parsing takes quadratic time, and Python cannot print more than 4,300
MAX_SHOWN = 1000  # characters of a path in a message
NULL_TAG, MERGE_TAG, TEXT_TAG, INT_TAG = (f"tag:yaml.org,2002:{kind}" for kind in ("null", "merge", "str", "int"))
PLAIN_TAGS = {NULL_TAG, *(f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float", "timestamp", "value"))}


def open_regular(path: str | Path) -> BufferedReader:
    """Open a regular file for reading bytes.

    Raises:
        OSError: the file cannot be opened or is not a regular file (a pipe would block, a device may never end).
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except ValueError as error:  # a NUL character in the path
        raise OSError(errno.EINVAL, str(error), str(path)) from None
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        what = "it is a folder" if stat.S_ISDIR(mode) else "it is not a regular file"
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, what, str(path))
    return os.fdopen(descriptor, "rb")


def read_regular(path: str | Path, limit: int = MAX_TEXT) -> bytes:
    """Return the bytes of a regular file.

    Raises:
        OSError: as ``open_regular``, or the file is larger than ``limit`` bytes.
    """
    with open_regular(path) as file:
        content = file.read(limit + 1)
    if len(content) > limit:
        raise OSError(errno.EFBIG, f"it is larger than {limit // 2**20} MiB", str(path))
    return content


def sha256_of(path: str | Path) -> str:
    """Return the SHA-256 digest of a regular file, in hexadecimal.

    Raises:
        OSError: as ``open_regular``.
    """
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_yaml(path: str | Path, text_keys: Collection[str] = ()) -> Any:
    """Return the content of a YAML file: mappings, lists, text and numbers, never arbitrary objects.

    Args:
        path: the file.
        text_keys: top-level keys under which all scalars are read as text: ``no``, ``1.0`` and ``2024-01-01`` are
            strings. A key without a value is None nevertheless.

    Raises:
        OSError: as ``read_regular``.
        DetkitError: the file is malformed (with the line), repeats a key, is not UTF-8, is nested deeper than
            MAX_YAML_DEPTH, has a number of more than MAX_DIGITS characters, or has aliases that are recursive or
            expand to more than MAX_YAML_NODES values.
    """
    try:
        text = read_regular(path).decode("utf-8-sig")
        loader = yaml.SafeLoader(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            if _expanded_size(root, {}, 0) > MAX_YAML_NODES:
                raise DetkitError(f"{path} is rejected: its aliases expand to more than {MAX_YAML_NODES:,} values")
            if isinstance(root, yaml.MappingNode):
                for key, value in _entries(root):
                    if key.value in text_keys and value.tag != NULL_TAG:
                        _keep_as_text(value)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except UnicodeDecodeError:
        raise DetkitError(f"{path} is not a yaml file: it is not UTF-8 text") from None
    except RecursionError:
        raise DetkitError(f"{path} is rejected: its values are nested too deeply, or recursively") from None
    except (yaml.YAMLError, ValueError, TypeError, OverflowError, AttributeError) as error:  # of "!!timestamp x"
        if isinstance(error, DetkitError):
            raise
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise DetkitError(f"{path} is malformed yaml{line}: {shorten(problem)}") from None


def _expanded_size(node: yaml.Node, known: dict[int, int], depth: int) -> int:
    """Return the number of values in a node with aliases expanded.

    Raises:
        RecursionError: the node contains itself, or is nested deeper than MAX_YAML_DEPTH.
        ValueError: the node contains a number of more than MAX_DIGITS characters.
    """
    if node.tag == INT_TAG and len(node.value) > MAX_DIGITS:
        raise ValueError(f"line {node.start_mark.line + 1} has a number of {len(node.value)} characters")
    if known.get(id(node)) == 0 or depth > MAX_YAML_DEPTH:  # 0: still being counted
        raise RecursionError
    if id(node) not in known:
        known[id(node)] = 0
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
        children = node.value if isinstance(node, yaml.CollectionNode) else ()
        flat = [n for child in children for n in (child if isinstance(child, tuple) else (child,))]
        known[id(node)] = 1 + sum(_expanded_size(child, known, depth + 1) for child in flat)
    return known[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    """Check that a mapping has no duplicate keys, of which PyYAML would silently use the last.

    Raises:
        yaml.YAMLError: it has.
    """
    seen = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE_TAG:
            continue
        if (key.tag, key.value) in seen:
            raise yaml.constructor.ConstructorError(
                problem=f"the key '{shorten(key.value)}' is given twice", problem_mark=key.start_mark
            )
        seen.add((key.tag, key.value))


def _entries(node: yaml.MappingNode) -> Iterator[tuple[yaml.Node, yaml.Node]]:
    """Yield the keys and values of a mapping, including those merged by ``<<: *alias``."""
    for key, value in node.value:
        if key.tag == MERGE_TAG:
            merged = value.value if isinstance(value, yaml.SequenceNode) else [value]
            for mapping in merged:
                if isinstance(mapping, yaml.MappingNode):
                    yield from _entries(mapping)
        else:
            yield key, value


def _keep_as_text(node: yaml.Node) -> None:
    """Tag every plain scalar in a node as text; ``<<`` is special only as a key."""
    if isinstance(node, yaml.ScalarNode):
        if node.tag in PLAIN_TAGS:
            node.tag = TEXT_TAG
        return
    for child in node.value:
        *keys, value = child if isinstance(child, tuple) else (child,)
        if value.tag == MERGE_TAG:
            value.tag = TEXT_TAG
        for item in (*keys, value):
            _keep_as_text(item)


def explain_oserror(error: OSError) -> str | None:
    """Return a message with the file and the system's reason; None if the error does not come from the system."""
    if error.errno is None:
        return None
    if error.filename is None:
        return f"the operating system reports: {error.strerror}"
    path = error.filename if isinstance(error.filename, int) else os.fsdecode(error.filename)
    return f"cannot read or write {shorten(path, MAX_SHOWN)}: {error.strerror}"


def cache_dir() -> Path:
    """Return detkit's cache folder: in XDG_CACHE_HOME or ~/.cache, else in the temporary folder.

    A process without a home directory, as in a container run under an arbitrary user ID, uses the temporary folder.
    """
    root = os.environ.get("XDG_CACHE_HOME")
    try:
        return Path(root or Path.home() / ".cache") / "detkit"
    except RuntimeError:  # no HOME, and no entry in the user database
        return Path(tempfile.gettempdir()) / f"detkit-{os.getuid()}"
