"""Reading a foreign checkpoint: tensors by name, and class names and image size if it contains them."""

import re
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from detkit.errors import DetkitError, is_name, shorten
from detkit.ops.files import open_regular
from detkit.weights.pickle_names import Global, Record, StorageRef, TensorRef
from detkit.weights.torch_file import open_torch_file

AVERAGE = re.compile(r"(?<![a-z])(ema|swa|averaged?|shadow)(?![a-z])")  # keys of averaged weights, as in model_ema
WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}  # torch's, around a module
COUNTERS = {"total_ops", "total_params", "n_averaged", "num_batches_tracked"}  # thop's and torch's, not weights
MAX_NAME = 500  # characters of a module's name; real ones have below 100, or more with nested wrappers
MAX_ENTRIES = 50_000  # modules and tensors; RevCol-XL, the largest supported model, has 4,000
MAX_ITEMS = 300_000  # visited in search of models; a real YOLOv8 training checkpoint has 2,000
MAX_MODELS = 16  # state dicts and modules considered per file
MAX_NESTING = 6  # of containers around a model


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint.

    Attributes:
        tensors: by their names in the file, without those of wrappers; floating-point ones in float32.
        class_names: class names in the file, or None.
        image_size: image size used in training, in pixels, or None.
        place: path of the model within the file, for example ``ema.module``; empty if it is the whole file.
    """

    tensors: dict[str, Tensor]
    class_names: tuple[str, ...] | None = None
    image_size: int | None = None
    place: str = ""


@dataclass(frozen=True)
class _Model:
    """A module or state dict within a file."""

    place: str
    content: Any
    tensors: Mapping[str, TensorRef]

    @property
    def weights(self) -> int:
        """Number of tensors that are not counters."""
        return sum(name.rpartition(".")[2] not in COUNTERS for name in self.tensors)


def read_source(path: Path, key: str = "src") -> Source:
    """Read a file of ``torch.save`` (preferring averaged weights) or safetensors without executing code in it.

    Args:
        path: the file.
        key: configuration key that names the file, for messages.

    Raises:
        DetkitError: the file does not exist, is damaged, contains no model, contains NaN, or is not plain data.
    """
    try:
        open_regular(path).close()
        if path.suffix == ".safetensors":
            source = Source(_plain_names(_read_safetensors(path)))
        else:
            file = open_torch_file(path)
            model = _choose(_find_models(path, file.content))
            if model is None:
                raise DetkitError(f"{path} contains no model: a module or a state dict was expected")
            tensors = file.read_tensors(_plain_names(model.tensors))
            names = _class_names(model.content) or _class_names(file.content)
            source = Source(tensors, names, _image_size(file.content), model.place)
    except FileNotFoundError:
        raise DetkitError(f"{key}={path} does not exist") from None
    except IsADirectoryError:
        raise DetkitError(f"{key}={path} is a folder: name the file in it") from None
    except OSError as error:
        raise DetkitError(f"cannot read {key}={path}: {error.strerror}") from None
    for name, tensor in source.tensors.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise DetkitError(f"{path} is rejected: its tensor {shorten(name)!r} contains NaN or infinity")
    return source


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if "detkit" in (file.metadata() or {}):
                raise DetkitError(f"{path} is a checkpoint of detkit already: start from it with weights={path}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except DetkitError:
        raise
    except (SafetensorError, ValueError) as error:
        raise DetkitError(f"{path} is not a safetensors file, or is truncated ({shorten(str(error))})") from None
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _choose(models: Iterable[_Model]) -> _Model | None:
    """Return the model with the most weights, preferring averaged ones among equals; None if there is none."""
    by_size = sorted(models, key=lambda model: -model.weights)
    largest = [model for model in by_size if model.weights == by_size[0].weights]
    return next((m for m in largest if AVERAGE.search(m.place.lower())), largest[0] if largest else None)


def _find_models(path: Path, content: Any) -> Iterator[_Model]:
    """Yield the modules and state dicts in the mappings, lists and objects of a checkpoint, breadth first."""
    todo, seen, models, entries, items = deque([("", content)]), set(), 0, 0, 0
    while todo and models < MAX_MODELS and entries < MAX_ENTRIES and items < MAX_ITEMS:
        place, node = todo.popleft()
        if id(node) in seen or place.count(".") >= MAX_NESTING:
            continue
        seen.add(id(node))
        tensors, visited = _named_tensors(path, node)
        items += visited
        if tensors:
            models += 1
            yield _Model(place, node, tensors)
        if _is_module(node):
            continue  # its contents belong to it
        for key, value in islice(_children(node), MAX_ENTRIES):
            entries += 1
            if not str(key).startswith("optim"):  # optimizers contain tensors, too
                todo.append((f"{place}.{key}" if place else str(key), value))


def _children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield the containers and objects in a container or object, by key or index."""
    items = (table.items() if isinstance(table, Mapping) else enumerate(table) for table in _tables(node))
    for key, value in chain.from_iterable(items):
        is_tensor = isinstance(value, (TensorRef, StorageRef, Global))  # these are tuples
        if isinstance(value, (Record, Mapping, list, tuple)) and not is_tensor and isinstance(key, (str, int)):
            yield (key[:40] if isinstance(key, str) else key), value


