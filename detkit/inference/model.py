"""What prediction and evaluation run: a PyTorch detector, or an exported file (``detkit.export``)."""

import copy
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from detkit.ops.nms import Selection, Thresholds, non_max_suppression
from detkit.ops.precision import Precision

FixedShape = tuple[int | None, int | None, int | None]  # B, H, W


class Model(Protocol):
    """A detector in any runtime.

    Attributes:
        class_names: one name per class.
        image_size: default side of the letterboxed input in pixels.
        max_stride: both sides of an input must be divisible by it.
        device: where ``detect`` takes its images.
        fixed_shape: (B, H, W) that every input must have; None in place of a number that may vary.
        cfg: resolved configuration that the detector was built from.
    """

    class_names: tuple[str, ...]
    image_size: int
    max_stride: int
    device: torch.device
    fixed_shape: FixedShape
    cfg: Mapping[str, Any]

    def detect(self, images: Tensor, thresholds: Thresholds) -> list[Selection]:
        """Return the detections in each of the letterboxed images (B, 3, H, W) uint8 RGB, in pixels of the input."""


class TorchModel:
    """A detector in PyTorch, as prediction and evaluation run it: with autocast, decoded in float32.

    Args:
        detector: a ``Detector`` on its device; put into eval mode. Fused, it is copied with weights in ``precision``.
        precision: of the network.
    """

    fixed_shape: FixedShape = (None, None, None)

    def __init__(self, detector: Any, precision: Precision) -> None:
        self.detector = detector.eval()
        self.precision = precision
        self.class_names = detector.class_names
        self.cfg: Mapping[str, Any] = detector.cfg
        self.image_size = detector.cfg.get("image_size", 640)
        self.max_stride: int = detector.max_stride
        self.device = precision.device
        if precision.dtype is not None and detector.is_fused:
            self.detector = copy.deepcopy(detector)
            for module in self.detector.modules():
                if isinstance(module, (nn.Conv2d, nn.Linear)):
                    module.to(precision.dtype)  # once, as autocast would cast the weights at every call

    @torch.inference_mode()
    def network(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Map images (B, 3, H, W) uint8 to boxes (B, A, 4) xyxy in input pixels and scores (B, A, C) in 0..1."""
        with self.precision.autocast():
            out = self.detector(images.float() / 255)
        return self.detector.decode(out)

    @torch.inference_mode()
    def detect(self, images: Tensor, thresholds: Thresholds) -> list[Selection]:
        """Return the detections in each of the letterboxed images (B, 3, H, W) uint8 RGB, in pixels of the input."""
        return non_max_suppression(*self.network(images), thresholds)
