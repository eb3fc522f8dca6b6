"""detkit from Python."""

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
    """Build a detector by the names of the command line, in training mode.

    Args:
        model: a preset of ``configs/model``.
        backbone, neck, head: parts in place of the preset's.
        num_classes: C; the classes are called class0, class1, ...
        weights: a checkpoint to start from; tensors that do not fit keep their initial values.
        overrides: Hydra override strings, such as ``"backbone.block=c2f"``.

    Raises:
        DetkitError: an unknown name or key, or parts that do not fit.
    """
    groups = {"model": model, "backbone": backbone, "neck": neck, "head": head}
    chosen = [f"{group}={name}" for group, name in groups.items() if name is not None]
    if not is_whole(num_classes, 1) or num_classes > MAX_CLASSES:
        words = f"a detector needs one class or more, and {MAX_CLASSES} at most"
        raise DetkitError(f"num_classes={shorten(num_classes)}: {words}")
    cfg = resolve(compose_config("train", ["~data", *chosen, *overrides]))  # no data set, and so none's preset
    check_values(cfg, partial=True)
    import_plugins(cfg["plugins"])
    detector = build_detector(cfg, [f"class{k}" for k in range(num_classes)])
    if weights is not None:
        load_weights(detector, weights)
        detector.cfg["image_size"] = read_header(weights).cfg.get("image_size", detector.cfg["image_size"])
    return detector


def load(path: str | Path) -> Detector:
    """Rebuild the detector of a checkpoint, in eval mode, with its ``class_names`` and ``cfg``.

    Raises:
        DetkitError: the file is missing, damaged or not a detkit checkpoint.
    """
    return build_from_checkpoint(path)


def list_models(kind: str = "model") -> list[str]:
    """Return the names the command line knows for a kind: model, backbone, neck, head, block or loss.

    These are the YAML files detkit comes with (and the registered blocks); a plugin's part is not among them.

    Raises:
        DetkitError: another kind.
    """
    if kind == "block":
        return BLOCKS.names()
    kinds = ("model", "backbone", "neck", "head", "loss")
    if kind not in kinds:
        raise DetkitError(f"list_models('{kind}'): the kinds are {', '.join((*kinds, 'block'))}")
    return group_options(kind)
