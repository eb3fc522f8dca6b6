"""Test harness that runs a detector and its loss on noise, in eval and train mode."""

import contextlib
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from detkit.models.detector import Detector
from detkit.models.profiling import dummy_batch
from detkit.ops.precision import Precision
from detkit.structures import Batch


class PropertyError(Exception):
    """A check failed; the message states what differed."""


@dataclass(frozen=True)
class Composition:
    """A detector and its loss.

    Attributes:
        detector: on the device to be tested.
        loss: (DenseOutput, Batch) -> weighted terms.
        image_size: side in pixels for FLOPs and memory; checks use smaller images.
    """

    detector: Detector
    loss: nn.Module
    image_size: int = 640

    @property
    def device(self) -> torch.device:
        """Device of the parameters."""
        return next(self.detector.parameters()).device

    @property
    def size(self) -> tuple[int, int]:
        """Height and width of small images that are not square: 64x96 if the largest stride is 32."""
        return 2 * self.detector.max_stride, 3 * self.detector.max_stride

    def batch(self, images: int, boxes: int) -> Batch:
        """Return noise images with random boxes."""
        return dummy_batch(images, self.size, boxes, len(self.detector.class_names)).to(self.device)

    @torch.no_grad()
    def decode(self, detector: Detector | None = None) -> tuple[Tensor, Tensor]:
        """Return boxes (2, A, 4) and scores (2, A, C) of two fixed images, by default from this detector in eval."""
        detector = detector or self.detector.eval()
        images = torch.rand(2, 3, *self.size, generator=torch.Generator().manual_seed(0))
        return detector.decode(detector(images.to(next(detector.parameters()))))

    def backward(self, batch: Batch, precision: Precision | None = None) -> float:
        """Run forward (under autocast if a precision is given) and backward in train mode; return the loss.

        Raises:
            PropertyError: the loss or a gradient is not finite.
        """
        detector = self.detector.train()
        detector.zero_grad()
        with precision.autocast() if precision else contextlib.nullcontext():
            out = detector(batch.images.float() / 255)
        loss = sum(self.loss(out, batch).values())
        if not loss.isfinite():
            raise PropertyError(f"the loss is {loss.item()}")
        loss.backward()
        broken = [n for n, p in detector.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        if broken:
            raise PropertyError(f"the gradient is not finite: {abbreviate(broken)}")
        return loss.item()

    def without_gradient(self) -> list[str]:
        """Return the names of trainable parameters without a gradient after the last backward pass."""
        return [name for name, p in self.detector.named_parameters() if p.requires_grad and p.grad is None]

    @torch.no_grad()
    def randomize_norms(self) -> None:
        """Make the outputs of a new detector depend on all its parts, so that comparing outputs covers them.

        Scales initialized to (nearly) 0 hide their branches, and a new batch norm is the identity: the former get
        random values, the latter random weights and the statistics of a batch of noise.
        """
        norms = [m for m in self.detector.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        for norm in norms:
            if norm.affine:
                norm.weight.uniform_(0.5, 1.5)
        for parameter in self.detector.parameters():
            if parameter.requires_grad and parameter.abs().max() < 1e-3:
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.3 / parameter[0].numel() ** 0.5)
                else:
                    parameter.uniform_(0.1, 0.3)
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.momentum = 1.0  # the statistics of the last batch alone
        try:
            self.detector.train()(torch.rand(4, 3, *self.size, device=self.device))
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum


def deviations(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> tuple[float, float]:
    """Return the relative deviations of (boxes, scores) from the expected ones: norm of the difference over the norm.

    Raises:
        PropertyError: a value is not finite.
    """
    for name, tensor in zip(("boxes", "scores") * 2, (*found, *expected), strict=True):
        if not tensor.isfinite().all():
            raise PropertyError(f"{name} are not finite")
    pairs = zip(found, expected, strict=True)
    boxes, scores = (float((one - other).norm() / other.norm().clamp(min=1e-12)) for one, other in pairs)
    return boxes, scores


def abbreviate(names: list[str]) -> str:
    """Format the first two names and the number of the others."""
    more = f" and {len(names) - 2} more" if len(names) > 2 else ""
    return ", ".join(names[:2]) + more
