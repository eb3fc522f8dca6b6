"""From a foreign checkpoint to one of detkit's."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import detkit.layers  # noqa: F401  (registers the blocks)
from detkit.engine.checkpoint import Checkpoint
from detkit.errors import DetkitError
from detkit.models.detector import build_detector
from detkit.registry import BACKBONES
from detkit.weights.recognise import Recognised
from detkit.weights.source import Source

MAX_CLASSES = 10_000


def make_checkpoint(path: Path, source: Source, found: Recognised, cfg: Mapping[str, Any], named: str) -> Checkpoint:
    """Return the checkpoint of what was recognised in ``path``, built as ``cfg`` says.

    Args:
        cfg: resolved; ``backbone``, and ``model``, ``neck`` and ``head`` of a whole detector.
        named: the choices that led to ``cfg``, for the sentence.

    Raises:
        DetkitError: the tensors do not fit that model, name by name and shape by shape.
    """
    parts = ("backbone",) if found.part else ("model", "backbone", "neck", "head")
    kept = {key: dict(cfg[key]) for key in parts}
    if kept["backbone"].get("pretrained"):
        kept["backbone"]["pretrained"] = False  # these weights take the place of those
    if found.part:
        names: tuple[str, ...] = ()
    elif found.num_classes < 1:
        raise DetkitError(f"{path} is {found.what}, but its head's last layer is missing: it has no classes")
    elif found.num_classes > MAX_CLASSES:
        raise DetkitError(f"{path} is refused: its head's last layer claims {found.num_classes:,} classes")
    else:
        kept["head"] |= found.head or {}
        kept["image_size"] = source.image_size or 640
        told = source.class_names or ()
        names = told if len(told) == found.num_classes else tuple(f"class{k}" for k in range(found.num_classes))
    shapes = _shapes(kept, names)
    for name in shapes:  # older checkpoints have no such counters, and nothing depends on them
        if name.endswith("num_batches_tracked"):
            found.tensors.setdefault(name, torch.tensor(0))
    odd = _first_odd(shapes, found)
    if odd:
        hint = (
            f"; by its tensors it is {' '.join(found.choices)}"
            if found.choices and named != " ".join(found.choices)
            else ""
        )
        raise DetkitError(f"{path} is {found.what}, but does not fit {named}: {odd}{hint}")
    weights = {name: found.tensors[name] for name in shapes}
    return Checkpoint(weights, kept, names, {}, found.part)


def _shapes(cfg: Mapping[str, Any], names: tuple[str, ...]) -> dict[str, tuple[int, ...]]:
    """Return name and shape of every tensor of a detector, or of a backbone where ``cfg`` has no more."""
    with torch.device("meta"):
        if "neck" in cfg:
            state = build_detector(cfg, names).state_dict()
        else:
            backbone = BACKBONES.build(cfg["backbone"])
            state = {f"backbone.{name}": tensor for name, tensor in backbone.state_dict().items()}
    return {name: tuple(tensor.shape) for name, tensor in state.items()}


def _first_odd(shapes: Mapping[str, tuple[int, ...]], found: Recognised) -> str:
    """Say what the first tensor is that does not fit; an empty string where all do."""
    for name, shape in shapes.items():
        if name not in found.tensors:
            return f"its '{name}' is missing"
        theirs = tuple(found.tensors[name].shape)
        if theirs != shape:
            return f"its '{name}' has the shape {list(theirs)} instead of {list(shape)}"
    unknown = [name for name in found.tensors if name not in shapes]
    if not found.part:
        unknown += found.left_out
    return f"its {unknown[0][:100]!a} has no place there" if unknown else ""
