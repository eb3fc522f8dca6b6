"""Pictures of what a network sees, and of what it finds."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from torch import Tensor

from detkit.data.annotations import Annotations
from detkit.errors import UnreadableImage
from detkit.ops.image import read_image
from detkit.structures import Batch, ImageMeta
from detkit.viz.drawing import draw_boxes, grid

COMPARED = 8  # validation images
SCORE = 0.25  # of the boxes that are drawn


def draw_batch(batch: Batch, class_names: Sequence[str]) -> np.ndarray:
    """Return the first 16 images of a training batch as the network sees them, with their boxes: (H, W, 3) uint8."""
    columns = zip(batch.images[:16], batch.boxes_bm4, batch.labels_bm, batch.valid_bm, strict=False)
    pictures = [
        draw_boxes(image.permute(1, 2, 0).numpy(), boxes[valid].numpy(), labels[valid].tolist(), class_names)
        for image, boxes, labels, valid in columns
    ]
    return grid(pictures)


def draw_predictions(
    predictions: Sequence[tuple[ImageMeta, Tensor, Tensor, Tensor]], annotations: Annotations
) -> np.ndarray:
    """Return validation images twice, side by side: with their labels, and with what was found: (H, W, 3) uint8."""
    pictures = []
    names = annotations.class_names
    for meta, boxes, scores, labels in predictions[:COMPARED]:
        own = slice(*annotations.offsets[meta.index : meta.index + 2])
        keep = scores > SCORE
        with suppress(UnreadableImage):  # gone since
            image = read_image(meta.path)
            pictures.append(draw_boxes(image, annotations.boxes[own], annotations.labels[own].tolist(), names))
            found = (boxes[keep].numpy(), labels[keep].tolist(), names, scores[keep].tolist())
            pictures.append(draw_boxes(image, *found))
    return grid(pictures, titles=("labels", f"found, score > {SCORE}") * 2)
