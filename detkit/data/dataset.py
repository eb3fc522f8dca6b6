"""Torch datasets over Annotations: raw images, and images letterboxed for evaluation.

A key is ``(epoch, index)`` or a ``SampleKey``. A sample depends only on its key and the seed.
"""

from itertools import pairwise

import numpy as np
from torch.utils.data import Dataset

from detkit.data.annotations import Annotations
from detkit.data.cache import open_cache
from detkit.errors import UnreadableImage
from detkit.ops.geometry import rect_frames
from detkit.ops.image import Letterbox, decode_resized, read_bytes
from detkit.structures import ImageMeta, Sample, SampleKey


class DetectionDataset(Dataset):
    """Decoded images with their boxes (without crowds), at full or at training size.

    Args:
        annotations: the data set.
        longest: limit of the longer side in pixels; larger images are shrunk, none is enlarged.
        cache: ``data.cache`` (null, ram or disk), for images of that size; requires ``longest``.

    Raises:
        DetkitError: not enough free memory or disk space for the cache.
    """

    def __init__(self, annotations: Annotations, longest: int | None = None, cache: str | None = None) -> None:
        self.annotations = annotations
        self.has_crowds = bool(annotations.crowd.any())
        self.longest = longest
        self.cache = open_cache(cache, annotations, longest) if longest else None

    def __len__(self) -> int:
        return len(self.annotations)

    def labels_by_item(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the image index and the label of each box without crowds, (T,) each."""
        a = self.annotations
        images = np.repeat(np.arange(len(a)), np.diff(a.offsets))
        return images[~a.crowd], a.labels[~a.crowd]

    @property
    def in_memory(self) -> bool:
        """Whether no image is decoded more than once."""
        return self.cache is not None and self.cache.holds_all

    def __getitem__(self, key: SampleKey | tuple[int, int]) -> Sample:
        """Return image ``key[1]``; its pixels may be read-only.

        Raises:
            UnreadableImage: the image cannot be read, or its size does not match the annotations.
        """
        index = key[1]

        def load() -> np.ndarray:
            return self._pixels(index, read_bytes(self.annotations.paths[index]))

        return self._sample(index, load() if self.cache is None else self.cache.fetch(index, load))

    def decode(self, index: int, data: np.ndarray) -> Sample:
        """Return image ``index``, decoded from the content of its file, (K,) uint8.

        Raises:
            UnreadableImage: the image cannot be decoded, or its size does not match the annotations.
        """
        return self._sample(index, self._pixels(index, data))

    def _sample(self, index: int, image: np.ndarray) -> Sample:
        """Return an image with its boxes scaled to its size."""
        a = self.annotations
        size = (int(a.sizes[index, 0]), int(a.sizes[index, 1]))
        rows = a.rows(index)
        boxes, labels = a.boxes[rows].astype(np.float32), a.labels[rows].astype(np.int64)
        if self.has_crowds:
            keep = ~a.crowd[rows]
            boxes, labels = boxes[keep], labels[keep]
        if image.shape[:2] != size:
            boxes *= np.array((image.shape[1] / size[1], image.shape[0] / size[0]) * 2, np.float32)
        return Sample(image, boxes, labels, ImageMeta(index, a.paths[index], size))

    def _pixels(self, index: int, data: np.ndarray) -> np.ndarray:
        """Decode the content of a file at training size."""
        path, size = self.annotations.paths[index], tuple(self.annotations.sizes[index].tolist())
        image, found = decode_resized(data, path, size, self.longest or max(size))
        if found != size:
            raise UnreadableImage(
                f"image {path} is now {found[1]}x{found[0]} pixels; when its labels were read it was "
                f"{size[1]}x{size[0]}, so its boxes would be misplaced"
            )
        return image


class LetterboxDataset(Dataset):
    """Images letterboxed into a frame with a longer side of ``size`` pixels; scale and offset are stored in ``meta``.

    The frame is a square, and images keep the order of the data set. With ``rect``, the frame is the smallest that
    holds the image (``rect_frames``), and images are sorted by frame.
    """

    def __init__(self, dataset: DetectionDataset, size: int, rect: bool = False) -> None:
        self.dataset = dataset
        self.order = np.arange(len(dataset))
        self.frames = np.full((len(dataset), 2), size)
        if rect:
            frames = rect_frames(dataset.annotations.sizes, size)
            self.order = np.lexsort((-frames[:, 1], frames[:, 0]))  # from wide to high; stable
            self.frames = frames[self.order]

    def batch_starts(self, batch_size: int) -> list[int]:
        """Return the first item of each batch; all images of a batch have the same frame."""
        differs = (self.frames[1:] != self.frames[:-1]).any(1)
        firsts = [0, *(np.flatnonzero(differs) + 1).tolist(), len(self)]
        return [start for first, last in pairwise(firsts) for start in range(first, last, batch_size)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey | tuple[int, int]) -> Sample:
        """Return item ``key[1]`` with its boxes, letterboxed."""
        epoch, item = key[:2]
        sample = self.dataset[epoch, int(self.order[item])]
        height, width = self.frames[item].tolist()
        box = Letterbox.fit(sample.meta.size, (height, width))
        sample.image = box.apply(sample.image)
        sample.meta.scale, sample.meta.offset = box.scale, box.offset
        sample.boxes = sample.boxes * np.array(box.scale * 2, np.float32) + np.array(box.offset * 2, np.float32)
        return sample
