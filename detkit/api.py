"""The Python API of detkit."""

from collections.abc import Sequence
from pathlib import Path

from detkit.config import check_values, compose_config, group_options, import_plugins, is_whole, resolve
from detkit.config.common import MAX_CLASSES
from detkit.engine.checkpoint import build_from_checkpoint, read_header
from detkit.engine.transfer import load_weights
from detkit.errors import DetkitError, shorten
from detkit.models.detector import Detector, build_detector
from detkit.registry import BLOCKS


def create_model(
    model: str = "yolov8n",
    *,
    backbone: str | None = None,
    neck: str | None = None,
    head: str | None = None,
    num_classes: int = 80,
    weights: str | Path | None = None,
    overrides: Sequence[str] = (),
) -> Detector:
    """Build a detector in training mode, by the same names as on the command line.

    Args:
        model: name of a preset in ``configs/model``.
        backbone: name of a backbone that replaces the preset's.
        neck: name of a neck that replaces the preset's.
        head: name of a head that replaces the preset's.
        num_classes: C; the classes are called class0, class1, ...
        weights: checkpoint to start from; tensors that do not match keep their initial values.
        overrides: Hydra overrides, for example ``"backbone.block=c2f"``.

    Raises:
        DetkitError: a name or key is unknown, or the parts do not fit together.
    """
    groups = {"model": model, "backbone": backbone, "neck": neck, "head": head}
    chosen = [f"{group}={name}" for group, name in groups.items() if name is not None]
    if not is_whole(num_classes, 1) or num_classes > MAX_CLASSES:
        raise DetkitError(f"num_classes={shorten(num_classes)} must be a whole number from 1 to {MAX_CLASSES}")
    cfg = resolve(compose_config("train", ["~data", *chosen, *overrides]))  # without a data set and its preset
    check_values(cfg, partial=True)
    import_plugins(cfg["plugins"])
    detector = build_detector(cfg, [f"class{k}" for k in range(num_classes)])
    if weights is not None:
        load_weights(detector, weights)
        detector.cfg["image_size"] = read_header(weights).cfg.get("image_size", detector.cfg["image_size"])
    return detector


def load(path: str | Path) -> Detector:
    """Load a detector from a checkpoint, in eval mode, with its ``class_names`` and ``cfg``.

    Raises:
        DetkitError: the file is missing, damaged, or not a detkit checkpoint.
    """
    return build_from_checkpoint(path)


def list_models(kind: str = "model") -> list[str]:
    """List the names available for a kind: model, backbone, neck, head, block or loss.

    These are the YAML files shipped with detkit and the registered blocks; other parts of plugins are not included.

    Raises:
        DetkitError: the kind is unknown.
    """
    if kind == "block":
        return BLOCKS.names()
    kinds = ("model", "backbone", "neck", "head", "loss")
    if kind not in kinds:
        raise DetkitError(f"list_models('{kind}'): the kinds are {', '.join((*kinds, 'block'))}")
    return group_options(kind)
