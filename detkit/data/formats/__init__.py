"""Dataset formats, reader and writer side by side; importing this package registers them."""

from detkit.data.formats import coco, shapes, tar_shards, voc, writers, yolo  # noqa: F401
