"""Telling by the names and shapes of its tensors what a checkpoint is, and naming them as detkit does."""

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.errors import DetkitError

YOLO_SCALES = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}  # by the channels of the stem
REVCOLS = {(64, 4): "tiny", (64, 8): "small", (72, 16): "base", (128, 8): "large", (224, 8): "xlarge"}  # and columns
STRIDES = (8, 16, 32)
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

# Layers of Ultralytics' and YOLOv5's flat lists, by what they are in detkit.
_BACKBONE = {0: "backbone.stem", **{1 + k: f"backbone.stages.{k // 2}.{k % 2}" for k in range(8)}, 9: "neck.context"}
_V8_NECK = {
    **{12: "neck.top_down.0", 15: "neck.top_down.1", 16: "neck.downs.0", 18: "neck.bottom_up.0"},
    **{19: "neck.downs.1", 21: "neck.bottom_up.1"},
}
_V5_NECK = {
    **{10: "neck.laterals.0", 13: "neck.top_down.0", 14: "neck.laterals.1", 17: "neck.top_down.1"},
    **{18: "neck.downs.0", 20: "neck.bottom_up.0", 21: "neck.downs.1", 23: "neck.bottom_up.1"},
}
_V8_HEAD = {"cv2": "head.box_branches", "cv3": "head.cls_branches"}


@dataclass(frozen=True)
class Recognised:
    """What a checkpoint is.

    Attributes:
        what: in words, such as ``YOLOv8``.
        choices: the arguments of the command line that build it; empty where the tensors do not tell.
        tensors: under detkit's names.
        left_out: names of the file's tensors that are not among them.
        part: "backbone" where the file holds no whole detector that detkit knows, else None.
        head: keys of the head's config that the file decides.
    """

    what: str
    choices: tuple[str, ...]
    tensors: dict[str, Tensor]
    left_out: tuple[str, ...] = ()
    part: str | None = None
    head: Mapping[str, Any] | None = None

    @property
    def num_classes(self) -> int:
        """Return C, by the head's last layer."""
        if "head.cls_branches.0.2.bias" in self.tensors:
            return _rows(self.tensors["head.cls_branches.0.2.bias"])
        return _rows(self.tensors.get("head.predictions.0.bias")) // 3 - 5


def recognise(path: Path, tensors: Mapping[str, Tensor]) -> Recognised:
    """Tell what the tensors of ``path`` are.

    Raises:
        DetkitError: nothing that detkit knows.
    """
    for family in (_detkit, _yolov8, _yolov5u, _yolov5, _revcol, _mobilenetv2_torchvision, _mobilenetv2_timm):
        found = family(tensors)
        if found is not None:
            return found
    some = ", ".join(ascii(name[:60]) for name in list(tensors)[:2])
    raise DetkitError(
        f"{path} is of no model that detkit can import (it holds {some}): YOLOv8, YOLOv5u, YOLOv5, RevCol, "
        "MobileNetV2 of torchvision or timm, and detkit's own"
    )


def _detkit(tensors: Mapping[str, Tensor]) -> Recognised | None:
    """A state dict of detkit's: its names do not tell the config."""
    parts = {name.partition(".")[0] for name in tensors}
    if parts == {"backbone", "neck", "head"}:
        return Recognised("a detector of detkit", (), dict(tensors))
    return None


def _yolov8(tensors: Mapping[str, Tensor]) -> Recognised | None:
    if not {"model.0.conv.weight", "model.22.dfl.conv.weight"} <= set(tensors):
        return None
    head = {f"22.{ours}": theirs for ours, theirs in _V8_HEAD.items()} | {"22.dfl.conv.weight": "head.bins"}
    return _yolo("YOLOv8", "yolov8", (), tensors, _BACKBONE | _V8_NECK | head)


def _yolov5u(tensors: Mapping[str, Tensor]) -> Recognised | None:
    if not {"model.0.conv.weight", "model.24.dfl.conv.weight"} <= set(tensors):
        return None
    head = {f"24.{ours}": theirs for ours, theirs in _V8_HEAD.items()} | {"24.dfl.conv.weight": "head.bins"}
    return _yolo("YOLOv5u", "yolov5", ("head=yolov8",), tensors, _BACKBONE | _V5_NECK | head)


def _yolov5(tensors: Mapping[str, Tensor]) -> Recognised | None:
    if not {"model.0.conv.weight", "model.24.m.0.weight", "model.24.anchors"} <= set(tensors):
        return None
    anchors = tensors["model.24.anchors"]  # (level, anchor, width and height), in cells
    if anchors.shape != (len(STRIDES), 3, 2) or not anchors.isfinite().all():
        return None
    pixels = {stride: (cells * stride).flatten().tolist() for stride, cells in zip(STRIDES, anchors, strict=True)}
    rest = {
        name: tensor for name, tensor in tensors.items() if name not in ("model.24.anchors", "model.24.anchor_grid")
    }
    rest["head.anchors"] = torch.tensor([pixels[stride] for stride in STRIDES]).view(anchors.shape)
    places = _BACKBONE | _V5_NECK | {"24.m": "head.predictions"}
    return _yolo("YOLOv5", "yolov5", (), rest, places, {"anchors": pixels})


