"""ONNX: written by PyTorch's dynamo exporter, run by ONNX Runtime."""

import copy
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.export.graph import ExportGraph
from detkit.export.metadata import KEY, Metadata, parse_metadata
from detkit.export.packages import need, only_errors
from detkit.export.settings import ExportSettings, explain_failure
from detkit.ops.atomic_write import write_atomically
from detkit.ops.files import open_regular

EXTRA = "export"
MAX_BYTES = 2**31 - 1  # of a protocol buffer
RAW = ("boxes", "scores")


def write_onnx(settings: ExportSettings, path: Path) -> None:
    """Export a detector to one ONNX file.

    Raises:
        DetkitError: a package is missing, or the detector cannot be exported.
        OSError: the file cannot be written.
    """
    model = build_onnx(settings)
    if settings.metadata.precision == "int8":
        from detkit.export.quantize import quantize  # imports ONNX Runtime

        model = quantize(model, settings.calibration)
    if settings.metadata.nms:  # boxes and scores stay tensors of the graph
        for output in [o for o in model.graph.output if o.name in RAW]:
            model.graph.output.remove(output)
    if model.ByteSize() > MAX_BYTES:
        raise DetkitError("the model is larger than 2 GB, the limit of an ONNX file: export it as pt2")
    model.metadata_props.add(key=KEY, value=settings.metadata.to_json())
    write_atomically(path, model.SerializeToString())


def build_onnx(settings: ExportSettings) -> Any:
    """Return the detector as an ``onnx.ModelProto``; with NMS its outputs are boxes, scores and detections.

    Raises:
        DetkitError: as ``write_onnx``.
    """
    onnxscript, onnx = need("onnxscript", EXTRA), need("onnx", EXTRA)
    metadata = settings.metadata
    detector = settings.detector
    if metadata.precision == "float16":
        detector = copy.deepcopy(detector).half()
    graph = ExportGraph(detector, metadata.thresholds if metadata.nms else None).eval()
    op = onnxscript.opset18

    def translate(boxes: Any, scores: Any, max_det: int, iou: float, score: float) -> Any:
        return op.NonMaxSuppression(
            boxes,
            scores,
            op.Constant(value_ints=[max_det]),
            op.Constant(value_floats=[iou]),
            op.Constant(value_floats=[score]),
        )

    try:
        quiet = only_errors("torch.onnx", "onnxscript")
        with torch.no_grad(), quiet, warnings.catch_warnings(action="ignore"):
            program = torch.onnx.export(
                graph,
                (settings.example(),),
                dynamo=True,
                verbose=False,
                input_names=["images"],
                output_names=[*RAW, *(["detections"] if metadata.nms else [])],
                dynamic_shapes=(settings.dynamic_shapes(),),
                opset_version=settings.opset,
                custom_translation_table={torch.ops.detkit.non_max_suppression.default: translate},
            )
        assert program is not None  # as no file was given
        model = program.model_proto
    except Exception as error:  # whatever an exporter may raise
        raise explain_failure(error, settings.detector, "ONNX") from error
    opset = next(entry.version for entry in model.opset_import if entry.domain == "")
    if opset != settings.opset:
        raise DetkitError(f"opset={settings.opset}: this model could only be exported in opset {opset}")
    for node in model.graph.node:  # traces of the source code, with paths of this machine
        del node.metadata_props[:]
        node.doc_string = ""
    del model.graph.value_info[:]
    onnx.checker.check_model(model)
    return model


class OnnxRunner:
    """Runs an ONNX model.

    Args:
        session: of ONNX Runtime.
        metadata: of the file.
        outputs: the names of what is returned.
    """

    def __init__(self, session: Any, metadata: Metadata, outputs: tuple[str, ...]) -> None:
        self.session = session
        self.metadata = metadata
        self.outputs = list(outputs)

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W) float32 in 0..1 to the file's outputs."""
        found = self.session.run(self.outputs, {"images": np.ascontiguousarray(images.cpu().numpy())})
        return tuple(torch.from_numpy(array) for array in found)


def open_onnx(path: Path, device: torch.device, _amp: str, raw: bool) -> OnnxRunner:
    """Open an ONNX file in ONNX Runtime.

    Args:
        path: the file.
        device: cpu, or cuda if ONNX Runtime was built for it.
        raw: return boxes and scores of a file that has NMS inside.

    Raises:
        DetkitError: the package is missing, or the file is damaged or not one of detkit's.
    """
    onnxruntime = need("onnxruntime", EXTRA)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors
    options.intra_op_num_threads = torch.get_num_threads()
    # Otherwise its threads spin while others read and draw images.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    providers: list[Any] = ["CPUExecutionProvider"]
    if device.type == "cuda":
        if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
            raise DetkitError(f"device={device}: this ONNX Runtime has no CUDA: use device=cpu or onnxruntime-gpu")
        providers = [("CUDAExecutionProvider", {"device_id": device.index or 0}), *providers]
    open_regular(path).close()
    try:
        content = _with_raw_outputs(path) if raw else str(path)
        session = onnxruntime.InferenceSession(content, options, providers=providers)
    except DetkitError:
        raise
    except Exception as error:  # those of ONNX Runtime have no common class
        raise DetkitError(f"{path} is not a readable ONNX file ({shorten(str(error))})") from None
    metadata = parse_metadata(session.get_modelmeta().custom_metadata_map.get(KEY), path)
    outputs = RAW if raw or not metadata.nms else ("detections",)
    if not {"images", *outputs} <= {value.name for value in (*session.get_inputs(), *session.get_outputs())}:
        raise DetkitError(f"{path} is damaged: it has no {' or '.join(('images', *outputs))}")
    return OnnxRunner(session, metadata, outputs)


def _with_raw_outputs(path: Path) -> bytes:
    """Return the content of an ONNX file with its boxes and scores among the outputs."""
    onnx = need("onnx", EXTRA)
    model = onnx.load_model(path)
    present = {output.name for output in model.graph.output}
    for name in RAW:
        if name not in present:
            model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    return model.SerializeToString()
