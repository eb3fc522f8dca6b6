"""OpenVINO: converted from the ONNX model, to an .xml and a .bin file."""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.export.metadata import KEY, Metadata, parse_metadata
from detkit.export.onnx import EXTRA, RAW, write_onnx
from detkit.export.packages import need, require_cpu
from detkit.export.settings import ExportSettings
from detkit.ops.files import open_regular

HINTS = {"off": "f32", "bf16": "bf16", "fp16": "f16"}  # of amp; otherwise OpenVINO's choice, bf16 where it is fast


def write_openvino(settings: ExportSettings, path: Path) -> None:
    """Export a detector to ``model.xml`` and ``model.bin`` in the new folder ``path``.

    float16 stores the weights in half precision; what is computed in is chosen where the file runs.

    Raises:
        DetkitError: as ``write_onnx``.
        OSError: a file cannot be written.
    """
    openvino = need("openvino", EXTRA)
    metadata = settings.metadata
    source = settings
    if metadata.precision == "float16":  # OpenVINO compresses weights itself
        source = settings.as_float32()
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        write_onnx(source, Path(folder) / "model.onnx")
        model = openvino.convert_model(Path(folder) / "model.onnx")
        model.set_rt_info(metadata.to_json(), [KEY])
        path.mkdir()
        openvino.save_model(model, path / "model.xml", compress_to_fp16=metadata.precision == "float16")


class OpenVinoRunner:
    """Runs an OpenVINO model.

    Args:
        model: as read.
        metadata: of the file.
        outputs: the names of what is returned.
        amp: precision: off, bf16, fp16, or auto for OpenVINO's choice.
    """

    def __init__(self, model: Any, metadata: Metadata, outputs: tuple[str, ...], amp: str) -> None:
        openvino = need("openvino", EXTRA)
        self.metadata = metadata
        config = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
        if hint := "f32" if metadata.precision == "int8" else HINTS.get(amp):  # it cannot mix int8 with bf16
            config["INFERENCE_PRECISION_HINT"] = hint
        self.compiled = openvino.Core().compile_model(model, "CPU", config)
        self.outputs = [self.compiled.output(name) for name in outputs]

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W) float32 in 0..1 to the file's outputs."""
        found = self.compiled(np.ascontiguousarray(images.cpu().numpy()))
        return tuple(torch.from_numpy(found[output]) for output in self.outputs)


def open_openvino(path: Path, device: torch.device, amp: str, raw: bool) -> OpenVinoRunner:
    """Open an OpenVINO .xml file, with its .bin beside it.

    Raises:
        DetkitError: the package is missing, or the file is damaged or not one of detkit's.
    """
    openvino = need("openvino", EXTRA)
    open_regular(path).close()
    require_cpu(device, "OpenVINO")
    try:
        model = openvino.Core().read_model(path)
        text = model.get_rt_info([KEY]).astype(str) if model.has_rt_info([KEY]) else None
    except RuntimeError as error:
        raise DetkitError(f"{path} is not a readable OpenVINO model ({shorten(str(error))})") from None
    metadata = parse_metadata(text, path)
    outputs = RAW if raw or not metadata.nms else ("detections",)
    try:
        if raw and metadata.nms:
            model.add_outputs([*RAW])
        return OpenVinoRunner(model, metadata, outputs, amp)
    except RuntimeError as error:
        raise DetkitError(f"{path} cannot be run by OpenVINO ({shorten(str(error))})") from None