def _yolo(
    what: str,
    model: str,
    more: tuple[str, ...],
    tensors: Mapping[str, Tensor],
    places: Mapping[int | str, str],
    head: Mapping[str, Any] | None = None,
) -> Recognised:
    """Rename ``model.K.rest`` by ``places``; the stem's width tells the scale."""
    names = {f"model.{place}": ours for place, ours in places.items()} | {"head.anchors": "head.anchors_la2"}
    taken, left_out = _renamed(tensors, names)
    if "head.bins" in taken:
        taken["head.bins"] = taken["head.bins"].flatten()
    scale = YOLO_SCALES.get(_rows(tensors["model.0.conv.weight"]))
    choices = (f"model={model}{scale}", *more) if scale else ()
    return Recognised(what, choices, taken, left_out, head=head)


def _revcol(tensors: Mapping[str, Tensor]) -> Recognised | None:
    """Bare, with a classifier, or in a detector of mmdet: there below ``backbone.``."""
    for prefix in ("", "backbone."):
        stem = tensors.get(f"{prefix}stem.0.weight")
        if stem is None or f"{prefix}subnet0.alpha0" not in tensors:
            continue
        columns = {m[1] for name in tensors if (m := re.match(rf"{re.escape(prefix)}(subnet\d+)\.", name))}
        taken, left_out = _renamed(tensors, {f"{prefix}{name}": f"backbone.{name}" for name in ("stem", *columns)})
        scale = REVCOLS.get((_rows(stem), len(columns)))
        _take_plain_images(taken, "backbone.stem.0.weight", "backbone.stem.0.bias")
        return Recognised("RevCol", (f"backbone=revcol_{scale}",) if scale else (), taken, left_out, "backbone")
    return None


def _mobilenetv2_torchvision(tensors: Mapping[str, Tensor]) -> Recognised | None:
    if not {"features.0.0.weight", "features.17.conv.3.weight"} <= set(tensors):
        return None
    return _mobilenetv2(tensors, {f"features.{k}": f"backbone.features.{k}" for k in range(18)})


def _mobilenetv2_timm(tensors: Mapping[str, Tensor]) -> Recognised | None:
    """timm numbers the blocks stage by stage; its first has no expansion, the others name their convolutions."""
    if not {"conv_stem.weight", "blocks.0.0.conv_dw.weight", "blocks.6.0.conv_pwl.weight"} <= set(tensors):
        return None
    found = {(int(m[1]), int(m[2])) for name in tensors if (m := re.match(r"blocks\.(\d{1,3})\.(\d{1,3})\.", name))}
    places = {"conv_stem": "backbone.features.0.0", "bn1": "backbone.features.0.1"}
    for k, (stage, block) in enumerate(sorted(found), 1):
        layers = ("conv_dw 0.0", "bn1 0.1", "conv_pw 1", "bn2 2")
        if stage > 0:
            layers = ("conv_pw 0.0", "bn1 0.1", "conv_dw 1.0", "bn2 1.1", "conv_pwl 2", "bn3 3")
        for theirs, ours in map(str.split, layers):
            places[f"blocks.{stage}.{block}.{theirs}"] = f"backbone.features.{k}.conv.{ours}"
    return _mobilenetv2(tensors, places)


def _mobilenetv2(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> Recognised:
    taken, left_out = _renamed(tensors, places)
    _take_plain_images(taken, "backbone.features.0.0.weight", "backbone.features.0.1.running_mean")
    for name in [name for name in taken if name.endswith(".running_var")]:
        weight, variance = taken.get(name.replace(".running_var", ".weight")), taken[name]
        if weight is not None and weight.shape == variance.shape:  # detectors divide by sqrt(var + 1e-3)
            taken[name.replace(".running_var", ".weight")] = weight * ((variance + 1e-3) / (variance + 1e-5)).sqrt()
    last = _rows(taken.get("backbone.features.17.conv.3.weight"))  # 320 channels at width 1
    width = () if last == 320 else (f"backbone.width={last / 320:g}",)
    return Recognised("MobileNetV2", ("backbone=mobilenetv2", *width), taken, left_out, "backbone")


def _take_plain_images(tensors: dict[str, Tensor], kernel: str, shift: str) -> None:
    """Let a first convolution take images in 0..1, as detkit gives them, that learnt from ImageNet's normalised ones.

    ``w * (x - mean) / std`` is ``(w / std) * x`` and a constant, which goes into ``shift``: its bias, or the running
    mean of the batch norm behind it. Exact but for the outermost pixels of a padded convolution, whose padding is
    black now and was the mean colour.
    """
    weight, constant = tensors.get(kernel), tensors.get(shift)
    if weight is None or constant is None or weight.ndim != 4 or weight.shape[1] != 3 or constant.ndim != 1:
        return  # not what it seems: fitting it to the model will say so
    mean, std = (weight.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    offset = (weight * mean / std).sum((1, 2, 3))
    if len(offset) != len(constant):
        return
    tensors[kernel] = weight / std
    tensors[shift] = constant - offset if shift.endswith("bias") else constant + offset


def _rows(tensor: Tensor | None) -> int:
    """Return the length of the first dimension; 0 where there is none."""
    return tensor.shape[0] if tensor is not None and tensor.ndim else 0


def _renamed(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename each tensor by the longest of its name's beginnings in ``places``; the others are left out."""
    taken, left_out = {}, []
    for name, tensor in tensors.items():
        begin = next((begin for begin in _beginnings(name) if begin in places), None)
        if begin is None:
            left_out.append(name)
        else:
            taken[places[begin] + name.removeprefix(begin)] = tensor
    return taken, tuple(left_out)


def _beginnings(name: str) -> Iterator[str]:
    """``a.b.c`` -> ``a.b.c``, ``a.b``, ``a``; at most five steps, which no key of ``places`` exceeds."""
    steps = name.split(".", 5)[:5]
    for count in range(len(steps), 0, -1):
        yield ".".join(steps[:count])
