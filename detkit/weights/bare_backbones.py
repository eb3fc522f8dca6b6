"""Recognizing backbones trained on ImageNet: RevCol, and MobileNetV2 of torchvision and timm."""

import re
from collections.abc import Mapping

from torch import Tensor

from detkit.weights.naming import Identified, renamed, rows

# (stem channels, columns) -> size
REVCOLS = {(64, 4): "tiny", (64, 8): "small", (72, 16): "base", (128, 8): "large", (224, 8): "xlarge"}
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def revcol(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize a RevCol: bare, with a classifier, or in a detector of mmdet (prefix ``backbone.``)."""
    for prefix in ("", "backbone."):
        if f"{prefix}stem.0.weight" not in tensors or f"{prefix}subnet0.alpha0" not in tensors:
            continue
        columns = revcol_columns(tensors, prefix)
        taken, unused = renamed(tensors, {f"{prefix}{name}": f"backbone.{name}" for name in ("stem", *columns)})
        choice = revcol_choice(tensors, prefix)
        _take_plain_images(taken, "backbone.stem.0.weight", "backbone.stem.0.bias")
        return Identified("RevCol", choice, taken, unused, "backbone")
    return None


def revcol_columns(tensors: Mapping[str, Tensor], prefix: str) -> set[str]:
    """Return the names of the columns with a prefix: subnet0, subnet1, ..."""
    return {m[1] for name in tensors if (m := re.match(rf"{re.escape(prefix)}(subnet\d+)\.", name))}


def revcol_choice(tensors: Mapping[str, Tensor], prefix: str) -> tuple[str, ...]:
    """Return ``backbone=revcol_SIZE`` for the RevCol with a prefix; nothing if its size is unknown."""
    size = rows(tensors.get(f"{prefix}stem.0.weight")), len(revcol_columns(tensors, prefix))
    return (f"backbone=revcol_{REVCOLS[size]}",) if size in REVCOLS else ()


def mobilenetv2_torchvision(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize torchvision's MobileNetV2: ``features.K.conv.J``."""
    if not {"features.0.0.weight", "features.17.conv.3.weight"} <= set(tensors):
        return None
    return _mobilenetv2(tensors, {f"features.{k}": f"backbone.features.{k}" for k in range(18)})


def mobilenetv2_timm(tensors: Mapping[str, Tensor]) -> Identified | None:
    """Recognize timm's MobileNetV2, with blocks numbered within stages and named convolutions."""
    if not {"conv_stem.weight", "blocks.0.0.conv_dw.weight", "blocks.6.0.conv_pwl.weight"} <= set(tensors):
        return None
    found = {(int(m[1]), int(m[2])) for name in tensors if (m := re.match(r"blocks\.(\d{1,3})\.(\d{1,3})\.", name))}
    places = {"conv_stem": "backbone.features.0.0", "bn1": "backbone.features.0.1"}
    for k, (stage, block) in enumerate(sorted(found), 1):
        layers: tuple[str, ...] = ("conv_dw 0.0", "bn1 0.1", "conv_pw 1", "bn2 2")  # without expansion
        if stage > 0:
            layers = ("conv_pw 0.0", "bn1 0.1", "conv_dw 1.0", "bn2 1.1", "conv_pwl 2", "bn3 3")
        for old, new in map(str.split, layers):
            places[f"blocks.{stage}.{block}.{old}"] = f"backbone.features.{k}.conv.{new}"
    return _mobilenetv2(tensors, places)


def _mobilenetv2(tensors: Mapping[str, Tensor], places: Mapping[str, str]) -> Identified:
    taken, unused = renamed(tensors, places)
    _take_plain_images(taken, "backbone.features.0.0.weight", "backbone.features.0.1.running_mean")
    for name in [name for name in taken if name.endswith(".running_var")]:
        weight, variance = taken.get(name.replace(".running_var", ".weight")), taken[name]
        if weight is not None and weight.shape == variance.shape:  # detkit's divides by sqrt(var + 1e-3)
            taken[name.replace(".running_var", ".weight")] = weight * ((variance + 1e-3) / (variance + 1e-5)).sqrt()
    return Identified("MobileNetV2", mobilenetv2_choices(taken), taken, unused, "backbone")


def mobilenetv2_choices(taken: Mapping[str, Tensor]) -> tuple[str, ...]:
    """Return the arguments for a MobileNetV2 from tensors with detkit's names; the last block gives the width."""
    last = rows(taken.get("backbone.features.17.conv.2.weight"))  # 320 channels at width 1
    return ("backbone=mobilenetv2", *(() if last == 320 else (f"backbone.width={last / 320:g}",)))


def _take_plain_images(tensors: dict[str, Tensor], kernel: str, shift: str) -> None:
    """Fold ImageNet normalization into a first convolution, since detkit's images are in 0..1, in place.

    ``w * (x - mean) / std`` is ``(w / std) * x`` plus a constant, which goes into ``shift``: the convolution's bias, or
    the running mean of the batch norm after it. Exact except at the border of a padded convolution, where the padding
    used to be the mean colour and is now black.
    """
    weight, constant = tensors.get(kernel), tensors.get(shift)
    if weight is None or constant is None or weight.ndim != 4 or weight.shape[1] != 3 or constant.ndim != 1:
        return  # not the expected layer: loading it into the model will raise an error
    mean, std = (weight.new_tensor(values).view(1, 3, 1, 1) for values in (IMAGENET_MEAN, IMAGENET_STD))
    offset = (weight * mean / std).sum((1, 2, 3))
    if len(offset) != len(constant):
        return
    tensors[kernel] = weight / std
    tensors[shift] = constant - offset if shift.endswith("bias") else constant + offset
