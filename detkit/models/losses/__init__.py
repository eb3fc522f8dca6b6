"""Losses: ``(DenseOutput, Batch) -> {term: weighted scalar}``, in float32, without a host synchronisation."""

from detkit.models.losses import task_aligned, yolov5  # noqa: F401
