"""Checkpoints: safetensors files with the config and class names in the header. Nothing is unpickled."""

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
from detkit.models.detector import Detector, build_detector, build_meta_detector, without_pretrained
from detkit.ops.atomic_write import write_atomically
from detkit.ops.files import open_regular
from detkit.ops.memory import free_memory, gib

SCHEMA_VERSION = 1
MAX_HEADER = 2**25  # bytes; a header of 4,000 tensors and 10,000 classes takes less than 2 MB
FOREIGN_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")  # of pickled checkpoints of other frameworks


class TensorInfo(NamedTuple):
    """Shape and dtype (``F32``, say) of a tensor, from the header of a safetensors file."""

    shape: tuple[int, ...]
    dtype: str

    def is_floating_point(self) -> bool:
        """Whether the dtype is a floating-point type, as ``Tensor.is_floating_point``."""
        return self.dtype.startswith(("F", "BF"))


@dataclass(frozen=True)
class Header:
    """The header of a checkpoint file; fields as in Checkpoint."""

    cfg: dict[str, Any]
    class_names: tuple[str, ...]
    metrics: dict[str, Any]
    part: str | None
    tensors: dict[str, TensorInfo]


@dataclass(frozen=True)
class Checkpoint:
    """The contents of a checkpoint file: float32 weights by name, resolved config, class names and metrics."""

    weights: dict[str, Tensor]
    cfg: dict[str, Any]
    class_names: tuple[str, ...]
    metrics: dict[str, Any]
    part: str | None = None  # "backbone": the file holds only the backbone, under names that begin with ``backbone.``


