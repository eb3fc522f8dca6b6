"""Loading whatever can be run: a checkpoint, or an exported file of any format."""

from pathlib import Path

import torch

from detkit.engine.checkpoint import build_from_checkpoint
from detkit.export.formats import find_format, open_exported
from detkit.inference.model import Model


def load_model(path: str | Path, device: torch.device, amp: str = "auto", *, fuse: bool = True) -> Model:
    """Load a checkpoint or an exported file as what ``Predictor`` and ``evaluate`` run.

    Args:
        path: a .safetensors checkpoint, or a file or folder that ``detkit export`` wrote.
        device: to compute on.
        amp: precision of a checkpoint's network, and of OpenVINO: auto, off, bf16 or fp16.
        fuse: deploy a checkpoint's detector, which is faster, with equal outputs.

    Raises:
        DetkitError: it cannot be read, or a package is missing.
    """
    if (form := find_format(Path(path))) is not None:
        return open_exported(Path(path), form, device, amp)
    detector = build_from_checkpoint(path).to(device)
    return (detector.fuse() if fuse else detector).as_model(amp)
