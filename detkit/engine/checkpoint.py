"""Checkpoints: safetensors whose header holds what rebuilding the detector needs. Nothing is unpickled."""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_safetensors
from torch import Tensor

from detkit.errors import DetkitError
from detkit.models.detector import Detector, build_detector

SCHEMA_VERSION = 1
FOREIGN_SUFFIXES = (".pt", ".pth", ".ckpt", ".bin")  # what others' pickled checkpoints are called


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
        with safe_open(path, "pt") as file:
            return "detkit" in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a checkpoint.

    Raises:
        DetkitError: no such file, not a detkit checkpoint, truncated, or of a schema this version does not know.
    """
    path = Path(path)
    if not path.is_file():
        raise DetkitError(
            f"checkpoint {path} does not exist; a run's are RUN_DIR/best.safetensors and last.safetensors"
        )
    if path.suffix in FOREIGN_SUFFIXES:
        raise DetkitError(
            f"{path} is not a checkpoint of detkit: make one of it by "
            f"detkit import_weights src={path} dst={path.stem}.safetensors"
        )
    try:
        with safe_open(path, "pt") as file:
            header = json.loads((file.metadata() or {}).get("detkit", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
    except (SafetensorError, ValueError, OSError, RecursionError) as error:
        raise DetkitError(f"{path} is not a safetensors file, or is truncated ({error})") from None
    if not isinstance(header, dict):
        raise DetkitError(
            f"{path} was not written by detkit (its header has no 'detkit' entry): try detkit import_weights src={path}"
        )
    if header.get("schema_version") != SCHEMA_VERSION:
        version = header.get("schema_version")
        raise DetkitError(
            f"{path} has schema version {version}, this detkit reads {SCHEMA_VERSION}: use a matching detkit"
        )
    for key, kind in (("cfg", dict), ("class_names", list), ("metrics", dict)):
        if not isinstance(header.get(key), kind):
            raise DetkitError(f"{path} is damaged: its header has no '{key}'")
    return Checkpoint(weights, header["cfg"], tuple(header["class_names"]), header["metrics"], header.get("part"))


def build_from_checkpoint(path: str | Path) -> Detector:
    """Rebuild the detector of a checkpoint, in eval mode.

    Raises:
        DetkitError: as ``read_checkpoint``, or weights that do not fit the config in the header.
    """
    checkpoint = read_checkpoint(path)
    if checkpoint.part is not None:
        raise DetkitError(
            f"{path} holds a {checkpoint.part} only, not a detector: start a training from it with weights={path}"
        )
    for key in ("backbone", "neck", "head"):
        if not isinstance(checkpoint.cfg.get(key), dict):
            raise DetkitError(f"{path} is damaged: the config in its header has no '{key}'")
    try:
        detector = build_detector(without_pretrained(checkpoint.cfg), checkpoint.class_names)
    except DetkitError as error:
        plugins = checkpoint.cfg.get("plugins")  # never imported on a file's word
        hint = f"; it was trained with plugins={plugins}: import these first, or pass the same" if plugins else ""
        raise DetkitError(f"{path}: {error}{hint}") from None
    odd = misfits(detector.state_dict(), checkpoint.weights)
    if odd:
        raise DetkitError(f"{path} does not fit the model in its header: {odd}")
    detector.load_state_dict(checkpoint.weights)
    return detector.eval()


def without_pretrained(cfg: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config whose backbone is built without looking for published weights, as others are at hand."""
    without = {"pretrained": False, "weights": None}
    return {**cfg, "backbone": {key: without.get(key, value) for key, value in cfg["backbone"].items()}}


def misfits(own: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> str:
    """Say which tensors are missing, unknown or of another shape than one's own; an empty string if none is."""
    odd = [name for name in own if name not in theirs or theirs[name].shape != own[name].shape]
    odd += [name for name in theirs if name not in own]
    more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
    return f"'{odd[0]}'{more} missing, unknown or of another shape" if odd else ""


def write_atomically(path: Path, data: bytes | memoryview, keep: int = 1) -> None:
    """Write a file under a temporary name, then rename it: a reader sees the old one or the new one, whole.

    Args:
        keep: how many there are to be: ``path`` itself and those that it was before, see ``earlier``.

    Raises:
        OSError: it cannot be written; what was there is as it was.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # a full disk needs the room
        raise
    for age in range(keep - 1, 0, -1):
        with suppress(FileNotFoundError):
            os.replace(earlier(path, age - 1), earlier(path, age))
    os.replace(temporary, path)


def earlier(path: Path, age: int) -> Path:
    """Return where ``write_atomically`` keeps what ``path`` was ``age`` writes ago: ``state-1.pt`` for ``state.pt``."""
    return path.with_name(f"{path.stem}-{age}{path.suffix}") if age else path
