"""Checkpoints: safetensors whose header holds what rebuilding the detector needs. Nothing is unpickled."""

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from detkit.config.check import check_values, first_unsupported_value
from detkit.errors import DetkitError, error_context, is_name, shorten
from detkit.models.detector import Detector, build_detector, sketch_detector, without_pretrained
from detkit.ops.atomic_write import write_atomically
from detkit.ops.files import open_regular
from detkit.ops.memory import free_memory, gib

SCHEMA_VERSION = 1
MAX_HEADER = 2**25  # bytes; one of 4,000 tensors and 10,000 classes is below 2 MB
FOREIGN_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")  # what others' pickled checkpoints are called


class TensorInfo(NamedTuple):
    """What the header of a safetensors file tells of a tensor: its shape, and its type such as ``F32``."""

    shape: tuple[int, ...]
    dtype: str

    def is_floating_point(self) -> bool:
        """Whether it holds numbers that need not be whole, as ``Tensor.is_floating_point``."""
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Header:
    """What a checkpoint file tells before its weights are read; as in Checkpoint."""

    cfg: dict[str, Any]
    class_names: tuple[str, ...]
    metrics: dict[str, Any]
    part: str | None
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint file holds: float32 weights by name, the resolved config, class names, and its metrics."""

    weights: dict[str, Tensor]
    cfg: dict[str, Any]
    class_names: tuple[str, ...]
    metrics: dict[str, Any]
    part: str | None = None  # "backbone": it holds no more than that, its names still beginning with ``backbone.``


def save_checkpoint(detector: Detector, path: Path, metrics: Mapping[str, Any]) -> None:
    """Write a detector's weights, config, class names and metrics; the file appears whole or not at all."""
    write_checkpoint(path, Checkpoint(detector.state_dict(), detector.cfg, detector.class_names, dict(metrics)))


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; the file appears whole or not at all."""
    header = {"schema_version": SCHEMA_VERSION}
    header |= {key: getattr(checkpoint, key) for key in ("cfg", "class_names", "metrics", "part")}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
    write_atomically(path, to_safetensors(weights, {"detkit": json.dumps(header)}))


def is_checkpoint(path: Path) -> bool:
    """Whether a file is one of detkit's, by its header alone."""
    try:
        return "detkit" in _metadata(path)[0]
    except (DetkitError, OSError):
        return False


