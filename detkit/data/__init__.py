"""Labelled image sets, from files to batches; importing this package registers the formats."""

from detkit.data import coco, shapes, voc, webdataset, writers, yolo  # noqa: F401
