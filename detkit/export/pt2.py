"""torch.export: a .pt2 archive, run by PyTorch."""

import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from detkit.errors import DetkitError, shorten
from detkit.export.graph import ExportGraph
from detkit.export.metadata import Metadata, parse_metadata
from detkit.export.pt2_check import EXTRA_FILE, check_archive
from detkit.export.settings import ExportSettings, explain_failure
from detkit.ops.files import open_regular


def write_pt2(settings: ExportSettings, path: Path) -> None:
    """Export a detector with ``torch.export``, its metadata in an extra file of the archive.

    Raises:
        DetkitError: the detector cannot be exported.
        OSError: the file cannot be written.
    """
    program = export_program(settings, "pt2")
    program.example_inputs = None  # it would be pickled
    for node in program.graph.nodes:
        node.meta.pop("stack_trace", None)  # with the paths of this machine
    torch.export.save(program, path, extra_files={EXTRA_FILE: settings.metadata.to_json()})


def export_program(settings: ExportSettings, target: str) -> torch.export.ExportedProgram:
    """Return a detector, with boxes and scores as outputs, as an exported program.

    Raises:
        DetkitError: it cannot be exported to ``target``.
    """
    try:
        with torch.no_grad(), warnings.catch_warnings(action="ignore"):
            return torch.export.export(
                ExportGraph(settings.detector).eval(),
                (settings.example(),),
                dynamic_shapes=(settings.dynamic_shapes(),),
            )
    except Exception as error:  # whatever an exporter may raise
        raise explain_failure(error, settings.detector, target) from error


class TorchRunner:
    """Runs an exported program in PyTorch."""

    def __init__(self, module: Any, metadata: Metadata) -> None:
        self.module = module
        self.metadata = metadata

    @torch.inference_mode()
    def __call__(self, images: Tensor) -> tuple[Tensor, ...]:
        """Map images (B, 3, H, W) float32 in 0..1 to boxes (B, A, 4) and scores (B, A, C)."""
        return tuple(self.module(images))


def open_pt2(path: Path, device: torch.device, _amp: str, _raw: bool) -> TorchRunner:
    """Open a .pt2 file that ``write_pt2`` wrote.

    ``torch.export.load`` unpickles objects and evaluates expressions: a file with any other than the plain tensors,
    operators and sizes of an exported detector is refused before it is loaded.

    Raises:
        DetkitError: the file is damaged, not one of detkit's, or not safe to load.
    """
    if device.type != "cpu":
        raise DetkitError(f"device={device}: {path} was exported for the CPU, use device=cpu")
    open_regular(path).close()
    metadata = parse_metadata(check_archive(path), path)
    try:
        with warnings.catch_warnings(action="ignore"):
            return TorchRunner(torch.export.load(path).module(), metadata)
    except Exception as error:  # of many kinds
        raise DetkitError(f"{path} cannot be loaded by PyTorch {torch.__version__} ({shorten(str(error))})") from None
