"""Torch datasets over Annotations: raw images, and images letterboxed for evaluation.

A key is ``(epoch, index)`` or a ``SampleKey``: what a sample looks like depends on nothing else but the seed.
"""

from itertools import pairwise

import numpy as np
from torch.utils.data import Dataset

from detkit.data.annotations import Annotations
from detkit.data.cache import open_cache
from detkit.errors import UnreadableImage
from detkit.ops.image import Letterbox, decode_resized, read_bytes
from detkit.structures import ImageMeta, Sample, SampleKey


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

    def labels_by_item(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the image of each box that one trains on, and its label, (T,) each."""
        a = self.annotations
        images = np.repeat(np.arange(len(a)), np.diff(a.offsets))
        return images[~a.crowd], a.labels[~a.crowd]

    @property
    def in_memory(self) -> bool:
        """Whether any image is at hand without decoding, once each was decoded."""
        return self.cache is not None and self.cache.holds_all

    def __getitem__(self, key: SampleKey | tuple[int, int]) -> Sample:
        """Return image ``key[1]``, its pixels to be read only.

        Raises:
            UnreadableImage: it cannot be read, or has another size than its annotations say.
        """
        index = key[1]

        def load() -> np.ndarray:
            return self._pixels(index, read_bytes(self.annotations.paths[index]))

        return self._sample(index, load() if self.cache is None else self.cache.fetch(index, load))

    def decode(self, index: int, data: np.ndarray) -> Sample:
        """Return image ``index`` made of its bytes (K,) uint8, for who has read them already; raises the same."""
        return self._sample(index, self._pixels(index, data))

    def _sample(self, index: int, image: np.ndarray) -> Sample:
        """Return an image with its boxes in its own pixels."""
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
        """Return the picture of a file's bytes, of a training's size."""
        path, size = self.annotations.paths[index], tuple(self.annotations.sizes[index].tolist())
        image, found = decode_resized(data, path, size, self.longest or max(size))
        if found != size:
            raise UnreadableImage(
                f"image {path} is now {found[1]}x{found[0]} pixels; when its labels were read it was "
                f"{size[1]}x{size[0]}, so its boxes would be misplaced"
            )
        return image


class LetterboxDataset(Dataset):
    """Images fitted into a frame with a longer side of ``size`` pixels, aspect kept; the sample remembers how.

    The frame is a square, the order that of the set. In rectangular validation (``rect``) the frame is the smallest
    that holds the image (``rect_frames``), and images of one frame come one after the other.
    """

    def __init__(self, dataset: DetectionDataset, size: int, rect: bool = False) -> None:
        self.dataset = dataset
        self.order = np.arange(len(dataset))
        self.frames = np.full((len(dataset), 2), size)
        if rect:
            frames = rect_frames(dataset.annotations.sizes, size)
            self.order = np.lexsort((-frames[:, 1], frames[:, 0]))  # from wide to high; of one frame, as in the set
            self.frames = frames[self.order]

    def batch_starts(self, batch_size: int) -> list[int]:
        """Return the items with which batches of ``batch_size`` begin; one ends early where the next frame differs."""
        differs = (self.frames[1:] != self.frames[:-1]).any(1)
        firsts = [0, *(np.flatnonzero(differs) + 1).tolist(), len(self)]
        return [start for first, last in pairwise(firsts) for start in range(first, last, batch_size)]

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey | tuple[int, int]) -> Sample:
        """Return item ``key[1]`` letterboxed, its boxes along with it."""
        epoch, item = key[:2]
        sample = self.dataset[epoch, int(self.order[item])]
        height, width = self.frames[item].tolist()
        box = Letterbox.fit(sample.meta.size, (height, width))
        sample.image = box.apply(sample.image)
        sample.meta.scale, sample.meta.offset = box.scale, box.offset
        sample.boxes = sample.boxes * np.array(box.scale * 2, np.float32) + np.array(box.offset * 2, np.float32)
        return sample


def rect_frames(sizes: np.ndarray, size: int, stride: int = 32) -> np.ndarray:
    """Return the smallest frame (height, width) that holds each image, (N, 2): it depends on nothing but the image.

    Args:
        sizes: (N, 2) height and width of the images.
        size: the longer side that every image is scaled to, a multiple of ``stride``.
        stride: the sides of a frame divide by it.
    """
    sizes = sizes.astype(np.int64)
    longest = sizes.max(1, keepdims=True)
    return -(-sizes * size // (longest * stride)) * stride  # whole numbers, so that no rounding adds a stride
