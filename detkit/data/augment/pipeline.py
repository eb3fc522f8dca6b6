"""The training view of a data set: mosaic, affine, copy-paste, mixup and the transforms of ``configs/augment``.

``Augmentation`` makes samples of images, wherever these come from; ``AugmentedDataset`` takes them from a set whose
images have numbers.
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

OFF = {"p": 0.0}  # where a configuration of one's own does not mention something
ATTEMPTS = 8  # to draw a partner, before the image is its own
WINDOW = 16  # positions of a window of the epoch's order at least,
MAX_WINDOW = 32  # and at most


class Augmentation:
    """Makes a training sample of an image and of partners drawn from a pool.

    Args:
        size: side of a sample in pixels.
        augment: ``mosaic`` {p, close_epochs}, ``affine`` {scale, translate, degrees, shear}, ``copy_paste`` {p,
            max_objects, max_side}, ``mixup`` {p, alpha}, ``transforms`` {name: arguments}.
        epochs: of the run; mosaic, copy-paste and mixup stay off in the last ``close_epochs``.
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
        """Return ``sample`` as the network sees it in ``epoch``: (size, size, 3), pixels of its own.

        Args:
            draw: returns a partner, as it was decoded, at random.
            rng: what everything here is drawn from.
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
        """Return the image alone in its frame, or in a mosaic with three partners."""
        samples = [sample, draw(), draw(), draw()] if mosaic else [sample]
        return mosaic_affine(samples, self.size, rng, self.affine)


def _happens(p: float, rng: np.random.Generator) -> bool:
    """Draw whether something of probability ``p`` happens; nothing is drawn where ``p`` is 0."""
    return p > 0 and rng.random() < p


class AugmentedDataset(Dataset):
    """Samples of ``size`` x ``size`` pixels, a function of the seed and the key alone.

    Args:
        dataset: the images, and perhaps their tiles.
        size, augment, epochs: see Augmentation.
        seed: of the run.
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
        """Return item ``key[1]`` as the network sees it in epoch ``key[0]``."""
        epoch, index, repeat, partners = SampleKey(*key)
        pool = range(len(self)) if partners is None else partners
        rng = np.random.default_rng((self.seed, epoch, index, repeat))

        def draw() -> Sample:
            for _ in range(ATTEMPTS):  # a partner that cannot be read is named when its own turn comes
                with suppress(UnreadableImage):
                    return self.dataset[epoch, pool[rng.integers(len(pool))]]
            return self.dataset[epoch, index]

        return self.augmentation(self.dataset[epoch, index], draw, rng, epoch)


def mosaic_window(partners: str, dataset: DetectionDataset | TiledDataset, batch_size: int) -> int:
    """Return how many positions of an epoch's order share their partners; 0 where these come from the whole set.

    Decoding four images a sample would take longer than all the rest. From a window of the order each image is
    decoded once, as whoever makes its batch still remembers it; so it is whole batches long, or whole in a batch.

    Args:
        partners: ``augment.mosaic.partners``: ``set``, ``window``, or ``auto``: ``set`` where the images are in memory.
    """
    if partners == "set" or (partners == "auto" and dataset.in_memory):
        return 0
    sizes = range(WINDOW, MAX_WINDOW + 1)
    return next((n for n in sizes if n % batch_size == 0 or batch_size % n == 0), WINDOW)
