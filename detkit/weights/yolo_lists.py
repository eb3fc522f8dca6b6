"""Recognizing the detectors that Ultralytics and YOLOv5 build from a flat list of layers: ``model.INDEX.…``.

Includes variants from tutorials that replace layers: DynamicConv, AKConv, another backbone as a single layer, and
Gold-YOLO's neck.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from detkit.weights.bare_backbones import mobilenetv2_choices, revcol_choice
from detkit.weights.naming import Identified, renamed, rows

SCALES = {16: "n", 32: "s", 48: "m", 64: "l", 80: "x"}  # by the channels of the stem
STRIDES = (8, 16, 32)

# Indices of layers -> names of detkit's modules.
_BACKBONE = {"0": "backbone.stem", **{f"{1 + k}": f"backbone.stages.{k // 2}.{k % 2}" for k in range(8)}}
_V8_NECK = {
    **{"9": "neck.context", "12": "neck.top_down.0", "15": "neck.top_down.1"},
    **{"16": "neck.downs.0", "18": "neck.bottom_up.0", "19": "neck.downs.1", "21": "neck.bottom_up.1"},
}
_V5_NECK = {
    **{"9": "neck.context", "10": "neck.laterals.0", "13": "neck.top_down.0", "14": "neck.laterals.1"},
    **{"17": "neck.top_down.1", "18": "neck.downs.0", "20": "neck.bottom_up.0"},
    **{"21": "neck.downs.1", "23": "neck.bottom_up.1"},
}
_NECK_AFTER_ONE_LAYER = {
    **{"1": "neck.context", "4": "neck.top_down.0", "7": "neck.top_down.1"},
    **{"8": "neck.downs.0", "10": "neck.bottom_up.0", "11": "neck.downs.1", "13": "neck.bottom_up.1"},
}
_GOLD_REPS = {"16": "neck.rep_p4", "20": "neck.rep_p3", "27": "neck.rep_n4", "30": "neck.rep_n5"}
_GOLD_NECK = {
    **{"9": "neck.context", "11": "neck.low_ifm", "13": "neck.narrow_c5", "17": "neck.narrow_p4"},
    **{"14": "neck.laf_p4", "15": "neck.inject_p4", "18": "neck.laf_p3", "19": "neck.inject_p3"},
    **{"22": "neck.high_ifm", "23": "neck.high_split", "26": "neck.inject_n4", "29": "neck.inject_n5"},
    **{f"{layer}.conv1": f"{rep}.0" for layer, rep in _GOLD_REPS.items()},
    **{f"{layer}.block.{k}": f"{rep}.{k + 1}" for layer, rep in _GOLD_REPS.items() for k in range(9)},
}


def yolov8(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize YOLOv8, possibly with other convolutions, such as DynamicConv."""
    if not {"model.0.conv.weight", "model.22.dfl.conv.weight"} <= set(tensors):
        return None
    taken, unused = _renamed(tensors, _BACKBONE | _V8_NECK | _v8_head(22))
    choices = _csp_choices("yolov8", "c2f", tensors, taken)
    return Identified("YOLOv8", choices, taken, unused, akconv=_has_akconv(taken))


