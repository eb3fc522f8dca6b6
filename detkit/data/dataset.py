"""Torch datasets over Annotations: raw images, and images letterboxed for evaluation.

A key is ``(epoch, index)``: what a sample looks like depends on nothing else but the seed.
"""

import numpy as np
from torch.utils.data import Dataset

from detkit.data.annotations import Annotations
from detkit.errors import DetkitError
from detkit.ops.image import Letterbox, decode_image, read_bytes
from detkit.structures import Origin, Sample


class DetectionDataset(Dataset):
    """Decoded images with the boxes one trains on (no crowds)."""

    def __init__(self, annotations: Annotations) -> None:
        self.annotations = annotations

    def __len__(self) -> int:
        return len(self.annotations)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return image ``key[1]`` as it is on disk.

        Raises:
            DetkitError: the image cannot be read, or has another size than its annotations say.
        """
        return self.decode(key[1], read_bytes(self.annotations.paths[key[1]]))

    def decode(self, index: int, data: np.ndarray) -> Sample:
        """Return image ``index`` made of its bytes (K,) uint8, for who has read them already; raises the same."""
        a = self.annotations
        rows = a.rows(index)
        keep = ~a.crowd[rows]
        image = decode_image(data, a.paths[index])
        stated = tuple(int(n) for n in a.sizes[index])
        if image.shape[:2] != stated:
            raise DetkitError(
                f"image {a.paths[index]} is now {image.shape[1]}x{image.shape[0]} pixels; when its labels were read "
                f"it was {stated[1]}x{stated[0]}, so its boxes would be misplaced"
            )
        boxes, labels = a.boxes[rows][keep].astype(np.float32), a.labels[rows][keep].astype(np.int64)
        return Sample(image, boxes, labels, Origin(index, a.paths[index], image.shape[:2]))


class LetterboxDataset(Dataset):
    """Images fitted into a square of ``size`` pixels, aspect kept; the sample remembers how."""

    def __init__(self, dataset: DetectionDataset, size: int) -> None:
        self.dataset = dataset
        self.size = size

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return image ``key[1]`` letterboxed, its boxes along with it."""
        sample = self.dataset[key]
        box = Letterbox.fit(sample.origin.size, (self.size, self.size))
        sample.image = box.apply(sample.image)
        sample.origin.scale, sample.origin.offset = box.scale, box.offset
        sample.boxes = sample.boxes * np.float32((*box.scale, *box.scale)) + np.float32((*box.offset, *box.offset))
        return sample
