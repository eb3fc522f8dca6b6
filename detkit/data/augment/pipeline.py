"""The augmentation pipeline: mosaic, affine, copy-paste, mixup and the transforms of ``configs/augment``.

``Augmentation`` works on images from any source; ``AugmentedDataset`` applies it to a data set with random access.
"""

from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from detkit.data.augment.copy_paste import paste_objects
from detkit.data.augment.mixup import mixup
from detkit.data.augment.mosaic import Affine, mosaic_affine
from detkit.data.augment.transforms import build_transform
from detkit.data.dataset import DetectionDataset
from detkit.data.tiles import TiledDataset
from detkit.errors import UnreadableImage
from detkit.structures import Sample, SampleKey

OFF = {"p": 0.0}  # for custom configurations without the key
ATTEMPTS = 8  # to draw a readable partner, before the image itself is used
WINDOW = 16  # minimum size of a mosaic window,
MAX_WINDOW = 32  # and its maximum


class Augmentation:
    """Makes a training sample from an image and partners drawn from a pool.

    Args:
        size: side of a sample in pixels.
        augment: ``mosaic`` {p, close_epochs}, ``affine`` {scale, translate, degrees, shear}, ``copy_paste`` {p,
            max_objects, max_side}, ``mixup`` {p, alpha}, ``transforms`` {name: arguments}.
        epochs: of the run; mosaic, copy-paste and mixup are off in the last ``close_epochs``.
    """

    def __init__(self, size: int, augment: Mapping[str, Any], epochs: int) -> None:
        self.size = size
        self.mosaic_p = augment["mosaic"]["p"]
        self.mosaic_epochs = epochs - augment["mosaic"]["close_epochs"]
        self.affine = Affine(**augment["affine"])
        self.copy_paste = augment.get("copy_paste", OFF)
        self.mixup = augment.get("mixup", OFF)
        self.transforms = [build_transform(name, args, size) for name, args in augment["transforms"].items()]

    def __call__(self, sample: Sample, draw: Callable[[], Sample], rng: np.random.Generator, epoch: int) -> Sample:
        """Augment a sample.

        Args:
            sample: a decoded image; not modified.
            draw: returns a random partner, a decoded image.
            rng: random generator.
            epoch: from 0.

        Returns:
            a new sample with an image of (size, size, 3).
        """
        mixes = epoch < self.mosaic_epochs
        mosaic = rng.random() < self.mosaic_p and mixes
        result = self._place(sample, draw, rng, mosaic)
        if mixes and _happens(self.copy_paste["p"], rng):
            donor = self._place(draw(), draw, rng, mosaic=False)
            limits = {name: self.copy_paste[name] for name in ("max_objects", "max_side")}
            result = paste_objects(result, donor, rng, **limits)
        if mixes and _happens(self.mixup["p"], rng):
            other = self._place(draw(), draw, rng, mosaic=False)
            result = mixup(result, other, rng, self.mixup["alpha"])
        for transform in self.transforms:
            result = transform(result, rng)
        return result

    def _place(self, sample: Sample, draw: Callable[[], Sample], rng: np.random.Generator, mosaic: bool) -> Sample:
        """Return the affinely transformed image, alone or in a mosaic with three partners."""
        samples = [sample, draw(), draw(), draw()] if mosaic else [sample]
        return mosaic_affine(samples, self.size, rng, self.affine)


def _happens(p: float, rng: np.random.Generator) -> bool:
    """Draw from a Bernoulli distribution; no random number is used if ``p`` is 0."""
    return p > 0 and rng.random() < p


class AugmentedDataset(Dataset):
    """Augmented samples of ``size`` x ``size`` pixels, which depend only on the seed and the key.

    Args:
        dataset: the images, and their tiles if any.
        size: see Augmentation.
        augment: see Augmentation.
        seed: of the run.
        epochs: see Augmentation.
    """

    def __init__(
        self, dataset: DetectionDataset | TiledDataset, size: int, augment: Mapping[str, Any], seed: int, epochs: int
    ) -> None:
        self.dataset = dataset
        self.seed = seed
        self.augmentation = Augmentation(size, augment, epochs)

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, key: SampleKey | tuple[int, int]) -> Sample:
        """Return item ``key[1]``, augmented for epoch ``key[0]``."""
        epoch, index, repeat, partners = SampleKey(*key)
        pool = range(len(self)) if partners is None else partners
        rng = np.random.default_rng((self.seed, epoch, index, repeat))

        def draw() -> Sample:
            for _ in range(ATTEMPTS):  # an unreadable partner is reported as an image of its own
                with suppress(UnreadableImage):
                    return self.dataset[epoch, pool[rng.integers(len(pool))]]
            return self.dataset[epoch, index]

        return self.augmentation(self.dataset[epoch, index], draw, rng, epoch)


def mosaic_window(partners: str, dataset: DetectionDataset | TiledDataset, batch_size: int) -> int:
    """Return the number of consecutive positions that draw partners from each other; 0 for the whole data set.

    Decoding four images per sample would dominate the loading time. With a window, each image is decoded once, as the
    worker that makes its batch caches it. A window therefore holds whole batches, or a batch whole windows.

    Args:
        partners: ``augment.mosaic.partners``: ``set``, ``window``, or ``auto`` (``set`` if the images are in memory).
        dataset: the images.
        batch_size: total over all ranks.
    """
    if partners == "set" or (partners == "auto" and dataset.in_memory):
        return 0
    sizes = range(WINDOW, MAX_WINDOW + 1)
    return next((n for n in sizes if n % batch_size == 0 or batch_size % n == 0), WINDOW)
