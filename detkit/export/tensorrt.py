"""TensorRT: an engine built from the ONNX model for the GPU of this machine.

Not run by detkit's developers yet, for want of a machine with TensorRT; the check against PyTorch after every export
would find an engine that differs.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.export.metadata import MAX_TEXT, Metadata, parse_metadata
from detkit.export.onnx import RAW, write_onnx
from detkit.export.packages import need
from detkit.export.settings import ExportSettings
from detkit.ops.atomic_write import write_atomically
from detkit.ops.files import open_regular

EXTRA = "tensorrt"
MAGIC = b"detkit1\n"  # then the length of the metadata in 4 bytes, the metadata, and the engine
LARGEST_BATCH = 16  # of a dynamic engine; its sides are at most image_size


def write_tensorrt(settings: ExportSettings, path: Path) -> None:
    """Build an engine from the ONNX model and write it after its metadata.

    Raises:
        DetkitError: TensorRT or a GPU is missing, or the model cannot be exported or built.
        OSError: the file cannot be written.
    """
    trt = need("tensorrt", EXTRA)
    if not torch.cuda.is_available():
        raise DetkitError(
            "format=tensorrt builds an engine for a GPU, and torch sees none: export on the GPU's machine"
        )
    metadata = settings.metadata
    log = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(log)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    is_half = metadata.precision == "float16"
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        write_onnx(settings.as_float32() if is_half else settings, Path(folder) / "model.onnx")
        if not parser.parse((Path(folder) / "model.onnx").read_bytes()):
            raise DetkitError(f"TensorRT cannot read the ONNX model: {shorten(str(parser.get_error(0)))}")
    config = builder.create_builder_config()
    if is_half:
        config.set_flag(trt.BuilderFlag.FP16)
    if metadata.precision == "int8":
        config.set_flag(trt.BuilderFlag.INT8)
    if None in metadata.fixed_shape:
        least, most = 2 * metadata.max_stride, metadata.image_size
        profile = builder.create_optimization_profile()
        shapes = ((1, 3, least, least), (1, 3, most, most), (LARGEST_BATCH, 3, most, most))
        profile.set_shape("images", *shapes)
        config.add_optimization_profile(profile)
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise DetkitError("TensorRT cannot build this model: see its messages above")
    text = metadata.to_json().encode()
    write_atomically(path, MAGIC + len(text).to_bytes(4, "little") + text + bytes(engine))


class TensorRtRunner:
    """Runs an engine on the current GPU; its boxes and scores are returned on the CPU."""

    def __init__(self, context: Any, metadata: Metadata) -> None:
        self.context = context
        self.metadata = metadata

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W) float32 in 0..1 to boxes (B, A, 4) and scores (B, A, C).

        Raises:
            DetkitError: the engine was not built for this shape.
        """
        images = images.cuda().contiguous()
        if not self.context.set_input_shape("images", tuple(images.shape)):
            raise DetkitError(
                f"the TensorRT engine takes up to {LARGEST_BATCH} images of up to {self.metadata.image_size} pixels, "
                f"not {list(images.shape)}"
            )
        outputs = [torch.empty(tuple(self.context.get_tensor_shape(name)), device="cuda") for name in RAW]
        for name, tensor in zip(("images", *RAW), (images, *outputs), strict=True):
            self.context.set_tensor_address(name, tensor.data_ptr())
        stream = torch.cuda.current_stream()
        if not self.context.execute_async_v3(stream.cuda_stream):
            raise DetkitError("TensorRT could not run the engine: see its messages above")
        stream.synchronize()
        return tuple(output.cpu() for output in outputs)


def open_tensorrt(path: Path, _device: torch.device, _amp: str, _raw: bool) -> TensorRtRunner:
    """Open an .engine file that ``write_tensorrt`` wrote.

    An engine holds machine code: run only those that you built.

    Raises:
        DetkitError: TensorRT is missing, or the file is damaged or was built for another machine.
    """
    trt = need("tensorrt", EXTRA)
    with open_regular(path) as file:
        start = file.read(len(MAGIC) + 4)
        length = int.from_bytes(start[len(MAGIC) :], "little")
        if not start.startswith(MAGIC) or length > MAX_TEXT:
            raise DetkitError(f"{path} is not a TensorRT engine of detkit")
        metadata = parse_metadata(file.read(length).decode("utf-8", "replace"), path)
        engine = trt.Runtime(trt.Logger(trt.Logger.ERROR)).deserialize_cuda_engine(file.read())
    if engine is None:
        raise DetkitError(f"{path} was built for another GPU or version of TensorRT: export it again on this machine")
    return TensorRtRunner(engine.create_execution_context(), metadata)
