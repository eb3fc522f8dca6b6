"""The formats: what each can hold, and what writes and runs it."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from detkit.errors import DetkitError
from detkit.export.executorch import open_executorch, write_executorch
from detkit.export.model import ExportedModel, Runner
from detkit.export.ncnn import open_ncnn, write_ncnn
from detkit.export.onnx import open_onnx, write_onnx
from detkit.export.openvino import open_openvino, write_openvino
from detkit.export.pt2 import open_pt2, write_pt2
from detkit.export.settings import ExportSettings
from detkit.export.tensorrt import open_tensorrt, write_tensorrt


@dataclass(frozen=True)
class Format:
    """A format of exported files.

    Attributes:
        suffix: of the file, or of the folder's name.
        marker: suffix by which the file, or the one in a folder, is known.
        write: writes a detector to a path.
        open: takes path, device, amp (of a checkpoint; only some runtimes use it) and raw (return boxes and scores of a
            file with NMS inside).
        has_nms: whether NMS can be inside.
        is_dynamic: whether the batch and the sides can vary.
        precisions: that it can be exported in.
    """

    suffix: str
    marker: str
    write: Callable[[ExportSettings, Path], None]
    open: Callable[[Path, torch.device, str, bool], Runner]
    has_nms: bool = False
    is_dynamic: bool = True
    precisions: tuple[str, ...] = ("float32",)


CPU = torch.device("cpu")
ALL = ("float32", "float16", "int8")
FORMATS = {
    "onnx": Format(".onnx", ".onnx", write_onnx, open_onnx, has_nms=True, precisions=ALL),
    "openvino": Format("_openvino", ".xml", write_openvino, open_openvino, has_nms=True, precisions=ALL),
    "pt2": Format(".pt2", ".pt2", write_pt2, open_pt2),
    "executorch": Format("_executorch", ".pte", write_executorch, open_executorch, is_dynamic=False),
    "ncnn": Format("_ncnn", ".param", write_ncnn, open_ncnn, is_dynamic=False, precisions=("float32", "float16")),
    "tensorrt": Format(".engine", ".engine", write_tensorrt, open_tensorrt, precisions=ALL),
}


def find_format(path: Path) -> Format | None:
    """Return the format of an exported file or folder, by its suffix or the one file in it; None for others."""
    if not path.is_dir():
        return next((form for form in FORMATS.values() if path.suffix == form.marker), None)
    present = {file.suffix for file in path.iterdir()}
    return next((form for form in FORMATS.values() if form.suffix[0] == "_" and form.marker in present), None)


def open_exported(
    path: Path, form: Format, device: torch.device = CPU, amp: str = "off", *, raw: bool = False
) -> ExportedModel:
    """Open a file, or the only one of a folder, in its runtime.

    Raises:
        DetkitError: it cannot be read, or a package is missing.
    """
    file = path
    if path.is_dir():
        files = sorted(path.glob(f"*{form.marker}"))
        if len(files) != 1:
            raise DetkitError(f"{path} holds {len(files)} files *{form.marker}: name one of them")
        file = files[0]
    elif not path.exists():
        raise DetkitError(f"{path} does not exist")
    runner = form.open(file, device, amp, raw)
    if runner.metadata.nms and not form.has_nms:
        raise DetkitError(f"{path} is damaged: a file of this format cannot have non-maximum suppression inside")
    return ExportedModel(runner, path.name, raw)
