"""Images of training batches and of predictions."""

from collections.abc import Sequence
from contextlib import suppress

import numpy as np
from torch import Tensor

from detkit.data.annotations import Annotations
from detkit.errors import UnreadableImage
from detkit.ops.image import read_image
from detkit.structures import Batch, ImageMeta
from detkit.viz.drawing import draw_boxes, image_grid

MAX_IMAGES = 8  # validation images
MIN_SCORE = 0.25  # of predictions that are drawn


def draw_batch(batch: Batch, class_names: Sequence[str]) -> np.ndarray:
    """Draw the first 16 images of a batch, as the network receives them, with their boxes: (H, W, 3) uint8 RGB."""
    columns = zip(batch.images[:16], batch.boxes_bm4, batch.labels_bm, batch.valid_bm, strict=False)
    images = [
        draw_boxes(image.permute(1, 2, 0).numpy(), boxes[valid].numpy(), labels[valid].tolist(), class_names)
        for image, boxes, labels, valid in columns
    ]
    return image_grid(images)


def draw_predictions(
    predictions: Sequence[tuple[ImageMeta, Tensor, Tensor, Tensor]], annotations: Annotations
) -> np.ndarray:
    """Draw the first images twice, with labels and with predictions, side by side: (H, W, 3) uint8 RGB.

    Args:
        predictions: metadata, boxes (N, 4) xyxy, scores (N,) and labels (N,) of each image.
        annotations: ground truth.
    """
    images = []
    names = annotations.class_names
    for meta, boxes, scores, labels in predictions[:MAX_IMAGES]:
        own = slice(*annotations.offsets[meta.index : meta.index + 2])
        keep = scores > MIN_SCORE
        with suppress(UnreadableImage):  # removed since
            image = read_image(meta.path)
            images.append(draw_boxes(image, annotations.boxes[own], annotations.labels[own].tolist(), names))
            found = (boxes[keep].numpy(), labels[keep].tolist(), names, scores[keep].tolist())
            images.append(draw_boxes(image, *found))
    return image_grid(images, titles=("labels", f"predictions, score > {MIN_SCORE}") * 2)
