"""ExecuTorch: a .pte file for its XNNPACK backend, run by its Python runtime."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.export.metadata import Metadata, parse_metadata, read_beside
from detkit.export.packages import need, quiet_root_logger, require_cpu
from detkit.export.pt2 import export_program
from detkit.export.settings import ExportSettings, explain_failure

EXTRA = "executorch"


def write_executorch(settings: ExportSettings, path: Path) -> None:
    """Export a detector for ExecuTorch with XNNPACK, and its metadata to a .json file beside it.

    Raises:
        DetkitError: the package is missing, or the detector cannot be exported.
        OSError: a file cannot be written.
    """
    exir = need("executorch.exir", EXTRA)
    xnnpack = need("executorch.backends.xnnpack.partition.xnnpack_partitioner", EXTRA)
    program = export_program(settings, "ExecuTorch")
    try:
        with quiet_root_logger(), warnings.catch_warnings(action="ignore"):
            lowered = exir.to_edge_transform_and_lower(program, partitioner=[xnnpack.XnnpackPartitioner()])
            content = lowered.to_executorch().buffer
    except Exception as error:  # whatever an exporter may raise
        raise explain_failure(error, settings.detector, "ExecuTorch") from error
    path.mkdir()
    (path / "model.pte").write_bytes(content)
    (path / "model.json").write_text(settings.metadata.to_json(), encoding="utf-8")


class ExecuTorchRunner:
    """Runs a method of a program."""

    def __init__(self, method: Any, metadata: Metadata) -> None:
        self.method = method
        self.metadata = metadata

    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (1, 3, H, W) float32 in 0..1 to boxes (1, A, 4) and scores (1, A, C)."""
        return tuple(output.clone() for output in self.method.execute([images.contiguous()]))


def open_executorch(path: Path, device: torch.device, _amp: str, _raw: bool) -> ExecuTorchRunner:
    """Open a .pte file with its .json file beside it.

    Raises:
        DetkitError: the package is missing, or a file is damaged or missing.
    """
    runtime = need("executorch.runtime", EXTRA)
    require_cpu(device, "ExecuTorch")
    metadata = parse_metadata(read_beside(path), path)
    try:
        program = runtime.Runtime.get().load_program(path)
        return ExecuTorchRunner(program.load_method("forward"), metadata)
    except RuntimeError as error:
        raise DetkitError(f"{path} cannot be run by ExecuTorch ({shorten(str(error))})") from None
