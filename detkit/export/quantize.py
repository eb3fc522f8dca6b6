"""Static quantization of an ONNX model to int8."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from detkit.errors import DetkitError
from detkit.export.packages import need, quiet_root_logger

EXTRA = "export"
LAYERS = ("Conv", "Gemm")


def quantize(model: Any, images: Sequence[np.ndarray]) -> Any:
    """Return an ``onnx.ModelProto`` with its convolutions in int8, in QDQ format, weights per channel.

    Only convolutions and linear layers are quantized: decoding stays in float32, since boxes (in pixels) and scores
    (in 0..1) of one quantized tensor would leave the scores no steps.

    Args:
        model: an ``onnx.ModelProto`` in float32 with the input ``images``.
        images: letterboxed (H, W, 3) uint8 RGB, from which the ranges of the activations are measured.

    Raises:
        DetkitError: there are no images, or ONNX Runtime is missing.
    """
    if not images:
        raise DetkitError("precision=int8 is calibrated on images: there are none")
    quantization, onnx = need("onnxruntime.quantization", EXTRA), need("onnx", EXTRA)
    with quiet_root_logger(), tempfile.TemporaryDirectory(prefix="detkit-") as folder:
        target = Path(folder) / "model.onnx"
        quantization.quantize_static(
            model,
            target,
            _Inputs(images),
            quant_format=quantization.QuantFormat.QDQ,
            op_types_to_quantize=list(LAYERS),
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
        )
        return onnx.load_model(target)


class _Inputs:
    """What ONNX Runtime calibrates on: a reader of one input after another."""

    def __init__(self, images: Sequence[np.ndarray]) -> None:
        self.images = iter(images)

    def get_next(self) -> dict[str, np.ndarray] | None:
        """Return the next input; None at the end."""
        image = next(self.images, None)
        return None if image is None else {"images": _as_input(image)}


def _as_input(image: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(image.transpose(2, 0, 1)[None], np.float32) / 255