def save_checkpoint(detector: Detector, path: Path, metrics: Mapping[str, Any]) -> None:
    """Write a detector's weights, config, class names and metrics atomically."""
    write_checkpoint(path, Checkpoint(detector.state_dict(), detector.cfg, detector.class_names, dict(metrics)))


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint atomically."""
    header = {"schema_version": SCHEMA_VERSION}
    header |= {key: getattr(checkpoint, key) for key in ("cfg", "class_names", "metrics", "part")}
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in checkpoint.weights.items()}
    write_atomically(path, to_safetensors(weights, {"detkit": json.dumps(header)}))


def is_checkpoint(path: Path) -> bool:
    """Whether a file is a detkit checkpoint, judging by its header."""
    try:
        return "detkit" in _metadata(path)[0]
    except (DetkitError, OSError):
        return False


def read_header(path: str | Path) -> Header:
    """Read and check the header of a checkpoint: everything but the weights.

    Raises:
        DetkitError: the file does not exist, is not a detkit checkpoint, is truncated, has an unknown schema version or
            holds invalid values.
    """
    path = Path(path)
    content, tensors = _read_json_header(path)
    version = content.get("schema_version")
    if type(version) is not int or version != SCHEMA_VERSION:
        raise DetkitError(
            f"{path} has schema version {shorten(version, 50)}, but this version of detkit reads {SCHEMA_VERSION}: "
            "use a matching version"
        )
    for key, kind in (("cfg", dict), ("class_names", list), ("metrics", dict)):
        if not isinstance(content.get(key), kind):
            raise DetkitError(f"{path} is damaged: its header has no '{key}'")
    if message := _first_invalid_value(content):
        raise DetkitError(f"{path} is damaged: in its header {message}")
    return Header(content["cfg"], tuple(content["class_names"]), content["metrics"], content.get("part"), tensors)


def _read_json_header(path: Path) -> tuple[dict[str, Any], dict[str, TensorInfo]]:
    """Return the header's ``detkit`` entry, and shape and dtype of each tensor.

    Raises:
        DetkitError: the file does not exist, or is not a detkit checkpoint.
    """
    if path.suffix in FOREIGN_SUFFIXES and os.path.isfile(path):  # noqa: PTH113  (Path.is_file may raise)
        raise DetkitError(
            f"{path} is not a detkit checkpoint: convert it with "
            f"detkit import_weights src={path} dst={path.stem}.safetensors"
        )
    try:
        metadata, tensors = _metadata(path)
        content = json.loads(metadata.get("detkit", "null"))
    except FileNotFoundError:
        raise DetkitError(
            f"checkpoint {path} does not exist; a run's checkpoints are RUN_DIR/best.safetensors and last.safetensors"
        ) from None
    except OSError as error:
        is_dir = os.path.isdir(path)  # noqa: PTH112  (Path.is_dir may raise)
        hint = "; a run's checkpoints are best.safetensors and last.safetensors in it" if is_dir else ""
        raise DetkitError(f"{path} cannot be read: {error.strerror}{hint}") from None
    except (ValueError, RecursionError) as error:
        if isinstance(error, DetkitError):
            raise
        raise DetkitError(f"{path} is damaged: its header is not valid JSON ({shorten(str(error), 100)})") from None
    if not isinstance(content, dict):
        raise DetkitError(
            f"{path} was not written by detkit (its header has no 'detkit' entry): try detkit import_weights src={path}"
        )
    return content, tensors


def read_weights(path: str | Path, names: Iterable[str]) -> dict[str, Tensor]:
    """Read the tensors ``names`` of a checkpoint.

    Raises:
        DetkitError: the file is truncated or too large for the free memory, or a tensor holds NaN or infinity.
    """
    try:
        size, free = Path(path).stat().st_size, free_memory()
        if size > free:
            raise DetkitError(f"{path} holds {gib(size)} of weights, more than the {gib(free)} of free memory")
        with safe_open(path, "pt") as file:
            weights = {name: file.get_tensor(name) for name in names}
    except (SafetensorError, OSError, MemoryError) as error:
        raise DetkitError(f"{path} is truncated or damaged ({shorten(str(error))})") from None
    if name := first_not_finite(weights):
        raise DetkitError(f"{path}: the weights are not finite: '{shorten(name)}' holds NaN or infinity")
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
    """Rebuild the detector of a checkpoint, in eval mode. Shapes are compared before memory is allocated.

    Raises:
        DetkitError: as ``read_checkpoint``, or the weights do not match the config in the header.
    """
    header = read_header(path)
    if header.part is not None:
        raise DetkitError(
            f"{path} holds only a {header.part}, not a detector: start training from it with weights={path}"
        )
    for key in ("backbone", "neck", "head", "image_size"):
        if key not in header.cfg:
            raise DetkitError(f"{path} is damaged: the config in its header has no '{key}'")
    if not header.class_names:
        raise DetkitError(f"{path} is damaged: its header names no classes")
    cfg, plugins = without_pretrained(header.cfg), header.cfg.get("plugins")  # a file never causes imports
    hint = f"; it was trained with plugins={shorten(plugins)}: import these first, or pass the same" if plugins else ""
    with error_context(path, hint):
        planned = build_meta_detector(cfg, header.class_names)
    if planned is not None:
        _check_fit(planned, header, path)
    with error_context(path, hint):
        detector = build_detector(cfg, header.class_names)
    _check_fit(detector, header, path)
    detector.load_state_dict(read_weights(path, header.tensors))
    return detector.eval()


def _check_fit(detector: Detector, header: Header, path: str | Path) -> None:
    if mismatch := first_mismatch(detector.state_dict(), header.tensors):
        raise DetkitError(f"{path} does not match the model in its header: {mismatch}")


def _metadata(path: Path) -> tuple[dict[str, str], dict[str, TensorInfo]]:
    """Return the metadata of a safetensors file, and shape and dtype of each tensor.

    Raises:
        OSError: the file cannot be opened, or is not a regular file.
        DetkitError: it is not a safetensors file, is truncated, or has a header larger than MAX_HEADER.
    """
    with open_regular(path) as file:
        length = int.from_bytes(file.read(8), "little")
    if length > MAX_HEADER:
        raise DetkitError(f"{path} is not a safetensors file, or is truncated: its header would take {gib(length)}")
    try:
        with safe_open(path, "pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
            tensors = {name: TensorInfo(tuple(s.get_shape()), s.get_dtype()) for name, s in slices.items()}
            return file.metadata() or {}, tensors
    except (SafetensorError, MemoryError) as error:  # MemoryError: a sparse file too large to be mapped
        reason = shorten(str(error))
        raise DetkitError(f"{path} is not a safetensors file, or is truncated ({reason})") from None


def _first_invalid_value(content: Mapping[str, Any]) -> str:
    """Return a message about the first invalid value in a header; an empty string if there is none."""
    names = content["class_names"]
    for name in names:
        if not is_name(name):
            return f"class_names holds {shorten(name)!r}, which is not a printable name"
    if len(set(names)) < len(names):
        return "class_names holds a duplicate"
    if content.get("part") not in (None, "backbone"):
        return f"part={shorten(content['part'])} must be null or backbone"
    try:
        check_values(content["cfg"], partial=True)
    except DetkitError as error:
        return str(error)
    return first_unsupported_value(content["metrics"])


def first_mismatch(expected: Mapping[str, Tensor], saved: Mapping[str, Tensor | TensorInfo]) -> str:
    """Return a message about tensors that are missing, unexpected or of another shape; an empty string if all match."""
    mismatches = [name for name in expected if name not in saved or not is_compatible(expected[name], saved[name])]
    mismatches += [name for name in saved if name not in expected]
    more = f" and {len(mismatches) - 1} more" if len(mismatches) > 1 else ""
    return f"'{shorten(mismatches[0])}'{more} missing, unexpected or of another shape" if mismatches else ""


def is_compatible(expected: Tensor, saved: Tensor | TensorInfo) -> bool:
    """Whether two tensors have the same shape, and both or neither are of a floating-point type."""
    return expected.shape == saved.shape and expected.is_floating_point() == saved.is_floating_point()


def first_not_finite(tensors: Mapping[str, Tensor]) -> str:
    """Return the name of the first tensor that holds NaN or infinity; an empty string if none does."""
    floating = ((name, tensor) for name, tensor in tensors.items() if tensor.is_floating_point())
    return next((name for name, tensor in floating if not tensor.float().isfinite().all()), "")
