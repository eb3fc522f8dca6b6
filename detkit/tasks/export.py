"""Export a checkpoint to another runtime: ``detkit export ckpt=FILE format=onnx``."""

import logging
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from detkit.config.common import CommonConfig, ImageSize, image_size_field
from detkit.config.fields import Location, field, location, number, whole
from detkit.config.schema import DataConfig
from detkit.data.annotations import Annotations
from detkit.data.read import read_split
from detkit.engine.checkpoint import build_from_checkpoint
from detkit.engine.evaluator import evaluate
from detkit.errors import DetkitError, UnreadableImage, error_context
from detkit.export.formats import FORMATS, Format, open_exported
from detkit.export.metadata import Metadata, describe
from detkit.export.model import ExportedModel
from detkit.export.settings import ExportSettings
from detkit.export.verify import CONFIDENT, Letterboxed, letterbox_both, verify
from detkit.inference.model import FixedShape, Model, TorchModel
from detkit.inference.sources import expand_path
from detkit.models.detector import Detector
from detkit.ops.image import is_image, read_image
from detkit.ops.precision import Precision
from detkit.tasks.runs.data import val_loader

logger = logging.getLogger(__name__)

MIN_OPSET, MAX_OPSET = 18, 25
CPU = torch.device("cpu")


class ExportConfig(CommonConfig):
    """Keys of ``configs/export.yaml``."""

    data: DataConfig = field(
        "data set to verify with; by default the one the checkpoint was trained with", default=None
    )
    ckpt: Location = location("checkpoint to export")
    format: Literal["onnx", "openvino", "pt2", "executorch", "ncnn", "tensorrt"] = field("format of the file")
    dst: Location | None = location("new file or folder to write; null: beside the checkpoint, with its name")
    nms: bool | None = field("non-maximum suppression inside the file; null: if the format can hold it")
    precision: Literal["float32", "float16", "int8"] = field("of the weights, and for int8 of the convolutions")
    dynamic: bool | None = field("let batch and sides of the input vary; null: if the format can")
    image_size: ImageSize | None = image_size_field()
    score: float = number("minimum score of a detection, fixed with nms", 0, 1)
    iou: float = number("IoU threshold of non-maximum suppression, fixed with nms", 0, 1)
    max_det: int = whole("maximum number of detections per image, fixed with nms", 1, 100_000)
    opset: int = whole("ONNX operator set, 18 or more", MIN_OPSET, MAX_OPSET)
    images: Location | None = location("folder of images to verify with and calibrate int8 on, instead of a data set")
    max_images: int = whole("images to verify with and calibrate int8 on", 1, 1000)


def run(cfg: ExportConfig) -> dict[str, Any]:
    """Export ``cfg.ckpt``, compare the file with PyTorch on images, and return what was measured.

    For float16 and int8, AP before and after is measured on the validation split, if there are labels.

    Raises:
        DetkitError: the checkpoint cannot be read or exported, there are no images, or a package is missing.
        SystemExit: with status 1 if the file differs from PyTorch; it is removed.
    """
    form = FORMATS[cfg.format]
    _check_possible(cfg, form)
    dst = _destination(cfg, form)
    detector = build_from_checkpoint(str(cfg.ckpt)).fuse().to(memory_format=torch.contiguous_format)
    settings = ExportSettings(detector, _describe(cfg, form, detector), opset=cfg.opset)
    annotations = _read_annotations(cfg, detector)
    images = _read_images(cfg, annotations, settings.metadata)
    if cfg.precision == "int8":
        settings = replace(settings, calibration=[square for square, _ in images])
    reference = TorchModel(detector, Precision(CPU, None))
    logger.info("exporting %s to %s ...", cfg.ckpt, dst)
    with tempfile.TemporaryDirectory(dir=dst.parent, prefix=".export-") as folder:  # no unverified file is ever seen
        path = Path(folder) / dst.name
        form.write(settings, path)
        model = open_exported(path, form)
        raw = open_exported(path, form, raw=True) if model.has_nms else model
        deviation = verify(model, raw, reference, images)
        logger.info("%d images, %d predictions: %s", len(images), deviation.compared, deviation)
        if not deviation.compared:
            logger.warning("nothing is compared, as no score of PyTorch exceeds %g on these images", CONFIDENT)
        if not (deviation.is_equal() if cfg.precision == "float32" else deviation.is_finite()):
            logger.error("%s is refused, as it differs from PyTorch: %s", dst, deviation)
            sys.exit(1)
        path.replace(dst)
    size = sum(file.stat().st_size for file in ([*dst.iterdir()] if dst.is_dir() else [dst]))
    measured: dict[str, Any] = {"boxes": deviation.boxes, "scores": deviation.scores, "bytes": size}
    if cfg.precision != "float32":
        measured |= _compare_ap(cfg, reference, raw, annotations)
    logger.info("%s: %.1f MB, %s", dst, size / 1e6, _usage(settings.metadata))
    return measured


