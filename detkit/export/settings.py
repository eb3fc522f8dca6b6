"""What a format is given to export."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from detkit.errors import DetkitError
from detkit.export.metadata import Metadata
from detkit.models.detector import Detector

LARGEST_BATCH, LARGEST_SIDE = 1024, 8192  # of dynamic shapes


@dataclass(frozen=True)
class ExportSettings:
    """A detector and how it is exported.

    Attributes:
        detector: fused, on the CPU, with contiguous weights, as mobile runtimes demand.
        metadata: goes into the file; it says whether NMS is inside, which sizes are fixed, and the precision.
        calibration: letterboxed images (H, W, 3) uint8 for int8.
        opset: of ONNX.
    """

    detector: Detector
    metadata: Metadata
    calibration: Sequence[np.ndarray] = ()
    opset: int = 20

    def example(self) -> Tensor:
        """Return an input: of the fixed shape, or small and not square, so that no two sizes are taken for one."""
        stride = self.metadata.max_stride
        defaults = (2, 2 * stride, 3 * stride)
        batch, height, width = (n or k for n, k in zip(self.metadata.fixed_shape, defaults, strict=True))
        return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0))

    def as_float32(self) -> "ExportSettings":
        """Return the same in float32."""
        return replace(self, metadata=replace(self.metadata, precision="float32"))

    def dynamic_shapes(self) -> dict[int, object]:
        """Return the sizes of the input that vary, for torch.export: the batch, and sides in steps of max_stride."""
        from torch.export import Dim

        stride = self.metadata.max_stride
        most = LARGEST_SIDE // stride
        dims = {0: Dim("batch", max=LARGEST_BATCH)}
        dims |= {2: stride * Dim("rows", min=1, max=most), 3: stride * Dim("columns", min=1, max=most)}
        fixed = (self.metadata.fixed_shape[0], None, *self.metadata.fixed_shape[1:])
        return {axis: dim for axis, dim in dims.items() if fixed[axis] is None}


def explain_failure(error: Exception, detector: Detector, target: str) -> DetkitError:
    """Return a message about an exporter's error: which module of the detector it comes from, and why.

    The module is the last one that the exporter ran, from the traceback: the deepest frame of a ``forward``.
    """
    names = {id(module): name for name, module in detector.named_modules()}
    place, trace = "", error.__traceback__
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and len(causes) < 10:
        causes.append(cause)
    for cause in causes:
        trace = cause.__traceback__
        while trace is not None:
            module = trace.tb_frame.f_locals.get("self")
            if id(module) in names and names[id(module)]:
                place = f"{names[id(module)]} ({type(module).__name__})"
            trace = trace.tb_next
        if place:
            break
    reason = next((line.strip() for line in str(causes[-1]).splitlines() if line.strip()), type(causes[-1]).__name__)
    where = f"{place} of this model" if place else "this model"
    return DetkitError(f"{where} cannot be exported to {target}: {type(causes[-1]).__name__}: {reason[:300]}")
