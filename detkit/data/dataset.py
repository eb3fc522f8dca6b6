"""Torch datasets over Annotations: raw images, and images letterboxed for evaluation.

A key is ``(epoch, index)`` or a ``Key``: what a sample looks like depends on nothing else but the seed.
"""

import numpy as np
from torch.utils.data import Dataset

from detkit.data.annotations import Annotations
from detkit.errors import DetkitError
from detkit.ops.image import Letterbox, read_image
from detkit.structures import Key, Origin, Sample


class DetectionDataset(Dataset):
    """Decoded images with the boxes one trains on (no crowds)."""

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations

    def __len__(self) -> int:
        return len(self.annotations)

    def labels_by_item(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the image of each box that one trains on, and its label, (T,) each."""
        a = self.annotations
        images = np.repeat(np.arange(len(a)), np.diff(a.offsets))
        return images[~a.crowd], a.labels[~a.crowd]

    def __getitem__(self, key: Key | tuple[int, int]) -> Sample:
        """Return image ``key[1]`` as it is on disk.

        Raises:
            DetkitError: the image cannot be read, or has another size than its annotations say.
        """
        index = key[1]
        a = self.annotations
        rows = a.rows(index)
        keep = ~a.crowd[rows]
        image = read_image(a.paths[index])
        stated = tuple(int(n) for n in a.sizes[index])
        if image.shape[:2] != stated:
            raise DetkitError(
                f"image {a.paths[index]} is now {image.shape[1]}x{image.shape[0]} pixels; when its labels were read "
                f"it was {stated[1]}x{stated[0]}, so its boxes would be misplaced"
            )
        boxes, labels = a.boxes[rows][keep].astype(np.float32), a.labels[rows][keep].astype(np.int64)
        return Sample(image, boxes, labels, Origin(index, a.paths[index], image.shape[:2]))


class LetterboxDataset(Dataset):
    """Images fitted into a frame with a longer side of ``size`` pixels, aspect kept; the sample remembers how.

    The frame is a square, the order that of the set. Where ``rect_batch`` is given (rectangular validation), items
    come by aspect ratio instead, and each run of ``rect_batch`` items shares its own smallest frame (``rect_frames``):
    the same pixels of each image, with less padding around them.
    """

    def __init__(self, dataset: DetectionDataset, size: int, rect_batch: int | None = None) -> None:
        self.dataset = dataset
        self.order = np.arange(len(dataset))
        self.frames = np.full((len(dataset), 2), size)
        if rect_batch is not None:
            self.order, self.frames = rect_frames(dataset.annotations.sizes, size, rect_batch)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: Key | tuple[int, int]) -> Sample:
        """Return item ``key[1]`` letterboxed, its boxes along with it."""
        epoch, item = key[:2]
        sample = self.dataset[epoch, int(self.order[item])]
        height, width = self.frames[item].tolist()
        box = Letterbox.fit(sample.origin.size, (height, width))
        sample.image = box.apply(sample.image)
        sample.origin.scale, sample.origin.offset = box.scale, box.offset
        sample.boxes = sample.boxes * np.float32((*box.scale, *box.scale)) + np.float32((*box.offset, *box.offset))
        return sample


def rect_frames(sizes: np.ndarray, size: int, batch_size: int, stride: int = 32) -> tuple[np.ndarray, np.ndarray]:
    """Sort images into batches of like aspect and find each batch's smallest frame.

    Args:
        sizes: (N, 2) height and width of the images.
        size: the longer side that every image is scaled to, a multiple of ``stride``.
        stride: the sides of a frame divide by it.

    Returns:
        the order of the images (N,), from wide to high, and the frame (height, width) of each in that order (N, 2).
    """
    sizes = sizes.astype(np.int64)
    order = np.argsort(sizes[:, 0] / sizes[:, 1], kind="stable")
    longest = sizes[order].max(1, keepdims=True)
    fitted = -(-sizes[order] * size // (longest * stride)) * stride  # whole numbers, so that no rounding adds a stride
    starts = np.arange(0, len(order), batch_size)
    lengths = np.diff(starts, append=len(order))
    return order, np.repeat(np.maximum.reduceat(fitted, starts), lengths, axis=0)