def yolov5u(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize YOLOv5 with YOLOv8's head, from Ultralytics."""
    if not {"model.0.conv.weight", "model.24.dfl.conv.weight"} <= set(tensors):
        return None
    taken, unused = _renamed(tensors, _BACKBONE | _V5_NECK | _v8_head(24))
    choices = _csp_choices("yolov5", "c3", tensors, taken)
    choices = (*choices, "head=yolov8") if choices else ()
    return Identified("YOLOv5u", choices, taken, unused, akconv=_has_akconv(taken))


def yolov5(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize YOLOv5 (release 7), possibly with AKConv in its bottlenecks."""
    if not {"model.0.conv.weight", "model.24.m.0.weight", "model.24.anchors"} <= set(tensors):
        return None
    anchors = tensors["model.24.anchors"]  # (level, anchor, width and height), in cells
    if anchors.shape != (len(STRIDES), 3, 2) or not anchors.isfinite().all():
        return None
    pixels = {stride: (cells * stride).flatten().tolist() for stride, cells in zip(STRIDES, anchors, strict=True)}
    rest = {name: t for name, t in tensors.items() if name not in ("model.24.anchors", "model.24.anchor_grid")}
    taken, unused = _renamed(rest, _BACKBONE | _V5_NECK | {"24.m": "head.predictions"})
    taken["head.anchors_la2"] = torch.tensor([pixels[stride] for stride in STRIDES]).view(anchors.shape)
    choices = _csp_choices("yolov5", "c3", tensors, taken)
    return Identified("YOLOv5", choices, taken, unused, head={"anchors": pixels}, akconv=_has_akconv(taken))


def yolov8_with_backbone(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize YOLOv8 with a RevCol or MobileNetV2 as its first layer, trained on plain images in 0..1."""
    if "model.14.dfl.conv.weight" not in tensors:
        return None
    scale = SCALES.get(rows(tensors.get("model.7.cv2.conv.weight")) // 4)  # P3 is four times as wide as a stem
    if "model.0.subnet0.alpha0" in tensors:
        what, backbone = "YOLOv8 with RevCol", {"0": "backbone"}
    elif "model.0.model.17.conv2.conv.weight" in tensors:
        what, backbone = "YOLOv8 with MobileNetV2", _mobilenetv2_places(tensors)
    else:
        return None
    taken, unused = _renamed(tensors, backbone | _NECK_AFTER_ONE_LAYER | _v8_head(14))
    choices = revcol_choice(tensors, "model.0.") if "0" in backbone else mobilenetv2_choices(taken)
    return Identified(what, (f"model=yolov8{scale}", *choices) if scale and choices else (), taken, unused)


def _mobilenetv2_places(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Map the tutorials' named layers of a block to torchvision's indices; the first block has no expansion."""
    places = {"0.model.0.conv": "backbone.features.0.0", "0.model.0.bn": "backbone.features.0.1"}
    for k in range(1, 18):
        old, new = f"0.model.{k}", f"backbone.features.{k}.conv"
        layers = ["conv1"] if f"model.{old}.conv1.conv.weight" in tensors else []
        for index, layer in enumerate((*layers, "depthwise_conv")):
            places |= {f"{old}.{layer}.conv": f"{new}.{index}.0", f"{old}.{layer}.bn": f"{new}.{index}.1"}
        last = len(layers) + 1
        places |= {f"{old}.conv2.conv": f"{new}.{last}", f"{old}.conv2.bn": f"{new}.{last + 1}"}
    return places


def gold(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize YOLOv8 with Gold-YOLO's neck."""
    if not {"model.0.conv.weight", "model.11.conv1.conv.weight", "model.31.dfl.conv.weight"} <= set(tensors):
        return None
    taken, unused = _renamed(tensors, _BACKBONE | _GOLD_NECK | _v8_head(31))
    taken = {n.replace(".c.", ".conv.") if n.startswith("neck.high_ifm") else n: t for n, t in taken.items()}
    scale = SCALES.get(rows(tensors["model.0.conv.weight"]))
    choices = ("model=yolov8n_gold",) if scale == "n" else (f"model=yolov8{scale}", "neck=repgd") if scale else ()
    return Identified("YOLOv8 with Gold-YOLO's neck", choices, taken, unused)


def _v8_head(layer: int) -> dict[str, str]:
    return {
        f"{layer}.cv2": "head.box_branches",
        f"{layer}.cv3": "head.cls_branches",
        f"{layer}.dfl.conv.weight": "head.bins",
    }


def _renamed(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rename ``model.LAYER.rest`` by the layers in ``places``; return the tensors, and the names of the others."""
    taken, unused = renamed(tensors, {f"model.{layer}": name for layer, name in places.items()})
    if "head.bins" in taken:
        taken["head.bins"] = taken["head.bins"].flatten()
    return taken, unused


def _has_akconv(taken: Mapping[str, Tensor]) -> bool:
    return any(name.endswith(".p_conv.weight") for name in taken)


def _csp_choices(model: str, csp: str, tensors: Mapping[str, Tensor], taken: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the arguments for a detector of CSPDarknet and PAFPN: its scale, and the blocks that are not default.

    Args:
        model: "yolov5" or "yolov8".
        csp: the default CSP block.
        tensors: tensors by their names in the file.
        taken: tensors by detkit's names.
    """
    scale = SCALES.get(rows(tensors["model.0.conv.weight"]))
    if not scale:
        return ()
    downs = [_conv_block(taken, f"backbone.stages.{k}.0") for k in range(4)]
    neck_downs = [_conv_block(taken, f"neck.downs.{k}") for k in range(2)]
    blocks = [_csp_block(taken, f"backbone.stages.{k}.1", csp) for k in range(4)]
    neck_blocks = [_csp_block(taken, f"neck.{way}.{k}", csp) for way in ("top_down", "bottom_up") for k in range(2)]
    other = {block for block in (*downs, *neck_downs, *blocks, *neck_blocks) if block not in ("conv", csp)}
    if other == {"c3_akconv"} and blocks[:3] == ["c3"] * 3 and set(neck_blocks) == {"c3"}:
        return (f"model={model}{scale}_akconv",)
    all_replaced = len(other) == 1 and downs[0] == "conv" and {*downs[1:], *neck_downs} == other
    if all_replaced and model == "yolov8" and scale in "ns":
        name = {"dynamic_conv": "dynamicconv", "dynamic_bn_act": "dynamicbnact"}.get(*other)
        if name:
            return (f"model={model}{scale}_{name}",)
    keys = ("backbone.downsample", "neck.downsample", "backbone.block", "neck.block")
    lists = zip(keys, (downs, neck_downs, blocks, neck_blocks), strict=True)
    chosen = (f"{key}=[{','.join(names)}]" for key, names in lists if other & set(names))
    return (f"model={model}{scale}", *chosen)


def _conv_block(tensors: Mapping[str, Tensor], place: str) -> str:
    """Return the block specification of the convolution at ``place``."""
    if f"{place}.p_conv.weight" in tensors:
        return _spec("akconv", n=(rows(tensors[f"{place}.p_conv.weight"]) // 2, 3))
    for name, routing in (("dynamic_conv", "conv.0.routing"), ("dynamic_bn_act", "conv.conv.0.routing")):
        if f"{place}.{routing}.weight" in tensors:
            return _spec(name, experts=(rows(tensors[f"{place}.{routing}.weight"]), 4))
    return "conv"


def _csp_block(tensors: Mapping[str, Tensor], place: str, csp: str) -> str:
    """Return the specification of the CSP block at ``place``, by the second convolution of its first bottleneck."""
    conv = _conv_block(tensors, f"{place}.m.0.cv2")
    if conv == "conv" or csp != "c3":
        return csp
    if f"{place}.m.0.cv2.p_conv.weight" in tensors:
        return _spec("c3_akconv", points=(rows(tensors[f"{place}.m.0.cv2.p_conv.weight"]) // 2, 3))
    return f"{{name: c3, conv: {conv}}}"


def _spec(name: str, **arguments: tuple[Any, Any]) -> str:
    """Format a block with those of its arguments, each (value, default), that differ from their defaults."""
    changed = "".join(f", {key}: {value}" for key, (value, default) in arguments.items() if value != default)
    return f"{{name: {name}{changed}}}" if changed else name
