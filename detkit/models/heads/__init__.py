"""Heads: ``forward(features) -> DenseOutput``, ``decode`` to boxes and scores, ``init_bias``."""

from detkit.models.heads import yolov5, yolov8  # noqa: F401
