"""Torch datasets over Annotations: raw images, and images letterboxed for evaluation.

A key is ``(epoch, index)``: what a sample looks like depends on nothing else but the seed.
"""

from pathlib import Path

import numpy as np
from torch.utils.data import Dataset

from detkit.data.annotations import Annotations
from detkit.data.cache import open_cache
from detkit.errors import DetkitError
from detkit.ops.image import Letterbox, read_shrunk
from detkit.structures import Origin, Sample


class DetectionDataset(Dataset):
    """Decoded images with the boxes one trains on (no crowds): as they are on disk, or of a training's size.

    Args:
        longest: shrink an image whose longer side has more pixels than this; none is enlarged.
        cache: ``data.cache`` (null, ram or disk), of images of that size; needs ``longest``.

    Raises:
        DetkitError: the cache takes more than there is room for.
    """

    def __init__(self, annotations: Annotations, longest: int | None = None, cache: str | None = None) -> None:
        self.annotations = annotations
        self.has_crowds = bool(annotations.crowd.any())
        self.longest = longest
        self.cache = open_cache(cache, annotations, longest) if longest else None

    def __len__(self) -> int:
        return len(self.annotations)

    @property
    def in_memory(self) -> bool:
        """Whether any image is at hand without decoding, once each was decoded."""
        return self.cache is not None and self.cache.holds_all

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        """Return image ``key[1]``, its pixels to be read only.

        Raises:
            DetkitError: the image cannot be read, or has another size than its annotations say.
        """
        index = key[1]
        a = self.annotations
        path, size = a.paths[index], (int(a.sizes[index, 0]), int(a.sizes[index, 1]))
        rows = slice(a.offsets[index], a.offsets[index + 1])
        boxes, labels = a.boxes[rows].astype(np.float32), a.labels[rows]
        if self.has_crowds:
            keep = ~a.crowd[rows]
            boxes, labels = boxes[keep], labels[keep]
        if self.cache is None:
            image = self._decode(path, size)
        else:
            image = self.cache.fetch(index, lambda: self._decode(path, size))
        if image.shape[:2] != size:
            boxes *= np.float32((image.shape[1] / size[1], image.shape[0] / size[0]) * 2)
        return Sample(image, boxes, labels, Origin(index, path, size))

    def _decode(self, path: Path, size: tuple[int, int]) -> np.ndarray:
        """Return the file's picture, whose (height, width) is ``size`` by its label."""
        image, found = read_shrunk(path, size, self.longest or max(size))
        if found != size:
            raise DetkitError(
                f"image {path} is {found[1]}x{found[0]} pixels once turned upright, {self.annotations.source} says "
                f"{size[1]}x{size[0]}: its boxes would be misplaced; correct the one or the other"
            )
        return image


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
