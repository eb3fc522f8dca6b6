"""Backbones: ``forward(image) -> tuple of feature maps``, with ``out_channels`` and ``strides`` to match."""

from detkit.models.backbones import csp_darknet, mobilenetv2, revcol, timm_backbone  # noqa: F401