def _tables(node: Any) -> list[Any]:
    """Return the mappings and lists that a container or object consists of."""
    if isinstance(node, Record):
        return [table for table in (node.state, node.items) if isinstance(table, Mapping)]
    return [node] if isinstance(node, (Mapping, list, tuple)) else []


def _is_module(node: Any) -> bool:
    return isinstance(node, Record) and isinstance(node.state, Mapping) and "_modules" in node.state


def _named_tensors(path: Path, node: Any) -> tuple[dict[str, TensorRef], int]:
    """Return the state dict of a module, or the tensors of a state dict, and the number of items visited.

    Raises:
        DetkitError: the modules are nested recursively.
    """
    if not _is_module(node):
        table = node if isinstance(node, Mapping) else {}
        tensors = {name: ref for name, ref in table.items() if isinstance(name, str) and isinstance(ref, TensorRef)}
        return tensors, 1 + sum(map(len, _tables(node)))
    tensors, todo, entries = {}, [("", node)], 0
    while todo:
        prefix, module = todo.pop()
        state = module.state if isinstance(module, Record) and isinstance(module.state, Mapping) else {}
        parameters, buffers, children = (_table(state, key) for key in ("_parameters", "_buffers", "_modules"))
        entries += 1 + len(parameters) + len(buffers) + len(children)  # shared ones count each time
        if entries > MAX_ENTRIES or len(prefix) > MAX_NAME:
            raise DetkitError(f"{path} is rejected: its modules are nested recursively")
        non_persistent = _strings(state.get("_non_persistent_buffers_set"))
        for name, ref in (*_named(parameters), *_named(buffers)):
            if isinstance(ref, TensorRef) and name not in non_persistent:
                tensors[f"{prefix}{name}"] = ref
        todo += [(f"{prefix}{name}.", child) for name, child in reversed(_named(children))]
    return tensors, entries


def _plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Remove the names of wrappers from tensors' names, and drop the counters of thop and of weight averaging."""
    plain = {}
    for name, tensor in tensors.items():
        parts = [part for part in name.split(".") if part not in WRAPPERS]
        if parts and parts[-1] not in COUNTERS - {"num_batches_tracked"}:
            plain[".".join(parts)] = tensor
    return plain


def _table(state: Mapping[Any, Any], key: str) -> Mapping[Any, Any]:
    """Return the mapping under ``key``, or an empty one."""
    table = state.get(key)
    return table if isinstance(table, Mapping) else {}


def _named(table: Mapping[Any, Any]) -> list[tuple[str, Any]]:
    """Return the items with a name of reasonable length."""
    return [(name, value) for name, value in table.items() if isinstance(name, str) and len(name) <= 100]


def _strings(values: Any) -> set[str]:
    """Return the strings among the first 1,000 values of a set, which the reader returns as a set or a list."""
    values = values if isinstance(values, (set, list)) else ()
    return {value for value in islice(values, 1000) if isinstance(value, str)}


def _class_names(holder: Any) -> tuple[str, ...] | None:
    """Return the ``names`` of a YOLO module or checkpoint, {0: name, ...} or a list; None if missing or invalid."""
    table = holder.state if isinstance(holder, Record) else holder
    names = table.get("names") if isinstance(table, Mapping) else None
    values = [names.get(k) for k in range(len(names))] if isinstance(names, Mapping) else names
    if not isinstance(values, list) or not all(map(_is_label, values)):
        return None
    if len({value.strip() for value in values}) < len(values):
        return None
    return tuple(values)


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= 100 and is_name(value)


def _image_size(content: Any) -> int | None:
    """Return ``imgsz`` from the training arguments; None if missing or not supported."""
    for key in ("train_args", "args", "opt"):
        arguments = content.get(key) if isinstance(content, Mapping) else None
        arguments = arguments.state if isinstance(arguments, Record) else arguments
        size = arguments.get("imgsz") if isinstance(arguments, Mapping) else None
        if isinstance(size, int) and 64 <= size <= 4096 and size % 32 == 0:
            return size
    return None
