"""What an import needs of a foreign file: its tensors by name, and the class names and image size it may tell."""

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
COUNTERS = {"total_ops", "total_params", "n_averaged", "num_batches_tracked"}  # thop's and torch's: no weights
MAX_DEPTH = 50  # of modules in modules; real ones: below 15
MAX_ENTRIES = 50_000  # modules and tensors; RevCol-XL, the largest known here, has 4,000
MAX_MODELS = 16  # state dicts and modules of a file that are looked at
MAX_NESTING = 6  # of containers around a model


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint.

    Attributes:
        tensors: by their names in the file, without those of wrappers; floating-point ones in float32.
        class_names: as the file tells them, or None.
        image_size: pixels of the training, or None.
        place: where in the file the model was, such as ``ema.module``; empty where it is all of it.
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
        """Return how many tensors are no counters."""
        return sum(name.rpartition(".")[2] not in COUNTERS for name in self.tensors)


def read_source(path: Path, key: str = "src") -> Source:
    """Read a file of ``torch.save`` (its averaged weights where it has both) or of safetensors. Nothing in it is run.

    Args:
        key: of the configuration, that names the file.

    Raises:
        DetkitError: no such file, damaged, without a model in it, with NaN in it, or one that would run code.
    """
    try:
        open_regular(path).close()
        if path.suffix == ".safetensors":
            source = Source(_plain_names(_read_safetensors(path)))
        else:
            file = open_torch_file(path)
            model = _choose(_find_models(path, file.content))
            if model is None:
                raise DetkitError(f"{path} holds no model: a module or a state dict was expected")
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
            raise DetkitError(f"{path} is refused: its tensor {shorten(name)!r} holds NaN or infinity")
    return source


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if "detkit" in (file.metadata() or {}):
                raise DetkitError(f"{path} is a checkpoint of detkit already: start from it with weights={path}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except DetkitError:
        raise
    except (SafetensorError, ValueError) as error:
        raise DetkitError(f"{path} is not a safetensors file, or is truncated ({shorten(str(error))})") from None
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _choose(models: Iterable[_Model]) -> _Model | None:
    """Return the model with the most weights, averaged ones where there are as many; None where there is none."""
    by_size = sorted(models, key=lambda model: -model.weights)
    largest = [model for model in by_size if model.weights == by_size[0].weights]
    return next((m for m in largest if AVERAGE.search(m.place.lower())), largest[0] if largest else None)


def _find_models(path: Path, content: Any) -> Iterator[_Model]:
    """Yield the modules and state dicts within the mappings, lists and objects of a checkpoint, outermost first."""
    todo, seen, models, entries = deque([("", content)]), set(), 0, 0
    while todo and models < MAX_MODELS and entries < MAX_ENTRIES:
        place, node = todo.popleft()
        if id(node) in seen or place.count(".") >= MAX_NESTING:
            continue
        seen.add(id(node))
        tensors = _named_tensors(path, node)
        if tensors:
            models += 1
            yield _Model(place, node, tensors)
        if _is_module(node):
            continue  # what is in it is part of it
        for key, value in islice(_children(node), MAX_ENTRIES):
            entries += 1
            if not str(key).startswith("optim"):  # optimizers hold tensors, too
                todo.append((f"{place}.{key}" if place else str(key), value))


def _children(node: Any) -> Iterator[tuple[str | int, Any]]:
    """Yield the containers and objects within one, by key or index."""
    items: Iterable[tuple[Any, Any]]
    if isinstance(node, Record):
        tables = [table for table in (node.state, node.items) if isinstance(table, Mapping)]
        items = chain.from_iterable(table.items() for table in tables)
    else:
        items = (
            node.items() if isinstance(node, Mapping) else enumerate(node if isinstance(node, (list, tuple)) else ())
        )
    for key, value in items:
        is_tensor = isinstance(value, (TensorRef, StorageRef, Global))  # which are tuples
        if isinstance(value, (Record, Mapping, list, tuple)) and not is_tensor and isinstance(key, (str, int)):
            yield (key[:40] if isinstance(key, str) else key), value


def _is_module(node: Any) -> bool:
    return isinstance(node, Record) and isinstance(node.state, Mapping) and "_modules" in node.state


def _named_tensors(path: Path, node: Any) -> dict[str, TensorRef]:
    """Return what the ``state_dict()`` of a module would, or the tensors of a state dict.

    Raises:
        DetkitError: modules nested endlessly, as in no real model.
    """
    if isinstance(node, Mapping):
        return {name: ref for name, ref in node.items() if isinstance(name, str) and isinstance(ref, TensorRef)}
    tensors: dict[str, TensorRef] = {}
    todo, entries = [("", node)] if _is_module(node) else [], 0
    while todo:
        prefix, module = todo.pop()
        state = module.state if isinstance(module, Record) and isinstance(module.state, Mapping) else {}
        own, children = (*_items(state, "_parameters"), *_items(state, "_buffers")), _items(state, "_modules")
        entries += 1 + len(own) + len(children)  # one small module, referred to a million times, would be as many
        if entries > MAX_ENTRIES or prefix.count(".") > MAX_DEPTH:
            raise DetkitError(f"{path} is refused: its modules are nested without end")
        passing = _strings(state.get("_non_persistent_buffers_set"))
        for name, ref in own:
            if isinstance(ref, TensorRef) and name not in passing:
                tensors[f"{prefix}{name}"] = ref
        todo += [(f"{prefix}{name}.", child) for name, child in reversed(children)]
    return tensors


def _plain_names(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Take the names of wrappers out of tensors' names, and leave out the counters of thop and of averaging."""
    plain = {}
    for name, tensor in tensors.items():
        steps = [step for step in name.split(".") if step not in WRAPPERS]
        if steps and steps[-1] not in COUNTERS - {"num_batches_tracked"}:
            plain[".".join(steps)] = tensor
    return plain


def _items(state: Mapping[Any, Any], key: str) -> list[tuple[str, Any]]:
    """Return the items of the table ``key`` that have a name, of a reasonable length."""
    table = state.get(key)
    items = table.items() if isinstance(table, Mapping) else ()
    return [(name, value) for name, value in items if isinstance(name, str) and len(name) <= 100]


def _strings(values: Any) -> set[str]:
    """Return the strings among the first of a set, which the reader gives as a set or a list."""
    values = values if isinstance(values, (set, list)) else ()
    return {value for value in islice(values, 1000) if isinstance(value, str)}


def _class_names(holder: Any) -> tuple[str, ...] | None:
    """Return the ``names`` of a YOLO module or of a checkpoint, {0: name, ...} or a list, where fit to be shown."""
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
    """Return the ``imgsz`` of the training's arguments, where it is a size detkit can work with."""
    for key in ("train_args", "args", "opt"):
        arguments = content.get(key) if isinstance(content, Mapping) else None
        arguments = arguments.state if isinstance(arguments, Record) else arguments
        size = arguments.get("imgsz") if isinstance(arguments, Mapping) else None
        if isinstance(size, int) and 64 <= size <= 4096 and size % 32 == 0:
            return size
    return None