def read_header(path: str | Path) -> Header:
    """Read and check all of a checkpoint but its weights, of which it tells the shapes.

    Raises:
        DetkitError: no such file, not a detkit checkpoint, truncated, of a schema this version does not know, or with
            values that no training writes.
    """
    path = Path(path)
    if path.suffix in FOREIGN_SUFFIXES and os.path.isfile(path):
        raise DetkitError(
            f"{path} is not a checkpoint of detkit: make one of it by "
            f"detkit import_weights src={path} dst={path.stem}.safetensors"
        )
    try:
        metadata, tensors = _metadata(path)
        content = json.loads(metadata.get("detkit", "null"))
    except FileNotFoundError:
        raise DetkitError(
            f"checkpoint {path} does not exist; a run's are RUN_DIR/best.safetensors and last.safetensors"
        ) from None
    except OSError as error:
        hint = "; a run's checkpoints are best.safetensors and last.safetensors in it" if os.path.isdir(path) else ""
        raise DetkitError(f"{path} cannot be read: {error.strerror}{hint}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DetkitError):
            raise
        raise DetkitError(f"{path} is damaged: its header is no json ({shorten(str(error), 100)})") from None
    if not isinstance(content, dict):
        raise DetkitError(
            f"{path} was not written by detkit (its header has no 'detkit' entry): try detkit import_weights src={path}"
        )
    version = content.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        words = f"has schema version {shorten(version, 50)}, this detkit reads {SCHEMA_VERSION}"
        raise DetkitError(f"{path} {words}: use a matching detkit")
    for key, kind in (("cfg", dict), ("class_names", list), ("metrics", dict)):
        if not isinstance(content.get(key), kind):
            raise DetkitError(f"{path} is damaged: its header has no '{key}'")
    if odd := _first_odd(content):
        raise DetkitError(f"{path} is damaged: in its header {odd}")
    return Header(content["cfg"], tuple(content["class_names"]), content["metrics"], content.get("part"), tensors)


def read_weights(path: str | Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read the tensors ``names`` of a checkpoint.

    Raises:
        DetkitError: they do not fit into the memory, or hold numbers that are not finite.
    """
    try:
        size, free = os.stat(path).st_size, free_memory()
        if size > free:
            raise DetkitError(f"{path} holds {gib(size)} of weights, more than the {gib(free)} of free memory")
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, MemoryError) as error:
        raise DetkitError(f"{path} is truncated or damaged ({shorten(str(error))})") from None
    if name := first_not_finite(weights):
        raise DetkitError(f"{path}: its weights are not finite: '{shorten(name)}' holds NaN or infinity")
    return weights


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DetkitError: as ``read_header`` and ``read_weights``.
    """
    header = read_header(path)
    weights = read_weights(path, header.tensors)
    return Checkpoint(weights, header.cfg, header.class_names, header.metrics, header.part)


def build_from_checkpoint(path: str | Path) -> Detector:
    """Rebuild the detector of a checkpoint, in eval mode. Shapes are compared before anything takes memory.

    Raises:
        DetkitError: as ``read_checkpoint``, or weights that do not fit the config in the header.
    """
    header = read_header(path)
    if header.part is not None:
        raise DetkitError(
            f"{path} holds a {header.part} only, not a detector: start a training from it with weights={path}"
        )
    for key in ("backbone", "neck", "head", "image_size"):
        if key not in header.cfg:
            raise DetkitError(f"{path} is damaged: the config in its header has no '{key}'")
    if not header.class_names:
        raise DetkitError(f"{path} is damaged: its header names no classes")
    cfg, plugins = without_pretrained(header.cfg), header.cfg.get("plugins")  # never imported on a file's word
    words = f"; it was trained with plugins={shorten(plugins)}: import these first, or pass the same"
    hint = words if plugins else ""
    with error_context(path, hint):
        planned = sketch_detector(cfg, header.class_names)
    if planned is not None:
        _check_fit(planned, header, path)
    with error_context(path, hint):
        detector = build_detector(cfg, header.class_names)
    _check_fit(detector, header, path)
    detector.load_state_dict(read_weights(path, header.tensors))
    return detector.eval()


def _check_fit(detector: Detector, header: Header, path: str | Path) -> None:
    if odd := first_mismatch(detector.state_dict(), header.tensors):
        raise DetkitError(f"{path} does not fit the model in its header: {odd}")


def _metadata(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return the metadata of a safetensors file, and what its tensors are.

    Raises:
        OSError: it cannot be opened, or is no regular file.
        DetkitError: it is no safetensors file, truncated, or has a header larger than MAX_HEADER.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise DetkitError(f"{path} is not a safetensors file, or is truncated: its header would have {gib(length)}")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
            tensors = {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            return file.metadata() or {}, tensors
    except (SafetensorError, MemoryError) as error:  # MemoryError: a sparse file, larger than what can be mapped
        reason = shorten(str(error))
        raise DetkitError(f"{path} is not a safetensors file, or is truncated ({reason})") from None


def _first_odd(content: Mapping[str, Any]) -> str:
    """Say what in a header no training writes; an empty string where all is well."""
    names = content["class_names"]
    for name in names:
        if not is_name(name):
            return f"class_names holds {shorten(name)!r}, which is no name that can be printed"
    if len(set(names)) < len(names):
        return "class_names holds a name twice"
    if content.get("part") not in (None, "backbone"):
        return f"part={shorten(content['part'])} must be null or backbone"
    try:
        check_values(content["cfg"], partial=True)
    except DetkitError as error:
        return str(error)
    return first_unsupported_value(content["metrics"])


def first_mismatch(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor | TensorInfo]) -> str:
    """Say which tensors are missing, unknown or of another shape than one's own; an empty string if none is."""
    odd = [name for name in own if name not in theirs or not alike(own[name], theirs[name])]
    odd += [name for name in theirs if name not in own]
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return f"'{shorten(odd[0])}'{more} missing, unknown or of another shape" if odd else ""


def alike(mine: Tensor, theirs: Tensor | TensorInfo) -> bool:
    """Whether two tensors have the same shape, and both hold whole numbers only, or neither."""
    return mine.shape == theirs.shape and mine.is_floating_point() == theirs.is_floating_point()


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor that holds NaN or infinity; an empty string where none does."""
    floating = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    return next((name for name, tensor in floating if not tensor.float().isfinite().all()), "")
