"""Identifying a checkpoint by the names and shapes of its tensors, and renaming them to detkit's names."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.weights.bare_backbones import mobilenetv2_timm, mobilenetv2_torchvision, revcol
from detkit.weights.naming import Identified
from detkit.weights.yolo_lists import gold, yolov5, yolov5u, yolov8, yolov8_with_backbone

Family = Callable[[Mapping[str, Tensor]], Identified | None]

PREFIX_STEPS = 3  # maximum length of a prefix, as added by Lightning and wrappers of detectors


def identify(path: Path, tensors: Mapping[str, Tensor]) -> Identified:
    """Identify the model of the tensors of ``path``.

    Raises:
        DetkitError: the model is unknown.
    """
    families: tuple[Family, ...] = (_detkit, yolov8, yolov5u, yolov5, yolov8_with_backbone, gold)
    families += (revcol, mobilenetv2_torchvision, mobilenetv2_timm)
    for names in _readings(tensors):
        for family in families:
            found = family(names)
            if found is not None:
                return found
    examples = ", ".join(repr(shorten(name, 60)) for name in list(tensors)[:2])
    raise DetkitError(
        f"{path} contains no model that detkit can import (found {examples}): supported are YOLOv8, also with "
        "DynamicConv, RevCol, MobileNetV2 or Gold-YOLO's neck, YOLOv5u, YOLOv5, RevCol, MobileNetV2 of torchvision or "
        "timm, and detkit's own"
    )


def _detkit(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize a state dict of detkit, whose names do not determine the config."""
    if {name.partition(".")[0] for name in tensors} == {"backbone", "neck", "head"}:
        return Identified("a detector of detkit", (), dict(tensors))
    return None


def _readings(tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Yield the tensors with their names, then those with each prefix common to a third of the names, without it.

    A bare list of YOLO layers (``0.conv.weight``) gets the prefix that it has in the whole model.
    """
    yield tensors
    if all(name[:1].isdigit() for name in tensors):
        yield {f"model.{name}": tensor for name, tensor in tensors.items()}
    prefixes: Counter[str] = Counter()
    for name in tensors:
        steps = name.split(".", PREFIX_STEPS)[:-1]
        prefixes.update(".".join(steps[: k + 1]) + "." for k in range(len(steps)))
    for prefix, count in prefixes.most_common():
        # A prefix with an index is an entry of a list within a model.
        if 3 * count >= len(tensors) and not any(step.isdigit() for step in prefix.split(".")):
            yield {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
