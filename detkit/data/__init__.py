"""Labelled image sets, from files to batches; importing this package registers the formats."""

from detkit.data import coco, shapes, voc, yolo  # noqa: F401
