"""Backbones: ``forward(images) -> tuple of feature maps``, with matching ``out_channels`` and ``strides``."""

from detkit.models.backbones import csp_darknet, mobilenetv2, revcol, timm_backbone  # noqa: F401
