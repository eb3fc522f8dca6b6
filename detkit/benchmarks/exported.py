"""The exported forms of a model for ``task=infer``."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from detkit.errors import DetkitError
from detkit.export.formats import FORMATS
from detkit.export.metadata import describe
from detkit.export.settings import ExportSettings
from detkit.models.detector import Detector

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportedForm:
    """How a model is exported: the name of its row, its format, its precision, and the value of ``amp`` to run it."""

    name: str
    form: str
    precision: str = "float32"
    amp: str = "auto"


FORMS = (
    ExportedForm("onnxruntime", "onnx"),
    ExportedForm("openvino", "openvino"),
    ExportedForm("openvino_int8", "openvino", "int8"),
)


def export_forms(
    detector: Detector, image_size: int, calibration: Sequence[np.ndarray], folder: Path
) -> dict[ExportedForm, Path]:
    """Export a detector without NMS in every form of FORMS; one that cannot be written is left out with a warning.

    Args:
        detector: on the CPU.
        image_size: side of the square input in pixels.
        calibration: letterboxed images (H, W, 3) uint8, for int8.
        folder: existing; receives the files.

    Returns:
        The files or folders of the forms.
    """
    files = {}
    deployed = detector.fuse().to(memory_format=torch.contiguous_format)
    for form in FORMS:
        try:
            files[form] = _export(deployed, form, image_size, calibration, folder)
        except (DetkitError, ImportError) as error:
            logger.warning("%s is left out: %s", form.name, error)
    return files


def _export(
    detector: Detector, form: ExportedForm, image_size: int, calibration: Sequence[np.ndarray], folder: Path
) -> Path:
    described = describe(
        detector,
        image_size=image_size,
        fixed_shape=(None, None, None),
        nms=False,
        score=0.25,
        iou=0.7,
        max_det=300,
        precision=form.precision,
    )
    target = FORMATS[form.form]
    path = folder / f"{form.name}{target.suffix}"
    target.write(ExportSettings(detector, described, calibration), path)
    return path
