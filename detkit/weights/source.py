"""What an import needs of a foreign file: its tensors by name, and the class names and image size it may tell."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from detkit.errors import DetkitError
from detkit.weights.pickle_names import Record, TensorRef
from detkit.weights.torch_file import open_torch_file

MODEL_KEYS = ("ema", "model_ema", "ema_state_dict", "state_dict_ema", "model", "state_dict")  # the average is better
MAX_DEPTH = 50  # of modules in modules; real ones: below 15
MAX_ENTRIES = 50_000  # modules and tensors; RevCol-XL, the largest known here, has 4,000


@dataclass(frozen=True)
class Source:
    """A foreign checkpoint.

    Attributes:
        tensors: by their names in the file; floating-point ones in float32.
        class_names: as the file tells them, or None.
        image_size: pixels of the training, or None.
    """

    tensors: dict[str, Tensor]
    class_names: tuple[str, ...] | None
    image_size: int | None


def read_source(path: Path, key: str = "src") -> Source:
    """Read a file of ``torch.save`` (its averaged weights where it has both) or of safetensors. Nothing in it is run.

    Args:
        key: of the configuration, that names the file.

    Raises:
        DetkitError: no such file, damaged, without a model in it, or one that would run code.
    """
    if not path.is_file():
        what = "is a folder: name the file in it" if path.is_dir() else "does not exist"
        raise DetkitError(f"{key}={path} {what}")
    try:
        if path.suffix == ".safetensors":
            return Source(_read_safetensors(path), None, None)
        file = open_torch_file(path)
        model = _find_model(file.content)
        refs = _named_tensors(path, model)
        if not refs:
            raise DetkitError(f"{path} holds no model: a module or a state dict was expected")
        tensors = file.read_tensors({name.removeprefix("module."): ref for name, ref in refs.items()})
    except OSError as error:
        raise DetkitError(f"cannot read {path}: {error.strerror}") from None
    return Source(tensors, _class_names(model), _image_size(file.content))


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            if "detkit" in (file.metadata() or {}):
                raise DetkitError(f"{path} is a checkpoint of detkit already: start from it with weights={path}")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except DetkitError:
        raise
    except (SafetensorError, ValueError) as error:
        raise DetkitError(f"{path} is not a safetensors file, or is truncated ({error})") from None
    return {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in tensors.items()}


def _find_model(content: Any) -> Any:
    """Return the module or state dict of a checkpoint: below one of the usual keys, or the saved object itself."""
    if isinstance(content, Mapping):
        for key in MODEL_KEYS:
            if isinstance(content.get(key), (Record, Mapping)):
                return content[key]
    return content


def _named_tensors(path: Path, model: Any) -> dict[str, TensorRef]:
    """Return what the ``state_dict()`` of a module would, or the tensors of a state dict.

    Raises:
        DetkitError: modules nested endlessly, as in no real model.
    """
    if isinstance(model, Mapping):
        return {name: ref for name, ref in model.items() if isinstance(name, str) and isinstance(ref, TensorRef)}
    tensors: dict[str, TensorRef] = {}
    todo, entries = [("", model)], 0
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


def _items(state: Mapping[Any, Any], key: str) -> list[tuple[str, Any]]:
    """Return the items of the table ``key`` that have a name, of a reasonable length."""
    table = state.get(key)
    items = table.items() if isinstance(table, Mapping) else ()
    return [(name, value) for name, value in items if isinstance(name, str) and len(name) <= 100]


def _strings(values: Any) -> set[str]:
    """Return the strings among the first of a set, which the reader gives as a set or a list."""
    values = values if isinstance(values, (set, list)) else ()
    return {value for value in islice(values, 1000) if isinstance(value, str)}


def _class_names(model: Any) -> tuple[str, ...] | None:
    """Return the ``names`` of a YOLO module, {0: name, ...} or a list, where they are fit to be shown."""
    state = model.state if isinstance(model, Record) else None
    names = state.get("names") if isinstance(state, Mapping) else None
    values = [names.get(k) for k in range(len(names))] if isinstance(names, Mapping) else names
    if not isinstance(values, list) or not all(map(_is_label, values)) or len(set(values)) < len(values):
        return None
    return tuple(values)


def _is_label(value: Any) -> bool:
    return isinstance(value, str) and 0 < len(value) <= 100 and value.isprintable()


def _image_size(content: Any) -> int | None:
    """Return the ``imgsz`` of the training's arguments, where it is a size detkit can work with."""
    for key in ("train_args", "args", "opt"):
        arguments = content.get(key) if isinstance(content, Mapping) else None
        arguments = arguments.state if isinstance(arguments, Record) else arguments
        size = arguments.get("imgsz") if isinstance(arguments, Mapping) else None
        if isinstance(size, int) and 64 <= size <= 4096 and size % 32 == 0:
            return size
    return None
