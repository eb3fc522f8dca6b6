"""Telling by the names and shapes of its tensors what a checkpoint is, and naming them as detkit does."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.weights.bare_backbones import mobilenetv2_timm, mobilenetv2_torchvision, revcol
from detkit.weights.naming import Identified
from detkit.weights.yolo_lists import gold, yolov5, yolov5u, yolov8, yolov8_with_backbone

Family = Callable[[Mapping[str, Tensor]], Identified | None]

PREFIX_STEPS = 3  # of names in front of a model's, as Lightning and detectors' wrappers put them there


def identify(path: Path, tensors: Mapping[str, Tensor]) -> Identified:
    """Tell what the tensors of ``path`` are.

    Raises:
        DetkitError: nothing that detkit knows.
    """
    families: tuple[Family, ...] = (_detkit, yolov8, yolov5u, yolov5, yolov8_with_backbone, gold)
    families += (revcol, mobilenetv2_torchvision, mobilenetv2_timm)
    for names in _readings(tensors):
        for family in families:
            found = family(names)
            if found is not None:
                return found
    some = ", ".join(repr(shorten(name, 60)) for name in list(tensors)[:2])
    raise DetkitError(
        f"{path} is of no model that detkit can import (it holds {some}): YOLOv8, with DynamicConv, RevCol, "
        "MobileNetV2 or Gold-YOLO's neck, YOLOv5u, YOLOv5, RevCol, MobileNetV2 of torchvision or timm, and detkit's own"
    )


def _detkit(tensors: Mapping[str, Tensor]) -> Identified | None:
    """A state dict of detkit's: its names do not tell the config."""
    parts = {name.partition(".")[0] for name in tensors}
    if parts == {"backbone", "neck", "head"}:
        return Identified("a detector of detkit", (), dict(tensors))
    return None


def _readings(tensors: Mapping[str, Tensor]) -> Iterator[Mapping[str, Tensor]]:
    """Yield the tensors as they are named, then those below each prefix that a third of the names share.

    A YOLO's list of layers alone (``0.conv.weight``) gets the name in front that it has in the whole model.
    """
    yield tensors
    if all(name[:1].isdigit() for name in tensors):
        yield {f"model.{name}": tensor for name, tensor in tensors.items()}
    prefixes: Counter[str] = Counter()
    for name in tensors:
        steps = name.split(".", PREFIX_STEPS)[:-1]
        prefixes.update(".".join(steps[: k + 1]) + "." for k in range(len(steps)))
    for prefix, count in prefixes.most_common():
        # What stands at a place of a list is a part of a model, not one with a prefix.
        if 3 * count >= len(tensors) and not any(step.isdigit() for step in prefix.split(".")):
            yield {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