def _check_possible(cfg: ExportConfig, form: Format) -> None:
    if cfg.precision not in form.precisions:
        raise DetkitError(
            f"format={cfg.format} is only exported in {' or '.join(form.precisions)}, not {cfg.precision}"
        )
    if cfg.nms and not form.has_nms:
        raise DetkitError(f"format={cfg.format} cannot hold non-maximum suppression: use nms=false")
    if cfg.dynamic and not form.is_dynamic:
        raise DetkitError(f"format={cfg.format} takes inputs of one size and one image at a time: use dynamic=false")


def _destination(cfg: ExportConfig, form: Format) -> Path:
    """Return the file or folder to write, which does not exist yet."""
    ckpt = Path(str(cfg.ckpt))
    dst = ckpt.with_name(ckpt.stem + form.suffix) if cfg.dst is None else Path(str(cfg.dst))
    if form.suffix[0] == "." and dst.suffix != form.suffix:
        raise DetkitError(f"dst={dst} must end in {form.suffix}")
    if dst.exists():
        raise DetkitError(f"dst={dst} already exists: name another, or remove it")
    if not dst.parent.is_dir():
        raise DetkitError(f"dst={dst}: the folder {dst.parent} does not exist")
    return dst


def _describe(cfg: ExportConfig, form: Format, detector: Detector) -> Metadata:
    size = cfg.image_size or detector.cfg["image_size"]
    dynamic = form.is_dynamic if cfg.dynamic is None else cfg.dynamic
    fixed: FixedShape = (None, None, None) if dynamic else (1, size, size)
    return describe(
        detector,
        image_size=size,
        fixed_shape=fixed,
        nms=form.has_nms if cfg.nms is None else cfg.nms,
        score=cfg.score,
        iou=cfg.iou,
        max_det=cfg.max_det,
        precision=cfg.precision,
    )


def _read_annotations(cfg: ExportConfig, detector: Detector) -> Annotations | None:
    """Return the validation split of the data set; None if images are given instead."""
    data = cfg.data.as_dict() if cfg.data else detector.cfg.get("data")
    if cfg.images is not None:
        return None
    if data is None:
        raise DetkitError(f"{cfg.ckpt} does not name its data set: add images=FOLDER or data=coco data.root=DIR")
    with error_context(None if cfg.data else cfg.ckpt, "" if cfg.data else "; or add images=FOLDER"):
        return read_split(data, "val")


def _read_images(cfg: ExportConfig, annotations: Annotations | None, metadata: Metadata) -> list[Letterboxed]:
    """Return images, evenly spaced over the validation split or the folder, letterboxed."""
    paths: Sequence[Path] = annotations.paths if annotations else _images_in(Path(str(cfg.images)))
    chosen = np.unique(np.linspace(0, len(paths) - 1, min(cfg.max_images, len(paths))).round().astype(int))
    images = []
    for k in chosen.tolist():
        try:
            images.append(letterbox_both(read_image(paths[k]), metadata))
        except UnreadableImage as error:
            logger.warning("skipped: %s", error)
    if not images:
        raise DetkitError("none of the images can be read: name others with images=FOLDER")
    return images


def _images_in(folder: Path) -> list[Path]:
    """Return the images of a folder, or the single file.

    Raises:
        DetkitError: there are none.
    """
    paths = [path for path in expand_path(folder) if is_image(path.name)]
    if not paths:
        raise DetkitError(f"images={folder} contains no images")
    return paths


def _compare_ap(
    cfg: ExportConfig, reference: TorchModel, exported: ExportedModel, annotations: Annotations | None
) -> dict[str, float]:
    """Measure and log AP before and after, on the validation split."""
    if annotations is None or not len(annotations.labels) or annotations.class_names != reference.class_names:
        logger.warning("AP is not measured: there is no data set with labels of the same classes (data=...)")
        return {}
    models: dict[str, Model] = {"ap_before": reference, "ap_after": exported}
    found = {}
    for key, model in models.items():
        loader = val_loader(annotations, 8, exported.image_size, CPU, rect=False, workers=cfg.workers)
        found[key] = float(evaluate(model, loader.epoch(0), annotations).metrics["AP"])
    logger.info(
        "AP %.4f in PyTorch float32, %.4f in %s (%+.4f) on %d images",
        *found.values(),
        cfg.precision,
        found["ap_after"] - found["ap_before"],
        len(annotations),
    )
    return found


def _usage(metadata: Metadata) -> str:
    """Return a message about the inputs and outputs of a file."""
    sides = [str(n or "any") for n in metadata.fixed_shape]
    outputs = "detections (M, 7)" if metadata.nms else "boxes (B, A, 4), scores (B, A, C)"
    multiple = f", sides multiples of {metadata.max_stride}" if None in metadata.fixed_shape else ""
    return f"images ({sides[0]}, 3, {sides[1]}, {sides[2]}){multiple} -> {outputs}"
